"""Compiled trunks: slow to make, so a small network is enough."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from concepts.cut import Cut
from concepts.errors import InvalidModel
from concepts.runtimes.torch import TorchTrunk


def noise(rows: int) -> Tensor:
    return torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(rows))


@pytest.fixture(scope="module")
def cut() -> Cut:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    for _ in range(3):
        module(torch.randn(16, 3, 16, 16))
    return Cut(module.eval().requires_grad_(False), "2", noise(2))


def test_compiled_trunks_compute_the_same_for_batches_of_any_size(cut: Cut) -> None:
    trunk = TorchTrunk(cut, compiled=True)
    assert trunk.description == "torch cpu float32 compiled"
    for rows in (1, 2, 5):
        a = trunk(noise(rows))
        torch.testing.assert_close(a, cut.trunk(noise(rows)), rtol=1e-5, atol=1e-6)
        leaf = a.requires_grad_()
        assert torch.autograd.grad(cut.head(leaf).sum(), leaf)[0].shape == leaf.shape


def test_compiled_in_low_precision(cut: Cut) -> None:
    trunk = TorchTrunk(cut, "bfloat16", compiled=True)
    assert trunk.description == "torch cpu bfloat16 compiled"
    a = trunk(noise(3))
    assert a.dtype == torch.float32
    torch.testing.assert_close(a, TorchTrunk(cut, "bfloat16")(noise(3)), rtol=0.02, atol=0.02)
    assert not torch.equal(a, cut.trunk(noise(3)))


def test_what_cannot_be_compiled_is_refused_with_the_remedy() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x * 2 if float(x.sum()) > 0 else x).mean((2, 3)))

    branching = Cut(Branching().eval().requires_grad_(False), "conv", noise(2))
    with pytest.raises(InvalidModel, match="set compile to false"):
        TorchTrunk(branching, compiled=True)
