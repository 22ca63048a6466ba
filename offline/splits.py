"""Whether parts split their concepts: what they contribute, and whether they tell apart what a concept mixes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from concepts.bank import Bank
from concepts.engine import Engine
from concepts.explanation import ConceptScore, EngineRequest, ExplainOptions, Explanation
from offline import passes
from offline.config import TrainingConfig
from offline.images import shuffled
from offline.metrics import localisation
from offline.task import Task
from offline.truth import Truth, read_truth

_FEWEST = 3
"""Images that must show an attribute, and that must not, to ask whether something tells it apart."""

_DENSER = 2.0
"""A concept looks at an attribute if its activation is so much denser where that is than elsewhere."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a bank's parts."""

    contributions: dict[int, float]
    """Mean of each part on images that are predicted as its class, by its place among the parts."""
    attributes: dict[str, Any] | None
    """See ``measure``; None where the truth is not known, or no concept mixes attributes."""


@dataclass(frozen=True)
class _Mixture:
    """Images in which a concept is active, and the attributes that it mixes there; n images, m attributes."""

    concept: int
    keys: list[str]
    activation: Tensor
    """Of the concept, ``[n]``."""
    attributes: list[int]
    present: Tensor
    """bool ``[n, m]``."""


Answers = dict[str, Explanation]
"""Explanations by the keys of their images."""


def measure(task: Task[TrainingConfig], bank: Bank, engine_of: Callable[[Bank], Engine], most: int) -> Measured:
    """Measure parts on held-out images, explained for their predicted classes.

    A concept *mixes* the attributes that it looks at and that some, but not all, of the images show in which it is
    active (at least as the median where it is not silent). The activation of each of its parts ranks these images; for
    each attribute the part with the highest AUROC counts. That is the best of several numbers, all of which hold how
    much of the image is the concept's: so the same is measured of as many random directions in place of the parts.

    Parameters
    ----------
    task
        Whose held-out images serve.
    bank
        With parts.
    engine_of
        Makes the engine of a bank.
    most
        Images to explain.

    Returns
    -------
    Measured
        Its ``attributes`` has means over attributes, and a record for each, of means over the ``concepts`` that mix it:
        ``auroc`` of the best part, ``auroc_concept`` of the concept itself, ``auroc_random`` of the best direction.
    """
    answers = _explain(task, engine_of(bank), shuffled(task.held_out.keys, task.config.seed), most)
    contributions = _contributions(bank, answers.values())
    truth = read_truth(task.held_out.root)
    if truth is None or task.model.spec.preprocessing.resize is not None:
        return Measured(contributions, None)
    known = {key: answer for key, answer in answers.items() if key in truth.rows}
    mixtures = [mixture for concept in bank.concepts for mixture in _mixed(concept.id, known, truth)]
    if not mixtures:
        return Measured(contributions, None)
    task.report("measuring parts", 1, 2)
    control = _explain(task, engine_of(_random(bank, task.config.seed)), list(known), most)
    task.report("measuring parts", 2, 2)
    return Measured(contributions, _summary(mixtures, known, control, truth))


def _explain(task: Task[TrainingConfig], engine: Engine, keys: Sequence[str], most: int) -> Answers:
    """Explain the first images of the bank's classes, with all of their concepts, the maps of these, and parts."""
    options = ExplainOptions(top_k=len(engine.bank.concepts), maps=("activation",), parts=True)
    classes = engine.codec.classes() or frozenset()
    found: Answers = {}
    for batch in task.stream(task.held_out, keys):
        predicted = passes.predictions(task.model, batch)
        rows = [row for row, target in enumerate(predicted) if target in classes][: most - len(found)]
        if not rows:
            continue
        answers = engine.explain(batch.views[rows], [EngineRequest(None, options)] * len(rows))
        for row, answer in zip(rows, answers, strict=True):
            if isinstance(answer, Explanation):  # and not the refusal of an image whose activations are not finite
                found[batch.keys[row]] = answer
        if len(found) == most:
            break
    return found


