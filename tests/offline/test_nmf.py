"""NMF against scikit-learn on the same input, and the laws that any solution obeys."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from concepts.errors import NotTrainable
from offline.nmf import best_of, factorise, projected_gradient


def rectified(n: int, c: int, seed: int) -> Tensor:
    """Rows as a ReLU layer gives them."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 12, generator=g, dtype=torch.float64)
    return (hidden @ torch.randn(12, c, generator=g, dtype=torch.float64)).clamp_min(0)


def noisy_product(n: int, c: int, seed: int) -> Tensor:
    g = np.random.default_rng(seed)
    return torch.from_numpy(g.gamma(0.5, size=(n, 8)) @ g.gamma(0.5, size=(8, c)) + 0.05 * g.random((n, c)))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("make", "n", "c", "rank", "starts"),
    [(rectified, 300, 64, 10, 8), (rectified, 200, 48, 25, 8), (noisy_product, 200, 64, 8, 1)],
)
def test_objective_is_not_worse_than_scikit_learn(make, n, c, rank, starts, seed):
    from sklearn.decomposition import NMF

    rows = make(n, c, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says itself that 200 iterations are not enough
        reference = NMF(rank, init="nndsvda", random_state=0).fit(rows.numpy())
    ours = best_of(rows, rank, random_starts=starts, tolerance=1e-4)
    # Local minima differ: 0.01 % is what remains between two ways down to the same one.
    assert float(ours.objective) <= 0.5 * reference.reconstruction_err_**2 * (1 + 1e-4)


def test_solution_is_stationary_and_reported_as_it_is():
    rows = rectified(200, 30, 3)
    found = factorise(rows, 6, tolerance=1e-6)
    assert (found.codes >= 0).all()
    assert (found.dictionary >= 0).all()
    torch.testing.assert_close(found.dictionary.norm(dim=2), torch.ones(1, 6, dtype=torch.float64))
    error = 0.5 * (rows - found.codes[0] @ found.dictionary[0]).square().sum()
    torch.testing.assert_close(found.objective[0], error)
    assert float(found.residual) <= 1e-6
    # With W fixed, U solves a least squares problem: scipy must find the same codes.
    atoms = found.dictionary[0].T.numpy()
    reference = np.stack([nnls(atoms, row)[0] for row in rows.numpy()])
    np.testing.assert_allclose(found.codes[0].numpy(), reference, atol=1e-3 * reference.max())


def test_exact_product_is_recovered():
    g = torch.Generator().manual_seed(0)
    # Every concept has crops and channels of its own, which makes the factors unique.
    codes = torch.rand(120, 4, generator=g, dtype=torch.float64) * (torch.rand(120, 4, generator=g) < 0.4)
    dictionary = torch.eye(4, 20, dtype=torch.float64) + torch.rand(4, 20, generator=g, dtype=torch.float64) * (
        torch.arange(20) >= 4
    )
    found = best_of(codes @ dictionary, 4, tolerance=1e-9, max_iterations=5000)
    assert float(found.objective) < 1e-8
    expected = torch.nn.functional.normalize(dictionary, dim=1)
    cosines = expected @ found.dictionary[0].T
    torch.testing.assert_close(cosines.max(1).values, torch.ones(4, dtype=torch.float64), atol=1e-4, rtol=0)


def test_projected_gradient_matches_finite_differences_and_is_scale_free():
    rows, g = rectified(20, 8, 5), torch.Generator().manual_seed(1)
    codes = torch.rand(1, 20, 3, generator=g, dtype=torch.float64)
    dictionary = torch.rand(1, 3, 8, generator=g, dtype=torch.float64)
    codes[0, :5, 0] = 0

    def objective(u: Tensor, w: Tensor) -> Tensor:
        return 0.5 * (rows - u[0] @ w[0]).square().sum()

    gradients = torch.func.grad(objective, argnums=(0, 1))(codes, dictionary)
    parts = []
    for factor, gradient, constant in zip(
        (codes, dictionary), gradients, (rows @ dictionary.mT, codes.mT @ rows), strict=True
    ):
        allowed = torch.where((factor == 0) & (gradient > 0), 0.0, gradient)
        parts.append(float(allowed.norm() / constant.norm()))
    value = float(projected_gradient(rows[None], codes, dictionary))
    assert value == pytest.approx(np.hypot(*parts))
    scaled = float(projected_gradient(10 * rows[None], 5 * codes, 2 * dictionary))
    assert scaled == pytest.approx(value)


def test_problems_of_a_batch_do_not_meet():
    batch = torch.stack([rectified(80, 16, seed) for seed in range(3)])
    together = factorise(batch, 5, seed=4)
    assert len(set(together.iterations.tolist())) > 1  # they end at different times
    for row in range(3):
        alone = factorise(batch[row], 5, seed=4)
        # The start's random probe differs with the place in the batch; where it leads does not.
        torch.testing.assert_close(together.objective[row], alone.objective[0], rtol=1e-4, atol=0)


def test_same_seed_same_bits_other_seed_other_start():
    rows = rectified(60, 12, 0)
    first, again, other = (factorise(rows, 4, start="random", seed=s, max_iterations=5) for s in (1, 1, 2))
    assert torch.equal(first.dictionary, again.dictionary)
    assert not torch.equal(first.dictionary, other.dictionary)


def test_rows_of_zeros_weigh_nothing():
    rows = rectified(60, 12, 0)
    padded = torch.cat([rows, torch.zeros(30, 12, dtype=torch.float64)])
    plain, with_zeros = best_of(rows, 4, tolerance=1e-8), best_of(padded, 4, tolerance=1e-8)
    torch.testing.assert_close(plain.objective, with_zeros.objective, rtol=1e-5, atol=0)
    assert not with_zeros.codes[0, 60:].any()


def test_float32_ends_near_float64():
    rows = rectified(100, 20, 2)
    narrow = factorise(rows.float(), 5, tolerance=1e-4)
    assert narrow.dictionary.dtype == torch.float32
    assert float(narrow.objective) == pytest.approx(float(factorise(rows, 5).objective), rel=1e-2)


@pytest.mark.parametrize(
    ("rows", "rank", "words"),
    [
        (-torch.ones(9, 9), 2, "negative"),
        (torch.full((9, 9), torch.nan), 2, "NaN"),
        (torch.zeros(9, 9), 2, "all zero"),
        (torch.ones(3, 9), 4, "4 concepts do not fit 3 vectors"),
        (torch.ones(9, 3), 4, "ask for 1 to 3"),
    ],
)
def test_bad_input_is_refused_with_a_reason(rows, rank, words):
    with pytest.raises(NotTrainable, match=words):
        factorise(rows, rank)
