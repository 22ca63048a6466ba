"""Whole trainings: known dictionaries are found, and a result depends on nothing that it should not."""

from __future__ import annotations

import dataclasses
import math
import resource
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from concepts.errors import CorruptData, InvalidInput, NotTrainable, NumericalFailure
from offline.sae.checkpoint import Checkpoints
from offline.sae.dictionary import Dictionary
from offline.sae.group import Group
from offline.sae.learner import Learner, normalise_rows, remove_parallel
from offline.sae.settings import Reading, SaeSettings
from offline.sae.training import Pauses, Progress, train
from tests.offline.sae.memory import MemoryVectors, decoded, dense_codes, known_world, matched_cosine

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
    codes = dense_codes(found.dictionary, vectors.rows)
    error = (decoded(found.dictionary, codes) - vectors.rows).square().sum(1).mean()
    explained = 1 - float(error / (vectors.rows - vectors.rows.mean(0)).square().sum(1).mean())
    final = found.history[-1]
    assert len(found.history) == READING.epochs
    assert final.variance_explained > 0.9
    assert final.variance_explained == pytest.approx(explained, abs=0.02)
    assert final.l0 == pytest.approx(float((codes > 0).double().sum(1).mean()), rel=0.1)


def test_the_dead_revive():
    vectors, _ = known_world(4096, atoms=48)
    scaled = vectors.rows / math.sqrt(vectors.mean_square)
    shares = []
    for coefficient in (0.0, 1 / 32):
        settings = dataclasses.replace(SETTINGS, latents=48, auxk_coefficient=coefficient)
        learner = Learner(settings, scaled.mean(0), len(scaled), READING, Group(torch.device("cpu")))
        state = learner.state()
        state["weights/encoder"][:24] *= 0.01  # they see something, but never most
        learner.restore(state, 0)
        for batch in scaled.split(256) * 6:
            learner.step(batch, len(batch))
        shares.append(learner.dead_share())
    assert shares[0] == pytest.approx(0.5, abs=0.05)
    assert shares[1] < 0.1


def test_gradients_of_rows_are_orthogonal_to_them_and_rows_stay_unit():
    g = torch.Generator().manual_seed(0)
    rows, gradient = torch.randn(20, 30, generator=g), torch.randn(20, 30, generator=g)
    normalise_rows(rows)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(20))
    before = gradient.clone()
    remove_parallel(gradient, rows)
    torch.testing.assert_close((gradient * rows).sum(1), torch.zeros(20), atol=1e-5, rtol=0)
    # Only what is parallel was taken.
    taken = before - gradient
    torch.testing.assert_close(taken, (taken * rows).sum(1, keepdim=True) * rows, atol=1e-5, rtol=0)


def test_a_step_follows_clipped_gradients_that_leave_rows_their_length():
    vectors, _ = known_world(500)
    scaled = 30 * vectors.rows  # far too long, so that gradients are too
    learner = Learner(SETTINGS, scaled.mean(0), len(scaled), SMALL, Group(torch.device("cpu")))
    rows = learner.state()["weights/decoder"].clone()
    learner.step(scaled, len(scaled))
    state = learner.state()
    assert float(learner.sums[3]) > 10
    # After one step Adam's first moment is a tenth of the gradient that it was given.
    first = [state[f"exp_avg/{name}"] * 10 for name in ("encoder", "decoder")]
    assert math.hypot(*(float(moment.norm()) for moment in first)) == pytest.approx(1.0, rel=1e-3)
    torch.testing.assert_close((first[1] * rows).sum(1), torch.zeros(64), atol=1e-6, rtol=0)
    torch.testing.assert_close(state["weights/decoder"].norm(dim=1), torch.ones(64))


def test_a_dictionary_does_not_depend_on_its_company():
    vectors, _ = known_world(1000)
    settings = [*VARIANTS.values(), dataclasses.replace(SETTINGS, latents=40, k=5, seed=3, decoder_bias=True)]
    together = train(vectors, settings, SMALL, devices=["cpu"])
    for one, found in zip(settings, together, strict=True):
        (alone,) = train(vectors, [one], SMALL, devices=["cpu"])
        assert same(alone.dictionary, found.dictionary)
        assert alone.history[-1][3:7] == found.history[-1][3:7]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scale_of_the_vectors_is_folded_in(variant):
    vectors, _ = known_world(1000)
    settings = dataclasses.replace(VARIANTS[variant], encoder_bias=True, decoder_bias=True)
    (small,) = train(vectors, [settings], SMALL, devices=["cpu"])
    for factor in (8.0, 10.0):
        (large,) = train(MemoryVectors(vectors.rows * factor), [settings], SMALL, devices=["cpu"])
        codes = dense_codes(small.dictionary, vectors.rows)
        # Eight is a power of two: not a bit is rounded otherwise. Ten may choose otherwise at a tie.
        differs = (dense_codes(large.dictionary, vectors.rows * factor) / factor - codes).abs() > 1e-3
        assert float(differs.double().mean()) <= (0 if factor == 8.0 else 0.01)
        assert large.history[-1].loss == pytest.approx(small.history[-1].loss, rel=1e-2)


