"""Names of concepts, from CLIP embeddings of their crops and a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from concepts.bank import Bank, Concept, Naming, Word
from concepts.errors import InvalidInput
from offline.naming import scores, words
from offline.naming.scores import Background, Evidence
from offline.naming.settings import NamingSettings
from offline.naming.words import Candidates
from offline.progress import Reporter
from offline.vocabulary import Vocabulary

if TYPE_CHECKING:  # importing it takes seconds
    from concepts.clip import Clip

_CONCEPTS = 256
"""Concepts whose crops are looked up together."""


@dataclass(frozen=True)
class Names:
    """What was found to say of K concepts."""

    namings: list[Naming | None]
    """None for concepts without exemplars, and where the vocabulary has no word for them."""
    embeddings: Tensor
    """float32 ``[K, D]``: rows of norm 1 to compare texts with; zero for concepts without exemplars."""


@dataclass(frozen=True)
class _Looked:
    """The captions nearest to one concept's crops."""

    captions: list[str]
    """N of them, each once."""
    exemplars: Tensor
    """Cosines ``[n, N]``; −inf where a caption is not among a crop's nearest."""
    counterfactuals: Tensor
    """``[m, N]``."""

    @property
    def shown(self) -> list[str]:
        """Those that are near an exemplar: what is near counterfactuals alone cannot name the concept."""
        near = self.exemplars.isfinite().any(0).tolist()
        return [caption for caption, there in zip(self.captions, near, strict=True) if there]


def name_concepts(
    clip: Clip, vocabulary: Vocabulary, evidence: Sequence[Evidence], settings: NamingSettings, report: Reporter
) -> Names:
    """Name concepts.

    Parameters
    ----------
    clip, vocabulary
        A CLIP, and captions that it embedded.
    evidence
        Of each concept, in its space.
    settings
        How to name.
    report
        Hears of progress.

    Raises
    ------
    InvalidInput
        If no concept has an exemplar.
    """
    known = [concept for concept, own in enumerate(evidence) if len(own.exemplars)]
    if not known:
        raise InvalidInput("no concept has exemplars to name it by: train the bank with --exemplars")
    background = Background.of([evidence[concept] for concept in known])
    embeddings = torch.zeros(len(evidence), clip.width)
    namings: list[Naming | None] = [None] * len(evidence)
    texts = _Texts(clip)
    for first in range(0, len(known), _CONCEPTS):
        some = known[first : first + _CONCEPTS]
        looked = _look_up(vocabulary, [evidence[concept] for concept in some], settings)
        found = [words.candidates(own.shown) for own in looked]
        texts.add(text for candidates in found for kind in candidates for text in kind)
        for concept, own, candidates in zip(some, looked, found, strict=True):
            embeddings[concept] = functional.normalize(scores.direction(evidence[concept], background), dim=0).float()
            namings[concept] = _naming(texts, evidence[concept], background, own, candidates, settings)
        report("naming", first + len(some), len(known))
    return Names(namings, embeddings)


def labelled(bank: Bank, names: Names, clip: Clip, vocabulary: Vocabulary, record: dict[str, Any]) -> Bank:
    """Return a bank with names; what people named keeps their label.

    Parameters
    ----------
    bank
        With as many concepts and parts, together, as there are names.
    record
        What else is to be kept: ``settings`` that decided.
    """
    count = len(bank.concepts)
    named = replace(
        bank,
        concepts=_with_names(bank.concepts, names.namings[:count]),
        labelling={"clip": {"name": clip.name, "digest": clip.digest}, "vocabulary": vocabulary.record(), **record},
        embeddings=names.embeddings,
    )
    if bank.parts is None:
        return named
    parts = bank.parts
    return named.with_parts(
        parts.kind, parts.layer, parts.channels, _with_names(parts.concepts, names.namings[count:]), parts.tensors
    )


def _with_names(concepts: Sequence[Concept], namings: Sequence[Naming | None]) -> tuple[Concept, ...]:
    return tuple(
        replace(concept, naming=naming, label=_label(concept, naming))
        for concept, naming in zip(concepts, namings, strict=True)
    )


