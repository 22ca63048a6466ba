"""FACE against a slow reference in float64, and the laws of its two modes, before heads of several kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from scipy.special import log_softmax
from torch import nn
from torch.nn import functional

from concepts.cut import Cut
from concepts.errors import InvalidInput
from demo.networks import vit
from offline import face, nmf
from offline.face import Losses, Material, Settings
from offline.trainers.face import material_of

CHANNELS, CLASSES, RANK = 8, 4, 3


class Network(nn.Module):
    """A layer of ReLU before a head of some kind."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.head = head

    def forward(self, x):
        return self.head(self.relu(x))


def affine() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES))


def perceptron() -> nn.Module:
    layers = nn.Linear(CHANNELS, 16), nn.Tanh(), nn.Linear(16, CLASSES)
    return nn.Sequential(nn.AdaptiveMaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)


def convolutional() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 8, 3, padding=1),
        norm,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


HEADS = [affine, perceptron, convolutional]


def cut_of(head, scale: float = 6.0) -> Cut:
    """Return a cut whose logits are far enough apart for divergences to matter."""
    torch.manual_seed(0)
    network = Network(head()).eval().requires_grad_(False)
    for last in [module for module in network.modules() if isinstance(module, nn.Linear)][-1:]:
        last.weight.mul_(scale)
    return Cut(network, "relu", torch.randn(2, CHANNELS, 4, 4))


def crops_of(count: int, positions: int, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, positions, 6, generator=g)
    return (hidden @ torch.randn(6, CHANNELS, generator=g)).clamp_min(0)


def material(head=affine, positions: int = 4, count: int = 20) -> Material:
    return material_of(cut_of(head), crops_of(count, positions), target=1)


def plain(crops: torch.Tensor) -> torch.Tensor:
    return nmf.best_of(crops.flatten(0, 1).double(), RANK, tolerance=1e-6).dictionary[0]


def reference(given: Material, dictionary: np.ndarray, lead: int) -> Losses:
    """Compute the losses crop by crop and position by position."""
    error, kl, spread = [], [], []
    for a, gradient in zip(given.crops, given.gradient, strict=True):
        codes = np.stack([nnls(dictionary.T, row.double().numpy())[0] for row in a])
        rebuilt = codes @ dictionary
        error.append(np.square(rebuilt - a.double().numpy()).mean())
        inputs = torch.stack([a, torch.from_numpy(rebuilt).to(a.dtype)])
        p, q = log_softmax(given.head(inputs).detach().double().numpy(), axis=1)
        kl.append((np.exp(p) * (p - q)).sum())
        parts = np.zeros(len(dictionary))
        for position in range(len(a)):
            parts += codes[position] * (dictionary @ gradient[position].double().numpy())
        spread.append(1 - parts[lead] ** 2 / np.square(parts).sum())
    return Losses(float(np.mean(error)), float(np.mean(kl)), float(np.mean(spread)))


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("head", HEADS)
def test_losses_are_those_of_the_reference(head, positions):
    given = material(head, positions, count=9)
    dictionary = torch.rand(RANK, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = face.measure(given, dictionary, 2)
    np.testing.assert_allclose(found, reference(given, dictionary.numpy(), 2), rtol=1e-4)
    assert 0 <= face.leading(given, dictionary) < RANK


@pytest.mark.parametrize("head", HEADS)
def test_predictions_are_kept_better_and_the_budget_holds(head):
    given = material(head)
    start = plain(given.crops)
    found = face.fit(given, start, Settings(max_error_increase=0.05, focus=0.0))
    lead = face.leading(given, start)
    measured = reference(given, found.dictionary.numpy(), lead)
    assert measured.error <= 1.05 * reference(given, start.numpy(), lead).error
    assert found.increase > 0.01  # the budget is there to be used
    assert measured.kl < 0.8 * found.plain.kl
    assert found.losses.kl == pytest.approx(measured.kl, rel=1e-3)
    assert bool((found.dictionary >= 0).all())
    torch.testing.assert_close(found.dictionary.norm(dim=1), torch.ones(RANK, dtype=torch.float64))


@pytest.mark.parametrize("head", HEADS)
def test_free_codes_are_those_of_the_published_objective(head):
    given = material(head)
    start = plain(given.crops)
    served = face.fit(given, start, Settings(max_error_increase=0.05, focus=0.0))
    free = face.fit(given, start, Settings(max_error_increase=0.05, focus=0.0, codes="free"))
    assert bool((free.codes >= 0).all())
    rebuilt = free.codes @ free.dictionary
    error = float((rebuilt - given.crops.double()).square().mean())
    inputs = [given.head(x.to(given.crops.dtype)).detach().double().numpy() for x in (given.crops, rebuilt)]
    p, q = (log_softmax(logits, axis=1) for logits in inputs)
    assert free.losses.error == pytest.approx(error, rel=1e-6)
    assert free.losses.kl == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-3)
    assert error <= 1.05 * free.plain.error
    # They know the prediction; those that are served with the same dictionary do not.
    assert free.losses.kl < served.losses.kl
    assert free.losses.kl < face.measure(given, free.dictionary, 0).kl


