"""Whole trainings: known dictionaries are found, and a result depends on nothing that it should not."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from concepts.errors import CorruptData, InvalidInput, NotTrainable, NumericalFailure
from offline.sae.dictionary import Dictionary
from offline.sae.learner import Learner
from offline.sae.settings import Reading, SaeSettings
from offline.sae.training import Pauses, Progress, train
from tests.offline.sae.memory import MemoryVectors, known_world, matched_cosine

ALWAYS = Pauses(checkpoint_s=0, listener_s=0)
READING = Reading(batch_size=256, epochs=12)
SETTINGS = SaeSettings(64, 3, learning_rate=3e-3, auxk=16, bandwidth=0.05, sparsity_coefficient=0.01)
VARIANTS = {
    "topk": SETTINGS,
    "batchtopk": dataclasses.replace(SETTINGS, variant="batchtopk"),
    "jumprelu": dataclasses.replace(SETTINGS, variant="jumprelu"),
}
SMALL = Reading(batch_size=100, epochs=3)


def same(one: Dictionary, other: Dictionary) -> bool:
    first, second = one.tensors(), other.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_known_dictionary_is_found(variant, bias):
    vectors, truth = known_world()
    settings = dataclasses.replace(VARIANTS[variant], encoder_bias=bias, decoder_bias=bias)
    (found,) = train(vectors, [settings], READING, devices=["cpu"])
    assert matched_cosine(found.dictionary.decoder, truth) > 0.95
    torch.testing.assert_close(found.dictionary.decoder.norm(dim=1), torch.ones(64))
    # What is told of the last epoch is what the dictionary does.
    codes = found.dictionary.encode(vectors.rows)
    error = (found.dictionary.decode(codes) - vectors.rows).square().sum(1).mean()
    explained = 1 - float(error / (vectors.rows - vectors.rows.mean(0)).square().sum(1).mean())
    final = found.history[-1]
    assert len(found.history) == READING.epochs
    assert final.variance_explained > 0.9
    assert final.variance_explained == pytest.approx(explained, abs=0.02)
    assert final.l0 == pytest.approx(float((codes > 0).double().sum(1).mean()), rel=0.1)
