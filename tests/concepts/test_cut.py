"""Cutting real architectures, and models made to be awkward."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import DenseNet

from concepts.architectures import build
from concepts.cut import Cut, layers
from concepts.errors import InvalidCut, InvalidModel, UnknownLayer
from concepts.layout import Layout
from concepts.model import Model, check_name
from concepts.preprocessing import Preprocessing
from tests.data import real_data

Factory = Callable[[], nn.Module]


def noise(rows: int, size: int, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(rows, channels, size, size, generator=torch.Generator().manual_seed(seed))


@functools.cache  # a cut leaves its module as it was: that is tested here too
def torchvision(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    module = build(f"torchvision:{name}", {"num_classes": 7, **options})
    for parameter in module.parameters():
        if not parameter.any():  # some heads start at zero, where every cut would look right
            nn.init.normal_(parameter, std=0.1)
    return module


def bcos_resnet20() -> nn.Module:
    module = build("bcos:cifar10_resnet20", {"num_classes": 10})
    module.load_state_dict(load_file(real_data() / "cifar10" / "bcos_resnet20.safetensors"))
    return module


CASES = [
    ("resnet18", {}, 64, "layer3", Layout("bchw", 256, (4, 4), 0)),
    ("resnet18", {}, 64, "avgpool", Layout("bchw", 512, (1, 1), 0)),
    ("densenet121", {}, 32, "features.denseblock2", Layout("bchw", 512, (4, 4), 0)),
    ("mobilenet_v2", {}, 64, "features.7", Layout("bchw", 64, (4, 4), 0)),
    ("swin_t", {}, 64, "features.3", Layout("bhwc", 192, (8, 8), 0)),
    ("swin_t", {}, 64, "permute", Layout("bchw", 768, (2, 2), 0)),
    ("vit_b_16", {"image_size": 48}, 48, "encoder.layers.encoder_layer_9", Layout("btc", 768, (3, 3), 1)),
    ("vit_b_16", {"image_size": 48}, 48, "encoder.ln", Layout("btc", 768, (3, 3), 1)),
]


@pytest.mark.parametrize(("name", "options", "size", "layer", "layout"), CASES, ids=[f"{c[0]}-{c[3]}" for c in CASES])
def test_head_of_trunk_is_the_model(name: str, options: dict[str, Any], size: int, layer: str, layout: Layout) -> None:
    module = torchvision(name, **options)
    cut = Cut(module, layer, noise(2, size))
    assert cut.layout == layout
    x = noise(5, size, seed=1)
    a = cut.trunk(x)
    with torch.no_grad():
        logits = module(x)
        torch.testing.assert_close(cut.head(a), logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
        twice = cut.head(torch.cat([a, a]))
    torch.testing.assert_close(twice[:5], twice[5:], rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    p = cut.positions(a)
    assert p.shape == (5, layout.positions, layout.channels)
    assert torch.equal(cut.unpositions(p), a)


def test_positions_run_along_rows_of_the_grid_with_tokens_first() -> None:
    cut = Cut(torchvision("resnet18"), "layer3", noise(2, 64))
    a = torch.arange(256 * 16.0).view(1, 256, 4, 4)
    assert torch.equal(cut.positions(a)[0, 4 * 2 + 3], a[0, :, 2, 3])
    swin = Cut(torchvision("swin_t"), "features.3", noise(2, 64))
    b = torch.arange(64 * 192.0).view(1, 8, 8, 192)
    assert torch.equal(swin.positions(b)[0, 8 * 2 + 3], b[0, 2, 3])


def test_pooled_features_are_one_position() -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    cut = Cut(module, "2", noise(2, 16))
    assert cut.layout == Layout("bc", 6, (1, 1), 0)
    a = cut.trunk(noise(3, 16))
    assert cut.positions(a).shape == (3, 1, 6)
    assert torch.equal(cut.unpositions(cut.positions(a)), a)


@pytest.mark.parametrize(("height", "width"), [(32, 64), (48, 16), (32, 32)])
def test_grids_have_the_shape_of_the_input(height: int, width: int) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 8, 8)
            self.sequence = nn.Identity()
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            p = self.patches(x).flatten(2).transpose(1, 2)
            token = p.mean(1, keepdim=True)
            return self.head(self.sequence(torch.cat([token, p], 1)).mean(1))

    module = Tokens().eval().requires_grad_(False)
    cut = Cut(module, "sequence", torch.rand(2, 3, height, width))
    assert cut.layout == Layout("btc", 8, (height // 8, width // 8), 1)
    assert Cut(module, "patches", torch.rand(2, 3, height, width)).layout.grid == (height // 8, width // 8)


@pytest.fixture(scope="module")
def bcos() -> tuple[nn.Module, Tensor]:
    """The B-cos network with its weights, and eight real images."""
    folders = sorted((real_data() / "cifar10" / "test").iterdir())
    views = np.stack([np.asarray(Image.open(sorted(folder.glob("*.jpg"))[0]).convert("RGB")) for folder in folders[:8]])
    return bcos_resnet20(), Preprocessing(32, 32, inverse=True).normalize(torch.from_numpy(views))


@pytest.mark.parametrize("layer", ["conv1", "layer1", "layer2", "layer3"])
def test_bcos_heads_are_dynamic_linear_on_real_images(bcos: tuple[nn.Module, Tensor], layer: str) -> None:
    module, x = bcos
    cut = Cut(module, layer, noise(2, 32, 6))
    a = cut.trunk(x)
    with torch.no_grad():
        logits = module(x)
    assert cut.facts.form == "dynamic_linear"
    assert not cut.non_negative
    targets = logits.argmax(1)
    again, gradient = cut.head_gradient(a, targets)
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)
    linear = cut.facts.constant[targets] + (gradient * a).flatten(1).sum(1)
    torch.testing.assert_close(linear, logits.amax(1), rtol=1e-3, atol=1e-3)
    # What the published network states about itself (bcos_resnet20.json): all of the constant is its logit bias.
    torch.testing.assert_close(cut.facts.constant, torch.full((10,), -2.1972246), rtol=1e-4, atol=1e-4)


def test_resnet20_facts(model: Model, views: NDArray[np.uint8]) -> None:
    last = model.cut("layer3")
    assert last.facts.form == "affine"
    assert last.non_negative
    torch.testing.assert_close(last.facts.constant, model.module.linear.bias)  # type: ignore[union-attr]
    middle = model.cut("layer2")
    assert middle.facts.form == "general"
    zeros = torch.zeros_like(middle.trunk(model.inputs(views[:1])))
    with torch.no_grad():
        rest = nn.Sequential(*list(model.module.children())[-4:])
        torch.testing.assert_close(middle.facts.constant, rest(zeros)[0])
    assert not model.cut("conv1").non_negative


def trained_mlp(bias: bool) -> nn.Module:
    """Fit a small network with a ReLU head for a moment, so that its biases are not zero."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 32, bias=bias),
        nn.ReLU(),
        nn.Linear(32, 3, bias=bias),
    )
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    x = noise(64, 16)
    y = (x.mean((2, 3)) * torch.tensor([1.0, 1.1, 0.9])).argmax(1)
    for _ in range(20):
        optimizer.zero_grad()
        functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    return module.eval().requires_grad_(False)


