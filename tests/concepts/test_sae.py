"""SAE banks on B-cos and ordinary networks: codes, exact sums from logit to pixel, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from concepts import input_maps
from concepts.bank import Bank, Concept
from concepts.codec import DenseCodes, SparseCodes, decode
from concepts.cut import Cut
from concepts.engine import Engine
from concepts.errors import CorruptData, NumericalFailure, UnsupportedOption
from concepts.explanation import EngineRequest, ExplainOptions, Explanation
from concepts.kinds import load_codec
from concepts.kinds.sae import SaeCodec
from concepts.model import Model
from concepts.runtimes import Runtime, open_trunk

ALL = 10_000
"""More concepts than any image has."""

Tensors = dict[str, Tensor]


def random_tensors(latents: int, channels: int, k: int, seed: int = 0, **more: Tensor) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    encoder, decoder = torch.randn(2, latents, channels, generator=generator).unbind()
    return {"encoder": encoder, "decoder": decoder / decoder.norm(dim=1, keepdim=True), "k": torch.tensor(k), **more}


def codec_of(tensors: Tensors) -> SaeCodec:
    codec = load_codec("sae", tensors, [None] * len(tensors["encoder"]))
    assert isinstance(codec, SaeCodec)
    return codec


def reference(tensors: Tensors, a: Tensor) -> Tensor:
    """Return dense codes ``[…, K]`` in float64, as the methods are written down."""
    t = {name: value.double() for name, value in tensors.items()}
    pre = (a.double() - t.get("decoder_bias", torch.zeros(1))) @ t["encoder"].T + t.get("encoder_bias", torch.zeros(1))
    codes = pre.relu() * (pre > t.get("threshold", torch.zeros(1)))
    if "k" in tensors:
        kth = codes.sort(dim=-1, descending=True).values[..., int(tensors["k"]) - 1]
        codes = codes * (codes >= kth.unsqueeze(-1))
    return codes


def dense(codes: SparseCodes, latents: int) -> Tensor:
    """Return ``[B, P, K]``."""
    whole = torch.zeros(*codes.values.shape[:2], latents)
    return whole.scatter_add_(2, codes.concepts(), codes.values)


VARIANTS: dict[str, Tensors] = {
    "topk": random_tensors(96, 20, 5),
    "one": random_tensors(96, 20, 1),
    "many": random_tensors(96, 20, 30),
    "all": random_tensors(12, 20, 12),
    "biased": random_tensors(96, 20, 5, encoder_bias=torch.linspace(-3, 3, 96), decoder_bias=torch.linspace(-1, 1, 20)),
    "threshold": {k: v for k, v in random_tensors(96, 20, 1).items() if k != "k"}
    | {"threshold": torch.linspace(0, 9, 96), "decoder_bias": torch.linspace(-1, 1, 20)},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("screening", [False, True])
def test_codes_components_and_contributions_are_the_references(variant: str, screening: bool) -> None:
    tensors = VARIANTS[variant]
    codec, latents = codec_of(tensors), len(tensors["encoder"])
    codec.to(torch.device("cpu"), screening=screening)
    generator = torch.Generator().manual_seed(1)
    a, gradient = torch.randn(2, 3, 7, 20, generator=generator).unbind()
    codes, expected = codec.encode(a, torch.zeros(3, dtype=torch.int64)), reference(tensors, a)
    torch.testing.assert_close(dense(codes, latents).double(), expected, rtol=1e-5, atol=1e-5)
    decoder = tensors["decoder"].double()
    whole = expected @ decoder + tensors.get("decoder_bias", torch.zeros(1))
    torch.testing.assert_close(decode(codec, codes).double(), whole, rtol=1e-5, atol=1e-5)
    contributions = expected * (gradient.double() @ decoder.T)
    found = codec.contributions(codes, gradient)
    torch.testing.assert_close(dense(found, latents).double(), contributions, rtol=1e-4, atol=1e-5)
    for image in range(3):
        for slot, concept in enumerate(codes.ids[image].tolist()):
            if concept < 0:
                continue
            here = expected[image, :, concept]
            assert float(codes.total()[image, slot]) == pytest.approx(float(here.sum()), rel=1e-5, abs=1e-5)
            assert float(codes.peak()[image, slot]) == pytest.approx(float(here.max()), rel=1e-5, abs=1e-5)
            assert int(codes.active()[image, slot]) == int((here > 0).sum()) > 0
            values = codes.maps(torch.tensor([image]), torch.tensor([slot]))[0]
            torch.testing.assert_close(values.double(), here, rtol=1e-5, atol=1e-5)
        active = {k for k in range(latents) if bool((expected[image, :, k] > 0).any())}
        assert {k for k in codes.ids[image].tolist() if k >= 0} == active


def test_sparse_codes_obey_the_laws_of_dense_ones() -> None:
    tensors = VARIANTS["topk"]
    codec = codec_of(tensors)
    a = torch.randn(4, 6, 20, generator=torch.Generator().manual_seed(2))
    codes = codec.encode(a, torch.zeros(4, dtype=torch.int64))
    rows, slots = (codes.ids >= 0).nonzero(as_tuple=True)
    values = torch.zeros(4, codes.ids.shape[1], 6)
    values[rows, slots] = codes.maps(rows, slots)
    same = DenseCodes(values.mT, codes.ids)
    torch.testing.assert_close(codes.total(), same.total())
    torch.testing.assert_close(codes.peak(), same.peak())
    assert torch.equal(codes.active(), same.active())
    assert torch.equal(codes.peak_position()[rows, slots], same.peak_position()[rows, slots])
    chosen = torch.tensor([2, 0, 2])
    torch.testing.assert_close(codes.rows(chosen).total(), codes.total()[chosen])
    # Components add up to the reconstruction, and a weight of zero takes one away.
    weights = torch.rand(4, codes.ids.shape[1])
    singles = [codec.combine(codes, weights * one) for one in torch.eye(codes.ids.shape[1]).unsqueeze(1)]
    torch.testing.assert_close(sum(singles), codec.combine(codes, weights), rtol=1e-4, atol=1e-5)
    assert not codec.combine(codes, torch.zeros_like(weights)).any()


def test_an_image_that_excites_nothing_has_no_concepts() -> None:
    codec = codec_of(VARIANTS["topk"])
    a = torch.randn(2, 3, 20)
    a[1] = 0
    codes = codec.encode(a, torch.zeros(2, dtype=torch.int64))
    assert (codes.ids[1] == -1).all()
    assert not codes.total()[1].any()
    assert not codec.combine(codes)[1].any()


def test_an_image_has_the_same_codes_alone() -> None:
    codec = codec_of(VARIANTS["threshold"])
    a = torch.randn(3, 5, 20)
    together = dense(codec.encode(a, torch.zeros(3, dtype=torch.int64)), 96)
    for row in range(3):
        alone = dense(codec.encode(a[row : row + 1], torch.zeros(1, dtype=torch.int64)), 96)
        torch.testing.assert_close(alone[0], together[row])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"decoder": torch.zeros(96, 19)}, "alike"),
        ({"encoder": torch.full((96, 20), torch.nan)}, "finite"),
        ({"k": torch.tensor(97)}, "from 1 to the 96 latents"),
        ({"k": torch.tensor(0)}, "from 1 to the 96 latents"),
        ({"k": torch.tensor([1, 2])}, "needs k, or a threshold"),
        ({"threshold": torch.zeros(3)}, "threshold must have 96"),
        ({"encoder_bias": torch.zeros(20)}, "encoder_bias must have 96"),
        ({"decoder_bias": torch.zeros(96)}, "decoder_bias must have 20"),
    ],
)
def test_damaged_tensors_are_refused(changes: Tensors, says: str) -> None:
    with pytest.raises(CorruptData, match=says):
        codec_of({**VARIANTS["topk"], **changes})


def test_what_is_no_sae_bank_is_refused() -> None:
    with pytest.raises(CorruptData, match="needs the tensor 'decoder'"):
        load_codec("sae", {"encoder": torch.zeros(2, 2)}, [None] * 2)
    with pytest.raises(CorruptData, match="cannot be 3 concepts"):
        load_codec("sae", VARIANTS["topk"], [None] * 3)
    with pytest.raises(CorruptData, match="belong to no class"):
        load_codec("sae", VARIANTS["topk"], [0] * 96)


# On networks


def bank_of(model: Model, layer: str, tensors: Tensors) -> Bank:
    return Bank(
        kind="sae",
        model=model.spec.name,
        layer=layer,
        name="sae",
        weights_digest=model.spec.weights_digest,
        channels=tensors["encoder"].shape[1],
        concepts=tuple(Concept(k) for k in range(len(tensors["encoder"]))),
        tensors=tensors,
        digest="c" * 64,
    )


@pytest.fixture(scope="module")
def bcos_engine(bcos: Model) -> Engine:
    return Engine(bcos, bank_of(bcos, "layer3", random_tensors(256, 64, 8)))


def explain(engine: Engine, views: NDArray[np.uint8], **options: object) -> list[Explanation]:
    wanted = ExplainOptions(**{"top_k": ALL, **options})  # type: ignore[arg-type]
    found = engine.explain(views, [EngineRequest(None, wanted)] * len(views))
    assert all(isinstance(answer, Explanation) for answer in found), found
    return found  # type: ignore[return-value]


def test_the_reconstruction_stands_in_on_bcos_models_and_adds_up(bcos_engine: Engine, views: NDArray[np.uint8]) -> None:
    """Every concept is listed, so that the sum here is the caller's own; one missing would be seen."""
    tensors, double = bcos_engine.bank.tensors, copy.deepcopy(bcos_engine.model.module).double()
    for view, answer in zip(views, explain(bcos_engine, views), strict=True):
        report = answer.faithfulness
        assert answer.substitute
        assert report.exactness == "exact"
        assert answer.unexplained is None
        listed = sum(concept.contribution for concept in answer.concepts)
        gap = abs(report.explained_logit - report.constant - listed)
        assert gap <= 1e-4 * abs(report.explained_logit)
        smallest = min(abs(c.contribution) for c in answer.concepts if abs(c.contribution) > 1e-3)
        assert gap < smallest
        # The explained logit is the model's on the reconstruction.
        x = bcos_engine.model.inputs(view[None]).double()
        a = double.layer3(double.layer2(double.layer1(double.bn1(double.conv1(x)))))
        codes = reference(tensors, a.flatten(2).mT)
        stand_in = (codes @ tensors["decoder"].double()).mT.reshape(a.shape)
        logit = double.logit_layer(double.fc(stand_in).mean((2, 3)))[0, answer.target.index]
        assert report.explained_logit == pytest.approx(float(logit), rel=1e-4)


