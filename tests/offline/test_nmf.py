"""NMF against scikit-learn on the same input, and the laws that any solution obeys."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, nnls
from torch import Tensor

from concepts.errors import NotTrainable
from offline.crops import CropGrid
from offline.images import Stream, open_folder
from offline.nmf import Factorisation, Penalties, best_of, factorise, factorise_all, projected_gradient
from tests.offline.worlds import MODEL, cifar, repository


def rectified(n: int, c: int, seed: int) -> Tensor:
    """Rows as a ReLU layer gives them."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 12, generator=g, dtype=torch.float64)
    return (hidden @ torch.randn(12, c, generator=g, dtype=torch.float64)).clamp_min(0)


def noisy_product(n: int, c: int, seed: int) -> Tensor:
    g = np.random.default_rng(seed)
    return torch.from_numpy(g.gamma(0.5, size=(n, 8)) @ g.gamma(0.5, size=(8, c)) + 0.05 * g.random((n, c)))


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    """Mean activations of the crops of real images of some classes, of different numbers."""
    model = repository(tmp_path_factory.mktemp("nmf")).load_model(MODEL)
    cut, preprocessing = model.cut("layer3"), model.spec.preprocessing
    grid, folder = CropGrid.of(preprocessing, 16, enlarge=False), open_folder(cifar() / "train")
    found = []
    for name, count in (("ship", 60), ("frog", 100), ("cat", 80)):
        keys = [key for key in folder.keys if folder.label(key) == name][:count]
        (batch,) = Stream(folder, keys, preprocessing, count, {})
        with torch.no_grad():
            a = cut.trunk(grid.crops(model.inputs(batch.views)))
        found.append(cut.positions(a).mean(1).double())
    return found


def scikit_learn(rows: Tensor, rank: int) -> float:
    """Return the objective that it reaches."""
    from sklearn.decomposition import NMF

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says itself where its iterations are not enough
        reference = NMF(rank, init="nndsvda", solver="cd", tol=1e-6, max_iter=5000, random_state=0).fit(rows.numpy())
    return 0.5 * float(reference.reconstruction_err_) ** 2


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("make", "n", "c", "rank", "starts"),
    [(rectified, 300, 64, 10, 8), (rectified, 200, 48, 25, 16), (noisy_product, 200, 64, 8, 4)],
)
def test_objective_is_not_worse_than_scikit_learn(make, n, c, rank, starts, seed):
    rows = make(n, c, seed)
    ours = best_of(rows, rank, random_starts=starts, tolerance=1e-6)
    # Local minima differ: 0.01 % is what remains between two ways down to the same one.
    assert float(ours.objective) <= scikit_learn(rows, rank) * (1 + 1e-4)


@pytest.mark.parametrize("rank", [6, 10])
def test_objective_on_real_activations_is_not_worse_than_scikit_learn(crops, rank):
    for rows, ours in zip(crops, factorise_all(crops, rank), strict=True):
        assert float(ours.objective) <= scikit_learn(rows, rank) * (1 + 1e-5)


def same(one: Factorisation, other: Factorisation) -> None:
    torch.testing.assert_close(one.objective, other.objective, rtol=1e-6, atol=0)
    torch.testing.assert_close(one.dictionary, other.dictionary, rtol=0, atol=2e-3)
    torch.testing.assert_close(one.codes, other.codes, rtol=0, atol=2e-3 * float(other.codes.max()))


@pytest.mark.parametrize("penalties", [None, Penalties(codes_l1=0.05, dictionary_l1=0.05, l2=0.02)])
def test_many_together_are_as_each_alone(crops, penalties):
    matrices = [crops[0], crops[1], crops[2][:37], crops[2]]
    how = {"random_starts": 3, "seed": 5, "penalties": penalties}
    together, in_small_groups = factorise_all(matrices, 6, **how), factorise_all(matrices, 6, group_bytes=1, **how)
    for rows, one, small in zip(matrices, together, in_small_groups, strict=True):
        alone = best_of(rows, 6, **how)
        assert one.codes.shape == (1, len(rows), 6)
        same(one, alone)
        assert all(torch.equal(a, b) for a, b in zip(small, alone, strict=True))
        torch.testing.assert_close(projected_gradient(rows[None], one.codes, one.dictionary, penalties), one.residual)
        assert float(one.residual) <= 1e-5


def test_one_that_takes_all_its_iterations_leaves_the_others_theirs():
    how = {"random_starts": 1, "tolerance": 1e-7, "max_iterations": 205}
    slow, quick = factorise_all([noisy_product(80, 16, 3), rectified(80, 16, 0)], 5, **how)
    assert int(slow.iterations) == 205 > int(quick.iterations)
    assert float(slow.residual) > 1e-7 >= float(quick.residual)


def test_more_starts_are_never_worse_than_the_first_alone(crops):
    for rows in crops:
        assert float(best_of(rows, 8).objective) <= float(best_of(rows, 8, random_starts=0).objective) * (1 + 1e-6)


