"""Groups of features that are highly active together: in the very same images, or as frequent itemsets."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from offline.subspaces.probing import Probe

Grouping = Literal["itemsets", "exact"]

STEP = 0.1
"""Of the deviations that are tried where none are found."""


class Group(NamedTuple):
    """Features that are highly active together."""

    features: tuple[int, ...]
    """Ascending."""
    images: NDArray[np.int64]
    """In which they are; ascending."""


class Limits(NamedTuple):
    """Which groups are kept."""

    min_images: int
    """A group must be active in more images than this."""
    groups: int
    """Most groups: those of most images."""
    features: int
    """Most features of a group."""


def find(high: csr_array, grouping: Grouping, limits: Limits) -> list[Group]:
    """Return groups, those of most images first.

    Parameters
    ----------
    high
        Which features are highly active in which images, 0 or 1, ``[N, C]``.
    grouping
        ``exact``: images with the identical set of highly active features form a group (FALCON). ``itemsets``: the
        closed frequent itemsets of these sets; the images of a group are all whose set contains it. A set that is some
        image's own is closed, so that these hold all groups of the other.
    limits
        Which of them are kept.
    """
    return exact(high, limits) if grouping == "exact" else itemsets(high, limits)


def distinct(groups: Sequence[Group], overlap: float) -> list[int]:
    """Return the groups that are left without near repetitions, by their places.

    Parameters
    ----------
    groups
        Those of most images first.
    overlap
        Largest share of the images of both groups together that two may have in common (their Jaccard index); of two
        with more, the first stays.
    """
    if not groups:
        return []
    columns = np.concatenate([group.images for group in groups])
    ends = np.cumsum([0, *(len(group.images) for group in groups)])
    members = csr_array((np.ones(len(columns), np.int32), columns, ends))
    common, sizes = (members @ members.T).toarray(), np.diff(ends)
    shares = common / (sizes[:, None] + sizes - common)
    kept: list[int] = []
    for place in range(len(groups)):
        if not kept or shares[place, kept].max() <= overlap:
            kept.append(place)
    return kept


def exact(high: csr_array, limits: Limits) -> list[Group]:
    """Return the groups of images with the identical set of highly active features."""
    members: dict[tuple[int, ...], list[int]] = {}
    for image in range(high.shape[0]):
        members.setdefault(_items(high, image), []).append(image)
    kept = [
        Group(features, np.array(images))
        for features, images in members.items()
        if 0 < len(features) <= limits.features and len(images) > limits.min_images
    ]
    return sorted(kept, key=lambda group: (-len(group.images), group.features))[: limits.groups]


def itemsets(high: csr_array, limits: Limits) -> list[Group]:
    """Return the closed frequent itemsets, by prefix-preserving closure extension (LCM, Uno et al. 2004).

    An extension is in fewer images than what it extends: taken up in the order of their images, the sets that come
    first are the ones of most images, and the others need not be looked at.
    """
    found: list[Group] = []
    everywhere = tuple(np.flatnonzero(high.sum(0) == high.shape[0]).tolist())
    waiting = [(-high.shape[0], everywhere, -1)]  # images, features, and the feature that was added last
    by_feature = high.tocsc()
    while waiting and len(found) < limits.groups:
        count, features, core = heapq.heappop(waiting)
        if -count <= limits.min_images or len(features) > limits.features:
            continue
        images = np.flatnonzero(by_feature[:, list(features)].sum(1) == len(features))
        if features:
            found.append(Group(features, images))
        for extension in _extensions(high[images], features, core, limits):
            heapq.heappush(waiting, extension)
        room = limits.groups - len(found)
        if len(waiting) > 2 * room:
            waiting = heapq.nsmallest(room, waiting)
    return found


def _extensions(
    rows: csr_array, features: tuple[int, ...], core: int, limits: Limits
) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Yield the closed sets one step beyond a set; every closed set is one step beyond exactly one other."""
    together = csr_array(rows.T @ rows)  # in how many images each two features are
    counts = together.diagonal()
    for added in np.flatnonzero(counts > limits.min_images).tolist():
        if added <= core or added in features:
            continue
        here = slice(together.indptr[added], together.indptr[added + 1])
        closure = np.sort(together.indices[here][together.data[here] == counts[added]]).tolist()
        before = [feature for feature in closure if feature < added]
        if len(closure) <= limits.features and before == [feature for feature in features if feature < added]:
            yield -int(counts[added]), tuple(closure), added


def most_deviations(probe: Probe, grouping: Grouping, limits: Limits) -> float | None:
    """Return the most deviations, in steps of 0.1, at which there is a group; None where there is none at any."""
    if len(probe.keys) <= limits.min_images or not probe.std:
        return None
    # No group is in more images than each of its features: that bounds the search.
    highest = probe.representations.sort(dim=0, descending=True).values[limits.min_images].max()
    most = int((float(highest) - probe.mean) / probe.std / STEP + 1e-6)
    for steps in range(most, 0, -1):
        if find(probe.highly_active(probe.threshold(steps * STEP)), grouping, limits._replace(groups=1)):
            return round(steps * STEP, 1)
    return None


def _items(high: csr_array, image: int) -> tuple[int, ...]:
    """Return the highly active features of an image, ascending."""
    return tuple(sorted(high.indices[high.indptr[image] : high.indptr[image + 1]].tolist()))
