"""FACE banks (Bhusal et al., NeurIPS 2025, arXiv 2510.11675): concepts of each class that keep the predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from concepts import nnls
from concepts.cut import Cut
from concepts.errors import InvalidInput, NotTrainable
from concepts.repository import Repository
from offline import face, nmf
from offline.face import Fit, Material, Settings
from offline.metrics import dictionaries
from offline.per_class import factorising
from offline.per_class.crops import CropConfig, Cropping
from offline.per_class.lesson import Lesson
from offline.per_class.pipeline import train_classes
from offline.progress import Reporter
from offline.task import Task
from offline.trainers import Outcome, Trainer

BUDGET = 0.05
"""Error that is accepted where nothing is asked for, as a share of the plain factorisation's."""


def _share(value: object) -> object:
    """Read ``5%`` as 0.05."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


class FaceConfig(CropConfig):
    """All that decides a FACE bank."""

    name: str = Field("face", description="Name of the bank; model/layer/name is its reference.")
    variant: Literal["spatial", "pooled"] | None = Field(
        None,
        description="What is factorised: spatial, all positions of the crops; pooled, their means, as in FACE. "
        "Default: spatial, but where the layer has tokens without a place.",
    )
    max_error_increase: Annotated[float | None, BeforeValidator(_share)] = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Largest reconstruction error above plain NMF's that is accepted, e.g. 5% or 0.05, which is the "
        "default; predictions are kept as well as it allows.",
    )
    lambda_: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the predictions instead: at 1, a nat of KL weighs as much as plain NMF's whole error.",
    )
    focus: float = Field(
        0.3, ge=0, allow_inf_nan=False, description="Weight, in nats, of gathering a class's evidence in one concept."
    )
    codes: face.Codes = Field(
        "served",
        description="What is optimised: served, the dictionary alone, with the codes that explanations use; free, the "
        "crops' codes with it, as published, which explanations then do not have.",
    )
    fit_crops: int = Field(512, ge=1, description="Most crops of a class that the dictionary is fitted to.")

    @model_validator(mode="after")
    def _one_mode(self) -> FaceConfig:
        if self.lambda_ is not None and self.max_error_increase is not None:
            raise ValueError("--lambda and --max-error-increase exclude each other: leave one out")
        return self

    def settings(self) -> Settings:
        """Return what is wanted of each dictionary."""
        return Settings(self.lambda_, self.max_error_increase or BUDGET, self.focus, codes=self.codes)


class Face:
    """Factorises a class's crops so that the model predicts the same from their codes."""

    name = "face"

    def __init__(self, task: Task[FaceConfig]) -> None:
        tokens = task.cut.layout.tokens
        self._variant = task.config.variant or ("pooled" if tokens else "spatial")
        if self._variant == "spatial" and tokens:
            raise InvalidInput(
                f"layer {task.cut.layer!r} has {tokens} tokens without a place in the image, which crops do not cover: "
                "use --variant pooled"
            )
        self._task, self._cropping, settings = task, Cropping.of(task), task.config.settings()
        budget = settings.max_error_increase if settings.weight is None else None
        self.resolved = {**self._cropping.resolved, "variant": self._variant, "max_error_increase": budget}

    def learn(self, target: int, members: Sequence[str]) -> Lesson:
        """See ``Method.learn``."""
        config = self._task.config
        crops = self._cropping.cut(members, _TAKEN[self._variant])
        chosen = _some(len(crops.vectors), config.fit_crops, config.seed)
        material = material_of(self._task.cut, crops.vectors[chosen], target)
        plain = factorising.factorise(_rows(material), config)
        found = face.fit(material, plain.dictionary[0], config.settings())
        used = found.dictionary.any(1)
        dictionary = found.dictionary[used]
        pooled = crops.vectors.mean(1).double()
        codes = nnls.codes(pooled.unsqueeze(0), dictionary.unsqueeze(0))[0]
        values = _metrics(found, len(members), len(chosen))
        if config.stability_folds > 1:
            with suppress(NotTrainable):  # too little is left without a fold: what was learned stands all the same
                values["stability"] = self._stability(material, chosen // self._cropping.grid.count, found)
        return Lesson(
            dictionary=dictionary.float().cpu(),
            excerpts=self._cropping.excerpts(crops, codes.float().cpu()),
            keys=crops.keys,
            digests=crops.digests,
            metrics=values,
        )

    def _stability(self, material: Material, image: Tensor, found: Fit) -> float:
        """Refit without each fold of images in turn, from independent random starts, and compare the dictionaries."""
        config, folds = self._task.config, self._task.config.stability_folds
        settings, refits = replace(config.settings(), weight=found.weight), []
        for fold in range(folds):
            kept = material.rows((image % folds != fold).nonzero().squeeze(1).to(material.crops.device))
            start = nmf.factorise(
                _rows(kept),
                config.concepts,
                start="random",
                seed=config.seed + 1 + fold,
                tolerance=config.tolerance,
                max_iterations=config.max_iterations,
            )
            refits.append(face.fit(kept, start.dictionary[0], settings).dictionary)
        return dictionaries.stability(refits)


def material_of(cut: Cut, crops: Tensor, target: int) -> Material:
    """Return crops with the head that sees them, and the gradient of a class's logit there.

    Parameters
    ----------
    cut
        Where the model is cut; its layer has no tokens, unless the crops are pooled.
    crops
        ``[M, P, C]``; where P is 1, the vector is laid at every position of the layer's grid.
    target
        The class.

    Raises
    ------
    InvalidInput
        If the head takes no activations of the crops' size.
    """
    head = _head(cut, crops.shape[1])
    gradients = []
    for _, part in Material(crops, crops, head).chunks():
        with torch.enable_grad():
            leaf = part.crops.detach().requires_grad_()
            try:
                logits = head(leaf)
            except RuntimeError as error:
                raise InvalidInput(
                    f"what follows layer {cut.layer!r} does not take crops of another size than the model's: use "
                    "--enlarge, or --variant pooled"
                ) from error
            gradients.append(torch.autograd.grad(logits[:, target].sum(), leaf)[0])
    return Material(crops, torch.cat(gradients), head)


def _head(cut: Cut, positions: int) -> Callable[[Tensor], Tensor]:
    """Return the head on crops as rows of channels."""
    if positions == 1:
        return lambda a: cut.head(cut.unpositions(a.expand(-1, cut.layout.positions, -1)))
    side = math.isqrt(positions)
    here = positions == cut.layout.positions
    layout = cut.layout if here else cut.layout._replace(grid=(side, side))
    return lambda a: cut.head(layout.unflatten(a))


_TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "spatial": lambda positions: positions,
    "pooled": lambda positions: positions.mean(1, keepdim=True),
}


def _rows(material: Material) -> Tensor:
    return material.crops.flatten(0, 1).double()


def _some(count: int, most: int, seed: int) -> Tensor:
    """Return which crops to fit to, int64, in order; all where they are few."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def _metrics(found: Fit, images: int, crops: int) -> dict[str, float]:
    """Return what the learning says of itself."""
    return {
        "training_images": float(images),
        "training_crops": float(crops),
        "training_mse": found.losses.error,
        "training_kl": found.losses.kl,
        "training_spread": found.losses.spread,
        "plain_mse": found.plain.error,
        "plain_kl": found.plain.kl,
        "error_increase": found.increase,
        "lambda": found.weight,
        "evaluations": float(found.evaluations),
    }


def train(repository: Repository, config: FaceConfig, report: Reporter) -> Outcome:
    """Learn and publish one bank with the concepts of all requested classes; see ``train_classes``."""
    return train_classes(repository, config, report, Face)


TRAINER = Trainer("face", "Learn concepts of each class that keep the model's predictions (FACE).", FaceConfig, train)
