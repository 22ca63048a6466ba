"""Folding and rounding: the same function with less work, and nothing of the caller's changed."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from concepts.architectures import build
from concepts.cut import Cut
from concepts.model import Model
from concepts.runtimes.lowering import fold, round_weights, shared_copy
from concepts.runtimes.torch import TorchTrunk


def noise(rows: int, size: int = 32) -> Tensor:
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(rows))


def count(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(child, kind) for child in module.modules())


def test_every_normalisation_of_a_trained_network_is_folded(model: Model) -> None:
    before = copy.deepcopy(model.module.state_dict())
    folded = shared_copy(model.module)
    norms = count(folded, nn.BatchNorm2d)
    assert fold(folded, "linear", noise(1)) == norms > 0
    assert count(folded, nn.BatchNorm2d) == 0
    assert count(model.module, nn.BatchNorm2d) == norms
    x = noise(3)
    torch.testing.assert_close(folded(x), model.module(x), rtol=1e-4, atol=1e-4)
    # Against float64, so that both could not be wrong alike.
    torch.testing.assert_close(
        folded(x).double(), copy.deepcopy(model.module).double()(x.double()), rtol=1e-4, atol=1e-4
    )
    after = model.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_nothing_after_the_layer_is_folded(model: Model) -> None:
    folded = shared_copy(model.module)
    fold(folded, "layer1", noise(1))
    assert count(folded.get_submodule("layer1"), nn.BatchNorm2d) == 0
    assert count(folded.get_submodule("layer2"), nn.BatchNorm2d) == count(
        model.module.get_submodule("layer2"), nn.BatchNorm2d
    )


class Forked(nn.Module):
    """What is normalised is also used as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.join, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv(x)
        return self.fc(self.join(self.norm(a) + a).mean((2, 3)))


@pytest.mark.parametrize("layer", ["conv", "join"])
def test_what_folding_would_change_is_not_folded(layer: str) -> None:
    torch.manual_seed(0)
    module = Forked().eval().requires_grad_(False)
    module.norm.running_mean.normal_()
    module.norm.weight.normal_()
    if layer == "conv":  # a convolution's own answer is that before the normalisation
        module = nn.Sequential(module.conv, module.norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), module.fc)
        layer = "0"
    cut = Cut(module, layer, noise(2))
    x = noise(3)
    torch.testing.assert_close(TorchTrunk(cut)(x), cut.trunk(x), rtol=1e-5, atol=1e-6)


class Edited(nn.Module):
    """What is normalised was edited after the convolution, and once it is over tokens, not channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc, self.tokens = nn.Linear(4, 4), nn.BatchNorm1d(36, track_running_stats=False)
        self.out, self.head = nn.Identity(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv(x)
        a += 1
        return self.head(self.out(self.tokens(self.fc(self.norm(a).flatten(2).transpose(1, 2)))).mean(1))


def test_what_is_no_plain_pair_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    module = Edited().eval().requires_grad_(False)
    module.norm.running_mean.normal_()
    copied = shared_copy(module)
    assert fold(copied, "out", noise(2, 8)) == 0


class Picky(nn.Module):
    """A part of it leaves autocast, and does not take rounded weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.exact, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv(x)
        with torch.autocast("cpu", enabled=False):
            a = self.exact(a.float())
        return self.fc(a.mean((2, 3)))


def test_weights_that_must_not_be_rounded_are_not() -> None:
    torch.manual_seed(0)
    cut = Cut(Picky().eval().requires_grad_(False), "exact", noise(2))
    trunk, x = TorchTrunk(cut, "bfloat16"), noise(3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(trunk(x), cut.trunk(x))


def test_what_cannot_be_copied_is_run_as_it_is() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    module.lock = threading.Lock()
    cut, x = Cut(module.requires_grad_(False), "1", noise(2)), noise(3)
    for precision in ("float32", "bfloat16"):
        torch.testing.assert_close(TorchTrunk(cut, precision)(x), cut.trunk(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_weights_once_is_what_autocast_does_every_time(model: Model, dtype: torch.dtype) -> None:
    rounded = shared_copy(model.module)
    round_weights(rounded, dtype)
    x = noise(2)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        assert torch.equal(rounded(x), model.module(x))
    assert all(parameter.dtype == torch.float32 for parameter in model.module.parameters())


def test_weights_of_special_layers_are_left_alone() -> None:
    # A B-cos convolution divides its weights by their norm: rounding them first would round twice.
    module = build("bcos:cifar10_resnet20", {"num_classes": 10})
    rounded = shared_copy(module)
    round_weights(rounded, torch.bfloat16)
    x = torch.rand(1, 6, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rounded(x), module(x))
    assert all(parameter.dtype == torch.float32 for parameter in rounded.parameters())
