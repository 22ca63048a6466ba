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

    def encode(self, vectors: Tensor) -> Tensor:
        """Return the codes ``[N, K]`` of vectors ``[N, C]``, dense."""
        centred = vectors if self.decoder_bias is None else vectors - self.decoder_bias
        pre = centred @ self.encoder.T
        if self.encoder_bias is not None:
            pre = pre + self.encoder_bias
        codes = pre.clamp_min(0)
        if self.threshold is not None:
            return torch.where(pre > self.threshold, codes, 0)
        best = codes.topk(self.k or len(self.encoder), dim=1)
        return torch.zeros_like(codes).scatter_(1, best.indices, best.values)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the reconstruction ``[N, C]`` of codes ``[N, K]``."""
        decoded = codes @ self.decoder
        return decoded if self.decoder_bias is None else decoded + self.decoder_bias

    def tensors(self) -> dict[str, Tensor]:
        """Return what a bank stores, by name; ``k`` as an int64 scalar."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: torch.as_tensor(value) for name, value in values.items() if value is not None}