def test_maps_on_the_input_add_up_to_the_activation(bcos_engine: Engine, views: NDArray[np.uint8]) -> None:
    """Eleven images, so that graphs are made twice; against one backward pass for each concept, alone."""
    answers = explain(bcos_engine, views[:11], maps=("input", "activation"), top_k=12)
    module, tensors = bcos_engine.model.module, bcos_engine.bank.tensors
    for view, answer in zip(views[:11], answers, strict=True):
        report = answer.faithfulness.input_maps
        assert report is not None
        assert (report.exactness, answer.runtime) == ("exact", "torch cpu float32")
        assert report.residual <= 1e-4
        for concept in answer.concepts:
            pixels = concept.maps["input"].values
            assert pixels.shape == (32, 32)
            assert pixels.sum() == pytest.approx(concept.activation, rel=1e-4)
            assert concept.maps["activation"].values.sum() == pytest.approx(concept.activation, rel=1e-4)
        x = bcos_engine.model.inputs(view[None]).requires_grad_()
        with module.explanation_mode():
            a = module.layer3(module.layer2(module.layer1(module.bn1(module.conv1(x)))))[0].flatten(1).T
        active = reference(tensors, a.detach()) > 0
        for concept in (*answer.concepts[:2], answer.concepts[-1]):  # of the first product, and of the last
            code = (a @ tensors["encoder"][concept.id])[active[:, concept.id]].sum()
            (gradient,) = torch.autograd.grad(code, x, retain_graph=True)
            expected = (gradient * x)[0].sum(0).detach().numpy()
            np.testing.assert_allclose(concept.maps["input"].values, expected, atol=1e-4 * np.abs(expected).max())


