"""Sizes of dictionaries that were published, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from concepts.errors import InvalidInput


class Size(NamedTuple):
    """How large a dictionary is, and how many of its latents are active."""

    latents: int
    k: int

    @classmethod
    def read(cls, text: str) -> Size:
        """Read ``LATENTS/K``.

        Raises
        ------
        InvalidInput
            If it has another form.
        """
        latents, _, k = text.partition("/")
        try:
            return cls(int(latents), int(k))
        except ValueError as error:
            raise InvalidInput(f"--sizes {text!r} must be LATENTS/K, e.g. 16384/16") from error


PRESETS: Mapping[str, Size] = MappingProxyType(
    {
        "fact-resnet50-layer4": Size(16_384, 16),
        "fact-resnet50-layer3": Size(16_384, 32),
        "fact-resnet50-layer2": Size(8_192, 32),
        "fact-densenet121-norm5": Size(16_384, 16),
        "fact-vitc-s-encoder_10": Size(8_192, 32),
        "fact-vitc-s-encoder_9": Size(16_384, 32),
        "fact-vitc-s-encoder_8": Size(16_384, 32),
        "fact-vitc-s-encoder_4": Size(16_384, 64),
    }
)
"""FaCT's (arXiv 2510.25512, appendix); all else of that publication is the trainer's default."""


def preset(name: str) -> Size:
    """Return a published size.

    Raises
    ------
    InvalidInput
        If there is none of that name.
    """
    if name not in PRESETS:
        raise InvalidInput(f"there is no preset {name!r}: use {', '.join(PRESETS)}")
    return PRESETS[name]
