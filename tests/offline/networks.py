"""Networks that must not be published, and one that may, for the tests of ``whence-bank model add``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Pooled(nn.Module):
    """A linear classifier of an image's mean colour, for tests only."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x).mean((2, 3)))
        return out


class AMap(Pooled):
    """Answers one logit a position."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class APair(Pooled):
    """Answers a tuple, as networks with auxiliary heads do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), x  # type: ignore[return-value]


class Picky(Pooled):
    """Takes images of one size alone."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 48:
            raise ValueError("only 48 pixels will do")
        return super().forward(x)


def pooled(num_classes: int = 2) -> nn.Module:
    return Pooled(num_classes)


def a_map() -> nn.Module:
    return AMap(2)


def a_pair() -> nn.Module:
    return APair(2)


def picky() -> nn.Module:
    return Picky(2)


def raises() -> nn.Module:
    raise OSError("out of luck")


def not_a_module() -> Tensor:
    return torch.zeros(2)


class Moody(Pooled):
    """Does one thing or another, by what it sees: no one graph has both."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.detach().mean()) > 0 else -x)


class Blinded(Pooled):
    """Answers a black image with activations that are no numbers."""

    def forward(self, x: Tensor) -> Tensor:
        dark = (x == 0).flatten(1).all(1).view(-1, 1, 1, 1)
        return super().forward(torch.where(dark, torch.nan, x))


def blinded() -> nn.Module:
    return Blinded(2)
