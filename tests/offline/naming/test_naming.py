"""Naming from embeddings: candidates, ranks, and what a bank is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from concepts.bank import Naming
from concepts.clip import Clip
from concepts.errors import InvalidInput
from demo.world import World
from offline.naming import Evidence, Names, NamingSettings, labelled, name_concepts, naming
from offline.naming.scores import Background, direct, direction, separation
from offline.naming.words import candidates, lemma, runs
from offline.progress import silent
from offline.vocabulary import Texts, Vocabulary, build
from tests.concepts.test_bank import small_bank, with_parts


@pytest.fixture(scope="module")
def evidence(clip: Clip) -> list[Evidence]:
    """Crops of images; the third concept has no counterfactuals, the fourth nothing at all."""
    batch = World().sample(40, "heldout")
    crops = clip.embed_pictures([Image.fromarray(image[8:56, 8:56]) for image in batch.images])
    parts = crops.split([5, 4, 6, 3, 4, 0, 0, 0, 8, 10])
    return [Evidence(*parts[place : place + 2]) for place in range(0, 10, 2)]


def nearest(vocabulary: Vocabulary, crops: Tensor, k: int) -> list[dict[str, float]]:
    """Return the captions nearest to each crop with their cosines."""
    rows = np.load(vocabulary.path / "000000.embeddings.npy").astype(np.float64)
    texts = vocabulary.texts(range(len(vocabulary)))
    cosines = crops.double().numpy() @ rows.T
    return [{texts[i]: float(row[i]) for i in np.argsort(-row, kind="stable")[:k]} for row in cosines]


def settings(**changes: object) -> NamingSettings:
    return NamingSettings(**changes)


def found(names: Names) -> list[Naming]:
    return [each for each in names.namings if each is not None]


def test_names_are_the_best_words_of_the_nearest_captions(
    clip: Clip, vocabulary: Vocabulary, evidence: list[Evidence]
) -> None:
    names = name_concepts(clip, vocabulary, evidence, settings(captions=3, words=4, phrases=3), silent)
    background = Background.of(evidence)
    assert [each is None for each in names.namings] == [False, False, False, True, False]
    for own, each, row in zip(evidence, names.namings, names.embeddings, strict=True):
        if each is None:
            assert not bool(row.any())
            continue
        torch.testing.assert_close(row, functional.normalize(direction(own, background), dim=0).float())
        near = [caption for crop in nearest(vocabulary, own.exemplars, 3) for caption in crop]
        for kind, said in zip(candidates(sorted(set(near))), (each.words, each.phrases), strict=True):
            scores = direct(clip.embed_texts(kind), own, background).tolist()
            ranked = sorted(zip(scores, kind, strict=True), key=lambda pair: -pair[0])[: 4 if said is each.words else 3]
            assert [word.text for word in said] == [text for _, text in ranked]
            assert [word.score for word in said] == pytest.approx([score for score, _ in ranked], abs=1e-4)
        assert each.label == each.words[0].text
        assert each.score == pytest.approx(separation(clip.embed_texts([each.label])[0], own, background))
        assert each.counterfactuals == len(own.counterfactuals)


def test_published_scores_are_over_the_nearest_captions_of_each_crop(
    clip: Clip, vocabulary: Vocabulary, evidence: list[Evidence]
) -> None:
    names = name_concepts(clip, vocabulary, evidence, settings(scoring="captions", words=50, phrases=50), silent)

    def best(crops: Tensor, text: str) -> float:
        keys = " ".join(map(lemma, text.split()))
        total = []
        for crop in nearest(vocabulary, crops, 5):
            weights = {caption: math.exp(100 * cosine) for caption, cosine in crop.items()}
            holding = [
                weight
                for caption, weight in weights.items()
                if any(f" {keys} " in f" {' '.join(map(lemma, run))} " for run in runs(caption))
            ]
            total.append(max(holding, default=0.0) / math.fsum(weights.values()))
        return math.fsum(total) / len(total)

    dropped = 0
    for own, each in zip(evidence, names.namings, strict=True):
        near = sorted({caption for crop in nearest(vocabulary, own.exemplars, 5) for caption in crop})
        said = {} if each is None else {word.text: word.score for word in (*each.words, *each.phrases)}
        for text in [text for kind in candidates(near) for text in kind]:
            if len(own.counterfactuals) and best(own.counterfactuals, text) >= 0.1:
                dropped += 1
                assert text not in said
            else:
                assert said.pop(text) == pytest.approx(best(own.exemplars, text), rel=1e-4)
        assert said == {}  # what is near counterfactuals alone is no word for the concept
    assert dropped


def test_how_many_are_named_at_a_time_does_not_matter(
    clip: Clip, vocabulary: Vocabulary, evidence: list[Evidence], monkeypatch: pytest.MonkeyPatch
) -> None:
    for scoring in ("direct", "captions"):
        whole = name_concepts(clip, vocabulary, evidence, settings(scoring=scoring), silent)
        with monkeypatch.context() as patch:
            patch.setattr(naming, "_CONCEPTS", 1)
            alone = name_concepts(clip, vocabulary, evidence, settings(scoring=scoring), silent)
        torch.testing.assert_close(alone.embeddings, whole.embeddings)
        for one, other in zip(found(alone), found(whole), strict=True):
            assert (one.label, one.weak, one.score) == (other.label, other.weak, pytest.approx(other.score))
            assert [word.text for word in one.words] == [word.text for word in other.words]
            assert [w.score for w in one.phrases] == pytest.approx([w.score for w in other.phrases], abs=1e-4)


def test_labels_are_weak_below_a_score_and_without_counterfactuals(
    clip: Clip, vocabulary: Vocabulary, evidence: list[Evidence]
) -> None:
    for bar in (0.0, 0.8, 1.0):
        names = found(name_concepts(clip, vocabulary, evidence, settings(weak_below=bar), silent))
        assert [each.weak for each in names] == [each.score < bar or not each.counterfactuals for each in names]
    assert [each.counterfactuals for each in names] == [4, 3, 0, 10]
    assert names[2].weak
    bare = [Evidence(own.exemplars, own.counterfactuals[:0]) for own in evidence]
    assert all(each.weak for each in found(name_concepts(clip, vocabulary, bare, settings(weak_below=0), silent)))


def test_phrases_can_be_left_out(clip: Clip, vocabulary: Vocabulary, evidence: list[Evidence]) -> None:
    names = found(name_concepts(clip, vocabulary, evidence, settings(words=1, phrases=0), silent))
    assert [(len(each.words), each.phrases) for each in names] == [(1, ())] * 4


def test_without_exemplars_there_is_nothing_to_name_by(clip: Clip, vocabulary: Vocabulary) -> None:
    empty = torch.zeros(0, clip.width)
    for evidence in ([], [Evidence(empty, empty)], [Evidence(empty, clip.embed_texts(["a disc"]))]):
        with pytest.raises(InvalidInput, match="--exemplars"):
            name_concepts(clip, vocabulary, evidence, settings(), silent)


def speechless(folder: Path, clip: Clip) -> Vocabulary:
    """A vocabulary whose captions say nothing."""
    (folder / "captions.txt").write_text("this is it\nnone of these\n")
    return build(Texts(folder / "captions.txt", clip), clip, folder / "vocabulary")


def test_captions_that_say_nothing_name_nothing(clip: Clip, evidence: list[Evidence], tmp_path: Path) -> None:
    names = name_concepts(clip, speechless(tmp_path, clip), evidence, settings(), silent)
    assert names.namings == [None] * 5
    assert [bool(row.any()) for row in names.embeddings] == [True, True, True, False, True]


def named(label: str) -> Naming:
    return Naming(label, 0.5, weak=True)


def test_what_a_person_named_keeps_its_label(clip: Clip, vocabulary: Vocabulary) -> None:
    bank = with_parts(small_bank())
    first, second, third, fourth = bank.concepts
    before = (
        replace(first, label="mine", named_by_person=True, naming=named("old")),
        replace(second, label="old", naming=named("old")),
        replace(third, label="old", naming=named("old")),
        replace(fourth, label="given in training"),
    )
    parts = bank.parts
    assert parts is not None
    whole = replace(bank, concepts=before).with_parts(
        parts.kind,
        parts.layer,
        parts.channels,
        (replace(parts.concepts[0], label="fur", named_by_person=True), *parts.concepts[1:]),
        parts.tensors,
    )
    words: Sequence[str | None] = ("new", "new", None, None, "part", "part", None)
    names = Names([None if word is None else named(word) for word in words], torch.rand(7, clip.width))
    after = labelled(whole, names, clip, vocabulary, {"settings": {"words": 3}})
    assert [concept.label for concept in after.all_concepts] == [
        "mine", "new", "", "given in training", "fur", "part", "",
    ]  # fmt: skip
    assert [concept.naming for concept in after.all_concepts] == names.namings
    assert [concept.named_by_person for concept in after.all_concepts] == [
        True,
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    assert [concept.weak for concept in after.all_concepts] == [False, True, False, False, False, True, False]
    assert after.embeddings is names.embeddings
    assert after.labelling == {
        "clip": {"name": clip.name, "digest": clip.digest},
        "vocabulary": {"captions": 600, "digest": vocabulary.digest},
        "settings": {"words": 3},
    }
    assert after.tensors is whole.tensors
    assert after.parts is not None
    assert [part.id for part in after.parts.concepts] == [0, 1, 2]
