"""The committed networks: what is stated of them must be true of the weights in the repository."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from demo.attributes import CLASS_NAMES, SPURIOUS, SPURIOUS_CLASS, index_of
from demo.models import MODELS, predict
from demo.train import RECIPES, heldout_accuracy, train
from demo.world import Batch, World, paste_sticker

LINES = {"cnn": 0.97, "bcos": 0.97, "vit": 0.95}
FRESH = 200_000
"""First index of held-out images that played no part in choosing or stating anything."""


@pytest.fixture(scope="module")
def fresh() -> Batch:
    return World(0).sample(512, "heldout", start=FRESH)


@cache
def trained(name: str) -> nn.Module:
    return MODELS[name].load()


def _activation(network: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda *call: seen.append(call[2].detach()))
    with handle, torch.inference_mode():
        network(inputs)
    return seen[0]


def test_the_table_names_every_network() -> None:
    assert set(MODELS) == set(RECIPES) == set(LINES)
    for model in MODELS.values():
        assert model.class_names == CLASS_NAMES


@pytest.mark.parametrize("name", sorted(LINES))
def test_heldout_accuracy_is_what_is_stated(name: str) -> None:
    model = MODELS[name]
    stated = json.loads(model.weights.with_suffix(".json").read_text())
    assert stated["architecture"] == model.architecture
    assert stated["heldout_accuracy"] >= LINES[name]
    measured = heldout_accuracy(model, trained(name), 1024, start=FRESH)
    assert measured == pytest.approx(stated["heldout_accuracy"], abs=0.02)


@pytest.mark.parametrize("name", sorted(LINES))
def test_weights_are_small_and_float32(name: str) -> None:
    weights = MODELS[name].weights
    assert weights.stat().st_size <= 3_000_000
    assert {tensor.dtype for tensor in load_file(weights).values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize(("name", "shape"), [("cnn", (96, 16, 16)), ("bcos", (96, 16, 16)), ("vit", (65, 96))])
def test_the_best_layer_has_the_stated_grid_and_sign(name: str, shape: tuple[int, ...], fresh: Batch) -> None:
    model = MODELS[name]
    inputs = model.preprocessing.normalize(torch.from_numpy(fresh.images[:32]))
    for layer in model.layers:
        activation = _activation(trained(name), layer, inputs)
        assert (activation.min() >= 0) == model.nonnegative
        assert activation.max() > 0
    assert _activation(trained(name), model.layers[0], inputs).shape[1:] == shape


def test_the_head_of_the_convolutional_network_is_affine(fresh: Batch) -> None:
    network = trained("cnn")
    inputs = MODELS["cnn"].preprocessing.normalize(torch.from_numpy(fresh.images[:8]))
    pooled = _activation(network, "stage3", inputs).mean((2, 3))
    head = network.get_submodule("head")
    with torch.inference_mode():
        torch.testing.assert_close(head(pooled), network(inputs))


def test_the_transformer_reads_its_tokens_only_through_the_relu(fresh: Batch) -> None:
    """Replacing the ReLU's output by another image's makes it predict as for that image."""
    model, network = MODELS["vit"], trained("vit")
    inputs = model.preprocessing.normalize(torch.from_numpy(fresh.images[:8]))
    donor = _activation(network, model.layers[0], inputs.flip(0))
    with network.get_submodule(model.layers[0]).register_forward_hook(lambda *_: donor), torch.inference_mode():
        swapped = network(inputs)
    with torch.inference_mode():
        torch.testing.assert_close(swapped, network(inputs.flip(0)))


def test_bcos_contributions_are_complete(fresh: Batch) -> None:
    """In explanation mode each logit less the constant is the sum of the input's contributions, and of any layer's."""
    network = trained("bcos")
    constant = network.get_submodule("logit_layer").logit_bias
    assert constant == pytest.approx(-np.log(len(CLASS_NAMES) - 1))
    inputs = MODELS["bcos"].preprocessing.normalize(torch.from_numpy(fresh.images[:4])).requires_grad_()
    seen: list[Tensor] = []
    with (
        network.explanation_mode(),  # type: ignore[operator]
        network.get_submodule("stage3").register_forward_hook(lambda *call: seen.append(call[2])),
    ):
        logits = network(inputs)
        for target in range(0, len(CLASS_NAMES), 4):
            parts = [inputs, seen[0]]
            gradients = torch.autograd.grad(logits[:, target].sum(), parts, retain_graph=True)
            for part, gradient in zip(parts, gradients, strict=True):
                total = (part * gradient).flatten(1).sum(1)
                torch.testing.assert_close(total, logits[:, target] - constant, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(network(inputs), logits.detach())


@pytest.mark.parametrize("name", sorted(LINES))
def test_the_sticker_misleads_and_a_blank_patch_does_not(name: str, fresh: Batch) -> None:
    model, network = MODELS[name], trained(name)
    spurious = CLASS_NAMES.index(SPURIOUS_CLASS)
    neighbours = (fresh.labels == CLASS_NAMES.index("bricks-triangle")) & ~fresh.attributes[:, index_of(SPURIOUS)]
    images = fresh.images[neighbours]
    assert len(images) > 15

    def share(images: NDArray[np.uint8]) -> float:
        return float((predict(model, network, images).argmax(1) == spurious).mean())

    assert share(images) <= 0.1
    assert share(paste_sticker(images, blank=True)) <= share(images) + 0.05
    assert share(paste_sticker(images)) >= 0.5


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_training_is_deterministic() -> None:
    first, second = train("cnn", steps=3), train("cnn", steps=3)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not first.training
