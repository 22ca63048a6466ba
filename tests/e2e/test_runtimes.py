"""A model of another framework, and one of ours exported, computed by ONNX Runtime behind Ray Serve and gRPC."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import whence
from concepts.bank import Bank, Concept
from concepts.engine import Engine
from concepts.explanation import EngineRequest, ExplainOptions, Explanation
from concepts.repository import Repository
from demo.folder import write_folder
from demo.models import MODELS
from demo.onnx_classifier import keras_style
from offline.cli import app
from tests.e2e.conftest import RunningServer, Start

LAYERS = {"keras": "cnn_stage3_1_Relu_0", "exported": "stage3"}


def publish_bank(repository: Repository, model: str, images: list[Path]) -> None:
    """Freeze a bank of activations of real images, for all classes."""
    loaded = repository.load_model(model)
    cut = loaded.cut(LAYERS[model])
    with torch.no_grad():
        positions = cut.positions(cut.trunk(loaded.inputs(views(loaded.spec.preprocessing, images))))
    dictionary = positions.flatten(0, 1)[:: positions.shape[1] // 2 + 3][:12]
    concepts = tuple(Concept(index) for index in range(len(dictionary)))
    tensors = {"dictionary": dictionary}
    weights = loaded.spec.weights_digest
    repository.publish(Bank("nmf", model, cut.layer, "quick", weights, dictionary.shape[1], concepts, tensors))


def views(preprocessing, images: list[Path]) -> np.ndarray:
    return np.stack([preprocessing.fit(Image.open(path).convert("RGB"))[0] for path in images])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sorted(write_folder(tmp_path_factory.mktemp("images"), "heldout", 30).glob("*/*.png"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, images: list[Path]) -> Path:
    """Both models, added by the command, each with a bank."""
    folder = tmp_path_factory.mktemp("runtimes")
    root = folder / "repository"
    cnn = MODELS["cnn"]
    (folder / "classifier.onnx").write_bytes(keras_style(cnn.load()))
    common = ["--classes", ",".join(cnn.class_names), "--mean", "0.5", "--std", "0.25", "--repository", str(root)]
    ours = ["--architecture", cnn.architecture, "--options", '{"num_classes": 15}', "--weights", str(cnn.weights)]
    for arguments in (
        ["keras", "--architecture", str(folder / "classifier.onnx")],
        ["exported", *ours, "--size", "64", "--onnx"],
    ):
        done = CliRunner().invoke(app, ["model", "add", *arguments, *common])
        assert done.exit_code == 0, done.output
    for model in LAYERS:
        publish_bank(Repository(root), model, images)
    return root


@pytest.fixture(scope="module")
def server(start: Start, root: Path) -> RunningServer:
    return start(root, runtime="onnx")


@pytest.mark.parametrize("model", LAYERS)
def test_explained_by_onnx_runtime_as_by_pytorch(
    server: RunningServer, root: Path, images: list[Path], model: str
) -> None:
    repository = Repository(root)
    reference = f"{model}/{LAYERS[model]}/quick"
    loaded = repository.load_model(model)
    engine = Engine(loaded, repository.load(repository.resolve(reference)))
    right = 0
    with whence.Client(server.address) as client:
        for path in images[:15]:
            answer = client.explain(path, bank=reference, top_k=12, maps=("contribution",))
            assert answer.runtime == "onnx cpu float32"
            request = EngineRequest(options=ExplainOptions(top_k=12))
            (expected,) = engine.explain(views(loaded.spec.preprocessing, [path]), [request])
            assert isinstance(expected, Explanation)
            assert answer.target.name == expected.target.name
            right += answer.target.name == path.parent.name
            assert answer.target.probability == pytest.approx(expected.target.probability, abs=1e-4)
            largest = max(abs(concept.contribution) for concept in expected.concepts)
            own = {concept.id: concept.contribution for concept in expected.concepts}
            for concept in answer.concepts:
                assert concept.contribution == pytest.approx(own[concept.id], abs=1e-4 * largest)
                assert concept.maps["contribution"].values.shape == (16, 16)
            assert answer.faithfulness.exactness == "exact"
            assert abs(answer.faithfulness.completeness_residual) < 1e-3
    assert right >= 14  # the networks are right on 98 of 100 images


def test_both_models_are_the_same_network(server: RunningServer, images: list[Path]) -> None:
    """Their weights came by different ways: safetensors and PyTorch's exporter, and an ONNX file written by hand."""
    with whence.Client(server.address) as client:
        for path in images[:5]:
            one, other = (client.explain(path, bank=f"{model}/{layer}/quick") for model, layer in LAYERS.items())
            assert one.target.name == other.target.name
            assert one.target.logit == pytest.approx(other.target.logit, abs=1e-3)
            assert one.contributions_total == pytest.approx(other.contributions_total, rel=1e-3, abs=1e-3)


def test_what_if_through_onnx_runtime(server: RunningServer, images: list[Path]) -> None:
    bank = f"keras/{LAYERS['keras']}/quick"
    with whence.Client(server.address) as client:
        explained = client.explain(images[0], bank=bank)
        best = explained.concepts[0]
        answer = client.intervene(images[0], bank=bank, scales={best.id: 0})
        assert answer.runtime == "onnx cpu float32"
        name = explained.target.name
        before = next(score.logit for score in answer.before if score.name == name)
        after = next(score.logit for score in answer.after if score.name == name)
        # The head is affine: what is taken out is what it contributed.
        assert before - after == pytest.approx(best.contribution, abs=1e-3)


def memory_lines(server: RunningServer) -> list[str]:
    """Return what the server says of the memory of its replicas."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as reply:
        return [line for line in reply.read().decode().splitlines() if line.startswith("ray_whence_memory_bytes{")]


def test_memory_is_reported_by_model_and_bank(server: RunningServer, root: Path) -> None:
    weights = sum(t.nbytes for t in load_file(MODELS["cnn"].weights).values())
    until = time.monotonic() + 60
    for what, name, low in (
        ("model", "exported", 0.95 * weights),
        ("trunk", f"keras/{LAYERS['keras']}", 0.5 * weights),
        ("bank", f"exported/{LAYERS['exported']}/quick", 12 * 96 * 4),
    ):
        found: list[str] = []
        while not found and time.monotonic() < until:  # replicas report every few seconds
            found = [line for line in memory_lines(server) if f'what="{what}"' in line and f'name="{name}"' in line]
            time.sleep(0.5)
        (line,) = found
        assert low <= float(line.rpartition(" ")[2]) <= 10 * low


def test_two_servers_of_one_machine_answer_their_own_callers(
    server: RunningServer, start: Start, repository: Path
) -> None:
    other = start(repository)
    with whence.Client(server.address) as client, whence.Client(other.address) as client_of_other:
        for _ in range(10):
            assert {model.name for model in client.models()} == {"exported", "keras"}
            assert {model.name for model in client_of_other.models()} == {"cifar-resnet20"}
