"""Jansen's estimator against the closed form, and against a function whose indices are known."""

from __future__ import annotations

import torch
from scipy.stats import qmc

from offline import sobol


def test_designs_are_a_and_its_mixtures_with_b():
    designs = sobol.designs(concepts=3, n=32)
    points = torch.from_numpy(qmc.Sobol(6, scramble=False).random(32))
    assert designs.shape == (4, 32, 3)
    assert torch.equal(designs[0], points[:, :3])
    for i in range(3):
        expected = points[:, :3].clone()
        expected[:, i] = points[:, 3 + i]
        assert torch.equal(designs[1 + i], expected)


def test_estimator_meets_the_closed_form_on_an_affine_head():
    contributions = torch.tensor([3.0, -1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    exact = sobol.closed_form(contributions)
    torch.testing.assert_close(exact, contributions**2 / 14.25)
    for n, tolerance in ((32, 0.08), (4096, 2e-3)):
        outputs = 7.0 + sobol.designs(5, n) @ contributions
        torch.testing.assert_close(sobol.jansen(outputs), exact, atol=tolerance, rtol=0)


def test_estimator_knows_interactions():
    # f = m1·m2: Var f = 1/9 − 1/16 = 7/144 and E[Var(f given m2)] = (1/3)(1/12), so that S_T = 4/7 for both.
    designs = sobol.designs(2, 8192)
    indices = sobol.jansen(designs[..., 0] * designs[..., 1])
    torch.testing.assert_close(indices, torch.full((2,), 4 / 7, dtype=torch.float64), atol=3e-3, rtol=0)


def test_constant_output_has_no_importance():
    assert not sobol.jansen(torch.ones(2, 4, 32)).any()
    assert not sobol.closed_form(torch.zeros(2, 4)).any()
