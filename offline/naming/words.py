"""Words and phrases of captions, without a tagger: what is left between the words that only hold sentences together.

Articles, prepositions, pronouns, conjunctions, auxiliaries and the like are closed classes: they can be listed. What
remains are nouns, verbs and adjectives, with a few adverbs and numbers; runs of them are phrases (Rose et al., 2010,
RAKE). Words of one lemma are one candidate, shown as the captions have it most often.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import simplemma

LONGEST_PHRASE = 3
"""Words of the longest phrases."""

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|[^\s\w]+|[\d_]+")
_SHORTEST = 2

CLOSED = frozenset(
    """
    a an the this that these those my your his her its our their some any no none each every either neither both all
    another other such same own few fewer many more most much less least several enough half
    i you he she it we they me him us them mine yours hers ours theirs myself yourself himself herself itself ourselves
    themselves who whom whose which what whatever whoever someone somebody something anyone anybody anything everyone
    everybody everything nobody nothing one ones
    and or but nor so yet if then than because although though while whereas unless until since when where why how
    whether as
    about above across after against along among amid around at before behind below beneath beside besides between
    beyond by despite down during except for from in inside into like near next of off on onto opposite out outside over
    past per round through throughout to toward towards under underneath up upon versus via with within without
    am is are was were be been being do does did doing done have has had having will would shall should can could may
    might must ought ain't isn't aren't wasn't weren't don't doesn't didn't hasn't haven't hadn't won't wouldn't can't
    cannot couldn't shouldn't
    not n't never always often sometimes also too very quite rather just only even still already again once here there
    now away back almost perhaps maybe well ever together etc
    image images photo photos photograph picture pictures
    """.split()  # noqa: SIM905 - a list of quoted words cannot be read
)
"""Words that say nothing of what is seen."""


class Candidates(NamedTuple):
    """What may name a concept, as it is written most often, in alphabetical order."""

    words: list[str]
    phrases: list[str]


def candidates(captions: Iterable[str]) -> Candidates:
    """Return the words and phrases of some captions, each of its lemma once."""
    words: dict[str, Counter[str]] = {}
    phrases: dict[str, Counter[str]] = {}
    for caption in captions:
        for run in runs(caption):
            lemmas = [lemma(word) for word in run]
            for first, key in enumerate(lemmas):
                words.setdefault(key, Counter())[run[first]] += 1
                for end in range(first + 2, min(first + LONGEST_PHRASE, len(run)) + 1):
                    phrases.setdefault(" ".join(lemmas[first:end]), Counter())[" ".join(run[first:end])] += 1
    return Candidates(_forms(words), _forms(phrases))


def runs(caption: str) -> Iterator[list[str]]:
    """Yield the runs of words that say something, in lower case; closed classes, numbers and punctuation part them."""
    run: list[str] = []
    text = unicodedata.normalize("NFC", caption.lower()).replace("’", "'")
    for token in _WORD.findall(text):
        if token[0].isalpha() and len(token) >= _SHORTEST and not _is_closed(token):
            run.append(token)
        elif run:
            yield run
            run = []
    if run:
        yield run


def lemma(word: str) -> str:
    """Return the dictionary form of an English word; the word itself where it is not known."""
    return simplemma.lemmatize(word, lang="en").lower()


def _is_closed(token: str) -> bool:
    """Whether a word says nothing, be it drawn together with another: it's, they're."""
    return token in CLOSED or token.partition("'")[0] in CLOSED


def _forms(found: dict[str, Counter[str]]) -> list[str]:
    """Return the most frequent form of each lemma; of several the first in the alphabet."""
    return sorted(min(forms, key=lambda form: (-forms[form], form)) for forms in found.values())