def test_forms_of_heads() -> None:
    with_bias, without = trained_mlp(True), trained_mlp(False)
    assert Cut(with_bias, "1", noise(2, 16)).facts.form == "general"
    assert Cut(with_bias, "4", noise(2, 16)).facts.form == "affine"
    # A ReLU network without biases is linear on each ray: logit = ⟨G(a), a⟩.
    assert Cut(without, "1", noise(2, 16)).facts.form == "dynamic_linear"
    assert not Cut(without, "1", noise(2, 16)).facts.constant.any()


def test_gradient_is_that_of_finite_differences() -> None:
    module = trained_mlp(True).double()
    cut = Cut(module, "1", noise(2, 16).double())
    a = cut.trunk(noise(3, 16, seed=3).double())
    targets = torch.tensor([0, 2, 1])
    logits, gradient = cut.head_gradient(a, targets)
    step, rng = 1e-6, torch.Generator().manual_seed(0)
    for _ in range(5):
        direction = torch.randn(a.shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            up, down = cut.head(a + step * direction), cut.head(a - step * direction)
        slope = (up - down).gather(1, targets.view(-1, 1)).squeeze(1) / (2 * step)
        torch.testing.assert_close((gradient * direction).flatten(1).sum(1), slope, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(logits, cut.head(a))


def test_a_bypassed_layer_is_refused_and_the_layers_named_instead_are_valid() -> None:
    module = torchvision("resnet18")
    with pytest.raises(InvalidCut, match="bypassed by another path") as refusal:
        Cut(module, "layer2.1.conv1", noise(2, 64))
    named = refusal.value.message.split(": ")[-1].split(", ")
    assert set(named) >= {"layer2.0", "layer2.1"}
    x = noise(3, 64, seed=1)
    for layer in named:
        cut = Cut(module, layer, noise(2, 64))
        with torch.no_grad():
            torch.testing.assert_close(cut.head(cut.trunk(x)), module(x), rtol=1e-4, atol=1e-5)


def test_a_layer_within_a_dense_block_is_refused() -> None:
    torch.manual_seed(0)
    module = DenseNet(growth_rate=4, block_config=(3, 2), num_init_features=8, num_classes=5).eval()
    with pytest.raises(InvalidCut, match=r"features\.pool0, features\.denseblock1, features\.transition1\.norm"):
        Cut(module, "features.denseblock1.denselayer2", noise(2, 32))


def test_all_layers_of_a_network(model: Model) -> None:
    found = {layer.name: layer for layer in model.layers()}
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    stages = ["layer1", "layer2", "layer3"]
    assert set(found) == {"conv1", "bn1", "relu", *blocks, *stages, "pool", "flatten", "linear"}
    assert {name for name, layer in found.items() if not layer.non_negative} == {"conv1", "bn1", "linear"}
    assert found["layer2.1"].layout == Layout("bchw", 32, (16, 16), 0)


def test_layers_say_what_comes_before_and_after(model: Model) -> None:
    found = {layer.name: layer for layer in model.layers()}
    count = {name: sum(p.numel() for p in child.parameters()) for name, child in model.module.named_children()}
    total = sum(count.values())
    before = 0
    for name, size in count.items():  # the children of this network run in their order
        before += size
        if name in found:
            assert (found[name].parameters_before, found[name].parameters_after) == (before, total - before), name
    assert found["layer3"].shape == (64, 8, 8)
    assert {name for name, layer in found.items() if layer.head == "affine"} == {
        "layer3", "layer3.2", "pool", "flatten", "linear"
    }  # fmt: skip
    for name in ("conv1", "layer1.0", "layer2", "layer3", "flatten"):
        assert model.cut(name).facts.form == found[name].head


def test_the_list_of_layers_is_whole(model: Model) -> None:
    found = {layer.name for layer in model.layers()}
    for name, _ in model.module.named_modules():
        if name and name not in found:
            with pytest.raises(InvalidCut):
                model.cut(name)


def test_a_class_token_is_no_parameter_of_the_head() -> None:
    module = torchvision("vit_b_16", image_size=48)
    found = {layer.name: layer for layer in layers(module, noise(2, 48))}
    linear = sum(p.numel() for p in module.heads.parameters())  # type: ignore[union-attr]
    norm = sum(p.numel() for p in module.encoder.ln.parameters())  # type: ignore[union-attr]
    assert found["encoder"].parameters_after == linear
    assert found["encoder.layers.encoder_layer_11"].parameters_after == linear + norm


def test_a_path_too_faint_for_the_numbers_shows_in_the_flow_of_data(bcos: tuple[nn.Module, Tensor]) -> None:
    # A B-cos convolution scales its linear part by the norm of its input: a path of its own.
    with pytest.raises(InvalidCut, match="bypassed"):
        Cut(bcos[0], "conv1.linear", noise(2, 32, 6))

    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).mean((2, 3))) + 1e-7 * x.mean((1, 2, 3)).unsqueeze(1)

    with pytest.raises(InvalidCut, match="bypassed"):
        Cut(Faint().eval(), "conv", noise(2, 8))


