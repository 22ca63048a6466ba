"""Maps of ten concepts on the input of a B-cos model: in one batch of products, beside ten passes over a kept graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import measure
from concepts import devices, input_maps
from concepts.architectures import build
from concepts.cut import Cut
from concepts.kinds.sae import SaeCodec
from demo.models import MODELS

CONCEPTS = 10
TARGET = 3.0


def main() -> None:
    """Measure the demo's B-cos model and a B-cos ResNet-50, forward pass included on both sides."""
    device = devices.choose("auto")
    size = MODELS["bcos"].preprocessing
    cases = {
        f"the demo's B-cos model, {size.height}×{size.width}": (MODELS["bcos"].load(), "stage3", size.height),
        "B-cos ResNet-50, 224×224": (_calibrated(build("bcos:resnet50", {}), 224), "layer4", 224),
    }
    rows = [measured(name, *case, device) for name, case in cases.items()]
    measure.publish("input_maps", rows)


def _pictures(count: int, side: int) -> Tensor:
    rgb = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    return torch.cat([rgb, 1 - rgb], dim=1)


def _calibrated(network: torch.nn.Module, side: int) -> torch.nn.Module:
    """Let a network with random weights see some pictures, so that its normalisation keeps numbers from vanishing."""
    with torch.no_grad():
        for _ in range(30):
            network.train()(_pictures(2, side))
    return network.eval()


def measured(name: str, network: torch.nn.Module, layer: str, side: int, device: torch.device) -> measure.Row:
    """Measure one network, with the directions of ten random concepts."""
    network = network.to(device).eval().requires_grad_(False)
    x = _pictures(2, side).to(device)
    cut = Cut(network, layer, x)
    x = x[:1]
    encoder = torch.randn(CONCEPTS, cut.layout.channels, generator=torch.Generator().manual_seed(1))
    codec = SaeCodec(encoder.to(device), encoder.to(device), CONCEPTS)
    codes = codec.encode(cut.positions(cut.trunk(x)), torch.zeros(1, dtype=torch.int64, device=device))
    slots = (codes.ids[0] >= 0).nonzero().T
    gradients_of = partial(codec.gradients, codes)
    gradients = gradients_of(slots)

    def together() -> Tensor:
        return input_maps.input_maps(cut, input_maps.root(cut, x), x, slots, gradients_of).values[0].cpu()

    def one_by_one() -> Tensor:
        with torch.enable_grad(), cut.linearised():
            leaf = x.clone().requires_grad_()
            a = cut.trunk_with_gradients(leaf)
            at_layer: Sequence[Tensor] = [cut.unpositions(gradient) for gradient in gradients.unbind(1)]
            found = [torch.autograd.grad(a, leaf, wanted, retain_graph=True)[0] for wanted in at_layer]
        return torch.stack([(gradient * x)[0].sum(0) for gradient in found]).cpu()

    torch.testing.assert_close(together(), one_by_one(), rtol=1e-3, atol=1e-5)
    work: dict[str, Callable[[], object]] = {"together": together, "one by one": one_by_one}
    seconds = measure.interleaved(work)
    return measure.row(
        f"input_maps: {len(gradients[0])} concepts, {name}",
        1e3 * seconds["together"],
        "ms an image",
        higher_is_better=False,
        baseline="a backward pass for each, the graph retained",
        baseline_value=1e3 * seconds["one by one"],
        target=TARGET,
    )


if __name__ == "__main__":
    main()