def _contributions(bank: Bank, answers: Iterable[Explanation]) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for answer in answers:
        for concept in answer.concepts:
            for part in concept.parts:
                values.setdefault(part.id - len(bank.concepts), []).append(part.contribution)
    return {part: sum(seen) / len(seen) for part, seen in values.items()}


def _mixed(concept: int, answers: Answers, truth: Truth) -> list[_Mixture]:
    """Return what a concept mixes, if anything."""
    scores = {key: score for key, answer in answers.items() if (score := _score(answer, concept)) and score.activation}
    if not scores or not next(iter(scores.values())).parts:
        return []
    activation = torch.tensor([score.activation for score in scores.values()])
    active = activation >= activation.median()
    keys = [key for key, is_active in zip(scores, active.tolist(), strict=True) if is_active]
    present = truth.present[[truth.rows[key] for key in keys]]
    fewest = torch.minimum(present.sum(0), (~present).sum(0))
    maps = torch.stack([torch.from_numpy(scores[key].maps["activation"].values) for key in keys])
    varying = (fewest >= _FEWEST).nonzero().squeeze(1).tolist()
    looked = [attribute for attribute in varying if _looks_at(maps, keys, present, attribute, truth)]
    return [_Mixture(concept, keys, activation[active], looked, present[:, looked])] if looked else []


def _looks_at(maps: Tensor, keys: Sequence[str], present: Tensor, attribute: int, truth: Truth) -> bool:
    """Whether a concept's activation is denser where an attribute is, on the images that show it."""
    rows = present[:, attribute].nonzero().squeeze(1)
    masks = truth.masks([keys[row] for row in rows.tolist()], attribute)
    values = localisation.enlarge(maps[rows], (masks.shape[1], masks.shape[2]))
    return bool(masks.any()) and bool(values[masks].mean() > _DENSER * values[~masks].mean())


def _score(answer: Explanation, concept: int) -> ConceptScore | None:
    return next((score for score in answer.concepts if score.id == concept), None)


def _random(bank: Bank, seed: int) -> Bank:
    """Return the bank with as many random directions of the same layer in place of its parts."""
    if bank.parts is None:
        return bank
    shape = bank.parts.tensors["dictionary"].shape
    drawn = functional.normalize(torch.rand(shape, generator=torch.Generator().manual_seed(seed)), dim=1)
    return replace(bank, parts=replace(bank.parts, tensors={"dictionary": drawn}))


def _summary(mixtures: Sequence[_Mixture], answers: Answers, control: Answers, truth: Truth) -> dict[str, Any]:
    """Return means over concepts for each attribute, and their means."""
    found: dict[int, list[tuple[float, float, float]]] = {}
    for mixture in mixtures:
        own = localisation.auroc(mixture.activation.unsqueeze(1), mixture.present)[0]
        best, drawn = (_best(mixture, of) for of in (answers, control))
        for attribute, *numbers in zip(mixture.attributes, best.tolist(), own.tolist(), drawn.tolist(), strict=True):
            found.setdefault(attribute, []).append((numbers[0], numbers[1], numbers[2]))
    names = ("auroc", "auroc_concept", "auroc_random")
    records = {
        truth.attributes[attribute]: {
            **dict(zip(names, (sum(values) / len(values) for values in zip(*seen, strict=True)), strict=True)),
            "concepts": len(seen),
        }
        for attribute, seen in sorted(found.items())
    }
    means = {name: sum(record[name] for record in records.values()) / len(records) for name in names}
    return {"images": len(answers), **means, "attributes": records}


def _best(mixture: _Mixture, answers: Answers) -> Tensor:
    """Return the AUROC of the concept's best part for each attribute that it mixes, ``[m]``."""
    rows = []
    for key in mixture.keys:
        score = _score(answers[key], mixture.concept)
        parts = () if score is None else sorted(score.parts, key=lambda part: part.id)
        rows.append([part.activation for part in parts])
    return localisation.auroc(torch.tensor(rows), mixture.present).amax(0)