def test_the_gradient_of_an_affine_head_is_its_matrix(model: Model, views: NDArray[np.uint8]) -> None:
    cut = model.cut("layer3")
    a = cut.trunk(model.inputs(views[:4]))
    targets = torch.tensor([3, 1, 3, 9])
    matrix = model.module.linear.weight[targets]  # type: ignore[union-attr, index]
    for _ in range(2):  # computed, then remembered
        with torch.no_grad():  # as callers may
            logits, gradient = cut.head_gradient(a, targets)
        torch.testing.assert_close(gradient, (matrix / 64)[:, :, None, None].expand(-1, -1, 8, 8))
        torch.testing.assert_close(logits, model.module(model.inputs(views[:4])))
    gradient = cut.head_gradient(a, torch.tensor([5, 3, 0, 3]))[1]
    torch.testing.assert_close(gradient[1], gradient[3])
    torch.testing.assert_close(gradient[0, :, 0, 0], model.module.linear.weight[5] / 64)  # type: ignore[union-attr, index]


def test_a_constant_class_says_nothing_about_the_head() -> None:
    class Binary(nn.Module):
        """Answers zero for one class, and one number for the other."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.fc = nn.Conv2d(3, 4, 3), nn.GELU(), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            z = self.fc(self.act(self.conv(x)).mean((2, 3)))
            return torch.cat([torch.zeros_like(z), z], 1)

    torch.manual_seed(0)
    module = Binary().eval().requires_grad_(False)
    assert {layer.name: layer.head for layer in layers(module, noise(2, 8))} == {
        "conv": "general", "act": "affine", "fc": "affine"
    }  # fmt: skip


def test_a_layer_that_is_no_floating_point_tensor_is_passed_over() -> None:
    class Spectral(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft2(x)

    class Modulus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs()

    module = nn.Sequential(nn.Conv2d(3, 4, 3), Spectral(), Modulus(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    assert [layer.name for layer in layers(module, noise(2, 8))] == ["0", "2", "3", "4"]
    with pytest.raises(InvalidCut, match="answers in complex64, not in float32"):
        Cut(module, "1", noise(2, 8))


def test_models_that_edit_their_input_leave_the_example_alone() -> None:
    class Editing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.sub_(0.5)).mean((2, 3))

    example = noise(2, 8)
    before = example.clone()
    assert [layer.name for layer in layers(Editing().eval(), example)] == ["conv"]
    assert torch.equal(example, before)


@pytest.mark.parametrize(("height", "width"), [(100, 140), (64, 96)])
def test_channels_last_is_seen_where_the_grid_is_rounded(height: int, width: int) -> None:
    module = torchvision("swin_t")
    found = {layer.name: layer.layout for layer in layers(module, torch.rand(2, 3, height, width))}
    assert (found["features.3"].order, found["features.3"].channels) == ("bhwc", 192)


def test_networks_may_begin_their_names_with_an_underscore() -> None:
    module = nn.Sequential(
        OrderedDict(_blocks=nn.Conv2d(3, 4, 3), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
    ).eval()
    assert Cut(module, "_blocks", noise(2, 8)).layout == Layout("bchw", 4, (6, 6), 0)
    assert check_name("layer", "_blocks") == "_blocks"


def test_a_head_without_an_answer_to_nothing_has_no_constant() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            pooled = self.conv(x).mean((2, 3))
            return self.fc(pooled / pooled.norm(dim=1, keepdim=True))

    facts = Cut(Normed().eval(), "conv", noise(2, 8)).facts
    assert facts.form == "general"
    assert facts.constant.tolist() == [0.0, 0.0]


def test_a_layer_that_runs_twice_or_never() -> None:
    class Awkward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.fc, self.spare = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.act(self.act(self.conv(x)).mean((2, 3)) - 0.1))

    module = Awkward().eval()
    with pytest.raises(InvalidCut, match="runs 2 times"):
        Cut(module, "act", noise(2, 8))
    with pytest.raises(InvalidCut, match="never runs"):
        Cut(module, "spare", noise(2, 8))
    # The layer before it shares a module with the head, which must then run and not repeat its recorded answer.
    cut, x = Cut(module, "conv", noise(2, 8)), noise(4, 8, seed=2)
    torch.testing.assert_close(cut.head(cut.trunk(x)), module(x))


def test_an_unknown_layer_names_its_neighbours() -> None:
    with pytest.raises(UnknownLayer, match=r"nearest names: .*layer3"):
        Cut(torchvision("resnet18"), "layr3", noise(2, 64))
    with pytest.raises(UnknownLayer, match="conv1"):
        Cut(torchvision("resnet18"), "", noise(2, 64))
    with pytest.raises(UnknownLayer, match="conv1"):
        Cut(torchvision("resnet18"), "§", noise(2, 64))


class Answers(nn.Module):
    """Answers what it is told to."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.answer = nn.Conv2d(3, 4, 3), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.conv(x))


