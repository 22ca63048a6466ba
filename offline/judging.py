"""Judging concepts on held-out images: sums over images, whatever their number."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from concepts.codec import EMPTY, Codec, Codes
from concepts.cut import Cut
from concepts.layout import Layout
from offline.encoders import Encoder
from offline.metrics import consistency, curves, dictionaries, fidelity, sparsity, usage
from offline.metrics.reconstruction import ReconstructionError
from offline.passes import Explained, masked_targets

CURVE = 25
"""Concepts that are taken away or given back, of each image the ones that contribute most."""

WHOLE = 100
"""Most concepts of a bank of which all are taken away one by one: every step costs a pass of the head an image."""

_IMAGES_A_CONCEPT = 16
"""Most images on which a concept's consistency is measured."""

_DRAWS = 4
"""Times as many images are drawn at random for its baseline: a few would leave that to chance."""


@dataclass
class Tally:
    """Which of K concepts are active and contribute; grows batch by batch, by a few numbers a concept and an image."""

    concepts: int
    positions: int
    importance: Tensor | None = None
    """What orders deletion and insertion of all of them, ``[K]``; None: each image's contributions do, and their mean
    size is the importance."""
    first: int = 0
    """Id of the first concept; the others follow."""
    digests: dict[str, str] = field(default_factory=dict)
    """sha256 of what the model sees of each image, by key."""
    predicted: list[Tensor] = field(default_factory=list)
    needed: list[Tensor] = field(default_factory=list)
    """Concepts for 80 % of the positive contribution, of each image."""
    largest: list[Tensor] = field(default_factory=list)
    """The concept that contributes most, of each image; −1 where there is none."""

    def __post_init__(self) -> None:
        self.activity = sparsity.Activity(self.concepts, self.positions)
        self.contribution, self.size = torch.zeros(2, self.concepts, dtype=torch.float64)

    @property
    def keys(self) -> list[str]:
        """Of the images, in the order in which they were seen."""
        return list(self.digests)

    @property
    def images(self) -> int:
        """How many were seen."""
        return len(self.digests)

    def count(self, batch: Explained) -> None:
        """Take in a batch."""
        for key, view in zip(batch.keys, batch.views, strict=True):
            self.digests[key] = hashlib.sha256(view.tobytes()).hexdigest()
        self.predicted.append(batch.targets.cpu())
        self.needed.append(sparsity.concepts_for_share(batch.contributions.cpu()))
        ids, contributions = self._own(batch.codes.ids).cpu(), batch.contributions.cpu().double()
        self.largest.append(usage.largest(contributions, ids))
        self.activity.add(batch.codes.active().cpu(), ids)
        used = ids != EMPTY
        self.contribution.index_add_(0, ids[used], contributions[used])
        self.size.index_add_(0, ids[used], contributions[used].abs())

    def use(self) -> dict[str, float]:
        """Return how concepts are used, by name (methods section 6)."""
        return {
            "gini": sparsity.gini(self.size if self.importance is None else self.importance),
            "code_density": self.activity.density(),
            "l0_position": self.activity.l0_per_position(),
            "l0_image": self.activity.l0_per_image(),
            "concepts_for_80": float(torch.cat(self.needed).double().mean()),
            "alive_share": self.activity.alive_share(),
            "dead_share": self.activity.dead_share(),
            "always_on_share": self.activity.always_on_share(),
        }

    def statistics(self, labels: Tensor | None) -> list[dict[str, float]]:
        """Return statistics of each concept; true classes int64 ``[N]``, or None where they are not known."""
        largest = torch.cat(self.largest)
        columns = {"active_share": self.activity.share()}
        if self.importance is None:
            columns |= {"contribution": self.contribution / self.images, "importance": self.size / self.images}
        columns["prevalence"] = usage.prevalence(largest, self.concepts)
        if labels is not None:
            correct = torch.cat(self.predicted) == labels
            columns["reliability"] = usage.reliability(largest, correct, self.concepts)
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [
            {name: value for name, value in zip(columns, row, strict=True) if not math.isnan(value)} for row in rows
        ]

    def _own(self, ids: Tensor) -> Tensor:
        """Return ids as counted from the first concept."""
        return torch.where(ids == EMPTY, EMPTY, ids - self.first)


