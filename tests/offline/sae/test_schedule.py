"""Learning rates of a whole training."""

from __future__ import annotations

import itertools
import math

import pytest

from offline.sae.schedule import learning_rate, warm_up
from offline.sae.settings import SaeSettings


def test_rises_for_an_epoch_stays_for_one_and_falls_to_the_end():
    settings = SaeSettings(8, 2, learning_rate=0.1)
    rates = [learning_rate(settings, step, 10, 16) for step in range(160)]
    assert rates[:10] == pytest.approx([0.01 * (step + 1) for step in range(10)])
    assert rates[10:20] == pytest.approx([0.1] * 10)
    assert rates[20:] == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 140)) for step in range(140)])
    assert all(after < before for before, after in itertools.pairwise(rates[20:]))
    assert 0 < rates[-1] < 1e-4


def test_short_trainings_never_fall():
    settings = SaeSettings(8, 2, learning_rate=0.1, warm_up_epochs=0.0)
    assert [learning_rate(settings, step, 5, 2) for step in range(10)] == [0.1] * 10
    assert warm_up(0, 5, 0.0) == 1.0
    assert warm_up(0, 5, 0.1) == 1.0
