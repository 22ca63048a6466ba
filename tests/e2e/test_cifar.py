"""The main job, end to end on real images: learn concepts of all ten CIFAR classes, serve them, explain over gRPC."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import nnls

import whence
from concepts.repository import Repository
from tests.data import real_data
from tests.e2e.conftest import Start
from tests.e2e.repository import held_out, publish_model

BANK = "cifar-resnet20/layer3/craft"
IMAGES = held_out(per_class=2)


def whence_bank(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``whence-bank`` in a process of its own."""
    command = [sys.executable, "-c", "from offline.cli import app; app()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with ResNet-20 and a bank of all ten classes, learned by the command."""
    folder = tmp_path_factory.mktemp("cifar")
    data = real_data() / "cifar10"
    publish_model(folder)
    done = whence_bank(
        *("train", "craft", "--model", "cifar-resnet20", "--layer", "layer3", "--repository", folder),
        *("--images", data / "train", "--held-out", data / "test", "--concepts", 10, "--patch-size", 16),
        *("--images-per-class", 120, "--stability-folds", 0, "--random-starts", 0),
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("airplane", "truck"))
    return folder


@pytest.fixture(scope="module")
def client(root: Path, start: Start) -> Iterator[whence.Client]:
    """A client of a service that serves it."""
    with whence.Client(start(root).address) as connected:
        yield connected


@pytest.fixture(scope="module")
def explained(client: whence.Client) -> list[whence.Explanation]:
    """Explanations of held-out images of every class, all concepts listed."""
    outcomes = client.explain_many(IMAGES, bank=BANK, top_k=100, maps=("activation", "contribution"))
    return [outcome.result() for outcome in outcomes]


def test_every_class_has_its_concepts(client: whence.Client) -> None:
    bank = client.bank(BANK)
    assert (bank.kind, bank.concept_count, bank.channels) == ("nmf", 100, 64)
    owners = [client.concept(BANK, concept, max_exemplars=1).class_index for concept in range(0, 100, 5)]
    assert sorted(set(owners)) == list(range(10))


def test_codes_and_report_are_those_of_a_slow_reference(root: Path, explained: list[whence.Explanation]) -> None:
    repository = Repository(root)
    model = repository.load_model("cifar-resnet20")
    bank = repository.load(repository.resolve(BANK))
    views = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in IMAGES])
    cut = model.cut("layer3")
    with torch.no_grad():
        activations = cut.positions(cut.trunk(model.inputs(views))).double().numpy()
    for explanation, positions in zip(explained, activations, strict=True):
        own = [c.id for c in bank.concepts if c.class_index == explanation.target.index]
        dictionary = bank.tensors["dictionary"][own].double().numpy()
        reference = np.stack([nnls(dictionary.T, position)[0] for position in positions])
        assert sorted(c.id for c in explanation.concepts) == own
        for concept in explanation.concepts:
            codes = concept.maps["activation"].values.reshape(-1)
            expected = reference[:, own.index(concept.id)]
            assert codes.min() >= 0
            # Maps travel in half precision.
            np.testing.assert_allclose(codes, expected, atol=2e-3 * max(1.0, expected.max()))
            assert concept.activation == pytest.approx(expected.sum(), rel=1e-4, abs=1e-4)
        reconstruction = reference @ dictionary
        error = np.linalg.norm(positions - reconstruction) / np.linalg.norm(positions)
        assert explanation.faithfulness.relative_error == pytest.approx(error, rel=1e-4)
        with torch.no_grad():
            kept = cut.head(cut.unpositions(torch.as_tensor(reconstruction, dtype=torch.float32).unsqueeze(0)))
        assert explanation.faithfulness.top1_agrees == (int(kept.argmax()) == explanation.predictions[0].index)


def test_contributions_and_remainder_are_the_logit(explained: list[whence.Explanation]) -> None:
    for explanation in explained:
        report = explanation.faithfulness
        listed = sum(concept.contribution for concept in explanation.concepts)
        assert listed == pytest.approx(explanation.contributions_total, abs=1e-3)
        assert explanation.unexplained is not None
        total = report.constant + listed + explanation.unexplained
        assert total == pytest.approx(explanation.target.logit, rel=1e-4, abs=1e-3)
        assert report.exactness == "exact"
        assert abs(report.completeness_residual) < 1e-3


def test_maps_sum_to_what_they_map(explained: list[whence.Explanation]) -> None:
    for concept in (concept for explanation in explained for concept in explanation.concepts):
        activation, contribution = concept.maps["activation"].values, concept.maps["contribution"].values
        assert activation.shape == contribution.shape == (8, 8)
        assert activation.sum(dtype=np.float64) == pytest.approx(concept.activation, rel=2e-3, abs=2e-3)
        assert contribution.sum(dtype=np.float64) == pytest.approx(concept.contribution, rel=5e-3, abs=2e-3)


def test_the_model_still_predicts_as_it_does(explained: list[whence.Explanation]) -> None:
    right = [e.predictions[0].name == path.parent.name for e, path in zip(explained, IMAGES, strict=True)]
    assert np.mean(right) >= 0.7


def test_concepts_have_exemplars_of_their_class(client: whence.Client) -> None:
    concept = client.concept(BANK, 0)
    assert concept.class_name == "airplane"
    assert len(concept.exemplars) >= 4
    assert all(exemplar.picture.startswith(b"RIFF") for exemplar in concept.exemplars)


def test_nmf_of_signed_activations_is_refused_and_says_what_is_possible(tmp_path: Path) -> None:
    data = real_data() / "cifar10"
    names = ",".join(sorted(folder.name for folder in (data / "test").iterdir()))
    added = whence_bank(
        *("model", "add", "bcos", "--architecture", "bcos:cifar10_resnet20", "--options", '{"num_classes": 10}'),
        *("--weights", data / "bcos_resnet20.safetensors", "--classes", names, "--size", 32, "--inverse"),
        *("--repository", tmp_path),
    )
    assert added.returncode == 0, added.stderr
    refused = whence_bank(
        *("train", "craft", "--model", "bcos", "--layer", "layer3", "--images", data / "train"),
        *("--repository", tmp_path),
    )
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert "negative" in line
    assert "sae" in line
    assert Repository(tmp_path).banks() == []
