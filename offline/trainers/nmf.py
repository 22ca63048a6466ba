"""NMF banks for all classes together: one non-negative dictionary of the positions of a layer."""

from __future__ import annotations

import shutil
from functools import partial

from pydantic import Field

from concepts.bank import Bank
from concepts.errors import InvalidInput, NotTrainable
from concepts.kinds import load_codec
from concepts.repository import Repository
from offline.encoders import Encoder
from offline.exclusive import alone_in
from offline.free import judge_free, prepare, publish_free
from offline.harvested import HarvestedConfig, vectors_of
from offline.metrics import dictionaries
from offline.nmf import Penalties, Streamed, factorise_stream
from offline.progress import Reporter
from offline.refusals import negative_activations
from offline.store.reading import Store
from offline.store.settings import Sampling
from offline.task import Task
from offline.trainers import Outcome, Trainer


class NmfConfig(HarvestedConfig):
    """All that decides NMF banks."""

    name: str = Field("nmf", description="Name of the bank; with several ranks, it and the rank: nmf-25.")
    ranks: tuple[int, ...] = Field(
        (), description="Concepts of a bank, may be repeated: a bank each; default: 25, or the channels where less."
    )
    codes_l1: float = Field(
        0.0, ge=0, description="L1 penalty that makes codes sparse, in root mean squared lengths of the vectors."
    )
    dictionary_l1: float = Field(
        0.0, ge=0, description="L1 penalty that makes concepts sparse, in root mean squared lengths of the channels."
    )
    l2: float = Field(0.0, ge=0, description="L2 penalty on the size of components; 1 is the weight of the error.")
    tolerance: float = Field(1e-3, gt=0, description="Relative projected gradient at which a dictionary is done.")
    max_passes: int = Field(30, ge=1, description="Most passes over the vectors.")
    vectors_per_batch: int = Field(8192, ge=1, description="Vectors that are held in memory and solved at a time.")
    stability_seeds: int = Field(
        0,
        ge=0,
        description="Dictionaries from independent random starts to measure stability by; fewer than 2: none.",
    )
    sampling: Sampling = Field("uniform", description="How positions are drawn: attribution, uniform or all.")


def train(repository: Repository, config: NmfConfig, report: Reporter) -> Outcome:
    """Harvest a layer, factorise its vectors at each rank, judge and publish the dictionaries.

    Raises
    ------
    NotTrainable
        If the layer's activations can be negative or are all zero, or a rank does not fit them.
    UnknownModel, UnknownLayer, InvalidCut, UnknownClass, InvalidInput
        If the configuration does not fit the model, the images or this machine.
    AlreadyExists
        If the store holds what was harvested otherwise, or another process trains the bank.
    """
    task, encoder = prepare(repository, config, report)
    ranks = _ranks(task)
    workspace = repository.workspace(config.model, config.layer, config.name)
    with alone_in(workspace, "another training of this bank is running: wait for it, or give this one another --name"):
        store = vectors_of(task, workspace)
        learned = {rank: _learn(task, store, rank) for rank in ranks}
        banks = [_publish(repository, task, encoder, store, rank, found) for rank, found in learned.items()]
        shutil.rmtree(workspace, ignore_errors=True)
    return Outcome(tuple(banks), skipped_images={**store.skipped, **task.skipped_images})


def _ranks(task: Task[NmfConfig]) -> list[int]:
    """Return the ranks that are wanted, checked before the work."""
    config, channels = task.config, task.cut.layout.channels
    if not task.cut.non_negative:
        raise negative_activations(task.model, config.layer)
    ranks = list(dict.fromkeys(config.ranks)) or [min(25, channels)]
    for rank in ranks:
        if not 1 <= rank <= channels:
            raise InvalidInput(
                f"{rank} concepts do not fit layer {config.layer!r} of {channels} channels: ask for 1 to {channels}"
            )
    return ranks


def _learn(task: Task[NmfConfig], store: Store, rank: int) -> list[Streamed]:
    """Return the dictionary to publish, and those from independent starts."""
    config = task.config
    runs = 1 + (config.stability_seeds if config.stability_seeds > 1 else 0)
    found = []
    for run in range(runs):
        stage = f"{rank} concepts" if not run else f"{rank} concepts, start {run}"
        found.append(
            factorise_stream(
                store,
                rank,
                seed=config.seed + run,
                random_start=run > 0,
                batch_size=config.vectors_per_batch,
                sample=config.vectors_per_batch,
                tolerance=config.tolerance,
                max_passes=config.max_passes,
                penalties=Penalties(config.codes_l1, config.dictionary_l1, config.l2),
                device=task.model.device,
                listener=partial(_tell, task, stage),
            )
        )
        # It may be done in fewer passes than it was given.
        task.report(stage, config.max_passes, config.max_passes)
    if not bool(found[0].dictionary.any()):
        raise NotTrainable("the penalties leave no concept: lower them")
    return found


def _tell(task: Task[NmfConfig], stage: str, number: int, objective: float, residual: float) -> None:
    """Pass on how a dictionary does."""
    most = task.config.max_passes
    task.report(stage, min(number, most - 1), most, f"objective {objective:.4g} gradient {residual:.2g}")


def _publish(
    repository: Repository,
    task: Task[NmfConfig],
    encoder: Encoder | None,
    store: Store,
    rank: int,
    found: list[Streamed],
) -> Bank:
    """Judge and publish the first dictionary; the others differ by their starts."""
    config, best = task.config, found[0]
    dictionary = best.dictionary[best.dictionary.any(1)].float().cpu()
    tensors = {"dictionary": dictionary}
    codec = load_codec("nmf", tensors, [None] * len(dictionary))
    codec.to(task.model.device)
    judged = judge_free(task, encoder, codec, dictionary)
    judged.metrics["training"] = {
        "vectors": float(len(store)),
        "objective": best.objective / len(store),
        "projected_gradient": best.residual,
        "passes": float(best.passes),
    }
    if len(found) > 1:
        judged.metrics["mean"]["stability"] = dictionaries.stability([one.dictionary for one in found[1:]])
    return publish_free(
        repository,
        task,
        judged,
        kind="nmf",
        name=config.name if len(set(config.ranks)) <= 1 else f"{config.name}-{rank}",
        tensors=tensors,
        configuration={"method": "nmf", "concepts": rank},
        data_fingerprint=store.data_fingerprint,
    )


TRAINER = Trainer("nmf", "Learn one non-negative dictionary for all classes together (NMF).", NmfConfig, train)
