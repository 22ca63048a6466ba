"""Heads taken apart: what is found of them, and that mixtures get the answers that the whole head gives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vit_b_16

from concepts import mixtures
from concepts.architectures import build
from concepts.cut import Cut
from concepts.mixtures import mixture_head


def sequence(*after: nn.Module) -> nn.Sequential:
    """Return a network whose layer "0" makes ``[B, 4, 6, 6]`` of ``[B, 3, 8, 8]``."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *after).eval().requires_grad_(False)


class Residual(nn.Module):
    """Goes around its only convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.begin, self.branch, self.end = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.begin(x)
        return self.end((a + self.branch(a)).relu().mean((2, 3)).square())


class Tokens(nn.Module):
    """Reads the first token, or the mean over the others."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 6, 2, 2), first
        self.tokens, self.norm, self.end = nn.Identity(), nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patches(x).flatten(2).transpose(1, 2)
        p = self.norm(self.tokens(torch.cat([p.mean(1, keepdim=True), p], 1)))
        return self.end(p[:, 0] if self.first else p[:, 1:].mean(1))


CASES: dict[str, tuple[Callable[[], nn.Module], str, tuple[list[int] | None, str | None, str | None]]] = {
    "all of it affine": (
        lambda: sequence(nn.AvgPool2d(6), nn.Flatten(), nn.Linear(4, 5)), "0", (None, "3", None)
    ),
    "pooled first": (
        lambda: sequence(nn.AvgPool2d(6), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 5)), "0", (None, "2", "3")
    ),
    "a product first": (
        lambda: sequence(nn.Flatten(), nn.Linear(144, 7), nn.GELU(), nn.Linear(7, 5)), "0", (None, "2", "3")
    ),
    "a convolution first": (
        lambda: sequence(nn.Conv2d(4, 6, 3), nn.SiLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(6, 5)),
        "0",
        (None, "1", "2"),
    ),
    "bent at once": (
        lambda: sequence(nn.Tanh(), nn.Flatten(), nn.Linear(144, 5)), "0", (None, None, "1")
    ),
    "bent last": (lambda: sequence(nn.Flatten(), nn.Linear(144, 5), nn.Tanh()), "0", (None, "2", "3")),
    "goes around": (Residual, "begin", (None, None, "end")),
    "the first token": (lambda: Tokens(True), "tokens", ([0], None, "norm")),
    "the other tokens": (lambda: Tokens(False), "tokens", (None, None, "norm")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_parts_are_found_and_answer_as_the_whole(name: str) -> None:
    make, layer, (read, front, back) = CASES[name]
    torch.manual_seed(1)
    module = make().eval().requires_grad_(False)
    cut = Cut(module, layer, torch.rand(2, 3, 8, 8))
    head = mixture_head(cut)
    parts = mixtures._KNOWN[cut]
    assert (parts.read.tolist() if parts.read is not None else None) == read
    assert (parts.front.layer if parts.front is not None else None) == front
    assert (parts.back.layer if parts.back is not None else None) == back
    # Mixtures of what the front answers, beside the whole head in float64 on mixtures of the activations.
    summands = torch.randn(4, cut.layout.positions, cut.layout.channels)
    weights = torch.rand(9, 4)
    weights[:, 0] += 1 - weights.sum(1)
    values = torch.einsum("mk,kpc->mpc", weights, head.front(summands))
    wide = Cut(copy.deepcopy(module).double(), layer, torch.rand(2, 3, 8, 8).double())
    expected = wide.head(wide.unpositions(torch.einsum("mk,kpc->mpc", weights.double(), summands.double())))
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(head.logits(values).double(), expected, rtol=0, atol=tolerance)
    targets = torch.arange(9) % 5
    found = head.target_logits(values, targets).double()
    torch.testing.assert_close(found, expected[torch.arange(9), targets], rtol=0, atol=tolerance)


def test_a_vision_transformers_last_layer_is_read_at_the_class_token() -> None:
    torch.manual_seed(0)
    module = vit_b_16(image_size=32, num_classes=7).eval().requires_grad_(False)
    nn.init.normal_(module.heads.head.weight, std=0.1)  # it starts at zero
    cut = Cut(module, "encoder.layers.encoder_layer_11", torch.rand(2, 3, 32, 32))
    parts = (mixture_head(cut), mixtures._KNOWN[cut])[1]
    assert parts.read is not None
    assert parts.read.tolist() == [0]
    assert parts.back is not None
    assert parts.back.layer == "encoder.ln"
    earlier = Cut(module, "encoder.layers.encoder_layer_10", torch.rand(2, 3, 32, 32))
    assert (mixture_head(earlier), mixtures._KNOWN[earlier])[1].read is None  # attention reads all tokens


@pytest.mark.parametrize("layer", ["layer2", "layer3"])
def test_a_dynamic_linear_head_is_not_taken_for_an_affine_one(layer: str) -> None:
    torch.manual_seed(0)
    module = build("bcos:cifar10_resnet20", {"num_classes": 10}).eval().requires_grad_(False)
    cut = Cut(module, layer, torch.rand(2, 6, 32, 32))
    head = mixture_head(cut)
    a = torch.randn(3, *cut.shape)
    mixed = cut.head(a.mean(0, keepdim=True))
    assert float((cut.head(a).mean(0, keepdim=True) - mixed).abs().max()) > 1e-2 * float(mixed.std())
    values = head.front(cut.positions(a)).mean(0, keepdim=True)
    torch.testing.assert_close(head.logits(values), mixed, rtol=1e-4, atol=1e-4 * float(mixed.abs().max()))


def test_what_was_found_goes_with_its_cut() -> None:
    before = len(mixtures._KNOWN)
    cut = Cut(sequence(nn.Flatten(), nn.Linear(144, 5)), "0", torch.rand(2, 3, 8, 8))
    mixture_head(cut)
    assert len(mixtures._KNOWN) == before + 1
    del cut
    assert len(mixtures._KNOWN) == before
