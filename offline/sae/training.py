"""Training of several dictionaries in one pass over the vectors."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from concepts.devices import choose as choose_device
from concepts.errors import InvalidInput, NotTrainable, NumericalFailure
from offline.progress import Reporter, silent
from offline.sae.checkpoint import Checkpoints
from offline.sae.dictionary import Dictionary
from offline.sae.group import Group, run_together
from offline.sae.learner import Learner
from offline.sae.settings import Reading, SaeSettings
from offline.vectors import Vectors

STAGE = "train"


class Progress(NamedTuple):
    """How one dictionary does; means over the vectors of the epoch so far."""

    dictionary: int
    """Its place among the settings."""
    epoch: int
    """From 0."""
    step: int
    """Steps done in all."""
    loss: float
    """What is minimised, in units of the mean square norm of the vectors."""
    variance_explained: float
    """``1 − Σ‖a − â‖² / Σ‖a − mean‖²``, with the mean of every dimension."""
    dead_share: float
    """Share of latents that have not fired for as long as ``dead_after_epochs`` says."""
    l0: float
    """Active latents a vector."""
    vectors_per_second: float
    """Of the whole training: a vector counts once, however many dictionaries learn from it."""


class Trained(NamedTuple):
    """A dictionary and how it came about."""

    settings: SaeSettings
    dictionary: Dictionary
    """On the CPU."""
    history: tuple[Progress, ...]
    """One entry an epoch; the last one holds the final numbers."""


Listener = Callable[[Progress], None]


@dataclass(frozen=True)
class Pauses:
    """How often a training looks up from its work."""

    checkpoint_s: float = 600.0
    """Seconds between two checkpoints; the end of an epoch makes one besides."""
    listener_s: float = 5.0
    """Seconds between two calls of the listener; each makes a GPU wait."""


def train(
    vectors: Vectors,
    settings: Sequence[SaeSettings],
    reading: Reading | None = None,
    *,
    checkpoint_folder: Path | None = None,
    devices: Sequence[str] = ("auto",),
    pauses: Pauses | None = None,
    listener: Listener | None = None,
    report: Reporter = silent,
) -> list[Trained]:
    """Train dictionaries, each batch read once for all of them.

    A dictionary comes out the same to the bit whether it is trained alone or with others. A training that was killed
    goes on from its last checkpoint when it is called again, and on the same device comes out the same to the bit.

    Parameters
    ----------
    vectors
        The activations; several devices need vectors that can be pickled.
    settings
        One entry a dictionary.
    reading
        How the vectors are read; as FaCT does, where it is not given.
    checkpoint_folder
        Of this training alone; None keeps nothing. A finished training leaves its last checkpoint there, from which a
        second call returns at once.
    devices
        One process works on each, on its rows of every batch, starting with this process on the first. The result is
        that of one device but for rounding, except that batchtopk then chooses among the rows of each device.
    pauses
        How often to save and to tell.
    listener
        Told of the progress of each dictionary.
    report
        Told of every step.

    Raises
    ------
    InvalidInput
        If the settings cannot be trained with, or the checkpoint is of another training.
    NotTrainable
        If the vectors are not finite, or all the same.
    NumericalFailure
        If the loss is not finite any more. The last good checkpoint is kept.
    CorruptData
        If the checkpoint is damaged.
    """
    job = _Job(vectors, tuple(settings), reading or Reading(), checkpoint_folder, pauses or Pauses())
    job.check()
    if not devices:
        raise InvalidInput("training needs a device: name auto, cpu, cuda or cuda:N")
    return run_together(
        [choose_device(name) for name in devices], partial(job.run, listener=listener, report=report), job.run
    )


@dataclass(frozen=True)
class _Job:
    """A training, as each of its processes is told of it."""

    vectors: Vectors
    settings: tuple[SaeSettings, ...]
    reading: Reading
    checkpoint_folder: Path | None
    pauses: Pauses

    @property
    def variance(self) -> float:
        """Mean squared distance of a vector from the mean."""
        return self.vectors.mean_square - float((self.vectors.mean**2).sum())

    def check(self) -> None:
        """Raise an error that says what is wrong, before any work."""
        if not self.settings:
            raise InvalidInput("nothing to train: give the settings of one dictionary or more")
        for settings in self.settings:
            settings.check()
        self.reading.check(len(self.vectors))
        if not math.isfinite(self.vectors.mean_square):
            raise _not_finite()
        if self.variance <= 1e-12 * self.vectors.mean_square:
            raise NotTrainable("all activations are the same: nothing can be learned from them")

    def identity(self) -> dict[str, Any]:
        """Return all that decides the result, as JSON."""
        data = {
            "vectors": len(self.vectors),
            "channels": self.vectors.channels,
            "mean square": self.vectors.mean_square,
            "mean": hashlib.sha256(self.vectors.mean.tobytes()).hexdigest()[:16],
        }
        dictionaries = [asdict(settings) for settings in self.settings]
        return {"data": data, "reading": asdict(self.reading), "dictionary": dictionaries}

    def run(self, group: Group, listener: Listener | None = None, report: Reporter = silent) -> list[Trained]:
        """Do one process's share."""
        return _Training(self, group, listener, report).run()


