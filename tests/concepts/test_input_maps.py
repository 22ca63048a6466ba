"""Maps of NMF and SAE concepts on the input, by every method, against float64 gradients one concept at a time."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from concepts.bank import Bank, Concept
from concepts.engine import Engine
from concepts.errors import UnsupportedOption
from concepts.explanation import EngineRequest, ExplainOptions, Explanation, InputMethod
from concepts.model import Model
from concepts.runtimes.torch import TorchTrunk

METHODS: tuple[InputMethod, ...] = ("gradient", "smoothgrad", "integrated")
LISTED = 3


def explain(engine: Engine, views: NDArray[np.uint8], *targets: int | None, **options: object) -> list[Explanation]:
    wanted = ExplainOptions(**{"top_k": LISTED, "maps": ("input",), **options})  # type: ignore[arg-type]
    found = engine.explain(views, [EngineRequest(target, wanted) for target in targets])
    assert all(isinstance(answer, Explanation) for answer in found), found
    return found  # type: ignore[return-value]


class Reference:
    """Gradients of one concept of one image in float64, by autograd through an explicit solution."""

    def __init__(self, model: Model, bank: Bank) -> None:
        stages = dict(copy.deepcopy(model.module).double().named_children())
        names = list(stages)
        self.trunk = nn.Sequential(*(stages[name] for name in names[: names.index(bank.layer) + 1]))
        self.bank, self.model = bank, model

    def code(self, a: Tensor, concept: int) -> Tensor:
        """Return ``Σ_pos z_k`` of an activation ``[1, C, H, W]``."""
        positions = a[0].flatten(1).T
        if self.bank.kind == "sae":
            t = {name: tensor.double() for name, tensor in self.bank.tensors.items()}
            codes = ((positions - t["decoder_bias"]) @ t["encoder"].T + t["encoder_bias"]).relu()
            kth = codes.sort(dim=1, descending=True).values[:, int(t["k"]) - 1]
            return (codes[:, concept] * (codes[:, concept] >= kth)).sum()
        owner = self.bank.concepts[concept].class_index
        owned = [c.id for c in self.bank.concepts if c.class_index == owner]
        dictionary = self.bank.tensors["dictionary"].double()[owned]
        total = positions.new_zeros(())
        for position in positions:
            active = scipy.optimize.nnls(dictionary.numpy().T, position.detach().numpy())[0] > 0
            if active[owned.index(concept)]:
                z = torch.linalg.lstsq(dictionary[active].T, position.unsqueeze(1)).solution[:, 0]
                total = total + z[int(active[: owned.index(concept)].sum())]
        return total

    def at(self, x: Tensor, concept: int) -> tuple[float, Tensor]:
        """Return the activation and its gradient at an input ``[1, 3, H, W]``."""
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            code = self.code(self.trunk(leaf), concept)
            gradient = torch.autograd.grad(code, leaf)[0] if code.requires_grad else torch.zeros_like(x)
        return float(code.detach()), gradient

    def points(self, x: Tensor, method: InputMethod) -> list[Tensor]:
        """Return the inputs that the documentation names."""
        if method == "smoothgrad":
            generator = torch.Generator().manual_seed(0)
            std = torch.tensor(self.model.spec.preprocessing.std).view(3, 1, 1)
            return [x + 0.15 * torch.randn(x.shape[1:], generator=generator) / std for _ in range(16)]
        return [x * (2 * step + 1) / 64 for step in range(32)] if method == "integrated" else [x]

    def map(self, view: NDArray[np.uint8], concept: int, method: InputMethod) -> NDArray[np.float64]:
        x = self.model.inputs(view[None]).double()
        gradients = [self.at(point, concept)[1] for point in self.points(x, method)]
        found: NDArray[np.float64] = (torch.stack(gradients).mean(0) * x)[0].sum(0).numpy()
        return found


@pytest.fixture(scope="module")
def engine(model: Model, early_bank: Bank) -> Engine:
    return Engine(model, early_bank)


@pytest.fixture(scope="module")
def biased_sae(model: Model) -> Bank:
    generator = torch.Generator().manual_seed(0)
    encoder, decoder = torch.randn(2, 60, 32, generator=generator).unbind()
    biases = {"encoder_bias": torch.linspace(-1, 1, 60), "decoder_bias": torch.linspace(0, 0.5, 32)}
    return Bank(
        kind="sae",
        model=model.spec.name,
        layer="layer2",
        name="sae",
        weights_digest=model.spec.weights_digest,
        channels=32,
        concepts=tuple(map(Concept, range(60))),
        tensors={"encoder": encoder, "decoder": decoder, "k": torch.tensor(4), **biases},
    )


def bcos_bank(bcos: Model, *owners: int | None) -> Bank:
    dictionary = torch.rand(len(owners), 64, generator=torch.Generator().manual_seed(0))
    concepts = tuple(Concept(k, class_index=owner) for k, owner in enumerate(owners))
    tensors = {"dictionary": dictionary * torch.linspace(0, 1, 64)}
    return Bank("nmf", bcos.spec.name, "layer3", "nmf", bcos.spec.weights_digest, 64, concepts, tensors)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["nmf", "sae"])
def test_maps_are_the_references(
    model: Model, early_bank: Bank, biased_sae: Bank, views: NDArray[np.uint8], method: InputMethod, kind: str
) -> None:
    bank = early_bank if kind == "nmf" else biased_sae
    reference = Reference(model, bank)
    (answer,) = explain(Engine(model, bank), views[9:10], 4, input_method=method, order="activation", top_k=2)
    for concept in answer.concepts:
        expected, found = reference.map(views[9], concept.id, method), concept.maps["input"].values
        assert found.shape == (32, 32)
        # In float32 a ReLU or a code near zero may be on the other side at one of the points.
        assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected)
        x = model.inputs(views[9:10]).double()
        assert concept.activation == pytest.approx(reference.at(x, concept.id)[0], rel=1e-3)


def test_the_report_says_what_adds_up(model: Model, engine: Engine, views: NDArray[np.uint8]) -> None:
    reference = Reference(model, engine.bank)
    x = model.inputs(views[9:10]).double()
    for method in METHODS:
        (answer,) = explain(engine, views[9:10], 4, input_method=method)
        report = answer.faithfulness.input_maps
        assert report is not None
        assert (report.method, report.exactness) == (method, "first_order")
        gaps, complete = [], []
        for concept in answer.concepts:
            pixels = float(concept.maps["input"].values.sum())
            at_zero = reference.at(torch.zeros_like(x), concept.id)[0]
            gaps.append(abs(concept.activation - pixels) / concept.activation)
            complete.append(abs(concept.activation - at_zero - pixels) / concept.activation)
        assert report.residual == pytest.approx(max(gaps), rel=1e-2, abs=1e-3)
        if method == "integrated":
            assert report.completeness_residual == pytest.approx(max(complete), rel=1e-2, abs=1e-3)
            assert max(complete) < 0.1 < max(gaps)  # or the law would be too easy
        else:
            assert report.completeness_residual is None


@pytest.mark.parametrize("method", METHODS)
def test_concepts_that_are_silent_in_the_image_are_not_in_the_report(
    model: Model, engine: Engine, views: NDArray[np.uint8], method: InputMethod
) -> None:
    cut, x = model.cut("layer3"), model.inputs(views)
    here, at_zero = (cut.positions(cut.trunk(each)).sum(1) for each in (x, torch.zeros_like(x[:1])))
    row, silent = ((here == 0) & (at_zero > 0)).nonzero()[0].tolist()
    dictionary = torch.eye(cut.layout.channels)[[int(here[row].argmax()), silent]]
    bank = replace(
        engine.bank,
        layer="layer3",
        channels=cut.layout.channels,
        concepts=(Concept(0), Concept(1)),
        tensors={"dictionary": dictionary},
    )
    both, one = (
        explain(Engine(model, bank), views[[row]], None, input_method=method, top_k=k, order="activation")[0]
        for k in (2, 1)
    )
    assert [concept.activation > 0 for concept in both.concepts] == [True, False]
    assert method == "gradient" or both.concepts[1].maps["input"].values.any()
    found, expected = both.faithfulness.input_maps, one.faithfulness.input_maps
    assert found is not None
    assert expected is not None
    assert found.residual == pytest.approx(expected.residual, rel=1e-3)
    if method == "integrated":
        assert found.completeness_residual == pytest.approx(expected.completeness_residual, rel=1e-3)


def test_nmf_maps_add_up_where_the_model_is_linear_for_each_input(bcos: Model, views: NDArray[np.uint8]) -> None:
    """Codes of least squares have no biases: from B-cos models the pixels are the activation."""
    engine = Engine(bcos, bcos_bank(bcos, 0, 0, 0, 1, 1, 1))
    for answer in explain(engine, views[:2], 0, 1, top_k=10):
        report = answer.faithfulness.input_maps
        assert report is not None
        assert (report.exactness, report.completeness_residual) == ("exact", None)
        assert report.residual <= 1e-4
        assert any(concept.activation > 0 for concept in answer.concepts)
        for concept in answer.concepts:
            assert concept.maps["input"].values.sum() == pytest.approx(concept.activation, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_map_is_the_same_alone_and_in_any_batch(
    engine: Engine, views: NDArray[np.uint8], method: InputMethod
) -> None:
    rows, targets = [3, 8, 14], (0, None, 5)
    together = explain(engine, views[rows], *targets, input_method=method)
    for row, target, answer in zip(rows, targets, together, strict=True):
        (alone,) = explain(engine, views[row : row + 1], target, input_method=method)
        for one, other in zip(answer.concepts, alone.concepts, strict=True):
            pixels = other.maps["input"].values
            np.testing.assert_allclose(one.maps["input"].values, pixels, atol=2e-3 * np.abs(pixels).max())


@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_the_runtime_of_the_trunk(
    model: Model, engine: Engine, views: NDArray[np.uint8], method: InputMethod
) -> None:
    cut = model.cut(engine.bank.layer)
    low = Engine(model, engine.bank, cut, TorchTrunk(cut, "bfloat16"))
    (one,), (other,) = (explain(each, views[:1], 4, input_method=method) for each in (engine, low))
    assert one.runtime == other.runtime == "torch cpu float32"
    assert explain(low, views[:1], 4, maps=())[0].runtime == "torch cpu bfloat16"
    for left, right in zip(one.concepts, other.concepts, strict=True):
        assert left.activation == pytest.approx(right.activation, rel=1e-5)
        np.testing.assert_allclose(left.maps["input"].values, right.maps["input"].values, atol=1e-4)


def test_maps_of_all_classes_concepts(model: Model, engine: Engine, views: NDArray[np.uint8]) -> None:
    free = replace(engine.bank, concepts=tuple(replace(c, class_index=None) for c in engine.bank.concepts))
    (answer,) = explain(engine, views[:1], 9, concepts="all")
    reference = Reference(model, free)
    for concept in answer.concepts[:2]:
        expected, found = reference.map(views[0], concept.id, "gradient"), concept.maps["input"].values
        assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected)


def test_colours_are_those_of_one_gradient(bcos: Model) -> None:
    engine = Engine(bcos, bcos_bank(bcos, None, None))
    engine.check(EngineRequest(None, ExplainOptions(maps=("input",), colours=True)))
    for method in METHODS[1:]:
        with pytest.raises(UnsupportedOption, match="input_method"):
            engine.check(EngineRequest(None, ExplainOptions(maps=("input",), colours=True, input_method=method)))
