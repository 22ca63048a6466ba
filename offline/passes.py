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
from concepts.mixtures import MixtureHead, mixture_head
from concepts.model import Model
from offline.images import ImageBatch, Stream

_ELEMENTS = 2**23
"""Most numbers of masked activations held at a time: 32 MiB in float32. More do not go faster."""


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


def predicted(batch: ImageBatch, logits: Tensor, skipped: dict[str, str]) -> list[int]:
    """Return the predicted class of every image; −1, and a note, where the model answers with NaN or infinity."""
    finite = logits.isfinite().all(1)
    for row in (~finite).nonzero().squeeze(1).tolist():
        skipped[batch.keys[row]] = "The model answers with NaN or infinity."
    classes: list[int] = logits.argmax(1).masked_fill(~finite, -1).tolist()
    return classes


def take(targets: Iterable[int], left: dict[int, int]) -> list[int]:
    """Return the rows of a batch that are still wanted by their classes, and count them off."""
    rows = []
    for row, target in enumerate(targets):
        if left.get(target, 0) > 0:
            left[target] -= 1
            rows.append(row)
    return rows


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
        rows = take(targets.tolist(), left)
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


@torch.no_grad()
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
    head = mixture_head(cut)
    for rows, values in _masked(head, cut, codec, codes, masks):
        yield rows, head.logits(values)


@torch.no_grad()
def masked_target_logits(cut: Cut, codec: Codec, codes: Codes, masks: Tensor, targets: Tensor) -> Tensor:
    """Return each image's target logit under each mask, float64 ``[R, M]``: less work than all of its logits.

    See ``masked_logits``; targets int64 ``[R]``.
    """
    head, wanted = mixture_head(cut), targets.repeat_interleave(masks.shape[1])
    found = [
        head.target_logits(values, wanted[rows]).double() for rows, values in _masked(head, cut, codec, codes, masks)
    ]
    return torch.cat(found).view(masks.shape[:2])


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


def _masked(head: MixtureHead, cut: Cut, codec: Codec, codes: Codes, masks: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the values of masked reconstructions, by rows of the (image, mask) pairs in order."""
    images, count, slots = masks.shape
    nothing = codes.values.new_zeros(1, cut.layout.positions, cut.layout.channels)
    nothing = head.front(nothing if codec.offset is None else nothing + codec.offset)
    if slots >= count:  # to mix components, each must be decoded: with fewer masks than slots that is more work
        owner = torch.arange(images, device=masks.device).repeat_interleave(count)
        weights = masks.reshape(images * count, slots).to(codes.values.dtype)
        for rows in _slices(images * count, _ELEMENTS // (cut.layout.positions * cut.layout.channels)):
            yield rows, head.front(decode(codec, codes.rows(owner[rows]), weights[rows]))
        return
    # Many images with all their masks, or some masks of one image.
    wide = max(_ELEMENTS // nothing.numel(), 1)
    for chosen in _slices(images, wide // count):
        parts = _components(head, cut, codec, codes, chosen) - nothing
        for some in _slices(count, wide):
            mixed = torch.baddbmm(nothing.reshape(1, 1, -1), masks[chosen, some].to(parts.dtype), parts.flatten(2))
            values = mixed.reshape(-1, *nothing.shape[1:])
            first = chosen.start * count + some.start
            yield slice(first, first + len(values)), values


def _components(head: MixtureHead, cut: Cut, codec: Codec, codes: Codes, chosen: slice) -> Tensor:
    """Return the values of every component of some images, each with the offset: ``[R, S, P', C']``."""
    slots = codes.ids.shape[1]
    owner = torch.arange(chosen.start, chosen.stop, device=codes.ids.device).repeat_interleave(slots)
    one = torch.eye(slots, dtype=codes.values.dtype, device=codes.ids.device).repeat(chosen.stop - chosen.start, 1)
    found = [
        head.front(decode(codec, codes.rows(owner[rows]), one[rows]))
        for rows in _slices(len(owner), _ELEMENTS // (cut.layout.positions * cut.layout.channels))
    ]
    values = torch.cat(found)
    return values.reshape(-1, slots, *values.shape[1:])


def _slices(count: int, width: int) -> Iterator[slice]:
    """Cut a range into slices of a width, of one where that is none."""
    for start in range(0, count, max(width, 1)):
        yield slice(start, min(start + max(width, 1), count))
