"""Groups of features that mean something together, found in a layer itself: FALCON (arXiv 2307.10504)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from concepts.bank import Bank, Concept
from concepts.errors import NotTrainable
from concepts.kinds import load_codec
from concepts.repository import Repository
from offline import exemplars
from offline.config import JudgingConfig
from offline.encoders import open_encoder
from offline.exemplars import Excerpt
from offline.images import fingerprint
from offline.naming.scores import Evidence
from offline.naming.settings import NamingSettings
from offline.progress import Reporter
from offline.subspaces import judging
from offline.subspaces.counterfactuals import cut_like, nearest_without
from offline.subspaces.crops import Crops, cohesion, embed
from offline.subspaces.grouping import Group, Grouping, Limits, distinct, find, most_deviations
from offline.subspaces.probing import Probe, probe
from offline.task import Task, open_task
from offline.trainers import Outcome, Trainer
from offline.vocabulary import Vocabulary, open_vocabulary

if TYPE_CHECKING:
    from concepts.clip import Clip


class SubspaceConfig(JudgingConfig, NamingSettings):
    """All that decides a bank of groups of features."""

    name: str = Field("subspace", description="Name of the bank; model/layer/name is its reference.")
    clip: str = Field(
        description="CLIP that judges groups: a folder as open_clip saves them, or ARCHITECTURE@FILE; where the hub "
        "can be reached, also ARCHITECTURE@TAG.",
    )
    vocabulary: Path | None = Field(
        None,
        description="Folder of a vocabulary that was built with the CLIP, from which groups get names; without, "
        "`whence-bank label` can name them later.",
    )
    classes: tuple[str, ...] = Field(
        (), description="Look at images alone that are predicted as these classes; all where none is named."
    )
    grouping: Grouping = Field(
        "itemsets",
        description="itemsets: sets of features that are highly active together, whatever else is; exact: the sets of "
        "all features that are, as published.",
    )
    deviations: float = Field(
        5.0, gt=0, description="Standard deviations above the mean from which on a feature is highly active."
    )
    min_images: int = Field(10, ge=1, description="A group must be active in more images than this.")
    max_groups: int = Field(1000, ge=1, description="Most groups to look at: those of most images.")
    max_features: int = Field(32, ge=1, description="Most features of a group.")
    probe_images: int = Field(50_000, ge=2, description="Most training images to look for groups in.")
    crops: int = Field(32, ge=2, description="Most crops of a group that its cohesion is measured on.")
    crop_threshold: float = Field(
        0.6, gt=0, le=1, description="A crop is where a group's map exceeds this share of its range over the image."
    )
    cohesion: float = Field(
        0.8, ge=-1, le=1, description="Mean cosine of a group's crops to the CLIP above which it is interpretable."
    )
    overlap: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of their images that two groups may have in common; of those with more the larger is kept. "
        "1: keep all.",
    )
    keep: Literal["interpretable", "all"] = Field("interpretable", description="Groups to keep: interpretable or all.")
    counterfactuals: int = Field(10, ge=0, description="Most counterfactuals of a group.")
    counterfactual_similarity: float = Field(
        0.3, ge=-1, le=1, description="Least cosine of a counterfactual's other features with the group's."
    )

    @model_validator(mode="after")
    def _enough(self) -> SubspaceConfig:
        if self.exemplars > self.crops:
            raise ValueError(f"exemplars {self.exemplars} are taken from the crops: ask for at most {self.crops}")
        return self

    @property
    def limits(self) -> Limits:
        """Which groups are kept."""
        return Limits(self.min_images, self.max_groups, self.max_features)


@dataclass(frozen=True)
class Found:
    """The groups of a bank."""

    groups: list[Group]
    cohesions: list[float]
    excerpts: list[list[Excerpt]]
    """Of each group its crops, best first."""
    embeddings: list[Tensor]
    """What they look like to the CLIP, of each group ``[n, D]``."""
    tried: int
    """How many groups there were, and how many of these are interpretable."""
    interpretable: int

    def tensors(self, threshold: float) -> dict[str, Tensor]:
        """Return what banks of this kind hold."""
        return {
            "features": torch.tensor([feature for group in self.groups for feature in group.features]),
            "offsets": torch.tensor([0, *accumulate(len(group.features) for group in self.groups)]),
            "threshold": torch.tensor(threshold),
        }


def train(repository: Repository, config: SubspaceConfig, report: Reporter) -> Outcome:
    """Find groups of features, judge them by a CLIP and on held-out images, and publish them.

    Raises
    ------
    NotTrainable
        If there are no groups, or none is interpretable; nothing is published then.
    UnknownModel, UnknownLayer, InvalidCut, UnknownClass, InvalidInput
        If the configuration does not fit the model, the CLIP, the images or this machine.
    """
    from concepts.clip import open_clip_model  # takes seconds to import, which other commands need not wait for

    task = open_task(repository, config, report)
    encoder = None if config.encoder is None else open_encoder(config.encoder, repository, task.model.device)
    clip = open_clip_model(config.clip, task.model.device)
    vocabulary = None if config.vocabulary is None else open_vocabulary(config.vocabulary, clip)
    seen = probe(task, config.probe_images)
    threshold = seen.threshold(config.deviations)
    found = _interpretable(task, clip, seen, _groups(seen, threshold, config))
    without = nearest_without(seen, found.groups, config.counterfactuals, config.counterfactual_similarity)
    without = cut_like(seen, without, found.excerpts)
    tensors = found.tensors(threshold)
    codec = load_codec("subspace", tensors, [None] * len(found.groups)).to(task.model.device)
    measured = judging.measure(task, encoder, codec, len(found.groups))
    report("publishing", 0, 1)
    shown = exemplars.draw(task.training, [excerpts[: config.exemplars] for excerpts in found.excerpts])
    contrasted = exemplars.draw(task.training, without, role="counterfactual")
    spec = task.model.spec
    bank = Bank(
        kind="subspace",
        model=config.model,
        layer=config.layer,
        name=config.name,
        weights_digest=spec.weights_digest,
        channels=task.cut.layout.channels,
        concepts=_concepts(found, measured.statistics, shown, contrasted),
        tensors=tensors,
        metrics=_metrics(found, seen, threshold, measured),
        configuration={
            **config.record(),
            "method": "falcon",
            "clip": {"name": clip.name, "digest": clip.digest},
            "device": task.model.device.type,
        },
        data_fingerprint=fingerprint(dict(zip(seen.keys, seen.digests, strict=True))),
        preprocessing=spec.preprocessing.to_json(),
    )
    if vocabulary is not None:
        bank = _named(task, clip, vocabulary, bank, found, without)
        if clip.portable:  # texts are compared with what it saw
            repository.publish_clip(clip.files)
    bank = repository.publish(bank, shown.pictures | contrasted.pictures)
    report("publishing", 1, 1)
    return Outcome((bank,), skipped_images=task.skipped_images)


def _groups(seen: Probe, threshold: float, config: SubspaceConfig) -> list[Group]:
    """Return the groups at a threshold, or say at which there would be some."""
    if len(seen.keys) <= config.min_images:
        raise NotTrainable(
            f"{len(seen.keys)} images are too few: a group of features must be active in more than "
            f"{config.min_images} of them; give more --images, or lower --min-images"
        )
    groups = find(seen.highly_active(threshold), config.grouping, config.limits)
    if groups:
        return groups
    would = most_deviations(seen, config.grouping, config.limits)
    remedy = (
        "there is none at any number of deviations: give more --images, lower --min-images, or choose another layer of "
        "`whence-bank layers`"
        if would is None
        else f"set --deviations {would:g} or less, at which there are some"
    )
    raise NotTrainable(
        f"at --deviations {config.deviations:g} no group of features of layer {config.layer!r} is highly active in "
        f"more than {config.min_images} of {len(seen.keys):,} images: {remedy}",
        layer=config.layer,
    )


def _interpretable(task: Task[SubspaceConfig], clip: Clip, seen: Probe, groups: Sequence[Group]) -> Found:
    """Cut out where groups are; return those whose crops look alike to the CLIP, or all, without near repetitions."""
    config = task.config
    crops = Crops(seen, groups, config.crops)
    crops.cut(task, clip, config.crop_threshold)
    cohesions = [cohesion(embeddings) for embeddings in crops.embeddings]
    kept = [number for number, value in enumerate(cohesions) if config.keep == "all" or value > config.cohesion]
    if not kept:
        raise NotTrainable(
            f"none of {len(groups):,} groups is interpretable: the mean cosine of the crops of the best one is "
            f"{max(cohesions):.3f}, not above {config.cohesion:g}; lower --cohesion, keep all groups (--keep all), or "
            "take another --clip",
            layer=config.layer,
        )
    kept = [kept[place] for place in distinct([groups[number] for number in kept], config.overlap)]
    return Found(
        [groups[number] for number in kept],
        [cohesions[number] for number in kept],
        [crops.excerpts[number] for number in kept],
        [crops.embeddings[number] for number in kept],
        len(groups),
        sum(value > config.cohesion for value in cohesions),
    )


def _named(
    task: Task[SubspaceConfig],
    clip: Clip,
    vocabulary: Vocabulary,
    bank: Bank,
    found: Found,
    without: Sequence[Sequence[Excerpt]],
) -> Bank:
    """Return the bank with names, from all crops of its groups and from their counterfactuals."""
    from offline.naming.naming import labelled, name_concepts  # imports the CLIP, as above

    evidence = [
        Evidence(crops, embedded)
        for crops, embedded in zip(found.embeddings, embed(task.training, without, clip), strict=True)
    ]
    names = name_concepts(clip, vocabulary, evidence, task.config, task.report)
    return labelled(bank, names, clip, vocabulary, {"settings": task.config.naming_record()})


def _concepts(
    found: Found, statistics: Sequence[dict[str, float]], shown: exemplars.Drawn, contrasted: exemplars.Drawn
) -> tuple[Concept, ...]:
    rows = zip(found.groups, found.cohesions, statistics, shown.exemplars, contrasted.exemplars, strict=True)
    return tuple(
        Concept(
            index,
            statistics={
                "features": float(len(group.features)),
                "images": float(len(group.images)),
                "cohesion": cohesive,
                **known,
            },
            exemplars=pictures,
            counterfactuals=counterfactuals,
        )
        for index, (group, cohesive, known, pictures, counterfactuals) in enumerate(rows)
    )


def _metrics(found: Found, seen: Probe, threshold: float, measured: judging.Measured) -> dict[str, Any]:
    """Return the metrics of the bank: on held-out images, and of the search for groups."""
    everywhere = set().union(*(group.images.tolist() for group in found.groups))
    mean = {
        **measured.metrics["mean"],
        "cohesion": fmean(found.cohesions),
        "interpretable_share": found.interpretable / found.tried,
    }
    training = {
        "images": float(len(seen.keys)),
        "mean": seen.mean,
        "std": seen.std,
        "threshold": threshold,
        "highly_active": float((seen.representations >= threshold).sum(1).double().mean()),
        "groups": float(found.tried),
        "grouped_share": len(everywhere) / len(seen.keys),
    }
    return {**measured.metrics, "mean": mean, "training": training}


TRAINER = Trainer("subspace", "Find groups of features that mean something together (FALCON).", SubspaceConfig, train)