class _Training:
    """One process's share of a training."""

    def __init__(self, job: _Job, group: Group, listener: Listener | None, report: Reporter) -> None:
        self._job, self._group, self._listener, self._report = job, group, listener, report
        self._scale = math.sqrt(job.vectors.mean_square)
        mean = torch.from_numpy(job.vectors.mean / self._scale)
        count = len(job.vectors)
        self._learners = [Learner(settings, mean, count, job.reading, group) for settings in job.settings]
        self._history: list[list[Progress]] = [[] for _ in self._learners]
        self._steps_per_epoch = job.reading.steps_per_epoch(count)
        self._step = 0
        folder = job.checkpoint_folder
        self._checkpoints = None if folder is None else Checkpoints(folder, job.identity())
        self._saved = self._told = time.monotonic()

    def run(self) -> list[Trained]:
        """Train to the end, from the checkpoint where there is one."""
        self._resume()
        steps = self._steps_per_epoch * self._job.reading.epochs
        while self._step < steps:
            epoch, start = divmod(self._step, self._steps_per_epoch)
            began = time.monotonic()
            for place, batch in enumerate(self._batches(epoch, start), start):
                self._learn(batch, self._vectors(place, place + 1))
                self._report(STAGE, self._step, steps)
                self._look_up(epoch, place + 1, self._vectors(start, place + 1) / (time.monotonic() - began))
        return [
            Trained(learner.settings, learner.dictionary(self._scale), tuple(history))
            for learner, history in zip(self._learners, self._history, strict=True)
        ]

    def _vectors(self, start: int, end: int) -> int:
        """Return how many vectors the batches from ``start`` to before ``end`` of an epoch hold."""
        size, count = self._job.reading.batch_size, len(self._job.vectors)
        return min(end * size, count) - start * size

    def _batches(self, epoch: int, start: int) -> Iterator[Tensor]:
        """Yield this process's rows of the batches that are left of an epoch; there may be none in the last."""
        reading, group = self._job.reading, self._group
        batches = self._job.vectors.batches(
            reading.batch_size, seed=reading.seed, epoch=epoch, start=start, part=group.part, parts=group.parts
        )
        for _ in range(start, self._steps_per_epoch):
            yield next(batches, torch.empty(0, self._job.vectors.channels))

    def _learn(self, batch: Tensor, size: int) -> None:
        """Take one step of every dictionary."""
        self._check(batch)
        scaled = batch.to(self._group.device, non_blocking=True) / self._scale
        for learner in self._learners:
            learner.step(scaled, size)
        self._step += 1

    def _check(self, batch: Tensor) -> None:
        """Raise in every process if an entry in any is not finite."""
        bad = (~torch.isfinite(batch.sum())).float()
        if self._group.parts > 1:
            bad = self._group.total(bad.to(self._group.device))
        if bool(bad):
            raise _not_finite()

    def _look_up(self, epoch: int, done: int, speed: float) -> None:
        """Tell, note and save what is due after so many batches of an epoch."""
        now, first = time.monotonic(), self._group.part == 0
        ended = done == self._steps_per_epoch
        tell = first and self._listener is not None and now - self._told >= self._job.pauses.listener_s
        save = first and self._checkpoints is not None and (ended or now - self._saved >= self._job.pauses.checkpoint_s)
        if not (ended or tell or save):
            return
        progress = [self._progress(place, epoch, done, speed) for place in range(len(self._learners))]
        if ended:
            for learner, history, entry in zip(self._learners, self._history, progress, strict=True):
                history.append(entry)
                learner.forget()
        if tell and self._listener:
            for entry in progress:
                self._listener(entry)
            self._told = time.monotonic()
        if save:
            self._save()

    def _progress(self, place: int, epoch: int, done: int, speed: float) -> Progress:
        """Return how a dictionary does; waits for the device."""
        learner, vectors = self._learners[place], self._vectors(0, done)
        sums = learner.sums.tolist()
        if not all(map(math.isfinite, sums)):
            raise NumericalFailure(
                f"dictionary {place} of {len(self._learners)} has diverged by step {self._step}: its loss is no "
                f"number any more. Train with a lower learning rate than {learner.settings.learning_rate}"
            )
        error, active, loss = (value / vectors for value in sums[:3])
        explained = 1 - error * self._job.vectors.mean_square / self._job.variance
        return Progress(place, epoch, self._step, loss, explained, learner.dead_share(), active, speed)

    def _save(self) -> None:
        """Save where the training stands."""
        if self._checkpoints is None:
            return
        tensors = {
            f"{place}/{name}": tensor
            for place, learner in enumerate(self._learners)
            for name, tensor in learner.state().items()
        }
        self._checkpoints.save(tensors, {"step": self._step, "history": self._history})
        self._saved = time.monotonic()

    def _resume(self) -> None:
        """Go on from the checkpoint, where there is one."""
        checkpoint = self._checkpoints.load() if self._checkpoints else None
        if checkpoint is None:
            return
        self._step = checkpoint.facts["step"]
        self._history = [[Progress(*entry) for entry in history] for history in checkpoint.facts["history"]]
        for place, learner in enumerate(self._learners):
            prefix = f"{place}/"
            own = {k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)}
            learner.restore(own, self._step)


def _not_finite() -> NotTrainable:
    return NotTrainable("activations have NaN or infinite entries: check the model and its preprocessing")
