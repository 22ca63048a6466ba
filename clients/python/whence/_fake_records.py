"""Records that hang together, for the fake service: explanations, interventions, contrasts, concepts, searches."""

from __future__ import annotations

from base64 import b64decode
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import whence
from whence._contrast import Contrast, PlaneReport, ShiftPoint
from whence._explanation import (
    Box,
    ClassScore,
    ConceptMap,
    ConceptScore,
    Explanation,
    FaithfulnessReport,
    InputMapReport,
    MapKind,
    PartsReport,
    Timings,
)
from whence._handshake import CONTRACT_REVISION
from whence._intervention import Intervention
from whence._inventory import Concept, Exemplar, Naming, Word
from whence._search import FoundConcept, SearchResults, UnsearchedBank
from whence._server_info import Limits, ServerInfo

_LABELS = ("pointed ear", "striped fur", "", "whiskers")
_WORDS = (("pointed ear", "ear", "tip"), ("stripe", "fur", "tiger"), (), ("hair", "line", "wire"))
"""Of the same concepts."""
_WEAK = "whiskers"
"""The one label that cannot be trusted much."""
_CROP = b64decode("UklGRiwAAABXRUJQVlA4TB8AAAAvD8ADAA9wFMHzMJ6CbP4DD2LBJH/pvSFE9L8IBXwDAA==")
"""A WebP file: stripes."""


def make_explanation(
    *,
    concept_count: int = 5,
    part_count: int = 0,
    grid: tuple[int, int] = (7, 7),
    hot_cell: tuple[int, int] = (3, 3),
    view: Box | None = None,
    **changes: Any,
) -> Explanation:
    """An explanation that hangs together: maps sum to activations and contributions, and all adds up to the logit.

    Parameters
    ----------
    concept_count
        How many concepts to list.
    part_count
        How many parts each of them has, with maps twice as fine.
    grid
        Height and width of the maps; those on the input are four times as fine.
    hot_cell
        Row and column of the first concept's peak; the others' lie elsewhere.
    view
        The part of the image that the model saw, in pixels. Default: the first 224 × 224.
    **changes
        Fields of `Explanation` to set to something else.
    """
    concepts = tuple(_make_concept(index, grid, hot_cell) for index in range(concept_count))
    concepts = tuple(replace(concept, parts=_make_parts(concept, part_count)) for concept in concepts)
    listed = sum(concept.contribution for concept in concepts)
    target = ClassScore(index=281, name="tabby", logit=listed + 1.5, probability=0.75)
    explanation = Explanation(
        request_id="",
        model="fake",
        model_digest="a" * 64,
        bank="fake/layer/bank",
        bank_digest="b" * 64,
        predictions=(target, ClassScore(index=282, name="tiger cat", logit=target.logit - 1.5, probability=0.1875)),
        target=target,
        concepts=concepts,
        unexplained=0.5,
        contributions_total=listed + 0.75,
        faithfulness=FaithfulnessReport(
            explained_logit=target.logit,
            completeness_residual=0.0,
            constant=0.25,
            exactness="exact",
            exactness_reason="the head is affine after average pooling",
            relative_error=0.25,
            kl=0.0625,
            top1_agrees=True,
            input_maps=InputMapReport("exact", "the model up to the layer is linear for each input", 0.0),
        ),
        timings=Timings(
            decode_ms=1,
            queue_ms=0,
            trunk_ms=5,
            head_ms=2,
            codes_ms=3,
            explain_ms=1,
            encode_ms=1,
            total_ms=13,
            batch_size=1,
        ),
        view=view or Box(0, 0, 224, 224),
        runtime="fake cpu float32",
        estimator="gradient",
        substitute=False,
        parts=_make_parts_report(target.logit) if part_count else None,
    )
    return replace(explanation, **changes)


def make_intervention(**changes: Any) -> Intervention:
    """An intervention after which the model of `make_explanation` predicts another class.

    Parameters
    ----------
    **changes
        Fields of `Intervention` to set to something else.
    """
    explanation = make_explanation()
    first, second = explanation.predictions
    intervention = Intervention(
        request_id="",
        model=explanation.model,
        model_digest=explanation.model_digest,
        bank=explanation.bank,
        bank_digest=explanation.bank_digest,
        scales={0: 0.0},
        target=first,
        before=(first, second),
        after=(replace(second, probability=0.625), replace(first, logit=second.logit - 1.0, probability=0.25)),
        timings=explanation.timings,
        runtime=explanation.runtime,
    )
    return replace(intervention, **changes)


