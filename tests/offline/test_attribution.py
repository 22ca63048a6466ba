"""Attributions at a layer against autograd and DeepLIFT in float64, and what is done where DeepLIFT does not work."""

from __future__ import annotations

import copy

import pytest
import torch
from captum.attr import InputXGradient
from torch import nn
from torch.nn import functional

from concepts.cut import Cut
from concepts.errors import UnsupportedOption
from demo.models import MODELS
from offline.attribution import Attribution, Smoothing

PLAIN = Smoothing(samples=0)


class Reused(nn.Module):
    """One ReLU that runs twice after ``first``, as in torchvision's residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.ReLU()
        self.bend = nn.ELU()
        self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.relu(self.middle(self.relu(self.second(self.bend(self.first(x)))).mean((2, 3)))))


class Functional(Reused):
    """Its ReLUs are no modules."""

    def forward(self, x):
        return self.last(functional.relu(self.middle(functional.relu(self.second(self.first(x))).mean((2, 3)))))


def network() -> nn.Module:
    """Return a network whose non-linearities are modules of their own, one of them in place, some before the layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.ELU(),
        nn.Linear(10, 4),
    )


def cut_of(module: nn.Module, layer: str) -> Cut:
    torch.manual_seed(1)
    return Cut(module.eval().requires_grad_(False), layer, torch.randn(2, 3, 8, 8))


