"""Small networks and broken factories, for tests that need one that can be built by name."""

from __future__ import annotations

import shutil
from typing import Any

from torch import Tensor, nn

rmtree = shutil.rmtree
"""A name from elsewhere, as an import would leave behind."""

not_callable = 3


class Tiny(nn.Module):
    """One convolution, pooled, and a linear head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer3 = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU())
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer3(x).mean((2, 3)))


class Coupled(Tiny):
    """Mixes the images of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


class AfraidOfTheDark(Tiny):
    """Fails on black images."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.any():
            raise ValueError("it is dark in /secret/place")
        return super().forward(x)


def tiny(width: int = 4) -> nn.Module:
    return Tiny(width)


def raises(**_options: Any) -> nn.Module:
    raise OSError("out of luck")


def a_number() -> int:
    return 3
