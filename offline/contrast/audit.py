"""Looking for spurious features: prototypes whose small crops turn images of other classes into theirs.

Nobody says where to look. Every contrastive prototype of a bank is pasted into images of the class that it is
contrasted with; the strongest one of each class then into images of all other classes, which tells how far it reaches.
A small crop that is enough for the model may be a mark that happened to accompany the class in training, or what the
class should be told by: that is for a person to see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from concepts import devices
from concepts.bank import Bank, Concept
from concepts.errors import InvalidInput, UnsupportedOption
from concepts.model import Model
from concepts.repository import Repository
from offline.config import LARGEST_SEED
from offline.contrast.insertion import (
    PLACES,
    VARIANTS,
    Effect,
    Insertion,
    Pool,
    Variant,
    insertions,
    measure,
    probabilities,
)
from offline.images import ImageFolder, Stream, open_folder, shuffled
from offline.locations import Location
from offline.progress import Reporter

SUSPICIOUS = 0.5
"""A prototype is suspicious if it flips most images of a class beyond what the patches beside it flip."""


class AuditSettings(BaseModel):
    """What decides an audit; the command's options are made from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    images: Location = Field(
        description="Folder of images that the bank was not trained on, labelled or not; also s3://… or gs://…."
    )
    images_per_pair: int = Field(30, ge=1, description="Most images to paste a prototype into, in images.")
    spread_images: int = Field(
        200, ge=1, description="Images of all other classes to paste each class's strongest prototype into, about."
    )
    top: int = Field(20, ge=1, description="Classes to look at closely, and findings to show.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Of the choice of images and of random patches.")
    batch_size: int = Field(128, ge=1, description="Images a forward pass.")
    device: str = Field("auto", description="auto (a GPU where there is one), cpu, cuda or cuda:N.")


@dataclass(frozen=True)
class Finding:
    """What a prototype does to images of the class that it is contrasted with."""

    concept: Concept
    insertion: Insertion
    effect: Effect

    @property
    def excess(self) -> float:
        """Share of images that it flips, less that of the blank or random patch, whichever flips more."""
        flips = _mean([self.effect], Effect.flips)
        return flips["insertion"] - max(flips["blank"], flips.get("random", 0.0))

    @property
    def rank(self) -> tuple[float, float, int]:
        """Sorts the strongest first; of equals the one that raises the probability more, then the first."""
        return -self.excess, -(self.effect.gain("insertion") or 0.0), self.concept.id


@dataclass(frozen=True)
class Spread:
    """What the strongest prototype of a class does to images of all other classes."""

    finding: Finding
    effects: Mapping[int, Effect]
    """By the class of the images."""
    each: int
    """Most images of each of these classes."""
    area: float
    """Of a crop, as a share of the view."""

    @property
    def target(self) -> int:
        """The class."""
        return self.finding.insertion.target

    @property
    def images(self) -> int:
        """How many it was pasted into."""
        return sum(len(effect.keys) for effect in self.effects.values())

    @property
    def flipped(self) -> list[int]:
        """Classes of whose images at least half become the prototype's class."""
        return [other for other, effect in self.effects.items() if (effect.flips("insertion") or 0.0) >= 0.5]

    @property
    def suspicious(self) -> bool:
        """Whether a person should look at it."""
        return self.finding.excess >= SUSPICIOUS

    def flips(self) -> dict[Variant, float]:
        """Return the share of images that become the class, by variant."""
        return _mean(list(self.effects.values()), Effect.flips)

    def gain(self) -> dict[Variant, float]:
        """Return the mean change of the class's probability, by variant."""
        return _mean(list(self.effects.values()), Effect.gain)


@dataclass(frozen=True)
class Audit:
    """What was found in a bank."""

    bank: Bank
    class_names: tuple[str, ...]
    findings: Sequence[Finding]
    """Of all prototypes that could be tested, strongest first."""
    spreads: Sequence[Spread]
    """Of the classes with the strongest findings, the strongest first."""
    untested: Sequence[int]
    """Prototypes with no image to paste them into."""
    pool: Pool
    pictures: Mapping[str, bytes]
    """Of the exemplars, by file."""
    settings: AuditSettings

    def to_json(self) -> dict[str, Any]:
        """Return all numbers."""
        names = self.class_names
        return {
            "bank": self.bank.reference,
            "digest": self.bank.digest,
            "images": sum(map(len, self.pool.members.values())),
            "settings": self.settings.model_dump(mode="json", exclude={"images", "device"}),
            "classes": [
                {
                    "class": names[spread.target],
                    "concept": spread.finding.concept.id,
                    "other": names[spread.finding.insertion.other],
                    "suspicious": spread.suspicious,
                    "excess": spread.finding.excess,
                    **{f"{variant}_flips": share for variant, share in spread.flips().items()},
                    "images": spread.images,
                    "area": spread.area,
                    "flipped": [names[other] for other in spread.flipped],
                    "others": {names[other]: effect.statistics() for other, effect in spread.effects.items()},
                }
                for spread in self.spreads
            ],
            "findings": [
                {
                    "concept": finding.concept.id,
                    "class": names[finding.insertion.target],
                    "other": names[finding.insertion.other],
                    "excess": finding.excess,
                    **finding.effect.statistics(),
                }
                for finding in self.findings
            ],
            "untested": list(self.untested),
            "skipped_images": self.pool.skipped,
        }


