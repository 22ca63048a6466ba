"""Gradients by hand against automatic ones of the plain dense formula, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offline.sae import sparse
from offline.sae.settings import SaeSettings
from offline.sae.step import gradients

N, K, C = 24, 40, 10


class Jump(torch.autograd.Function):
    """``z · [z > θ]`` and, for θ, the pseudo-derivative of arXiv 2407.14435."""

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        pre, threshold = ctx.saved_tensors
        window = ((pre - threshold) / ctx.bandwidth).abs() < 0.5
        by_threshold = (-(threshold / ctx.bandwidth) * window * upstream).sum(0)
        return upstream * (pre > threshold), by_threshold, None


class Count(torch.autograd.Function):
    """``[z > θ]`` and, for θ, its pseudo-derivative."""

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        pre, threshold = ctx.saved_tensors
        window = ((pre - threshold) / ctx.bandwidth).abs() < 0.5
        return torch.zeros_like(pre), -(window * upstream / ctx.bandwidth).sum(0), None


def keep_best(pre: Tensor, k: int) -> Tensor:
    best = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())


def dense_loss(vectors: Tensor, p: dict[str, Tensor], settings: SaeSettings, dead: Tensor, price: float) -> Tensor:
    """The loss as the papers write it."""
    centred = vectors - p.get("decoder_bias", 0)
    pre = centred @ p["encoder"].T + p.get("encoder_bias", 0)
    penalty = torch.zeros(())
    if settings.variant == "topk":
        codes = keep_best(pre, settings.k)
    elif settings.variant == "batchtopk":
        codes = keep_best(pre.reshape(1, -1), settings.k * len(vectors)).view(pre.shape)
    else:
        threshold = p["log_threshold"].exp()
        codes = Jump.apply(pre, threshold, settings.bandwidth)
        penalty = price * Count.apply(pre, threshold, settings.bandwidth).sum(1).mean()
    residual = vectors - codes @ p["decoder"] - p.get("decoder_bias", 0)
    loss = residual.square().sum(1).mean() + penalty
    if len(dead):
        target = residual.detach()
        guess = keep_best(pre[:, dead], min(settings.auxk, len(dead))) @ p["decoder"][dead]
        spread = (target - target.mean(0)).square().mean()
        loss = loss + settings.auxk_coefficient * (guess - target).square().mean() / spread
    return loss


def example(settings: SaeSettings, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    parameters = {"encoder": draw(K, C) / 3, "decoder": torch.nn.functional.normalize(draw(K, C), dim=1)}
    if settings.encoder_bias:
        parameters["encoder_bias"] = 0.1 * draw(K)
    if settings.decoder_bias:
        parameters["decoder_bias"] = 0.1 * draw(C)
    if settings.variant == "jumprelu":
        parameters["log_threshold"] = torch.full((K,), -0.5, dtype=torch.float64) + 0.1 * draw(K)
    return draw(N, C), parameters


@pytest.mark.parametrize("always_dense", [False, True])
@pytest.mark.parametrize("variant", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dead_count", [0, 3, 30])
def test_gradients_are_those_of_the_dense_formula(variant, bias, dead_count, always_dense, monkeypatch):
    if not always_dense:
        monkeypatch.setattr(sparse, "_DENSE_FROM_ELSE", 2.0)
    settings = SaeSettings(K, 3, variant, encoder_bias=bias, decoder_bias=bias, auxk=5, bandwidth=0.4)
    vectors, parameters = example(settings)
    dead = torch.randperm(K, generator=torch.Generator().manual_seed(2))[:dead_count].sort().values
    price = 0.05 if variant == "jumprelu" else 0.0
    found = gradients(
        vectors,
        parameters,
        settings,
        dead,
        batch_size=N,
        sparsity_coefficient=price,
        dtype=torch.float64,
    )
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    loss = dense_loss(vectors, leaves, settings, dead, price)
    loss.backward()
    assert found.gradients.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 1e-3, name
        torch.testing.assert_close(found.gradients[name], leaf.grad, rtol=1e-9, atol=1e-12)
    own = found.squared_error / N + settings.auxk_coefficient * found.auxiliary + price * found.active / N
    torch.testing.assert_close(own, loss.detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("variant", ["topk", "batchtopk", "jumprelu"])
def test_bfloat16_chooses_but_no_value_is_kept_in_it(variant):
    settings = SaeSettings(K, 3, variant, bandwidth=0.2)
    vectors, parameters = example(settings, seed=1)
    none = torch.empty(0, dtype=torch.int64)
    coarse, exact = (
        gradients(vectors, parameters, settings, none, batch_size=N, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float64)
    )
    # With this seed both choose the same pairs; then nothing differs.
    for name, value in exact.gradients.items():
        torch.testing.assert_close(coarse.gradients[name], value, rtol=1e-9, atol=1e-12)


def test_batches_in_parts_add_up(monkeypatch):
    """Chosen in parts of few vectors, as large batches are."""
    from offline.sae import choose

    for variant in ("topk", "batchtopk", "jumprelu"):
        settings = SaeSettings(K, 3, variant, auxk=5, bandwidth=0.4)
        vectors, parameters = example(settings)
        dead = torch.arange(20)
        whole = gradients(vectors, parameters, settings, dead, batch_size=N, dtype=torch.float64)
        monkeypatch.setitem(choose._ENTRIES_AT_ONCE, "cpu", 5 * K)
        parts = gradients(vectors, parameters, settings, dead, batch_size=N, dtype=torch.float64)
        monkeypatch.undo()
        for name, value in whole.gradients.items():
            torch.testing.assert_close(parts.gradients[name], value, rtol=1e-10, atol=1e-13)


def test_batchtopk_keeps_k_a_vector_on_average_and_reports_the_smallest():
    settings = SaeSettings(K, 3, "batchtopk")
    vectors, parameters = example(settings)
    found = gradients(
        vectors, parameters, settings, torch.empty(0, dtype=torch.int64), batch_size=N, dtype=torch.float64
    )
    pre = (vectors @ parameters["encoder"].T).flatten()
    kept = pre.topk(3 * N).values
    assert int(found.active) == 3 * N
    torch.testing.assert_close(found.smallest, kept.min())


def test_the_dead_learn_nothing_from_a_residual_that_does_not_vary():
    settings = SaeSettings(K, 3)
    _, parameters = example(settings)
    dead = torch.arange(10)
    found = gradients(torch.ones(1, C, dtype=torch.float64), parameters, settings, dead, batch_size=1)
    assert all(bool(torch.isfinite(value).all()) for value in found.gradients.values())
    assert float(found.auxiliary) == 0