def test_an_image_without_an_answer_harms_no_map_of_others(
    bcos: Model, bcos_engine: Engine, views: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = views[:3].copy()
    batch[1] = 255
    options = {"maps": ("input", "activation"), "top_k": 5, "colours": True}
    expected = explain(bcos_engine, batch, **options)
    first = bcos.module.conv1.forward
    white = lambda x: (x[:, :3].mean((1, 2, 3)) > 0.99).view(-1, 1, 1, 1)  # noqa: E731
    monkeypatch.setattr(bcos.module.conv1, "forward", lambda x: first(x.masked_fill(white(x), torch.nan)))
    wanted = EngineRequest(None, ExplainOptions(**options))  # type: ignore[arg-type]
    found = bcos_engine.explain(batch, [wanted] * 3)
    assert isinstance(found[1], NumericalFailure)
    for row in (0, 2):
        answer = found[row]
        assert isinstance(answer, Explanation)
        for concept, alike in zip(answer.concepts, expected[row].concepts, strict=True):
            assert concept.id == alike.id
            pixels = alike.maps["input"].values
            np.testing.assert_allclose(concept.maps["input"].values, pixels, atol=1e-5 * np.abs(pixels).max())


def test_colours_are_those_of_the_pixels_that_count(bcos_engine: Engine, views: NDArray[np.uint8]) -> None:
    (answer,) = explain(bcos_engine, views[:1], maps=("input",), top_k=3, colours=True)
    for concept in answer.concepts:
        rgba = concept.maps["input"].colours
        assert rgba is not None
        assert (rgba.shape, rgba.dtype) == ((32, 32, 4), np.uint8)
        assert rgba[..., 3].max() == 255


def test_ordinary_networks_keep_the_remainder_and_call_pixels_first_order(
    model: Model, views: NDArray[np.uint8]
) -> None:
    tensors = random_tensors(200, 64, 6, encoder_bias=torch.full((200,), -0.5), decoder_bias=torch.linspace(0, 0.5, 64))
    engine = Engine(model, bank_of(model, "layer3", tensors))
    for substitute in (None, True):
        (answer,) = explain(engine, views[:1], maps=("input",), substitute=substitute)
        report = answer.faithfulness
        assert answer.substitute is bool(substitute)
        assert answer.unexplained is not None  # the offset is nobody's contribution, and is not lost
        gap = report.explained_logit - report.constant - answer.unexplained
        assert gap - sum(c.contribution for c in answer.concepts) == pytest.approx(0, abs=1e-4 * abs(gap))
        assert (report.explained_logit == pytest.approx(answer.target.logit, abs=1e-5)) is (not substitute)
        assert report.input_maps is not None
        assert report.input_maps.exactness == "first_order"


@pytest.mark.parametrize("estimator", ["gradient", "integrated", "ablation"])
def test_estimators_agree_where_the_head_is_affine(model: Model, views: NDArray[np.uint8], estimator: str) -> None:
    engine = Engine(model, bank_of(model, "layer3", random_tensors(200, 64, 6)))
    expected = {c.id: c.contribution for c in explain(engine, views[:2])[1].concepts}
    found = explain(engine, views[:2], estimator=estimator)[1]
    assert {c.id for c in found.concepts} == expected.keys()
    for concept in found.concepts:
        assert concept.contribution == pytest.approx(expected[concept.id], abs=1e-3)


def test_screening_in_bfloat16_keeps_float32_codes(bcos: Model, views: NDArray[np.uint8]) -> None:
    bank = bank_of(bcos, "layer3", random_tensors(256, 64, 8))
    cut = bcos.cut("layer3")
    exact, screened = bank.codec(), bank.codec().to(torch.device("cpu"), screening=True)
    positions = cut.positions(cut.trunk(bcos.inputs(views)))
    nothing = torch.zeros(len(views), dtype=torch.int64)
    left, right = (dense(codec.encode(positions, nothing), 256) for codec in (exact, screened))
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert Engine(bcos, bank, cut, open_trunk(Runtime(precision="bfloat16"), bcos, cut)).codec._screen is not None  # type: ignore[attr-defined]
    assert Engine(bcos, bank, cut).codec._screen is None  # type: ignore[attr-defined]


def test_colours_need_a_model_that_sees_them(model: Model, bcos_engine: Engine) -> None:
    ordinary = Engine(model, bank_of(model, "layer3", random_tensors(200, 64, 6)))
    with pytest.raises(UnsupportedOption, match="B-cos"):
        ordinary.check(EngineRequest(None, ExplainOptions(maps=("input",), colours=True)))
    with pytest.raises(UnsupportedOption, match="ask for these"):
        bcos_engine.check(EngineRequest(None, ExplainOptions(colours=True)))


class _Cube(torch.autograd.Function):
    """x³, its gradient by hand in the older of torch's two ways, which knows no batches of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class _Powers(nn.Module):
    """Its layer answers the cubes of the channels."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand, self.layer, self.linear = by_hand, nn.Identity(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        cubes = _Cube.apply(x) if self.by_hand else x**3
        return self.linear(self.layer(cubes).mean((2, 3)))


def test_networks_with_gradients_of_their_own_get_maps_one_by_one() -> None:
    torch.manual_seed(0)
    networks = [_Powers(by_hand).eval().requires_grad_(False) for by_hand in (True, False)]
    networks[1].load_state_dict(networks[0].state_dict())
    x = torch.rand(2, 3, 4, 4)
    probes = torch.randn(5, 2, 3, 4, 4)
    found = []
    for network in networks:
        cut = Cut(network, "layer", x)
        found.append(input_maps.root(cut, x).pull(probes))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], probes * 3 * x**2)
