"""Sparse autoencoders, end to end on real B-cos models: from logit to concept to pixel, nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import whence
from concepts.model import ModelSpec
from concepts.preprocessing import Preprocessing
from concepts.repository import Repository
from demo import cifar
from demo.folder import write_folder
from demo.models import MODELS
from tests.data import real_data
from tests.e2e.conftest import Start
from tests.e2e.test_cifar import whence_bank

CIFAR, WORLD = "bcos-cifar/layer3/sae", "bcos/stage3/sae"
ALL = 1000
"""More concepts than are active on any image."""
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of the known-concepts world."""
    folder = tmp_path_factory.mktemp("world")
    write_folder(folder, "train", 240)
    write_folder(folder, "heldout", 90)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A repository with two B-cos models, and banks that the command learned of them."""
    folder = tmp_path_factory.mktemp("repository")
    demo, data = MODELS["bcos"], real_data() / "cifar10"
    view = Preprocessing(32, 32, inverse=True)
    options = {"num_classes": 10}
    spec = ModelSpec("bcos-cifar", "bcos:cifar10_resnet20", view, cifar.CLASS_NAMES, "", options)
    Repository(folder).publish_model(spec, load_file(data / "bcos_resnet20.safetensors"))
    options = {"num_classes": len(demo.class_names)}
    spec = ModelSpec("bcos", demo.architecture, demo.preprocessing, demo.class_names, "", options)
    Repository(folder).publish_model(spec, load_file(demo.weights))
    quick = ("--sizes", "256/8", "--epochs", 3, "--exemplars", 1, "--exemplar-images", 200, "--held-out-per-class", 15)
    for model, layer, training, held_out in (
        ("bcos-cifar", "layer3", data / "train", data / "test"),
        ("bcos", "stage3", images / "train", images / "heldout"),
    ):
        done = whence_bank(
            *("train", "sae", "--model", model, "--layer", layer, "--repository", folder, "--image-limit", 400),
            *("--images", training, "--held-out", held_out, *quick),
        )
        assert done.returncode == 0, done.stderr
        assert f"{model}/{layer}/sae" in done.stdout
    assert not (folder / "work").exists() or not any((folder / "work").rglob("*.npy"))
    return folder


@pytest.fixture(scope="module")
def client(root: Path, start: Start) -> Iterator[whence.Client]:
    """A client of a service that serves them, and lists as many concepts as there are."""
    with whence.Client(start(root, limits={"top_k": ALL}).address) as connected:
        yield connected


def held_out(bank: str, images: Path) -> list[Path]:
    """Return every held-out image of a bank's model."""
    folder = real_data() / "cifar10" / "test" if bank == CIFAR else images / "heldout"
    return sorted(path for path in folder.rglob("*") if path.suffix in {".jpg", ".png", ".webp"})


@pytest.mark.parametrize(("bank", "count"), [(CIFAR, 1500), (WORLD, 90)])
def test_the_concepts_of_every_image_add_up_to_its_logit(
    client: whence.Client, images: Path, bank: str, count: int
) -> None:
    """All concepts are listed and added up here; leaving the largest out would be seen."""
    paths = held_out(bank, images)
    assert len(paths) == count
    right = 0
    for path, outcome in zip(paths, client.explain_many(paths, bank=bank, top_k=ALL, maps=()), strict=True):
        explanation = outcome.result()
        report = explanation.faithfulness
        assert explanation.substitute
        assert explanation.unexplained is None
        assert report.exactness == "exact"
        contributions = [concept.contribution for concept in explanation.concepts]
        assert len(contributions) < ALL
        gap = abs(report.explained_logit - report.constant - sum(contributions))
        allowed = TOLERANCE * max(abs(report.explained_logit), abs(report.explained_logit - report.constant))
        assert gap <= allowed, path
        assert abs(report.completeness_residual) <= allowed
        assert max(map(abs, contributions)) > 10 * allowed
        right += explanation.target.name == path.parent.name
    accuracy = client.bank(bank).metrics["mean"]["accuracy"]
    assert right / count == pytest.approx(accuracy, abs=0.05)  # the bank's is of fewer images