def test_a_larger_budget_keeps_predictions_better():
    given = material(convolutional)
    start = plain(given.crops)
    kl = [face.fit(given, start, Settings(max_error_increase=b, focus=0.0)).losses.kl for b in (0.01, 0.1)]
    assert kl[1] < kl[0]


def test_a_weight_is_on_the_scale_of_the_losses_and_its_end_is_a_minimum():
    given = material(perceptron, count=25)
    start, settings = plain(given.crops), Settings(weight=1.0, focus=0.5, tolerance=1e-9)
    found, lead = face.fit(given, start, settings), face.leading(given, start)

    def objective(dictionary: torch.Tensor) -> float:
        losses = reference(given, dictionary.numpy(), lead)
        return losses.error / found.plain.error + losses.kl + 0.5 * losses.spread

    least = objective(found.dictionary)
    assert least < objective(start)
    for seed in range(5):
        noise = torch.randn(start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for step in (1e-2,):
            moved = (found.dictionary + step * functional.normalize(noise.flatten(), dim=0).view_as(noise)).clamp_min(0)
            assert objective(moved) >= least - 1e-5


def test_focus_gathers_the_evidence_in_one_concept():
    given = material()
    start = plain(given.crops)
    spread = [face.fit(given, start, Settings(weight=1.0, focus=focus)).losses.spread for focus in (0.0, 1.0)]
    assert spread[1] < 0.5 * spread[0]


def test_a_budget_that_nothing_fits_keeps_the_start():
    given = material()
    start = plain(given.crops)
    found = face.fit(given, start, Settings(max_error_increase=1e-12, max_iterations=3))
    assert found.losses.error <= found.plain.error * (1 + 1e-12)


def test_memory_is_bounded_by_parts_which_change_nothing(monkeypatch):
    given = material(convolutional)
    start = plain(given.crops)
    settings = Settings(weight=1.0, max_iterations=5)
    whole = face.fit(given, start, settings)
    sizes = []

    def watched(a: torch.Tensor) -> torch.Tensor:
        sizes.append(len(a))
        return given.head(a)

    monkeypatch.setattr(face, "_ELEMENTS", 7 * given.crops[0].numel())
    parts = face.fit(Material(given.crops, given.gradient, watched), start, settings)
    assert max(sizes) == 7
    torch.testing.assert_close(parts.dictionary, whole.dictionary, rtol=1e-3, atol=1e-4)


def test_crops_without_any_activation_do_no_harm():
    crops = crops_of(30, 4)
    crops[::3] = 0
    given = material_of(cut_of(affine), crops, target=1)
    found = face.fit(given, plain(crops), Settings(weight=1.0))
    assert bool(found.dictionary.isfinite().all())
    assert found.losses.kl < found.plain.kl


def test_the_same_input_gives_the_same_dictionary_to_the_bit():
    given = material(convolutional)
    start = plain(given.crops)
    first, second = (face.fit(given, start, Settings()).dictionary for _ in range(2))
    assert torch.equal(first, second)


def test_pooled_vectors_are_laid_at_every_position():
    cut = cut_of(convolutional)
    pooled = crops_of(6, 1)
    given = material_of(cut, pooled, target=1)
    laid = cut.unpositions(pooled.expand(-1, 16, -1))
    torch.testing.assert_close(given.head(pooled), cut.head(laid))
    gradient = cut.positions(cut.head_gradient(laid, torch.ones(6, dtype=torch.int64))[1]).sum(1, keepdim=True)
    torch.testing.assert_close(given.gradient, gradient)


def test_a_transformer_is_given_pooled_vectors():
    torch.manual_seed(0)
    cut = Cut(vit(4).eval().requires_grad_(False), "encoder.layers.relu", torch.randn(2, 3, 64, 64))
    crops = torch.rand(20, 1, cut.layout.channels)
    given = material_of(cut, crops, target=1)
    start = nmf.factorise(crops[:, 0].double(), 3).dictionary[0]
    found = face.fit(given, start, Settings(focus=0.0))
    assert found.losses.kl <= found.plain.kl
    assert found.increase <= 0.05


def test_a_head_that_takes_one_size_alone_says_what_helps():
    cut = cut_of(lambda: nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * 16, CLASSES)))
    with pytest.raises(InvalidInput, match="--enlarge, or --variant pooled"):
        material_of(cut, crops_of(5, 4), target=1)
