"""Several processes train as one does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from concepts.errors import CorruptData, NotTrainable
from offline.sae.settings import Reading, SaeSettings
from offline.sae.training import train
from tests.offline.sae.memory import MemoryVectors, known_world

READING = Reading(batch_size=100, epochs=3)
SETTINGS = SaeSettings(
    64, 3, auxk=8, encoder_bias=True, decoder_bias=True, dead_after_epochs=0.2, bandwidth=0.05, encoder_dtype="float32"
)


def test_two_processes_give_the_weights_of_one():
    vectors, _ = known_world(401)  # the last batch has one vector, and nothing for the second process
    settings = [SETTINGS, dataclasses.replace(SETTINGS, variant="jumprelu")]
    one = train(vectors, settings, READING, devices=["cpu"])
    two = train(vectors, settings, READING, devices=["cpu", "cpu"])
    for alone, shared in zip(one, two, strict=True):
        assert alone.history[-1].dead_share > 0  # the dead were at work
        for name, tensor in alone.dictionary.tensors().items():
            torch.testing.assert_close(shared.dictionary.tensors()[name], tensor, atol=1e-5, rtol=1e-5)
        assert alone.history[-1].loss == pytest.approx(shared.history[-1].loss, rel=1e-5)
        assert alone.history[-1].l0 == pytest.approx(shared.history[-1].l0, rel=1e-5)


@dataclass
class Troubled(MemoryVectors):
    """Vectors that are spoiled or cannot be read, for the second process alone."""

    error: bool = False

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, part: int = 0, parts: int = 1
    ) -> Iterator[Tensor]:
        for batch in super().batches(batch_size, seed=seed, epoch=epoch, start=start, part=part, parts=parts):
            if part == 1 and self.error:
                raise CorruptData("a shard is damaged")
            yield batch * torch.nan if part == 1 else batch


@pytest.mark.parametrize(("error", "kind"), [(True, CorruptData), (False, NotTrainable)])
def test_trouble_in_another_process_is_told(error, kind):
    vectors, _ = known_world(400)
    with pytest.raises(kind):
        train(Troubled(vectors.rows, error=error), [SETTINGS], READING, devices=["cpu", "cpu"])
