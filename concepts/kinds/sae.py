"""SAE banks (FaCT, arXiv 2510.25512): dictionaries with an encoder of one product, of which few latents are active.

The bank's tensors are in the units of the layer's activations: whatever scale the training used is folded in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from concepts.codec import Codec, Codes, SparseCodes
from concepts.errors import CorruptData

_ROWS = 4096
"""Positions encoded at a time: their products with all latents are what takes memory."""

_DENSE = 8
"""Where more than one in so many latents is active at every position, products with all of them are faster."""

_SPARE = 16
"""Fewest latents that screening keeps beyond the k to choose."""


class SaeCodec:
    """Codes ``z = TopK(ReLU(a W_encᵀ))`` and components ``z_k · d_k``; see ``Codec``.

    Parameters
    ----------
    encoder, decoder
        float32 ``[K, C]``.
    k
        Latents active at a position, the largest ones; None: all that exceed their threshold.
    encoder_bias, threshold
        float32 ``[K]``, or None: added to what the encoder answers; what a latent must exceed to be active.
    decoder_bias
        float32 ``[C]``, or None: taken off the activation first, and added to the reconstruction.

    Raises
    ------
    CorruptData
        If shapes do not match, a value is not finite, k is out of range, or neither k nor a threshold is there.
    """

    reconstructs = True
    differentiable = True
    per_class = False
    needs_non_negative = False

    def __init__(
        self,
        encoder: Tensor,
        decoder: Tensor,
        k: int | None,
        encoder_bias: Tensor | None = None,
        decoder_bias: Tensor | None = None,
        threshold: Tensor | None = None,
    ) -> None:
        if encoder.ndim != 2 or encoder.shape != decoder.shape or not encoder.numel():
            raise CorruptData(f"encoder {list(encoder.shape)} and decoder {list(decoder.shape)} must be alike, [K, C]")
        latents, channels = encoder.shape
        for name, vector, length in (
            ("encoder_bias", encoder_bias, latents),
            ("decoder_bias", decoder_bias, channels),
            ("threshold", threshold, latents),
        ):
            if vector is not None and vector.shape != (length,):
                raise CorruptData(f"{name} must have {length} values, not the shape {list(vector.shape)}")
        for tensor in (encoder, decoder, encoder_bias, decoder_bias, threshold):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise CorruptData("the tensors of an SAE bank must be finite")
        if k is None and threshold is None:
            raise CorruptData("an SAE bank needs k, or a threshold for each latent")
        if k is not None and not 1 <= k <= latents:
            raise CorruptData(f"k must be from 1 to the {latents} latents, not {k}")
        self._encoder, self._decoder, self._k = encoder, decoder, k
        self._encoder_bias, self._threshold, self.offset = encoder_bias, threshold, decoder_bias
        self._screen: Tensor | None = None
        self.substitutes = self.homogeneous = encoder_bias is None and decoder_bias is None

    def to(self, device: torch.device, *, screening: bool = False) -> Codec:
        """Return this codec, moved to a device; screening makes a second, smaller copy of the encoder."""
        for name in ("_encoder", "_decoder", "_encoder_bias", "_threshold", "offset"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))
        keeps_few = self._k is not None and 4 * _kept(self._k) <= len(self._encoder)
        self._screen = self._encoder.to(torch.bfloat16) if screening and keeps_few else None
        return self

    def classes(self) -> None:
        """Return None: latents belong to no class."""

    def together(self) -> Codec:
        """Return itself."""
        return self

    def encode(self, positions: Tensor, targets: Tensor) -> SparseCodes:
        """Encode every position; targets do not matter. See ``Codec.encode``."""
        del targets
        a = positions if self.offset is None else positions - self.offset
        values, concepts = zip(*(self._encode(rows) for rows in a.flatten(0, 1).split(_ROWS)), strict=True)
        # Without k the chunks may keep different numbers of latents.
        widest = max(chunk.shape[1] for chunk in values)
        shape = (*positions.shape[:2], widest)
        return SparseCodes.of(_stack(values, widest).view(shape), _stack(concepts, widest).view(shape))

    def combine(self, codes: Codes, weights: Tensor | None = None) -> Tensor:
        """Add up the atoms of active latents only; see ``Codec.combine``."""
        sparse = _sparse(codes)
        values = sparse.values if weights is None else sparse.values * sparse.per_slot(weights)
        summed = _weighted_rows(self._decoder, sparse.concepts().flatten(0, 1), values.flatten(0, 1))
        return summed.view(*values.shape[:2], -1)

    def contributions(self, codes: Codes, gradient: Tensor) -> SparseCodes:
        """Return ``m = z ⊙ ⟨G, d⟩`` of active latents only; see ``Codec.contributions``."""
        sparse = _sparse(codes)
        products = _products(self._decoder, sparse.concepts().flatten(0, 1), gradient.flatten(0, 1))
        return sparse.with_values(sparse.values * products.view_as(sparse.values))

    def gradients(self, codes: Codes, slots: Tensor) -> Tensor:
        """Return the encoder's row wherever the latent is active: which ones are is locally constant."""
        images, chosen = slots.shape
        rows = torch.arange(images, device=slots.device).repeat_interleave(chosen)
        active = (codes.maps(rows, slots.flatten()) != 0).to(self._encoder.dtype)
        wanted = codes.ids.gather(1, slots).flatten().clamp_min(0)
        found = active.unsqueeze(2) * self._encoder[wanted].unsqueeze(1)
        return found.view(images, chosen, *found.shape[1:])

    def _encode(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return the active latents of rows ``[n, C]``: codes ``[n, k]``, 0 where fewer are active, and concepts."""
        if self._screen is not None and self._k is not None:
            likely = (a.to(torch.bfloat16) @ self._screen.T).float()
            if self._encoder_bias is not None:
                likely += self._encoder_bias
            concepts = likely.topk(_kept(self._k), dim=1, sorted=False).indices
            pre = _products(self._encoder, concepts, a)
            pre = pre if self._encoder_bias is None else pre + self._encoder_bias[concepts]
            thresholds = None if self._threshold is None else self._threshold[concepts]
        else:
            pre = a @ self._encoder.T
            pre = pre if self._encoder_bias is None else pre + self._encoder_bias
            concepts, thresholds = None, self._threshold
        codes = pre.clamp_min(0)
        codes = codes if thresholds is None else codes * (pre > thresholds)
        count = self._k or max(int((codes > 0).sum(1).max()), 1)
        values, places = codes.topk(count, dim=1, sorted=False)
        return values, places if concepts is None else concepts.gather(1, places)


def _kept(k: int) -> int:
    """Return how many latents screening keeps."""
    return max(2 * k, k + _SPARE)


def _sparse(codes: Codes) -> SparseCodes:
    if not isinstance(codes, SparseCodes):
        raise TypeError("these codes are not of an SAE bank")
    return codes


def _stack(chunks: Sequence[Tensor], width: int) -> Tensor:
    return torch.cat([functional.pad(chunk, (0, width - chunk.shape[1])) for chunk in chunks])


def _weighted_rows(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return ``Σ_j weights[n, j] · table[index[n, j]]``, ``[n, C]``, without gathering the rows."""
    if _DENSE * index.shape[1] > len(table):
        return weights.new_zeros(len(index), len(table)).scatter_add_(1, index, weights) @ table
    return functional.embedding_bag(index, table, per_sample_weights=weights, mode="sum")


def _products(table: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
    """Return ``⟨table[index[n, j]], vectors[n]⟩``, ``[n, j]``, without gathering the rows.

    It is the gradient of ``⟨_weighted_rows, vectors⟩`` with respect to the weights: several times faster than a product
    of gathered rows, which are written to memory and read again.
    """
    if _DENSE * index.shape[1] > len(table):
        return (vectors @ table.T).gather(1, index)
    with torch.enable_grad():
        weights = torch.zeros(index.shape, dtype=table.dtype, device=table.device, requires_grad=True)
        summed = _weighted_rows(table.detach(), index, weights)
    return torch.autograd.grad(summed, weights, vectors.detach())[0]


def load(tensors: Mapping[str, Tensor], concept_classes: Sequence[int | None]) -> Codec:
    """Rebuild the codec from a bank's tensors.

    ``encoder`` and ``decoder`` ``[K, C]``; ``k`` int64, or ``threshold`` ``[K]``; ``encoder_bias`` ``[K]`` and
    ``decoder_bias`` ``[C]`` where there are some.
    """
    missing = {"encoder", "decoder"} - tensors.keys()
    if missing:
        raise CorruptData(f"an SAE bank needs the tensor {min(missing)!r}")
    if len(tensors["encoder"]) != len(concept_classes):
        raise CorruptData(f"{len(tensors['encoder'])} latents cannot be {len(concept_classes)} concepts")
    if any(owner is not None for owner in concept_classes):
        raise CorruptData("the concepts of an SAE bank belong to no class")
    floats = {name: tensors[name].float() for name in ("encoder_bias", "decoder_bias", "threshold") if name in tensors}
    k = int(tensors["k"]) if "k" in tensors and tensors["k"].numel() == 1 else None
    return SaeCodec(tensors["encoder"].float(), tensors["decoder"].float(), k, **floats)


def directions(tensors: Mapping[str, Tensor], channels: int) -> Tensor:
    """Return the decoder."""
    del channels
    return tensors["decoder"]