def broken(_a: Tensor) -> Tensor:
    raise KeyError("nothing")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a: a, r"answers \[2, 4, 6, 6\]"),
        (lambda a: {"out": a.mean((2, 3))}, "answers dict"),
        (lambda a: a.mean((0, 2, 3)), r"answers \[4\]"),
        (lambda a: a.mean((2, 3))[:1], r"answers \[1, 4\]"),
        (broken, "KeyError"),
    ],
)
def test_a_module_that_is_no_classifier(answer: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        Cut(Answers(answer).eval(), "conv", noise(2, 8))


def test_a_head_without_gradients_is_refused() -> None:
    with pytest.raises(InvalidCut, match="no gradient flows"):
        Cut(Answers(lambda a: a.detach().mean((2, 3))).eval(), "conv", noise(2, 8))


def test_a_layer_that_answers_with_more_than_a_tensor() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, -x

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pair = nn.Conv2d(3, 4, 3), Pair()

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.pair(self.conv(x))
            return (left + 2 * right).mean((2, 3))

    with pytest.raises(InvalidCut, match="one tensor of activations; nearest layers that can be cut: conv"):
        Cut(Split().eval(), "pair", noise(2, 8))


def test_a_model_that_counts_its_images_before_the_layer() -> None:
    """``x.view(batch, −1)`` with the batch of the input: the head must take any number of rows all the same."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            batch = x.shape[0]
            return self.fc(self.conv(self.stem(x)).mean((2, 3)).view(batch, -1))

    module = Counts().eval().requires_grad_(False)
    for layer in ("stem", "conv"):
        cut, x = Cut(module, layer, noise(2, 12)), noise(6, 12, seed=4)
        for rows in (1, 6):
            torch.testing.assert_close(cut.head(cut.trunk(x[:rows])), module(x[:rows]))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_untouched(module: nn.Module, before: dict[str, Tensor]) -> None:
    for name, child in module.named_modules():
        assert "forward" not in vars(child), name
        assert not child._forward_hooks, name
        assert not child._forward_pre_hooks, name
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_module_is_left_as_it_was() -> None:
    module = torchvision("resnet18")
    before = state_of(module)
    x = noise(3, 64, seed=1)
    expected = module(x)
    cut = Cut(module, "layer3", noise(2, 64))
    assert_untouched(module, before)
    a = cut.trunk(x)
    cut.head(a)
    cut.head_gradient(a, torch.tensor([0, 1, 2]))
    assert_untouched(module, before)
    with pytest.raises(InvalidCut):
        Cut(module, "layer2.1.conv1", noise(2, 64))
    with pytest.raises(RuntimeError):
        cut.head(torch.zeros(2, 3, 4, 4))
    with pytest.raises(RuntimeError):
        cut.trunk(torch.zeros(2, 5, 4, 4))
    assert_untouched(module, before)
    assert torch.equal(module(x), expected)


def test_a_forward_of_the_instance_survives() -> None:
    module = torchvision("resnet18")
    plain = module.layer3.forward
    calls: list[int] = []

    def counting(x: Tensor) -> Tensor:
        calls.append(1)
        return plain(x)

    module.layer3.forward = counting
    cut = Cut(module, "layer3", noise(2, 64))
    cut.head(cut.trunk(noise(1, 64)))
    assert vars(module.layer3)["forward"] is counting
    assert calls


def test_an_in_place_head_does_not_edit_the_callers_tensor() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    cut = Cut(module.eval().requires_grad_(False), "2", noise(2, 8))
    x = noise(3, 8, seed=1)
    a = cut.trunk(x)
    assert (a < 0).any()
    before = a.clone()
    torch.testing.assert_close(cut.head(a), module(x))
    cut.head_gradient(a, torch.tensor([0, 1, 2]))
    assert torch.equal(a, before)
    assert not a.requires_grad


def test_gradients_never_enter_the_trunk_but_where_asked() -> None:
    module = torchvision("resnet18").requires_grad_(True)
    cut = Cut(module, "layer3", noise(2, 64))
    x = noise(2, 64).requires_grad_()
    assert not cut.trunk(x).requires_grad
    (gradient,) = torch.autograd.grad(cut.trunk_with_gradients(x)[:, 3].sum(), x)
    assert gradient.abs().sum() > 0


def test_the_head_may_use_control_flow_and_other_layers_functions() -> None:
    """A head with a branch on its own activation cuts as any other: nothing is traced."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.low, self.high = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            pooled = self.conv(x).mean((2, 3))
            return torch.where(pooled[:, :1] > 0, self.high(pooled), self.low(pooled))

    module = Branching().eval().requires_grad_(False)
    cut, x = Cut(module, "conv", noise(2, 8)), noise(16, 8, seed=5)
    torch.testing.assert_close(cut.head(cut.trunk(x)), module(x))
