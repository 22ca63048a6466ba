"""Factorisations of one matrix, of a batch, and of any number of any lengths in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from concepts.errors import NotTrainable
from offline.nmf import starts
from offline.nmf.descent import Factorisation, descend, finish
from offline.nmf.penalties import Penalties
from offline.nmf.starts import Factors, Start

_FLOAT32_TOLERANCE = 1e-5
"""Smallest relative gradient that float32 can be trusted with."""
_MOST_PADDING = 2
"""Times as many rows as the shortest matrix of a group that the longest may have."""
_GROUP_BYTES = 2**28
"""Most bytes of a group by default: enough to keep a device busy, nothing to worry about."""
_COPIES = 8
"""Of the codes while they are improved: now, before, ahead, their target, and what products leave behind."""


def factorise(
    rows: Tensor,
    rank: int,
    *,
    start: Start = "nndsvda",
    seed: int = 0,
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
    penalties: Penalties | None = None,
) -> Factorisation:
    """Factorise non-negative matrices of one shape, each from one start.

    Parameters
    ----------
    rows
        ``A``, ``[B, N, C]`` or ``[N, C]``, ≥ 0, float32 or float64; the arithmetic is done in this type.
    rank
        K, the number of components; at most ``min(N, C)``.
    start
        ``"nndsvda"``: from the leading singular vectors; ``"random"``: uniform numbers on the scale of the data.
    seed
        Of all random numbers; problem b of a batch draws its own.
    tolerance
        On the relative norm of the projected gradient.
    max_iterations
        Alternations after which a problem is left as it is.
    penalties
        None where omitted.

    Raises
    ------
    NotTrainable
        If ``A`` has negative or non-finite entries, is all zero, or the rank does not fit it.
    """
    batch = rows if rows.ndim == 3 else rows[None]
    for matrix in batch:
        check(matrix, rank)
    lengths = [batch.shape[1]] * len(batch)
    if start == "random":
        begun = starts.random(batch, lengths, rank, [[_seed(seed, b)] for b in range(len(batch))])
    else:
        begun = starts.nndsvda(batch, lengths, rank, _seed(seed, 0))
    weights = (penalties or Penalties()).weigh(batch)
    return finish(batch, descend(batch, begun, weights, tolerance, max_iterations), weights)


def best_of(
    rows: Tensor,
    rank: int,
    *,
    random_starts: int = 4,
    seed: int = 0,
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
    penalties: Penalties | None = None,
) -> Factorisation:
    """Factorise one matrix ``[N, C]`` from the singular vectors and from random starts; see ``factorise_all``."""
    return factorise_all(
        [rows],
        rank,
        random_starts=random_starts,
        seed=seed,
        tolerance=tolerance,
        max_iterations=max_iterations,
        penalties=penalties,
    )[0]


def factorise_all(
    matrices: Sequence[Tensor],
    rank: int,
    *,
    random_starts: int = 4,
    seed: int = 0,
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
    penalties: Penalties | None = None,
    group_bytes: int = _GROUP_BYTES,
) -> list[Factorisation]:
    """Factorise many matrices, each from the singular vectors and from random starts; the best counts.

    The problem is not convex: different starts end in different places, the singular vectors not always in the best.
    Starts are compared on their way, in float32, and those that lag are given up; what wins is finished in the
    matrix' own type. Matrices of similar length are worked on together, with rows of zeros where they are shorter:
    these weigh nothing, and every answer is that of the matrix alone.

    Parameters
    ----------
    matrices
        Each ``A [N, C]``, as of ``factorise``; N may differ, and all are on one device.
    rank, seed, tolerance, max_iterations, penalties
        As of ``factorise``.
    random_starts
        How many beside the one from the singular vectors.
    group_bytes
        About how much memory may be taken at a time, beside the matrices and the answers. One matrix is always taken.

    Returns
    -------
    list
        Of batches of one, in the order of the matrices.

    Raises
    ------
    NotTrainable
        As of ``factorise``, if one matrix cannot be factorised; ``check`` tells which before.
    """
    for matrix in matrices:
        check(matrix, rank)
    found: dict[int, Factorisation] = {}
    for group in _groups(matrices, rank * (1 + random_starts), group_bytes):
        chosen = [matrices[index] for index in group]
        answer = _together(chosen, rank, random_starts, seed, tolerance, max_iterations, penalties or Penalties())
        for row, index in enumerate(group):
            one = Factorisation(*(part[row : row + 1] for part in answer))
            # A copy: the padded group is not kept alive by its parts.
            found[index] = one._replace(codes=one.codes[:, : len(matrices[index])].clone())
    return [found[index] for index in range(len(matrices))]


def check(rows: Tensor, rank: int) -> None:
    """Check that a matrix ``[N, C]`` can be factorised.

    Raises
    ------
    NotTrainable
        If it cannot.
    """
    check_rank(len(rows), rows.shape[1], rank)
    check_entries(rows)
    if not bool(rows.any()):
        raise NotTrainable("activations are all zero: nothing can be learned from them")


def check_rank(count: int, channels: int, rank: int) -> None:
    """Check that so many vectors can have so many concepts.

    Raises
    ------
    NotTrainable
        If they cannot.
    """
    size = min(count, channels)
    if rank < 1 or rank > size:
        raise NotTrainable(f"{rank} concepts do not fit {count} vectors of {channels} channels: ask for 1 to {size}")


def check_entries(rows: Tensor) -> None:
    """Check that vectors are such as can be factorised.

    Raises
    ------
    NotTrainable
        If they are not.
    """
    least, most = rows.aminmax()
    if not bool(torch.isfinite(least) & torch.isfinite(most)):
        raise NotTrainable("activations have NaN or infinite entries: check the model and its preprocessing")
    if least < 0:
        raise NotTrainable("activations have negative entries, which no non-negative factorisation can make")


def _together(
    matrices: Sequence[Tensor],
    rank: int,
    random_starts: int,
    seed: int,
    tolerance: float,
    max_iterations: int,
    penalties: Penalties,
) -> Factorisation:
    """Factorise a group."""
    lengths = [len(matrix) for matrix in matrices]
    longest = max(lengths)
    batch = torch.stack([functional.pad(matrix, (0, 0, 0, longest - len(matrix))) for matrix in matrices])
    scale = batch.amax(dim=(1, 2), keepdim=True)
    narrow = (batch / scale).float()
    begun = starts.nndsvda(narrow, lengths, rank, _seed(seed, 0))
    if random_starts:
        seeds = [[_seed(seed, start) for start in range(random_starts)]] * len(matrices)
        drawn = starts.random(narrow, lengths, rank, seeds)
        begun = Factors(*(_interleaved(one, more) for one, more in zip(begun, drawn, strict=True)))
    coarse = max(tolerance, _FLOAT32_TOLERANCE)
    raced = descend(narrow, begun, penalties.weigh(narrow), coarse, max_iterations)
    weights = penalties.weigh(batch)
    begun = Factors(raced.factors.U.to(batch) * scale, raced.factors.W.to(batch))
    return finish(batch, descend(batch, begun, weights, tolerance, max_iterations, raced.iterations), weights)


def _interleaved(one: Tensor, more: Tensor) -> Tensor:
    """Return ``[P · (1 + S), …]`` from ``[P, …]`` and ``[P · S, …]``."""
    return torch.cat([one.unsqueeze(1), more.unflatten(0, (len(one), -1))], dim=1).flatten(0, 1)


def _groups(matrices: Sequence[Tensor], components: int, group_bytes: int) -> Iterator[list[int]]:
    """Yield indices of matrices to work on together, the longest first."""
    group: list[int] = []
    for index in sorted(range(len(matrices)), key=lambda i: -len(matrices[i])):
        if group:
            longest, channels = matrices[group[0]].shape
            each = longest * (channels * 12 + components * 4 * _COPIES)
            if (len(group) + 1) * each > group_bytes or _MOST_PADDING * len(matrices[index]) < longest:
                yield group
                group = []
        group.append(index)
    if group:
        yield group


def _seed(seed: int, number: int) -> int:
    return seed * 1_000_003 + number