@dataclass
class Judgement(Tally):
    """What was seen of K concepts that reconstruct; grows by what one batch needs and a few numbers a concept."""

    error: ReconstructionError = field(default_factory=ReconstructionError)
    reconstructed: list[Tensor] = field(default_factory=list)
    """What is predicted from the reconstruction."""
    kl: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    """Whether the target is predicted without, and with only, the 0, 1, … concepts that contribute most,
    ``[R, 2, steps + 1]``."""
    kept_of_all: list[Tensor] = field(default_factory=list)
    """Likewise in order of the importance, ``[R, 2, K + 1]``."""

    def add(self, cut: Cut, codec: Codec, batch: Explained) -> None:
        """Take in a batch."""
        self.count(batch)
        with torch.no_grad():
            reconstructed = cut.head(batch.reconstruction)
        self.reconstructed.append(reconstructed.argmax(1).cpu())
        self.kl.append(fidelity.kl_divergence(batch.logits, reconstructed).cpu())
        self.error.add(cut.positions(batch.a), cut.positions(batch.reconstruction))
        self._take_away(cut, codec, batch)

    def metrics(self, dictionary: Tensor, labels: Tensor | None) -> dict[str, float]:
        """Return the metrics by name (methods section 6); those that are not defined for these images are left out.

        Parameters
        ----------
        dictionary
            What components point along, ``[K, C]``.
        labels
            True classes of the images, int64 ``[N]``, or None where they are not known.
        """
        predicted, reconstructed = torch.cat(self.predicted), torch.cat(self.reconstructed)
        known = {}
        if labels is not None:
            known["accuracy"] = fidelity.accuracy(predicted, labels)
            known["accuracy_reconstructed"] = fidelity.accuracy(reconstructed, labels)
        found = {
            "images": float(self.images),
            "relative_error": self.error.relative_error(),
            "mse": self.error.mse(),
            "variance_explained": self.error.variance_explained(),
            "kl": float(torch.cat(self.kl).mean()),
            "top1_agreement": fidelity.agreement(predicted, reconstructed),
            **known,
            **self._curves(),
            **self.use(),
            "hoyer": dictionaries.hoyer(dictionary),
            "largest_cosine": dictionaries.largest_cosine(dictionary),
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _take_away(self, cut: Cut, codec: Codec, batch: Explained) -> None:
        """Note what is predicted while concepts are taken away, and while they are given back."""
        ids = self._own(batch.codes.ids)
        steps = max(CURVE, self.concepts) if self._all_by_contribution() else CURVE
        self.kept.append(_kept(cut, codec, batch, batch.contributions, steps))
        if self.importance is not None:
            order = self.importance.to(ids.device)[ids.clamp_min(0)]
            self.kept_of_all.append(_kept(cut, codec, batch, order, self.concepts))

    def _all_by_contribution(self) -> bool:
        return self.importance is None and self.concepts <= WHOLE

    def _curves(self) -> dict[str, float]:
        """Return C-Deletion and C-Insertion, of all concepts and of those that contribute most."""
        kept = torch.cat(self.kept).double().mean(0)
        pairs = {f"_{CURVE}": kept[:, : CURVE + 1]}
        if self.importance is not None:
            pairs[""] = torch.cat(self.kept_of_all).double().mean(0)
        elif self._all_by_contribution():
            pairs[""] = kept[:, : self.concepts + 1]
        found = {}
        for which, (deletion, insertion) in pairs.items():
            found[f"deletion_aopc{which}"] = curves.deletion_aopc(deletion)
            found[f"insertion_auc{which}"] = curves.insertion_auc(insertion)
        return found


def judge(
    cut: Cut, codec: Codec, concepts: int, images: Iterable[Explained], looks: Consistency | None = None
) -> Judgement:
    """Look at held-out images.

    Parameters
    ----------
    cut, codec
        Where the model is cut, and the bank's codec.
    concepts
        How many the bank holds, K.
    images
        Explained batches.
    looks
        Sees them, too.
    """
    judgement = Judgement(concepts, cut.layout.positions)
    for batch in images:
        judgement.add(cut, codec, batch)
        if looks is not None:
            looks.add(batch)
    return judgement


def _kept(cut: Cut, codec: Codec, batch: Explained, order: Tensor, steps: int) -> Tensor:
    """Return whether the target is predicted without, and with only, the first 0, 1, … concepts of an order."""
    # Empty slots come last: how many there are depends on the other images of the batch.
    order = order.double().masked_fill(batch.codes.ids == EMPTY, -torch.inf)
    needed = min(steps, order.shape[1])  # after which all are taken away, or given back
    deletion = curves.deletion_masks(order, needed)
    masks = torch.cat([deletion, 1 - deletion], dim=1)
    _, kept = masked_targets(cut, codec, batch.codes, masks, batch.targets)
    kept = kept.cpu().unflatten(1, (2, -1))
    return torch.cat([kept, kept[..., -1:].expand(-1, -1, steps - needed)], dim=2)


class Consistency:
    """How consistent concepts are to an encoder: the images that excite each most, against images drawn at random.

    Parameters
    ----------
    encoder
        The judge.
    layout
        Of the layer.
    images
        Most images to look at: their features stay in memory.
    """

    def __init__(self, encoder: Encoder, layout: Layout, images: int) -> None:
        self._encoder, self._layout, self._left = encoder, layout, images
        self._grid = layout.grid
        self._features: list[Tensor] = []
        self._means: list[Tensor] = []
        """Of the features of each image."""
        self._codes: list[Codes] = []

    def add(self, batch: Explained) -> None:
        """Take in a batch."""
        count = min(self._left, len(batch.keys))
        if count:
            self._left -= count
            features = self._encoder(batch.views[:count])
            # Whichever is coarser: features and maps are kept, and met, there.
            self._grid = min(self._layout.grid, (features.shape[2], features.shape[3]), key=math.prod)
            self._features.append(consistency.on_grid(features, self._grid))
            self._means.append(features.double().mean((2, 3)))
            self._codes.append(batch.codes.rows(torch.arange(count, device=batch.a.device)).to("cpu"))

    def scores(self, chosen: Sequence[int], seed: int = 0) -> dict[int, float]:
        """Return each chosen concept's score above its baseline (FaCT's C²); concepts active in one image have none.

        The baseline lays the concept's own maps over images drawn at random: what any region of that shape would get.
        """
        features, mean = torch.cat(self._features), torch.cat(self._means).mean(0).float()
        generator = torch.Generator().manual_seed(seed)
        scores = {}
        for concept, (images, maps) in self._best(chosen):
            activations, maps = maps.sum((1, 2)), consistency.resized(maps, self._grid)
            elsewhere = torch.randperm(len(features), generator=generator)[: _DRAWS * len(images)]
            laid = torch.arange(len(elsewhere)) % len(images)
            own, other = (
                consistency.consistency(consistency.regions(maps[which], features[place], mean), activations[which])
                for which, place in ((torch.arange(len(images)), images), (laid, elsewhere))
            )
            scores[concept] = own - other
        return scores

    def _best(self, chosen: Sequence[int]) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Yield concepts that are active in two images or more, with the best of these and the maps there."""
        activations, owners, places = self._active()
        order = activations.argsort(descending=True, stable=True)
        order = order[owners[order].argsort(stable=True)]
        owners, places = owners[order], places[order]
        wanted = torch.tensor(chosen, dtype=torch.int64)
        first, end = (torch.searchsorted(owners, wanted, right=right).tolist() for right in (False, True))
        for concept, start, stop in zip(chosen, first, end, strict=True):
            if stop - start >= 2:
                yield concept, self._maps(places[start : min(stop, start + _IMAGES_A_CONCEPT)])

    def _active(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the activation, concept and place (batch, row, slot) of every concept in every image, ``[E]``."""
        activations, owners, places = [], [], []
        for number, codes in enumerate(self._codes):
            total = self._in_place(codes).total().masked_fill(codes.ids == EMPTY, 0)
            rows, slots = (total > 0).nonzero(as_tuple=True)
            activations.append(total[rows, slots])
            owners.append(codes.ids[rows, slots])
            places.append(torch.stack([torch.full_like(rows, number), rows, slots], dim=1))
        return torch.cat(activations), torch.cat(owners), torch.cat(places)

    def _in_place(self, codes: Codes) -> Codes:
        """Return the codes ≥ 0, without those of tokens that have no place in the image."""
        values = codes.values.clamp_min(0)
        values[:, : self._layout.tokens] = 0
        return codes.with_values(values)

    def _maps(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return images and maps of places ``[M, 3]``: ``[M]`` and ``[M, h, w]``, in their order."""
        sizes = [len(codes.ids) for codes in self._codes]
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        maps = torch.empty(len(places), self._layout.grid[0] * self._layout.grid[1])
        for number in places[:, 0].unique().tolist():
            here = places[:, 0] == number
            found = self._codes[number].maps(places[here, 1], places[here, 2])
            maps[here] = found[:, self._layout.tokens :].clamp_min(0)
        return starts[places[:, 0]] + places[:, 1], maps.unflatten(1, self._layout.grid)
