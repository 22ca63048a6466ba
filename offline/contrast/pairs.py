"""Which ordered pairs of classes are looked at more closely."""

from __future__ import annotations

from torch import Tensor


def confused(runners_up: Tensor, exists: Tensor, most: int) -> list[tuple[int, int]]:
    """Return the ordered pairs (i, j) that the model confuses most, in the order of their indices.

    Parameters
    ----------
    runners_up
        How often j came second on images predicted as i, int64 ``[n, n]``.
    exists
        Whether there is a plane, bool ``[n, n]``.
    most
        Pairs at most; of equals those with the lowest indices.
    """
    ranked = runners_up.masked_fill(~exists, -1).flatten().argsort(descending=True, stable=True)
    chosen = ranked[: min(most, int(exists.sum()))].tolist()
    return sorted(divmod(place, len(exists)) for place in chosen)


def by_target(pairs: list[tuple[int, int]]) -> dict[int, list[int]]:
    """Return the other classes of each target."""
    others: dict[int, list[int]] = {}
    for target, other in pairs:
        others.setdefault(target, []).append(other)
    return others