def audit(repository: Repository, reference: str, settings: AuditSettings, report: Reporter) -> Audit:
    """Paste the prototypes of a contrast bank into images of other classes, and rank them by what that does.

    Raises
    ------
    UnknownBank, CorruptData, WeightsMismatch
        If there is no such bank, or it cannot be used any more.
    UnsupportedOption
        If it is no contrast bank, or has no prototypes with exemplars.
    InvalidInput
        If no image is predicted as a class that a prototype could be pasted into.
    """
    version = repository.resolve(reference)
    bank = repository.load(version)
    _check(bank)
    model = repository.load_model(bank.model, devices.choose(settings.device))
    pictures = repository.pictures(version, [e for concept in bank.concepts for e in concept.exemplars])
    wanted = insertions(bank.concepts, bank.tensors[PLACES], lambda e: pictures[e.file], model.spec.preprocessing)
    pool = gather(model, open_folder(settings.images), settings, report)
    effects = measure(pool, wanted, settings.images_per_pair, settings.seed, report)
    findings = [
        Finding(bank.concepts[one.number], one, effect)
        for one, effect in zip(wanted, effects, strict=True)
        if effect is not None
    ]
    if not findings:
        raise InvalidInput(
            f"no image is predicted as a class that bank {bank.reference} contrasts another with, so that nothing can "
            "be pasted: give images of its classes"
        )
    findings.sort(key=lambda finding: finding.rank)
    tested = {finding.concept.id for finding in findings}
    untested = [concept.id for concept in bank.concepts if concept.id not in tested]
    spreads = _spread(pool, findings, settings, report)
    return Audit(bank, model.spec.class_names, findings, spreads, untested, pool, pictures, settings)


def gather(model: Model, folder: ImageFolder, settings: AuditSettings, report: Reporter) -> Pool:
    """Return images by predicted class, as many of each as a prototype is pasted into."""
    stage, keys = "predicting", shuffled(folder.keys, settings.seed)
    members: dict[int, list[str]] = {target: [] for target in range(len(model.spec.class_names))}
    pool, done = Pool(model, folder, members, settings.batch_size), 0
    report(stage, 0, len(keys))
    for batch in Stream(folder, keys, model.spec.preprocessing, settings.batch_size, pool.skipped):
        for key, share in zip(batch.keys, probabilities(model, batch.views), strict=True):
            if not share.any():
                pool.skipped[key] = "The model answers with NaN or infinity."
            elif len(own := members[int(share.argmax())]) < settings.images_per_pair:
                own.append(key)
        done += len(batch.keys)
        report(stage, min(done, len(keys) - 1), len(keys))
        if all(len(own) == settings.images_per_pair for own in members.values()):
            break
    report(stage, len(keys), len(keys))
    return pool


def _check(bank: Bank) -> None:
    """Raise UnsupportedOption where a bank has nothing to paste."""
    problem = None
    if bank.kind != "contrast":
        problem = f"is of kind {bank.kind}: an audit pastes the prototypes of a contrast bank (`train contrast`)"
    elif not bank.concepts:
        why = str(bank.configuration.get("prototypes", ""))
        why = f" ({why.removeprefix('none: ')})" if why.startswith("none: ") else ""
        problem = f"has no prototypes to paste{why}: train one at a non-negative layer, with --pairs above 0"
    elif not any(concept.exemplars for concept in bank.concepts):
        problem = "has no exemplars to paste: train it with --exemplars above 0"
    elif PLACES not in bank.tensors:
        problem = "does not say where in its view each exemplar was cut out: train it anew"
    if problem is not None:
        raise UnsupportedOption(f"bank {bank.reference} {problem}", bank=bank.reference)


def _spread(pool: Pool, findings: Sequence[Finding], settings: AuditSettings, report: Reporter) -> tuple[Spread, ...]:
    """Paste the strongest prototype of each class into images of all other classes."""
    strongest: dict[int, Finding] = {}
    for finding in findings:
        strongest.setdefault(finding.insertion.target, finding)
    looked_at = list(strongest.values())[: settings.top]
    classes = [target for target, keys in pool.members.items() if keys]
    each = min(max(-(-settings.spread_images // max(len(classes) - 1, 1)), 1), settings.images_per_pair)
    wanted = [
        finding.insertion._replace(other=other)
        for finding in looked_at
        for other in classes
        if other != finding.insertion.target
    ]
    effects = measure(pool, wanted, each, settings.seed, report, "inserting everywhere")
    found: dict[int, dict[int, Effect]] = {finding.insertion.target: {} for finding in looked_at}
    for one, effect in zip(wanted, effects, strict=True):
        if effect is not None:
            found[one.target][one.other] = effect
    view = pool.model.spec.preprocessing
    return tuple(
        Spread(one, found[one.insertion.target], each, _area(one.insertion, view.height * view.width))
        for one in looked_at
    )


def _area(insertion: Insertion, pixels: int) -> float:
    """Return the mean size of the crops, as a share of the view."""
    return sum(crop.pixels[..., 0].size for crop in insertion.crops) / len(insertion.crops) / pixels


def _mean(effects: Sequence[Effect], measured: Callable[[Effect, Variant], float | None]) -> dict[Variant, float]:
    """Return the mean over all images of what is measured, by variant; without those that could not be made."""
    images = sum(len(effect.keys) for effect in effects)
    values = {variant: [measured(effect, variant) for effect in effects] for variant in VARIANTS}
    return {
        variant: sum(value * len(effect.keys) for value, effect in zip(known, effects, strict=True)) / images
        for variant, found in values.items()
        if len(known := [value for value in found if value is not None]) == len(effects)
    }
