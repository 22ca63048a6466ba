"""A trained dictionary, in the units of the activations."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dictionary:
    """Encoder and decoder of K latents for vectors of C channels.

    A latent's pre-activation is ``(a − decoder_bias) · encoder + encoder_bias``. With ``k``, a code is the k largest
    pre-activations after a ReLU; with ``threshold``, those above their threshold.
    """

    encoder: Tensor
    """float32 ``[K, C]``."""
    decoder: Tensor
    """float32 ``[K, C]``, unit rows."""
    encoder_bias: Tensor | None = None
    """``[K]``."""
    decoder_bias: Tensor | None = None
    """``[C]``."""
    threshold: Tensor | None = None
    """``[K]``, in place of ``k``."""
    k: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return what a bank stores, by name; ``k`` as an int64 scalar."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: torch.as_tensor(value) for name, value in values.items() if value is not None}