def make_contrast(
    *,
    prototype_count: int = 3,
    grid: tuple[int, int] = (7, 7),
    hot_cell: tuple[int, int] = (2, 2),
    view: Box | None = None,
    **changes: Any,
) -> Contrast:
    """A contrast that hangs together: the map sums to the contribution, the curve begins at the prediction.

    Parameters
    ----------
    prototype_count
        How many contrastive prototypes to list; together they are what lies on the target's side.
    grid
        Height and width of the maps.
    hot_cell
        Row and column that speak most for the target; what speaks most for the other class lies in the opposite corner.
    view
        The part of the image that the model saw, in pixels. Default: the first 224 × 224.
    **changes
        Fields of `Contrast` to set to something else.
    """
    opposite = grid[0] - 1 - hot_cell[0], grid[1] - 1 - hot_cell[1]
    distances = _half(_blob(grid, hot_cell) - 0.5 * _blob(grid, opposite))
    evidence = _half(distances * 0.5)
    contribution = float(evidence.sum())
    difference = 0.25 + contribution / 0.625
    shifts = (0.0, *(2.0**k for k in range(-3, 4)))
    curve = tuple(ShiftPoint(shift, *_two_of_three(difference - 4 * shift)) for shift in shifts)
    target = ClassScore(281, "tabby", difference + 1.5, curve[0].target_probability)
    explanation = make_explanation()
    contrast = Contrast(
        request_id="",
        model=explanation.model,
        model_digest=explanation.model_digest,
        bank=explanation.bank,
        bank_digest=explanation.bank_digest,
        target=target,
        other=ClassScore(282, "tiger cat", 1.5, curve[0].other_probability),
        contribution=contribution,
        contribution_for_target=float(evidence.clip(min=0).sum()),
        contribution_for_other=float(evidence.clip(max=0).sum()),
        maps={"activation": ConceptMap(distances), "contribution": ConceptMap(evidence)},
        concepts=_make_prototypes(distances, prototype_count, target),
        faithfulness=FaithfulnessReport(
            explained_logit=difference,
            completeness_residual=difference - 0.25 - contribution,
            constant=0.25,
            exactness="exact",
            exactness_reason="the head is affine after average pooling",
            carried_share=0.625,
            code_tolerance=1e-6,
        ),
        plane=PlaneReport(60, 48, accuracy=0.9375, margin=0.25, swap_rate=0.96875, swap_shift=0.375),
        flip_shift=next(point.shift for point in curve if point.other_probability > 0.5),
        shift_curve=curve,
        timings=explanation.timings,
        view=view or Box(0, 0, 224, 224),
        runtime=explanation.runtime,
    )
    return replace(contrast, **changes)


def make_concept(index: int = 0, **changes: Any) -> Concept:
    """The concept of `make_explanation` at an index, with what was found to say of it.

    Parameters
    ----------
    **changes
        Fields of `Concept` to set to something else.
    """
    said = _said_of(index)
    words = tuple(Word(word, 0.5 - place / 8) for place, word in enumerate(said["words"]))
    phrases = (Word(f"a photo of {said['label']}", 0.375),)
    weak = said["weak_label"]
    naming = Naming(said["label"], 0.125 if weak else 0.75, weak, words, phrases, counterfactuals=1)
    explanation = make_explanation(concept_count=0)
    concept = Concept(
        id=index * 7,
        label=said["label"],
        class_index=explanation.target.index,
        class_name=explanation.target.name,
        statistics={"importance": 0.5},
        exemplars=tuple(Exemplar(_CROP, f"image{n}.jpg", Box(0, 0, 64, 64), 0.5 - n / 8) for n in range(2)),
        parent=None,
        bank=explanation.bank,
        bank_digest=explanation.bank_digest,
        layer="layer",
        naming=naming if said["label"] else None,
        counterfactuals=(Exemplar(_CROP, "image9.jpg", Box(0, 0, 64, 64), 0.0),),
    )
    return replace(concept, **changes)


def make_search(*, found_count: int = 4, **changes: Any) -> SearchResults:
    """What a search finds: the concepts of `make_explanation`, in their order, and a bank without names.

    Parameters
    ----------
    found_count
        How many concepts to find.
    **changes
        Fields of `SearchResults` to set to something else.
    """
    results = SearchResults(
        text="ear",
        by="meaning",
        found=tuple(
            FoundConcept(make_concept(index, counterfactuals=()), 0.5 / (index + 1)) for index in range(found_count)
        ),
        unsearched=(UnsearchedBank("fake/layer/plain", "Its concepts have no names yet."),),
    )
    return replace(results, **changes)


