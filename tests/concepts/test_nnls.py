"""Non-negative least squares against scipy, row by row, and against the conditions of optimality."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from numpy.typing import NDArray

from concepts import nnls

TOLERANCE = 1e-9
"""The violation that is promised; written here so that loosening the code shows."""


def reference(dictionary: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solve every row by itself with scipy."""
    return np.stack([scipy.optimize.nnls(dictionary.T, row, maxiter=100 * len(dictionary))[0] for row in rows])


def solve(dictionary: NDArray[np.float64], rows: NDArray[np.float64]) -> nnls.Solution:
    d, a = torch.from_numpy(dictionary), torch.from_numpy(rows)
    return nnls.solve((d @ d.T)[None], (a @ d.T)[None])


def violation(
    dictionary: NDArray[np.float64], rows: NDArray[np.float64], codes: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance of each row from optimality, atoms scaled to length one: from the definition, with no Gram matrix."""
    length = np.linalg.norm(dictionary, axis=1)
    length[length == 0] = 1.0
    unit = dictionary / length[:, None]
    slope = (codes @ dictionary - rows) @ unit.T
    size = np.abs(rows @ unit.T).max(1)
    return np.abs(np.minimum(codes * length, slope)).max(1) / np.where(size > 0, size, 1.0)


def objective(dictionary: NDArray[np.float64], rows: NDArray[np.float64], codes: NDArray[np.float64]) -> float:
    return float(((codes @ dictionary - rows) ** 2).sum())


@pytest.mark.parametrize(
    ("k", "channels", "rows"),
    [(1, 1, 5), (1, 64, 40), (2, 3, 60), (5, 64, 200), (10, 512, 80), (25, 64, 150), (60, 80, 40), (150, 200, 30)],
)
@pytest.mark.parametrize("sign", ["non_negative", "mixed"])
def test_equal_to_scipy(k: int, channels: int, rows: int, sign: str) -> None:
    rng = np.random.default_rng(k * channels)
    dictionary, data = rng.normal(size=(k, channels)), rng.normal(size=(rows, channels))
    if sign == "non_negative":
        dictionary, data = np.abs(dictionary), np.abs(data)
    codes, stated = solve(dictionary, data)
    assert codes.dtype == torch.float64
    assert (codes >= 0).all()
    np.testing.assert_allclose(codes[0].numpy(), reference(dictionary, data), rtol=1e-8, atol=1e-9)
    assert float(stated.max()) <= TOLERANCE


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_ill_conditioned_dictionaries(condition: float) -> None:
    rng = np.random.default_rng(7)
    u, _, v = np.linalg.svd(rng.normal(size=(12, 30)), full_matrices=False)
    dictionary = u @ np.diag(np.geomspace(1, 1 / condition, 12)) @ v
    data = rng.normal(size=(100, 30))
    codes, stated = solve(dictionary, data)
    expected = reference(dictionary, data)
    assert objective(dictionary, data, codes[0].numpy()) <= objective(dictionary, data, expected) * (1 + 1e-9)
    assert violation(dictionary, data, codes[0].numpy()).max() <= TOLERANCE
    assert float(stated.max()) <= TOLERANCE


def test_more_atoms_than_channels_is_optimal_though_not_unique() -> None:
    rng = np.random.default_rng(1)
    dictionary, data = np.abs(rng.normal(size=(30, 8))), np.abs(rng.normal(size=(200, 8)))
    codes, stated = solve(dictionary, data)
    expected = reference(dictionary, data)
    assert objective(dictionary, data, codes[0].numpy()) == pytest.approx(
        objective(dictionary, data, expected), rel=1e-8
    )
    assert violation(dictionary, data, codes[0].numpy()).max() <= TOLERANCE
    assert float(stated.max()) <= TOLERANCE


def test_duplicate_atoms_share_or_take_turns() -> None:
    rng = np.random.default_rng(2)
    distinct, data = np.abs(rng.normal(size=(5, 20))), np.abs(rng.normal(size=(50, 20)))
    twice = np.concatenate([distinct, 3 * distinct, distinct[:1]])
    codes = solve(twice, data).codes[0].numpy()
    together = codes[:, :5] + 3 * codes[:, 5:10]
    together[:, 0] += codes[:, 10]
    np.testing.assert_allclose(together, reference(distinct, data), rtol=1e-7, atol=1e-8)
    assert violation(twice, data, codes).max() <= TOLERANCE


def test_zero_atoms_get_no_code_and_change_no_other() -> None:
    rng = np.random.default_rng(3)
    dictionary, data = np.abs(rng.normal(size=(6, 20))), np.abs(rng.normal(size=(50, 20)))
    holes = np.zeros((9, 20))
    holes[[0, 1, 3, 4, 6, 7]] = dictionary
    codes = solve(holes, data).codes[0].numpy()
    assert (codes[:, [2, 5, 8]] == 0).all()
    np.testing.assert_allclose(codes[:, [0, 1, 3, 4, 6, 7]], reference(dictionary, data), rtol=1e-8, atol=1e-9)
    assert (solve(np.zeros((3, 20)), data).codes == 0).all()


def test_rows_of_zeros_and_rows_that_point_away() -> None:
    dictionary = np.abs(np.random.default_rng(4).normal(size=(6, 20)))
    data = np.stack([np.zeros(20), -np.ones(20), np.ones(20)])
    codes, stated = solve(dictionary, data)
    assert (codes[0, :2] == 0).all()
    assert (codes[0, 2] > 0).any()
    assert (stated <= TOLERANCE).all()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("holes", [0, 2])
def test_codes_scale_with_the_data_and_against_the_dictionary(scale: float, holes: int) -> None:
    rng = np.random.default_rng(5)
    dictionary, data = np.abs(rng.normal(size=(6, 20))), np.abs(rng.normal(size=(40, 20)))
    dictionary = np.concatenate([dictionary, np.zeros((holes, 20))])
    codes = solve(dictionary, data).codes.numpy()
    np.testing.assert_allclose(
        solve(dictionary, scale * data).codes.numpy(), scale * codes, rtol=1e-7, atol=1e-9 * scale
    )
    np.testing.assert_allclose(solve(scale * dictionary, data).codes.numpy() * scale, codes, rtol=1e-7, atol=1e-9)


def test_groups_rows_and_batches_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(6)
    dictionaries, data = np.abs(rng.normal(size=(4, 7, 20))), np.abs(rng.normal(size=(4, 30, 20)))
    dictionaries[2, 5:] = 0
    data[1, 3] = 0
    d, a = torch.from_numpy(dictionaries), torch.from_numpy(data)
    together = nnls.solve(d @ d.mT, a @ d.mT)
    for group in range(4):
        alone = solve(dictionaries[group], data[group])
        torch.testing.assert_close(together.codes[group], alone.codes[0], rtol=1e-10, atol=1e-12)
        for row in (0, 3, 29):
            single = solve(dictionaries[group], data[group, row : row + 1]).codes[0, 0]
            torch.testing.assert_close(together.codes[group, row], single, rtol=1e-10, atol=1e-12)


def test_the_stated_violation_is_that_of_each_row() -> None:
    """A row that has no solution (NaN) says so and leaves the others exact."""
    rng = np.random.default_rng(8)
    dictionary, data = np.abs(rng.normal(size=(6, 20))), np.abs(rng.normal(size=(10, 20)))
    broken = data.copy()
    broken[4] = np.nan
    codes, stated = solve(dictionary, broken)
    assert stated.shape == (1, 10)
    sound = [row for row in range(10) if row != 4]
    np.testing.assert_allclose(codes[0, sound].numpy(), reference(dictionary, data[sound]), rtol=1e-8, atol=1e-9)
    assert (stated[0, sound] <= TOLERANCE).all()
    assert not stated[0, 4] <= TOLERANCE


def test_arguments_are_left_as_they_were() -> None:
    gram, b = torch.eye(3, dtype=torch.float64)[None] * 2, torch.ones(1, 4, 3, dtype=torch.float64)
    gram[0, 1, 1] = gram[0, 1, 0] = 0.0
    before = gram.clone(), b.clone()
    nnls.solve(gram, b)
    assert torch.equal(gram, before[0])
    assert torch.equal(b, before[1])


def test_no_rows() -> None:
    codes, stated = nnls.solve(torch.eye(3)[None], torch.zeros(1, 0, 3))
    assert codes.shape == (1, 0, 3)
    assert stated.shape == (1, 0)


def test_degenerate_rows_that_cycle_under_full_exchanges_still_end() -> None:
    """Strongly correlated atoms of mixed sign need the backup rule of block pivoting."""
    rng = np.random.default_rng(9)
    common = rng.normal(size=(1, 40))
    dictionary = common + 0.05 * rng.normal(size=(40, 40))
    data = rng.normal(size=(300, 40)) + common
    codes, stated = solve(dictionary, data)
    assert float(stated.max()) <= TOLERANCE
    np.testing.assert_allclose(codes[0].numpy(), reference(dictionary, data), rtol=1e-5, atol=1e-6)


# Gradients


def unambiguous(rng: np.random.Generator, k: int, channels: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dictionary and rows whose active sets stay as they are for small steps: codes and slopes are far from zero."""
    dictionary = np.abs(rng.normal(size=(k, channels)))
    data = np.abs(rng.normal(size=(20 * rows, channels)))
    codes = reference(dictionary, data)
    slopes = (codes @ dictionary - data) @ dictionary.T
    stable = np.maximum(codes, slopes).min(1) > 0.02
    assert stable.sum() >= rows
    return torch.from_numpy(dictionary), torch.from_numpy(data[stable][:rows])


def test_gradients_on_many_atoms_are_those_of_the_active_ones() -> None:
    rng = np.random.default_rng(14)
    dictionary = torch.from_numpy(np.abs(rng.normal(size=(150, 40))))
    a = torch.from_numpy(np.abs(rng.normal(size=(10, 40)))).requires_grad_()
    codes = nnls.codes(a[None], dictionary[None])[0]
    (found,) = torch.autograd.grad((codes * torch.arange(150)).sum(), a)
    for row in range(10):
        active = codes[row].detach() > 0
        slope = torch.linalg.pinv(dictionary[active].T)
        torch.testing.assert_close(found[row], torch.arange(150).double()[active] @ slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("k", "channels"), [(1, 4), (4, 9), (6, 6)])
def test_gradients_are_finite_differences(k: int, channels: int) -> None:
    rng = np.random.default_rng(10 + k)
    groups = [unambiguous(rng, k, channels, 3) for _ in range(2)]
    dictionary, a = (torch.stack(each).requires_grad_() for each in zip(*groups, strict=True))
    assert torch.autograd.gradcheck(nnls.codes, (a, dictionary), eps=1e-6, atol=1e-6)
    some = nnls.codes(a, dictionary)
    assert k == 1 or bool((some == 0).any())
    assert bool((some > 0).any())


def test_gradients_by_hand_with_scipy() -> None:
    """Central differences of scipy's codes, which share nothing with the code here; with atoms that are absent."""
    d, a = unambiguous(np.random.default_rng(11), 5, 8, 4)
    holes = torch.zeros(7, 8, dtype=torch.float64)
    holes[[0, 1, 3, 4, 6]] = d
    leaf = a.clone().requires_grad_()
    codes = nnls.codes(leaf[None], holes[None])[0]
    step = 1e-6
    for atom in range(7):
        (found,) = torch.autograd.grad(codes[:, atom].sum(), leaf, retain_graph=True)
        for channel in range(8):
            move = np.zeros(8)
            move[channel] = step
            rise = reference(holes.numpy(), a.numpy() + move) - reference(holes.numpy(), a.numpy() - move)
            np.testing.assert_allclose(found[:, channel], rise[:, atom] / (2 * step), atol=1e-6)


def test_gradients_of_rows_without_codes_are_zero() -> None:
    rng = np.random.default_rng(12)
    dictionary = torch.from_numpy(np.abs(rng.normal(size=(1, 4, 6)))).requires_grad_()
    a = torch.stack([-torch.ones(6), torch.ones(6)]).double()[None].requires_grad_()
    nnls.codes(a, dictionary).sum().backward()
    assert a.grad is not None
    assert not a.grad[0, 0].any()
    assert a.grad[0, 1].any()
    empty = torch.zeros(1, 3, 6, dtype=torch.float64, requires_grad=True)
    nnls.codes(a.detach(), empty).sum().backward()
    assert empty.grad is not None
    assert not empty.grad.any()


def test_codes_are_their_own_first_order_part() -> None:
    """Codes grow in proportion to the activation: ⟨∂z/∂a, a⟩ = z, and ⟨∂z/∂D, D⟩ = −z."""
    rng = np.random.default_rng(13)
    dictionary = torch.from_numpy(np.abs(rng.normal(size=(1, 6, 20)))).requires_grad_()
    a = torch.from_numpy(np.abs(rng.normal(size=(1, 30, 20)))).requires_grad_()
    codes = nnls.codes(a, dictionary)
    weights = torch.rand(codes.shape, dtype=torch.float64)
    at_a, at_dictionary = torch.autograd.grad((codes * weights).sum(), (a, dictionary))
    whole = (codes.detach() * weights).sum(2)
    torch.testing.assert_close((at_a * a).sum(2), whole)
    torch.testing.assert_close((at_dictionary * dictionary).sum(), -whole.sum())


def test_gradients_have_the_precision_of_what_they_are_of() -> None:
    a, dictionary = torch.rand(2, 3, 5, requires_grad=True), torch.rand(2, 4, 5, requires_grad=True)
    nnls.codes(a, dictionary).sum().backward()
    assert a.grad is not None
    assert dictionary.grad is not None
    assert (a.grad.dtype, dictionary.grad.dtype) == (torch.float32, torch.float32)
