"""The layer's own channels as a bank: the baseline that learned dictionaries are compared with."""

from __future__ import annotations

import torch
from pydantic import Field

from concepts.kinds import load_codec
from concepts.repository import Repository
from offline.free import FreeConfig, judge_free, prepare, publish_free
from offline.images import fingerprint
from offline.progress import Reporter
from offline.trainers import Outcome, Trainer


class ChannelsConfig(FreeConfig):
    """All that decides a bank of channels."""

    name: str = Field("channels", description="Name of the bank; model/layer/name is its reference.")


def train(repository: Repository, config: ChannelsConfig, report: Reporter) -> Outcome:
    """Publish the channels of a layer as concepts; nothing is learned.

    A channel is one concept where the layer's activations are never negative, and two, one a sign, elsewhere. The
    reconstruction is exact.

    Raises
    ------
    UnknownModel, UnknownLayer, InvalidCut, UnknownClass, InvalidInput
        If the configuration does not fit the model, the images or this machine.
    """
    task, encoder = prepare(repository, config, report)
    channels = task.cut.layout.channels
    table, names = torch.eye(channels), [f"channel {index}" for index in range(channels)]
    if not task.cut.non_negative:
        names = [f"{name}, {sign}" for sign in ("positive", "negative") for name in names]
        table = torch.cat([table, -table])
    # Of the two signs of a channel, one is active at a position.
    tensors = {"encoder": table, "decoder": table.clone(), "k": torch.tensor(channels)}
    codec = load_codec("sae", tensors, [None] * len(table))
    codec.to(task.model.device)
    judged = judge_free(task, encoder, codec, table)
    bank = publish_free(
        repository,
        task,
        judged,
        name=config.name,
        tensors=tensors,
        configuration={"method": "channels", "latents": len(table), "k": channels},
        data_fingerprint=fingerprint({}),
        labels=names,
    )
    return Outcome((bank,), skipped_images=task.skipped_images)


TRAINER = Trainer("channels", "Publish a layer's own channels as concepts: the baseline.", ChannelsConfig, train)