def make_server_info(**changes: Any) -> ServerInfo:
    """What a service of this package's version says that it is.

    Parameters
    ----------
    **changes
        Fields of `ServerInfo` to set to something else.
    """
    info = ServerInfo(
        version=whence.__version__,
        contract_revision=CONTRACT_REVISION,
        limits=Limits(
            request_bytes=64 * 2**20,
            reply_bytes=64 * 2**20,
            pixels=50_000_000,
            image_formats=("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"),
            top_k=100,
            scales=1000,
            stream_in_flight=64,
            deadline_s=60.0,
            default_deadline_s=10.0,
        ),
    )
    return replace(info, **changes)


def _two_of_three(difference: float) -> tuple[float, float]:
    """Probabilities of two classes whose logits differ by this, beside a third one."""
    weights = np.exp([difference, 0.0, -1.0])
    first, second, _ = weights / weights.sum()
    return float(first), float(second)


def _make_prototypes(distances: NDArray[np.float32], count: int, target: ClassScore) -> tuple[ConceptScore, ...]:
    """Prototypes that share the target's side of the plane, row by row; best first."""
    found = []
    for index in range(count):
        codes = distances.clip(min=0)
        codes[np.arange(len(codes)) % count != index] = 0
        evidence = _half(codes * 0.5)
        total, contribution = float(codes.sum()), float(evidence.sum())
        whole = float(distances.clip(min=0).sum()) * 0.5
        maps: dict[MapKind, ConceptMap] = {"activation": ConceptMap(codes), "contribution": ConceptMap(evidence)}
        score = ConceptScore(
            id=20 + index,
            activation=total,
            peak=float(codes.max()),
            contribution=contribution,
            share=contribution / whole,
            maps=maps,
            class_index=target.index,
            class_name=target.name,
            **_said_of(index),
        )
        found.append(score)
    return tuple(sorted(found, key=lambda score: -score.contribution))


def _blob(grid: tuple[int, int], cell: tuple[int, int]) -> NDArray[np.float64]:
    """One where the cell is, and less the farther from it."""
    rows, columns = np.indices(grid)
    values: NDArray[np.float64] = np.exp(-((rows - cell[0]) ** 2 + (columns - cell[1]) ** 2) / 2.0)
    return values


def _half(values: NDArray[np.float64] | NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest values that half precision has."""
    return values.astype(np.float16).astype(np.float32)


def _make_concept(index: int, grid: tuple[int, int], hot_cell: tuple[int, int]) -> ConceptScore:
    """A concept with one blob; its weight falls, and changes sign, with its index."""
    cell = (hot_cell[0] + 2 * index) % grid[0], (hot_cell[1] + 3 * index) % grid[1]
    blob = _half(_blob(grid, cell))
    weight = (-0.5) ** index * 0.5
    fine = np.kron(blob, np.full((4, 4), 1 / 16, np.float32))
    colours = np.zeros((*fine.shape, 4), np.uint8)
    colours[..., index % 3], colours[..., 3] = 255, np.rint(255 * fine / fine.max())
    return ConceptScore(
        id=index * 7,
        activation=float(blob.sum()),
        peak=float(blob.max()),
        contribution=float(blob.sum()) * weight,
        share=weight,
        maps={
            "activation": ConceptMap(blob),
            "contribution": ConceptMap(_half(blob * weight)),
            "input": ConceptMap(fine, colours=colours),
        },
        **_said_of(index),
    )


def _said_of(index: int) -> dict[str, Any]:
    """Label and words of a concept."""
    place = index % len(_LABELS)
    label = _LABELS[place]
    return {"label": label, "weak_label": label == _WEAK, "words": _WORDS[place]}


def _make_parts(concept: ConceptScore, count: int) -> tuple[ConceptScore, ...]:
    """Parts of a concept: horizontal slices of its blob, on a grid twice as fine."""
    parts = []
    for index in range(count):
        fine = np.kron(concept.maps["activation"].values, np.ones((2, 2), np.float32))
        fine[np.arange(len(fine)) * count // len(fine) != index] = 0
        weight = concept.share / (index + 1)
        maps: dict[MapKind, ConceptMap] = {
            "activation": ConceptMap(fine),
            "contribution": ConceptMap(fine * np.float32(weight)),
        }
        total = float(fine.sum())
        parts.append(
            ConceptScore(1000 + 10 * concept.id + index, "", total, float(fine.max()), total * weight, weight / 4, maps)
        )
    return tuple(parts)


def _make_parts_report(logit: float) -> PartsReport:
    report = FaithfulnessReport(
        explained_logit=logit,
        completeness_residual=0.375,
        constant=0.25,
        exactness="first_order",
        exactness_reason="the head is not linear",
        relative_error=0.375,
        kl=0.125,
        top1_agrees=True,
    )
    return PartsReport("earlier", 1.5, 0.25, report)
