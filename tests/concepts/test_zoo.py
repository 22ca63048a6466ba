"""Real architectures, with random weights: each is cut, exported, computed by both runtimes and explained."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from concepts.architectures import build
from concepts.bank import Bank, Concept
from concepts.engine import Engine
from concepts.explanation import EngineRequest, Estimator, ExplainOptions, Explanation
from concepts.layout import Layout
from concepts.model import Model, ModelSpec
from concepts.preprocessing import Preprocessing
from concepts.repository import Repository
from concepts.runtimes import Runtime, open_trunk
from offline.export import export

CLASSES = 7


SIZE = 64
"""Height and width of the images, in pixels."""


def maps(channels: int, side: int) -> Layout:
    return Layout("bchw", channels, (side, side), 0)


class Case(NamedTuple):
    architecture: str
    layers: dict[str, Layout]
    """Where it is cut: one layer in the middle, one at the end."""
    options: Mapping[str, Any] = MappingProxyType({})


ZOO = [
    Case("torchvision:resnet18", {"layer3": maps(256, 4), "layer4": maps(512, 2)}),
    Case("torchvision:resnet50", {"layer2": maps(512, 8), "layer4": maps(2048, 2)}),
    Case("torchvision:mobilenet_v2", {"features.7": maps(64, 4), "features": maps(1280, 2)}),
    Case("torchvision:densenet121", {"features.transition2": maps(256, 4), "features": maps(1024, 2)}),
    Case("torchvision:convnext_tiny", {"features.3": maps(192, 8), "features": maps(768, 2)}),
    Case("torchvision:efficientnet_b0", {"features.5": maps(112, 4), "features": maps(1280, 2)}),
    Case(
        "torchvision:vit_b_16",
        {"encoder.layers.encoder_layer_9": Layout("btc", 768, (4, 4), 1), "encoder": Layout("btc", 768, (4, 4), 1)},
        {"image_size": SIZE},
    ),
    Case("torchvision:swin_t", {"features.3": Layout("bhwc", 192, (8, 8), 0), "permute": maps(768, 2)}),
    Case("bcos:resnet50", {"layer2": maps(512, 8), "layer4": maps(2048, 2)}),
    Case("bcos:densenet121", {"features.transition2": maps(256, 4), "features": maps(1024, 2)}),
    Case("bcos:vitc_ti_patch1_14", {"0.transformer.encoder_9": Layout("btc", 192, (4, 4), 0)}),
]


class Subject(NamedTuple):
    case: Case
    model: Model
    views: NDArray[np.uint8]


def pictures(count: int) -> NDArray[np.uint8]:
    """Return smooth pictures, each with colours of its own: to networks, images of noise are all alike."""
    coarse = np.random.default_rng(count).integers(0, 256, (count, 3, 3, 3), dtype=np.uint8)
    smooth = [Image.fromarray(each).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for each in coarse]
    return np.stack([np.asarray(each) for each in smooth])


def settle(module: nn.Module, view: Preprocessing) -> None:
    """Let normalisation layers see pictures, so that activations neither die away nor explode on their way."""
    for child in module.modules():
        if hasattr(child, "momentum"):
            child.momentum = 0.9  # not whole: what hardly varies is not blown up
            child.train()
    with torch.no_grad():
        module(view.normalize(torch.from_numpy(pictures(16))))
    module.eval()


@pytest.fixture(scope="module", params=ZOO, ids=[case.architecture for case in ZOO])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """One architecture at a time, loaded from a repository that has its ONNX file too."""
    case: Case = request.param
    torch.manual_seed(0)
    options = {"num_classes": CLASSES, **case.options}
    module = build(case.architecture, options)
    for parameter in module.parameters():
        if not parameter.any():  # some heads start at zero, where every cut would look right
            nn.init.normal_(parameter, std=0.1)
    view = Preprocessing(SIZE, SIZE, inverse=case.architecture.startswith("bcos"))
    settle(module, view)
    names = tuple(f"class {index}" for index in range(CLASSES))
    spec = ModelSpec("m", case.architecture, view, names, "", options)
    repository = Repository(tmp_path_factory.mktemp("zoo"))
    repository.publish_model(spec, module.state_dict(), exported=export(Model(spec, module, torch.device("cpu"))))
    return Subject(case, repository.load_model("m"), pictures(2))


def bank_of(subject: Subject, layer: str) -> Bank:
    """Make six concepts of random directions, on the scale of the activations."""
    cut = subject.model.cut(layer)
    scale = cut.trunk(subject.model.inputs(subject.views)).abs().mean()
    generator = torch.Generator().manual_seed(0)
    dictionary = scale * torch.rand(6, cut.layout.channels, generator=generator).square()
    concepts = tuple(Concept(index) for index in range(len(dictionary)))
    weights = subject.model.spec.weights_digest
    return Bank("nmf", "m", layer, "b", weights, cut.layout.channels, concepts, {"dictionary": dictionary})


def explain(engine: Engine, views: NDArray[np.uint8], estimator: Estimator = "gradient") -> list[Explanation]:
    request = EngineRequest(options=ExplainOptions(estimator=estimator, maps=("activation",)))
    answers = engine.explain(views, [request] * len(views))
    assert all(isinstance(answer, Explanation) for answer in answers), answers
    return answers  # type: ignore[return-value]


def test_layers_are_found_cut_and_reproduce_the_logits(subject: Subject) -> None:
    model = subject.model
    found = {layer.name: layer for layer in model.layers()}
    x = model.inputs(subject.views)
    with torch.no_grad():
        logits = model.module(x)
    for layer, layout in subject.case.layers.items():
        cut = model.cut(layer)
        assert found[layer].layout == cut.layout == layout
        assert found[layer].head == cut.facts.form
        assert found[layer].parameters_before + found[layer].parameters_after <= sum(
            p.numel() for p in model.module.parameters()
        )
        with torch.no_grad():
            again = cut.head(cut.trunk(x))
        torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))


def test_contributions_remainder_and_constant_add_up(subject: Subject) -> None:
    model, views = subject.model, subject.views
    for layer, layout in subject.case.layers.items():
        engine = Engine(model, bank_of(subject, layer))
        # What contributions and remainder are parts of: ⟨G, a⟩ of the whole model with its activation replaced.
        a = engine.trunk(model.inputs(views)).requires_grad_()
        with engine.cut.linearised():
            logits = engine.cut.head(a)
            (gradient,) = torch.autograd.grad(logits.gather(1, logits.argmax(1, keepdim=True)).sum(), a)
        whole = (gradient.double() * a.double()).flatten(1).sum(1).tolist()
        for answer, expected in zip(explain(engine, views), whole, strict=True):
            assert answer.unexplained is not None
            scale = abs(expected) + abs(answer.contributions_total) + abs(answer.unexplained)
            assert answer.contributions_total + answer.unexplained == pytest.approx(expected, abs=1e-4 * scale)
            assert answer.concepts[0].maps["activation"].values.shape == layout.grid
            assert (answer.concepts[0].maps["activation"].class_token is not None) == bool(layout.tokens)
        for answer in explain(engine, views[:1], "integrated"):
            report = answer.faithfulness
            assert report.integration_error is not None
            difference = answer.target.logit - report.constant - (answer.unexplained or 0.0)
            assert abs(report.completeness_residual) <= report.integration_error * abs(difference) + 1e-4


def test_both_runtimes_give_the_same_answer(subject: Subject) -> None:
    model, views = subject.model, subject.views
    x = model.inputs(views)
    for layer in subject.case.layers:
        cut, bank = model.cut(layer), bank_of(subject, layer)
        one, other = (Engine(model, bank, cut, open_trunk(Runtime(name), model, cut)) for name in ("torch", "onnx"))
        a = cut.trunk(x)
        for engine in (one, other):
            torch.testing.assert_close(engine.trunk(x), a, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
        compare(one, other, views, "ablation", 1e-4)
        # A ReLU of the head that is at its threshold to the last digit may change sides, and with it the gradient.
        compare(one, other, views, "gradient", 1e-4 if cut.facts.form == "affine" else 0.05)


def compare(one: Engine, other: Engine, views: NDArray[np.uint8], estimator: Estimator, tolerance: float) -> None:
    for a, b in zip(explain(one, views, estimator), explain(other, views, estimator), strict=True):
        assert (a.runtime, b.runtime) == ("torch cpu float32", "onnx cpu float32")
        assert a.target.index == b.target.index
        contributions = {c.id: c.contribution for c in b.concepts}
        largest = max(abs(c.contribution) for c in a.concepts)
        if estimator == "ablation":  # differences of logits, which have their own rounding
            largest += abs(a.target.logit)
        for concept in a.concepts:
            assert concept.contribution == pytest.approx(contributions[concept.id], abs=tolerance * largest)
