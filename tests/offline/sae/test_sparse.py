"""The three sparse products against dense ones."""

from __future__ import annotations

import pytest
import torch

from offline.sae.sparse import DensePairs, Pairs, make_pairs, sum_bags

N, K, C = 40, 23, 7


def some_pairs(seed: int = 0, share: float = 0.2):
    """A pattern with vectors and latents that have no pair, and one latent that has nearly all vectors."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(N, K, generator=g) < share
    mask[:, 4] = True
    mask[[0, 17, N - 1]] = False
    mask[:, [0, 9, K - 1]] = False
    rows, latents = mask.nonzero(as_tuple=True)
    values = torch.randn(len(rows), generator=g, dtype=torch.float64)
    matrix = torch.zeros(N, K, dtype=torch.float64)
    matrix[rows, latents] = values
    left, table = (torch.randn(size, C, generator=g, dtype=torch.float64) for size in (N, K))
    return rows, latents, values, matrix, left, table


@pytest.mark.parametrize("dense", [False, True])
def test_products_are_those_of_the_whole_matrix(dense):
    rows, latents, values, matrix, left, table = some_pairs()
    pairs = DensePairs(rows, latents, (N, K), torch.float64) if dense else Pairs(rows, latents, (N, K))
    torch.testing.assert_close(pairs.decode(values, table), matrix @ table)
    torch.testing.assert_close(pairs.dots(left, table), (left @ table.T)[rows, latents])
    torch.testing.assert_close(pairs.accumulate(values, left), matrix.T @ left)
    torch.testing.assert_close(pairs.totals(values), matrix.sum(0))


@pytest.mark.parametrize("dense", [False, True])
def test_no_pairs_and_no_vectors_give_zeros(dense):
    none = torch.empty(0, dtype=torch.int64)
    table = torch.randn(K, C)
    for n in (0, 5):
        pairs = DensePairs(none, none, (n, K), torch.float32) if dense else Pairs(none, none, (n, K))
        assert torch.equal(pairs.decode(torch.empty(0), table), torch.zeros(n, C))
        assert pairs.dots(torch.randn(n, C), table).shape == (0,)
        assert torch.equal(pairs.accumulate(torch.empty(0), torch.randn(n, C)), torch.zeros(K, C))
        assert torch.equal(pairs.totals(torch.empty(0)), torch.zeros(K))


@pytest.mark.parametrize("longest", [1, 3, 10, 64, 10_000])
def test_long_sums_are_split_without_a_difference(longest):
    g = torch.Generator().manual_seed(1)
    sizes = torch.tensor([0, 0, 5, 1, 0, 97, 10, 0, 30, 0])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)[:-1]])
    members = torch.randint(N, (int(sizes.sum()),), generator=g)
    table = torch.randn(N, C, generator=g, dtype=torch.float64)
    weights = torch.randn(len(members), generator=g, dtype=torch.float64)
    expected = torch.stack([part.sum(0) for part in (table[members] * weights[:, None]).split(sizes.tolist())])
    torch.testing.assert_close(sum_bags(members, table, starts, weights, longest), expected)


def test_what_is_less_work_is_chosen():
    rows, latents, *_ = some_pairs(share=0.9)
    assert isinstance(make_pairs(rows, latents, (N, K), torch.float32), DensePairs)
    assert type(make_pairs(rows[:5], latents[:5], (N, K), torch.float32)) is Pairs