def _label(concept: Concept, naming: Naming | None) -> str:
    """Return what a concept is called once its naming is replaced: an earlier one's label does not outlive it."""
    if concept.named_by_person or (naming is None and concept.naming is None):
        return concept.label
    return "" if naming is None else naming.label


class _Texts:
    """Embeddings of words and phrases, each made once."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._rows: dict[str, int] = {}
        self._embeddings = torch.zeros(0, clip.width)

    def add(self, texts: Iterable[str]) -> None:
        """Embed those that are new."""
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        self._rows |= {text: len(self._rows) + place for place, text in enumerate(new)}
        self._embeddings = torch.cat([self._embeddings, self._clip.embed_texts(new)])

    def of(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings ``[W, D]``."""
        return self._embeddings[[self._rows[text] for text in texts]]


def _look_up(vocabulary: Vocabulary, evidence: Sequence[Evidence], settings: NamingSettings) -> list[_Looked]:
    """Find the captions nearest to the crops of some concepts, in one pass over the vocabulary."""
    crops = [part for own in evidence for part in (own.exemplars, own.counterfactuals)]
    nearest = vocabulary.nearest(torch.cat(crops), settings.captions)
    cosines, captions = (part.split([len(own) for own in crops]) for part in nearest)
    looked = []
    for place in range(0, len(crops), 2):
        indices = torch.unique(captions[place])
        if settings.scoring == "captions":
            indices = torch.unique(torch.cat([indices, captions[place + 1].flatten()]))
        columns = [_columns(indices, captions[part], cosines[part]) for part in (place, place + 1)]
        looked.append(_Looked(vocabulary.texts(indices.tolist()), *columns))
    return looked


def _columns(indices: Tensor, captions: Tensor, cosines: Tensor) -> Tensor:
    """Spread what each crop's nearest captions have over all of some, in ascending order: ``[n, k]`` to ``[n, N]``."""
    columns = torch.searchsorted(indices, captions)
    known = indices[columns.clamp_max(len(indices) - 1)] == captions
    spread = torch.full((len(captions), len(indices) + 1), -torch.inf)
    return spread.scatter(1, torch.where(known, columns, len(indices)), cosines)[:, :-1]


def _naming(
    texts: _Texts,
    evidence: Evidence,
    background: Background,
    looked: _Looked,
    candidates: Candidates,
    settings: NamingSettings,
) -> Naming | None:
    """Name one concept."""
    most = (settings.words, settings.phrases)
    ranked = [
        _ranked(kind, count, texts, evidence, background, looked, settings)
        for kind, count in zip(candidates, most, strict=True)
    ]
    best = ranked[0] or ranked[1]
    if not best:
        return None
    score = scores.separation(texts.of([best[0].text])[0], evidence, background)
    return Naming(
        label=best[0].text,
        score=score,
        # Nothing tells a concept from what accompanies it but counterfactuals.
        weak=score < settings.weak_below or not len(evidence.counterfactuals),
        words=tuple(ranked[0]),
        phrases=tuple(ranked[1]),
        counterfactuals=len(evidence.counterfactuals),
    )


def _ranked(
    kind: Sequence[str],
    count: int,
    texts: _Texts,
    evidence: Evidence,
    background: Background,
    looked: _Looked,
    settings: NamingSettings,
) -> list[Word]:
    """Return the best candidates of a kind; a score of −inf is none."""
    if not kind:
        return []
    if settings.scoring == "direct":
        values = scores.direct(texts.of(kind), evidence, background)
    else:
        holds = _holds(kind, looked.captions)
        values = scores.by_captions(holds, looked.exemplars, looked.counterfactuals)
    order = values.argsort(descending=True, stable=True)[:count].tolist()
    return [Word(kind[index], float(values[index])) for index in order if torch.isfinite(values[index])]


def _holds(kind: Sequence[str], captions: Sequence[str]) -> Tensor:
    """Return which captions hold which candidates, by lemma, bool ``[W, N]``."""
    lemmas = [" ".join(map(words.lemma, text.split())) for text in kind]
    runs = [[f" {' '.join(map(words.lemma, run))} " for run in words.runs(caption)] for caption in captions]
    return torch.tensor([[any(f" {key} " in run for run in own) for own in runs] for key in lemmas])