def images(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(count, 3, 8, 8), torch.arange(count) % 4


def attributed(attribution: Attribution, cut: Cut, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return attribution(x, cut.trunk(x), targets)


def state(module: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(child)) for name, child in module.named_modules()}


def test_gradient_times_activation_is_that_of_autograd_in_float64():
    module = network()
    cut, (x, targets) = cut_of(module, "1"), images()
    found = attributed(Attribution(cut, "gradient", PLAIN), cut, x, targets)
    wide = copy.deepcopy(module).double()
    a = wide[:2](x.double()).requires_grad_()
    (gradient,) = torch.autograd.grad(wide[2:](a).gather(1, targets[:, None]).sum(), a)
    torch.testing.assert_close(found.double(), a.detach() * gradient, rtol=1e-4, atol=1e-6)
    captum = InputXGradient(wide[2:]).attribute(a, target=targets)
    torch.testing.assert_close(found.double(), captum.detach(), rtol=1e-4, atol=1e-6)


def rescale(a: torch.Tensor, convolution, first, last, target: int) -> torch.Tensor:
    """DeepLIFT's rescale rule written out for convolution, ReLU, pooled linear, ELU, linear; zero is the reference."""
    with torch.no_grad():
        inner, nothing = convolution(a), convolution(torch.zeros_like(a))
        hidden, empty = first(inner.relu().flatten(1)), first(nothing.relu().flatten(1))
        slope = (functional.elu(hidden) - functional.elu(empty)) / (hidden - empty)
        back = (last.weight[target] * slope) @ first.weight
        slope = (inner.relu() - nothing.relu()) / (inner - nothing)
        back = back.view_as(inner) * slope
        return a * functional.conv_transpose2d(back, convolution.weight)


def test_deeplift_follows_the_rescale_rule_written_out_in_float64():
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 10), nn.ELU()]
    module = nn.Sequential(*parts, nn.Linear(10, 4))
    cut, (x, targets) = cut_of(module, "1"), images()
    found = attributed(Attribution(cut, "deeplift", PLAIN), cut, x, targets)
    wide = copy.deepcopy(module).double()
    for image, target in enumerate(targets.tolist()):
        a = wide[:2](x[image : image + 1].double()).detach()
        expected = rescale(a, wide[2], wide[5], wide[7], target)
        torch.testing.assert_close(found[image : image + 1].double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layer", ["1", "2", "3"])
def test_deeplift_adds_up_where_gradients_do_not(layer):
    cut, (x, targets) = cut_of(network(), layer), images()
    a = cut.trunk(x)
    change = (cut.head(a) - cut.facts.constant).gather(1, targets[:, None]).squeeze(1)
    found = Attribution(cut, smoothing=PLAIN)
    assert found.rule == "deeplift"
    torch.testing.assert_close(found(x, a, targets).flatten(1).sum(1), change, rtol=1e-4, atol=1e-5)
    gradient = Attribution(cut, "gradient", PLAIN)(x, a, targets)
    assert (gradient.flatten(1).sum(1) - change).abs().max() > 1e-3


@pytest.mark.parametrize("module", [Reused(), Functional()])
def test_heads_that_deeplift_cannot_follow_get_gradients_and_a_refusal_where_it_is_demanded(module):
    torch.manual_seed(3)
    before = state(module)
    cut, (x, targets) = cut_of(module, "first"), images()
    assert cut.facts.form == "general"
    found = Attribution(cut, smoothing=PLAIN)
    assert found.rule == "gradient"
    expected = cut.head_gradient(cut.trunk(x), targets)[1] * cut.trunk(x)
    torch.testing.assert_close(attributed(found, cut, x, targets), expected)
    with pytest.raises(UnsupportedOption, match="ask for gradient"):
        Attribution(cut, "deeplift")
    assert state(module) == before  # nothing is left behind


def test_b_cos_models_use_their_dynamic_linear_map():
    module = MODELS["bcos"].load().requires_grad_(False)
    torch.manual_seed(0)
    x = torch.rand(3, 3, 64, 64)
    x = torch.cat([x, 1 - x], dim=1)
    cut, targets = Cut(module, "stage2", x[:2]), torch.tensor([0, 1, 2])
    found = Attribution(cut, smoothing=PLAIN)
    assert found.rule == "gradient"
    a = cut.trunk(x)
    change = (cut.head(a) - cut.facts.constant).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(found(x, a, targets).flatten(1).sum(1), change, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", ["input", "layer"])
@pytest.mark.parametrize("rule", ["gradient", "deeplift"])
def test_noise_depends_on_the_seed_alone_and_not_on_the_batch(place, rule):
    cut, (x, targets) = cut_of(network(), "1"), images()
    smoothing = Smoothing(samples=3, place=place, seed=4)
    found = attributed(Attribution(cut, rule, smoothing), cut, x, targets)
    assert torch.equal(found, attributed(Attribution(cut, rule, smoothing), cut, x, targets))
    alone = attributed(Attribution(cut, rule, smoothing), cut, x[2:3], targets[2:3])
    torch.testing.assert_close(found[2:3], alone, rtol=1e-4, atol=1e-6)
    other = attributed(Attribution(cut, rule, Smoothing(samples=3, place=place, seed=5)), cut, x, targets)
    assert (found - other).abs().max() > 1e-4


def test_noise_is_on_the_scale_of_each_image():
    cut, (x, targets) = (
        cut_of(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.Flatten(), nn.Linear(216, 4)), "0"),
        images(),
    )
    noisy = Attribution(cut, "gradient", Smoothing(samples=1))
    plain = Attribution(cut, "gradient", PLAIN)

    def effect(scale: float) -> torch.Tensor:
        return attributed(noisy, cut, scale * x, targets) - attributed(plain, cut, scale * x, targets)

    torch.testing.assert_close(effect(100.0), 100 * effect(1.0), rtol=1e-3, atol=1e-3)
    # Without a bias the noise passes the layer as the image does: a quarter of its spread.
    spread = effect(1.0).norm() / attributed(plain, cut, x, targets).norm()
    assert 0.15 < spread < 0.4


def test_smoothing_is_the_mean_over_the_noisy_copies():
    cut, (x, targets) = cut_of(network(), "1"), images()
    generator = torch.Generator().manual_seed(7)
    expected = []
    for _ in range(4):
        noise = torch.randn(x.shape[1:], generator=generator)
        noisy = torch.stack([image + 0.25 * image.std() * noise for image in x])
        a = cut.trunk(noisy)
        expected.append(a * cut.head_gradient(a, targets)[1])
    found = attributed(Attribution(cut, "gradient", Smoothing(samples=4, seed=7)), cut, x, targets)
    torch.testing.assert_close(found, torch.stack(expected).mean(0), rtol=1e-4, atol=1e-6)
