"""Passes of a model over images: who is predicted as what, and what a bank's concepts make of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from concepts.codec import Codec, Codes, decode
from concepts.cut import Cut
from concepts.model import Model
from offline.images import ImageBatch, Stream

_HEAD_ROWS = 256
"""Masked activations in one pass of the head."""


@dataclass(frozen=True)
class Explained:
    """Images of a batch, explained for their predicted class; R images, S concept slots."""

    keys: list[str]
    views: NDArray[np.uint8]
    """``[R, height, width, 3]``: what the model sees."""
    a: Tensor
    """Activations in the layer's layout, ``[R, …]``."""
    reconstruction: Tensor
    """From the codes, likewise."""
    logits: Tensor
    """``[R, n_classes]``."""
    targets: Tensor
    """The predicted classes, int64 ``[R]``."""
    codes: Codes
    contributions: Tensor
    """``[R, S]``."""


def activations(model: Model, cut: Cut, stream: Stream) -> Iterator[tuple[ImageBatch, Tensor]]:
    """Yield images with their activations, ``[B, …]``; those that have NaN or infinite ones are skipped.

    Parameters
    ----------
    model, cut
        A model, cut at a layer.
    stream
        The images; it notes what is skipped.
    """
    for batch in stream:
        a = cut.trunk(model.inputs(batch.views))
        finite = a.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            for row in (~finite).nonzero().squeeze(1).tolist():
                stream.skipped[batch.keys[row]] = "The model answers with activations that are NaN or infinite."
            a, batch = a[finite], batch.rows(finite.nonzero().squeeze(1).tolist())
        if batch.keys:
            yield batch, a


def predictions(model: Model, batch: ImageBatch) -> list[int]:
    """Return the predicted class of every image."""
    with torch.no_grad():
        classes: list[int] = model.module(model.inputs(batch.views)).argmax(1).tolist()
    return classes


def explain(
    model: Model, cut: Cut, codec: Codec, stream: Stream, quota: dict[int, int], *, substitute: bool = False
) -> Iterator[Explained]:
    """Explain images for their predicted classes, until each class has had its share.

    Parameters
    ----------
    model, cut, codec
        A model, cut at the layer of a bank, and the bank's codec, on the model's device.
    stream
        The images.
    quota
        How many images of each class to take; others are passed over.
    substitute
        Take the gradient at the reconstruction, as explanations do where it stands in.
    """
    left = dict(quota)
    for batch, a in activations(model, cut, stream):
        logits, gradient_of = cut.head_forward(a)
        targets = logits.argmax(1)
        rows = _take(targets.tolist(), left)
        if rows:
            gradient = None if substitute else gradient_of(targets)[rows]
            a, targets = a[rows], targets[rows]
            with torch.no_grad():
                codes = codec.encode(cut.positions(a), targets)
                reconstruction = cut.unpositions(decode(codec, codes)).to(a.dtype)
            if gradient is None:
                gradient = cut.head_gradient(reconstruction, targets)[1]
            with torch.no_grad():
                contributions = codec.contributions(codes, cut.positions(gradient)).total()
            keys = [batch.keys[row] for row in rows]
            views = batch.views[rows]
            yield Explained(keys, views, a, reconstruction, logits[rows], targets, codes, contributions)
        if not any(left.values()):
            return


def masked_logits(cut: Cut, codec: Codec, codes: Codes, masks: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Run the head on reconstructions from masked codes, ``h(decode(mask ⊙ z))``.

    A mask multiplies a concept's code at all positions (CRAFT, section 3.3).

    Parameters
    ----------
    codes
        Of R images.
    masks
        ``[R, M, S]``: M masks for each image.

    Yields
    ------
    rows : slice
        Of the R·M (image, mask) pairs in order.
    logits : Tensor
        ``[rows, n_classes]``.
    """
    images, count, slots = masks.shape
    flat = masks.reshape(images * count, slots).to(codes.values.dtype)
    owner = torch.arange(images, device=masks.device).repeat_interleave(count)
    for start in range(0, len(flat), _HEAD_ROWS):
        rows = slice(start, min(start + _HEAD_ROWS, len(flat)))
        with torch.no_grad():
            chosen = codes.rows(owner[rows])
            yield rows, cut.head(cut.unpositions(decode(codec, chosen, flat[rows])))


def masked_targets(cut: Cut, codec: Codec, codes: Codes, masks: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image's target logit, and whether the target is predicted, under each mask; ``[R, M]`` both.

    See ``masked_logits``; targets int64 ``[R]``.
    """
    images, count, _ = masks.shape
    wanted = targets.repeat_interleave(count)
    logit = torch.empty(images * count, dtype=torch.float64, device=masks.device)
    kept = torch.empty(images * count, dtype=torch.bool, device=masks.device)
    for rows, logits in masked_logits(cut, codec, codes, masks):
        logit[rows] = logits.gather(1, wanted[rows].unsqueeze(1)).squeeze(1).double()
        kept[rows] = logits.argmax(1) == wanted[rows]
    return logit.view(images, count), kept.view(images, count)


def _take(targets: Iterable[int], left: dict[int, int]) -> list[int]:
    """Return the rows of the batch that are still wanted, and count them off."""
    rows = []
    for row, target in enumerate(targets):
        if left.get(target, 0) > 0:
            left[target] -= 1
            rows.append(row)
    return rows