@pytest.mark.parametrize(("bank", "count"), [(CIFAR, 1500), (WORLD, 90)])
def test_the_pixels_of_every_map_add_up_to_the_concept(
    client: whence.Client, images: Path, bank: str, count: int
) -> None:
    """The three concepts that contribute most of one image in five, and every active concept of one in sixty."""
    paths = held_out(bank, images)
    assert len(paths) == count
    for chosen, top_k in ((paths[::5], 3), (paths[::60], ALL)):
        for path, outcome in zip(
            chosen, client.explain_many(chosen, bank=bank, top_k=top_k, maps="input"), strict=True
        ):
            explanation = outcome.result()
            report = explanation.faithfulness.input_maps
            assert report is not None
            assert (report.exactness, explanation.runtime) == ("exact", "torch cpu float32")
            assert len(explanation.concepts) == 3 or 20 < len(explanation.concepts) < top_k == ALL
            for concept in explanation.concepts:
                pixels = concept.maps["input"].values
                assert pixels.sum(dtype=float) == pytest.approx(concept.activation, rel=TOLERANCE), path
                # Without its largest pixel it would not.
                assert abs(pixels).max() > 2 * TOLERANCE * concept.activation


@pytest.mark.parametrize("name", [CIFAR, WORLD])
def test_every_active_latent_is_listed(client: whence.Client, root: Path, images: Path, name: str) -> None:
    """Against codes computed from the bank's own tensors in float64, by sorting: the least of them is not dropped."""
    repository = Repository(root)
    bank = repository.load(repository.resolve(name))
    model = repository.load_model(bank.model)
    cut = model.cut(bank.layer)
    paths = held_out(name, images)[::30]
    for path, outcome in zip(paths, client.explain_many(paths, bank=name, top_k=ALL, maps=()), strict=True):
        listed = {concept.id: concept.activation for concept in outcome.result().concepts}
        view, _ = model.spec.preprocessing.fit(Image.open(path).convert("RGB"))
        pre = cut.positions(cut.trunk(model.inputs(view[None])))[0].double() @ bank.tensors["encoder"].double().T
        kth = pre.sort(dim=1, descending=True).values[:, int(bank.tensors["k"]) - 1 : int(bank.tensors["k"])]
        activations = torch.where((pre >= kth) & (pre > 0), pre, 0).sum(0)
        clear = (activations > 1e-3 * activations.max()).nonzero().squeeze(1).tolist()
        assert set(clear) <= listed.keys()
        assert len(listed) == pytest.approx(int((activations > 0).sum()), abs=2)  # two of almost equal size may swap
        for concept in clear:
            assert listed[concept] == pytest.approx(float(activations[concept]), rel=1e-3)


def test_the_bank_says_how_good_it_is(client: whence.Client) -> None:
    for bank in (CIFAR, WORLD):
        found = client.bank(bank)
        mean = found.metrics["mean"]
        assert found.kind == "sae"
        assert mean["accuracy_reconstructed"] >= mean["accuracy"] - 0.05
        assert mean["variance_explained"] > 0.7
        assert mean["l0_position"] == pytest.approx(8, abs=0.5)
        assert 0 <= mean["dead_share"] < 0.9
    assert client.bank(WORLD).metrics["localisation"]["auroc"] > 0.7


def test_an_ordinary_answer_can_be_had_and_concepts_can_be_taken_out(client: whence.Client, images: Path) -> None:
    path = held_out(WORLD, images)[0]
    explanation = client.explain(path, bank=WORLD, substitute=False)
    assert explanation.unexplained is not None
    assert explanation.faithfulness.explained_logit == pytest.approx(explanation.target.logit, abs=1e-4)
    best = client.explain(path, bank=WORLD).concepts[0]
    answer = client.intervene(path, bank=WORLD, scales={best.id: 0.0})
    before, after = ({score.index: score.logit for score in scores} for scores in (answer.before, answer.after))
    assert after[answer.target.index] < before[answer.target.index]