def test_scale_of_the_data_changes_nothing(crops):
    plain, scaled = (best_of(crops[0] * factor, 5, penalties=PENALTIES[-1]) for factor in (1.0, 1e-6))
    torch.testing.assert_close(scaled.dictionary, plain.dictionary, rtol=0, atol=1e-3)
    torch.testing.assert_close(scaled.objective, plain.objective * 1e-12, rtol=1e-6, atol=0)


PENALTIES = [
    Penalties(codes_l1=0.1),
    Penalties(dictionary_l1=0.1),
    Penalties(l2=0.2),
    Penalties(codes_l1=0.05, dictionary_l1=0.1, l2=0.05),
]


def penalised(rows: Tensor, codes: Tensor, dictionary: Tensor, penalties: Penalties) -> Tensor:
    """The objective as it is defined, one component after the other."""
    N, C = rows.shape
    length = rows.square().sum().sqrt()
    total = 0.5 * (rows - codes @ dictionary).square().sum()
    for u, w in zip(codes.T, dictionary, strict=True):
        total = total + penalties.codes_l1 * length / N**0.5 * u.abs().sum() * w.norm()
        total = total + penalties.dictionary_l1 * length / C**0.5 * u.norm() * w.abs().sum()
        total = total + penalties.l2 / 2 * (u.norm() * w.norm()) ** 2
    return total


@pytest.mark.parametrize("penalties", PENALTIES)
def test_penalised_objective_is_not_worse_than_that_of_a_general_solver(penalties):
    rows, g = rectified(60, 14, 7), np.random.default_rng(0)
    found = best_of(rows, 4, random_starts=8, penalties=penalties, tolerance=1e-6)
    value = penalised(rows, found.codes[0], found.dictionary[0], penalties)
    torch.testing.assert_close(found.objective[0], value)

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        flat = torch.from_numpy(x).requires_grad_()
        total = penalised(rows, flat[: 60 * 4].view(60, 4), flat[60 * 4 :].view(4, 14), penalties)
        return float(total.detach()), torch.autograd.grad(total, flat)[0].nan_to_num().numpy()

    bounds, many = [(0, None)] * (60 * 4 + 4 * 14), {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-13, "gtol": 1e-9}
    starts = [g.random(60 * 4 + 4 * 14) for _ in range(6)]
    reached = [minimize(objective, x, jac=True, bounds=bounds, method="L-BFGS-B", options=many).fun for x in starts]
    assert float(value) <= min(reached) * (1 + 1e-5)
    # And from where ours ended there is no way down.
    end = np.concatenate([found.codes[0].flatten().numpy(), found.dictionary[0].flatten().numpy()])
    further = minimize(objective, end, jac=True, bounds=bounds, method="L-BFGS-B", options=many).fun
    assert further >= float(value) * (1 - 1e-5)


def test_penalties_do_what_they_are_for(crops):
    plain = best_of(crops[1], 8)
    sparse_codes = best_of(crops[1], 8, penalties=Penalties(codes_l1=0.1))
    assert (sparse_codes.codes > 0).double().mean() < 0.8 * (plain.codes > 0).double().mean()
    sparse_concepts = best_of(crops[1], 8, penalties=Penalties(dictionary_l1=0.3))
    assert (sparse_concepts.dictionary > 0).double().mean() < 0.8 * (plain.dictionary > 0).double().mean()
    small = best_of(crops[1], 8, penalties=Penalties(l2=1.0))
    assert small.codes.norm() < 0.8 * plain.codes.norm()
    # What is not worth its price is left out whole.
    dear = best_of(crops[1], 8, penalties=Penalties(dictionary_l1=10.0))
    assert not dear.codes.any()
    assert float(dear.objective) == pytest.approx(0.5 * float(crops[1].square().sum()))
    assert float(dear.residual) <= 1e-5


@pytest.mark.parametrize("penalties", PENALTIES)
def test_projected_gradient_has_the_penalties_in_it(penalties):
    rows, g = rectified(20, 8, 5), torch.Generator().manual_seed(1)
    codes = torch.rand(1, 20, 3, generator=g, dtype=torch.float64)
    dictionary = torch.rand(1, 3, 8, generator=g, dtype=torch.float64)
    gradients = torch.func.grad(lambda u, w: penalised(rows, u[0], w[0], penalties), argnums=(0, 1))(codes, dictionary)
    constants = (rows @ dictionary.mT, codes.mT @ rows)
    parts = [float(gradient.norm() / constant.norm()) for gradient, constant in zip(gradients, constants, strict=True)]
    value = float(projected_gradient(rows[None], codes, dictionary, penalties))
    assert value == pytest.approx(np.hypot(*parts))
    # Of other scales of the same components, only the norms that it is relative to differ.
    scaled = float(projected_gradient(10 * rows[None], 5 * codes, 2 * dictionary, penalties))
    assert scaled == pytest.approx(value)


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
