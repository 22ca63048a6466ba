"""SAE banks (FaCT, arXiv 2510.25512): dictionaries of many latents, few of which are active at a position."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

from pydantic import Field
from torch import Tensor

from concepts.bank import Bank
from concepts.kinds import load_codec
from concepts.repository import Repository
from offline.encoders import Encoder
from offline.exclusive import alone_in
from offline.free import judge_free, prepare, publish_free
from offline.harvested import HarvestedConfig, vectors_of
from offline.metrics import dictionaries
from offline.progress import Reporter
from offline.sae import presets
from offline.sae.presets import Size
from offline.sae.settings import Reading, SaeSettings, Variant
from offline.sae.training import Listener, Progress, Trained
from offline.sae.training import train as train_dictionaries
from offline.store.reading import Store
from offline.task import Task
from offline.trainers import Outcome, Trainer

_BATCH = 32_786
"""Vectors a step, as published."""

_STEPS = 64
"""Fewest steps an epoch, where no batch is asked for: small data is read in smaller batches."""

_MATCHED = 2048
"""Latents up to which dictionaries are matched one to one to measure stability; larger ones by nearest rows."""


class SaeConfig(HarvestedConfig):
    """All that decides SAE banks."""

    name: str = Field("sae", description="Name of the bank; with several sizes, it and the size: sae-16384-16.")
    preset: str | None = Field(None, description=f"Published size: {', '.join(presets.PRESETS)}.")
    sizes: tuple[str, ...] = Field(
        (), description="LATENTS/K, may be repeated: all are trained in one pass; default: 8 × channels, 16 of them."
    )
    variant: Variant = Field("topk", description="topk, batchtopk or jumprelu.")
    biases: bool = Field(
        False, description="Give encoder and decoder biases: better for ordinary networks, but B-cos sums end to hold."
    )
    epochs: int = Field(16, ge=1, description="Passes over the vectors.")
    vectors_per_step: int | None = Field(
        None, ge=1, description="Default: 32,786 as published, or less where an epoch would have fewer than 64 steps."
    )
    learning_rate: float = Field(1e-3, gt=0, description="Of Adam, after the warm-up.")
    stability_seeds: int = Field(
        0, ge=0, description="Dictionaries from other seeds to measure stability with, trained in the same pass."
    )
    devices: tuple[str, ...] = Field((), description="Devices to train on together; default: that of --device.")

    def dictionary_settings(self, channels: int) -> list[SaeSettings]:
        """Return the settings of every dictionary, those for stability after the one that is published.

        Raises
        ------
        InvalidInput
            If there is no such preset, or a size cannot be read.
        """
        sizes = [Size.read(text) for text in self.sizes]
        if self.preset is not None:
            sizes.insert(0, presets.preset(self.preset))
        return [
            SaeSettings(
                latents=size.latents,
                k=size.k,
                variant=self.variant,
                seed=self.seed + seed,
                encoder_bias=self.biases,
                decoder_bias=self.biases,
                learning_rate=self.learning_rate,
            )
            for size in dict.fromkeys(sizes) or [Size(8 * channels, min(16, channels))]
            for seed in range(1 + self.stability_seeds)
        ]


def train(repository: Repository, config: SaeConfig, report: Reporter) -> Outcome:
    """Harvest a layer, train dictionaries on it, judge and publish them.

    Raises
    ------
    UnknownModel, UnknownLayer, InvalidCut, UnknownClass, InvalidInput
        If the configuration does not fit the model, the images or this machine.
    AlreadyExists
        If the store holds what was harvested otherwise, or another process trains the bank.
    NotTrainable, NumericalFailure
        If nothing can be learned from the activations, or the training diverges; nothing is published then.
    """
    task, encoder = prepare(repository, config, report)
    settings = config.dictionary_settings(task.cut.layout.channels)
    for one in settings:
        one.check()
    workspace = repository.workspace(config.model, config.layer, config.name)
    with alone_in(workspace, "another training of this bank is running: wait for it, or give this one another --name"):
        store = vectors_of(task, workspace)
        trained = _learn(store, settings, config, workspace / "checkpoints", report)
        each = 1 + config.stability_seeds
        groups = [trained[first : first + each] for first in range(0, len(trained), each)]
        banks = [_publish(repository, task, encoder, store, group, alone=len(groups) == 1) for group in groups]
        shutil.rmtree(workspace, ignore_errors=True)
    return Outcome(tuple(banks), skipped_images={**store.skipped, **task.skipped_images})


def _learn(
    store: Store, settings: Sequence[SaeSettings], config: SaeConfig, checkpoints: Path, report: Reporter
) -> list[Trained]:
    """Train all dictionaries in one pass over the vectors."""
    reading = _reading(config, len(store))
    # A folder for each training: what another one left there is not in its way.
    identity = hashlib.sha256(repr((store.plan, store.data_fingerprint, settings, reading)).encode()).hexdigest()
    tell = _teller(settings, reading.steps_per_epoch(len(store)) * reading.epochs, report)
    trained = train_dictionaries(
        store,
        settings,
        reading,
        checkpoint_folder=checkpoints / identity[:16],
        devices=config.devices or (config.device,),
        listener=tell,
        report=report,
    )
    for done in trained:
        tell(done.history[-1])
    return trained


def _reading(config: SaeConfig, vectors: int) -> Reading:
    batch_size = config.vectors_per_step or min(_BATCH, max(1, vectors // _STEPS))
    return Reading(batch_size, config.epochs, config.seed)


def _teller(settings: Sequence[SaeSettings], steps: int, report: Reporter) -> Listener:
    """Return what passes on how each dictionary does, of so many steps in all."""

    def tell(progress: Progress) -> None:
        one = settings[progress.dictionary]
        report(
            f"{one.latents}/{one.k} seed {one.seed}",
            progress.step,
            steps,
            f"loss {progress.loss:.3g} R² {progress.variance_explained:.3f} dead {progress.dead_share:.1%} "
            f"L0 {progress.l0:.1f} {progress.vectors_per_second:,.0f}/s",
        )

    return tell


def _publish(
    repository: Repository,
    task: Task[SaeConfig],
    encoder: Encoder | None,
    store: Store,
    group: Sequence[Trained],
    *,
    alone: bool,
) -> Bank:
    """Judge and publish the first dictionary of a group; the others differ by their seeds."""
    best, config = group[0], task.config
    size = f"{best.settings.latents}-{best.settings.k}"
    tensors = best.dictionary.tensors()
    codec = load_codec("sae", tensors, [None] * best.settings.latents)
    codec.to(task.model.device)
    judged = judge_free(task, encoder, codec, best.dictionary.decoder)
    final = best.history[-1]
    # Its speed is left out: equal trainings give equal banks.
    judged.metrics["training"] = {
        "vectors": float(len(store)),
        "loss": final.loss,
        "variance_explained": final.variance_explained,
        "dead_share": final.dead_share,
        "l0_position": final.l0,
    }
    judged.metrics["mean"] |= _stability([one.dictionary.decoder for one in group])
    return publish_free(
        repository,
        task,
        judged,
        name=config.name if alone else f"{config.name}-{size}",
        tensors=tensors,
        configuration={"method": "sae", "latents": best.settings.latents, "k": best.settings.k},
        data_fingerprint=store.data_fingerprint,
    )


def _stability(decoders: Sequence[Tensor]) -> dict[str, float]:
    """Compare dictionaries of independent seeds."""
    if len(decoders) < 2:
        return {}
    if len(decoders[0]) <= _MATCHED:
        return {"stability": dictionaries.stability(decoders)}
    return {"stability_nearest": fmean(dictionaries.best_cosine(a, b) for a, b in combinations(decoders, 2))}


TRAINER = Trainer("sae", "Learn a sparse dictionary of a layer (SAE, as in FaCT).", SaeConfig, train)