RESUMED = """
import sys, time
from dataclasses import replace
from pathlib import Path
from offline.sae.training import train
from tests.offline.sae.memory import known_world
from tests.offline.sae.test_training import ALWAYS, SMALL, VARIANTS

def report(stage, done, total):
    print(done, flush=True)
    time.sleep(0.02)

train(known_world(1000)[0], list(VARIANTS.values()), SMALL, devices=["cpu"], checkpoint_folder=Path(sys.argv[1]),
      pauses=ALWAYS, report=report)
"""


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path):
    vectors, _ = known_world(1000)
    settings = list(VARIANTS.values())
    for lives in (7, 9):
        process = subprocess.Popen([sys.executable, "-c", RESUMED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout as lines:
            steps = [int(next(lines)) for _ in range(lives)]
            process.send_signal(signal.SIGKILL)
        process.wait()
    # The second life began where the first one ended, give or take the step that was being saved.
    assert 6 <= steps[0] <= 9
    done: list[int] = []
    resumed = train(
        vectors,
        settings,
        SMALL,
        devices=["cpu"],
        checkpoint_folder=tmp_path,
        report=lambda stage, step, total: done.append(step),
    )
    assert steps[-1] <= done[0] <= steps[-1] + 2
    assert done[-1] == 30
    for one, other in zip(resumed, train(vectors, settings, SMALL, devices=["cpu"]), strict=True):
        assert same(one.dictionary, other.dictionary)
        assert [entry[:7] for entry in one.history] == [entry[:7] for entry in other.history]


def test_a_finished_training_returns_from_its_checkpoint(tmp_path):
    vectors, _ = known_world(500)
    (first,) = train(vectors, [SETTINGS], SMALL, devices=["cpu"], checkpoint_folder=tmp_path)
    steps: list[int] = []
    (again,) = train(
        vectors,
        [SETTINGS],
        SMALL,
        devices=["cpu"],
        checkpoint_folder=tmp_path,
        report=lambda stage, done, total: steps.append(done),
    )
    assert steps == []
    assert same(first.dictionary, again.dictionary)
    assert first.history == again.history


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": [dataclasses.replace(SETTINGS, latents=80)]}, "dictionary 0 latents was 64 and is now 80"),
        ({"settings": [dataclasses.replace(SETTINGS, variant="batchtopk")]}, "variant was topk and is now batchtopk"),
        ({"settings": [SETTINGS, SETTINGS]}, "dictionary had 1 entries and now has 2"),
        ({"reading": dataclasses.replace(SMALL, batch_size=50)}, "reading batch_size was 100 and is now 50"),
        ({"vectors": known_world(500, seed=1)[0]}, "data mean"),
        ({"vectors": known_world(500, channels=50)[0]}, "data channels was 48 and is now 50"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(change, named, tmp_path):
    asked = {"vectors": known_world(500)[0], "settings": [SETTINGS], "reading": SMALL}

    def run(vectors, settings, reading):
        train(vectors, settings, reading, devices=["cpu"], checkpoint_folder=tmp_path)

    run(**asked)
    with pytest.raises(InvalidInput, match=named) as caught:
        run(**asked | change)
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_a_damaged_checkpoint_is_told(damage, tmp_path):
    vectors, _ = known_world(500)
    train(vectors, [SETTINGS], SMALL, devices=["cpu"], checkpoint_folder=tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "other": b"no tensors", "empty": b""}[damage])
    with pytest.raises(CorruptData, match="delete it"):
        train(vectors, [SETTINGS], SMALL, devices=["cpu"], checkpoint_folder=tmp_path)


def test_a_full_disk_is_told_and_leaves_the_old_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save({"weights": torch.zeros(10)}, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(InvalidInput, match="make room") as caught:
            checkpoints.save({"weights": torch.zeros(10_000)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) not in caught.value.message
    assert len(list(tmp_path.iterdir())) == 1
    kept = checkpoints.load()
    assert kept is not None
    assert kept.facts == {"step": 1}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_vectors_that_are_not_finite_are_refused(value):
    vectors, _ = known_world(500)
    late = MemoryVectors(vectors.rows.clone())
    assert late.mean_square + late.mean.sum() > 0  # both are kept from before the damage
    late.rows[123, 4] = value
    with pytest.raises(NotTrainable, match="NaN or infinite"):
        train(late, [SETTINGS], SMALL, devices=["cpu"])
    with pytest.raises(NotTrainable, match="NaN or infinite"):
        train(MemoryVectors(late.rows), [SETTINGS], SMALL, devices=["cpu"])


def test_a_training_that_diverges_stops_and_keeps_its_last_good_checkpoint(tmp_path):
    vectors, _ = known_world(500)
    # The rise takes three epochs: the first steps are harmless.
    wild = dataclasses.replace(SETTINGS, learning_rate=1e30, warm_up_epochs=3.0, gradient_norm=1e30)
    with pytest.raises(NumericalFailure, match="lower learning rate than 1e\\+30"):
        train(vectors, [wild], SMALL, devices=["cpu"], checkpoint_folder=tmp_path, pauses=ALWAYS)
    for file in tmp_path.iterdir():
        for name, tensor in safetensors.torch.load_file(file).items():
            assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize(
    ("settings", "reading", "words"),
    [
        ({"k": 65}, {}, "k must be 1 to 64"),
        ({"k": 0}, {}, "k must be 1 to 64"),
        ({"latents": 0}, {}, "1 or more"),
        ({"learning_rate": math.nan}, {}, "learning_rate must be positive"),
        ({"bandwidth": 0.0}, {}, "bandwidth must be positive"),
        ({"auxk_coefficient": -1.0}, {}, "auxk_coefficient must be zero or positive"),
        ({"auxk": 0}, {}, "auxk must be 1 or more"),
        ({"variant": "relu"}, {}, "use topk, batchtopk, jumprelu"),
        ({"encoder_dtype": "float16"}, {}, "use auto, float32, bfloat16"),
        ({}, {"batch_size": 501}, "ask for 1 to 500"),
        ({}, {"batch_size": 0}, "ask for 1 to 500"),
        ({}, {"epochs": 0}, "1 epoch or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, reading, words):
    with pytest.raises(InvalidInput, match=words):
        train(
            known_world(500)[0],
            [dataclasses.replace(SETTINGS, **settings)],
            dataclasses.replace(SMALL, **reading),
            devices=["cpu"],
        )


def test_nothing_to_train_with_or_on_is_refused():
    vectors, _ = known_world(500)
    with pytest.raises(InvalidInput, match="nothing to train"):
        train(vectors, [], SMALL, devices=["cpu"])
    with pytest.raises(InvalidInput, match="needs a device"):
        train(vectors, [SETTINGS], SMALL, devices=[])
    with pytest.raises(InvalidInput, match="there is no device"):
        train(vectors, [SETTINGS], SMALL, devices=["warp"])
    for constant in (0.0, 2.5):
        with pytest.raises(NotTrainable, match="all activations are the same"):
            train(MemoryVectors(torch.full((500, 48), constant)), [SETTINGS], SMALL, devices=["cpu"])


def test_progress_is_told_as_often_as_asked():
    vectors, _ = known_world(450)
    told: list[Progress] = []
    steps: list[tuple[int, int]] = []
    both = [SETTINGS, VARIANTS["batchtopk"]]
    found = train(
        vectors,
        both,
        SMALL,
        devices=["cpu"],
        pauses=ALWAYS,
        listener=told.append,
        report=lambda stage, done, total: steps.append((done, total)),
    )
    assert steps == [(step, 15) for step in range(1, 16)]
    assert [(entry.dictionary, entry.step) for entry in told] == [(d, s) for s in range(1, 16) for d in (0, 1)]
    assert [entry for entry in told if entry.dictionary == 1 and entry.step % 5 == 0] == list(found[1].history)
    assert all(entry.l0 == pytest.approx(3.0) and entry.vectors_per_second > 0 for entry in told)
    quiet: list[Progress] = []
    train(vectors, both, SMALL, devices=["cpu"], pauses=Pauses(listener_s=3600), listener=quiet.append)
    assert quiet == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_trains_as_a_cpu_does_and_twice_the_same(variant):
    vectors, truth = known_world()
    settings = dataclasses.replace(VARIANTS[variant], encoder_bias=True, decoder_bias=True)
    first, again = (train(vectors, [settings], READING, devices=["cuda"])[0] for _ in range(2))
    assert same(first.dictionary, again.dictionary)
    assert matched_cosine(first.dictionary.decoder, truth) > 0.95
    exact = dataclasses.replace(settings, encoder_dtype="float32")
    short = Reading(batch_size=1024, epochs=1)
    on_cpu, on_gpu = (train(vectors, [exact], short, devices=[device])[0] for device in ("cpu", "cuda"))
    for name, tensor in on_cpu.dictionary.tensors().items():
        torch.testing.assert_close(on_gpu.dictionary.tensors()[name], tensor, atol=1e-4, rtol=1e-3)
