"""Masked reconstructions through the head, beside decoding each mask by itself in float64."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from concepts.codec import Codec, Codes
from concepts.cut import Cut
from concepts.kinds.nmf import NmfCodec
from concepts.kinds.sae import SaeCodec
from offline import passes, sobol
from offline.importance import total_indices
from offline.passes import Explained, masked_logits, masked_target_logits, masked_targets

CHANNELS, IMAGES, CLASSES = 6, 5, 3

HEADS: dict[str, tuple[nn.Module, ...]] = {
    "affine": (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES)),
    "pooled first": (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CLASSES)),
    "a product first": (nn.Flatten(), nn.Linear(CHANNELS * 16, 8), nn.ReLU(), nn.Linear(8, CLASSES)),
    "no parts": (nn.Tanh(), nn.Conv2d(CHANNELS, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES), nn.Tanh()),
}


class World(NamedTuple):
    """A model cut, a bank, and some images."""

    cut: Cut
    codec: Codec
    codes: Codes
    targets: Tensor
    components: Tensor
    """float64 ``[R, S, P, C]``, by hand."""
    offset: Tensor


def world(head: str, bank: str) -> World:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), *copy.deepcopy(HEADS[head])).eval().requires_grad_(False)
    cut = Cut(module, "0", torch.rand(2, 3, 6, 6))
    targets = torch.tensor([2, 0, 1, 0, 2])
    a = torch.rand(IMAGES, cut.layout.positions, CHANNELS)
    atoms = torch.rand(9, CHANNELS)
    codec: Codec
    if bank == "nmf":  # two, three and four concepts
        codec = NmfCodec(atoms, [0, 0, 1, 1, 1, 2, 2, 2, 2])
    else:
        codec = SaeCodec(atoms - 0.5, atoms, 2, decoder_bias=torch.rand(CHANNELS))
    codes = codec.encode(a, targets)
    rows, slots = torch.ones_like(codes.ids).nonzero().T
    values = codes.maps(rows, slots).view(*codes.ids.shape, -1).double()
    components = values.unsqueeze(3) * atoms.double()[codes.ids.clamp_min(0)].unsqueeze(2)
    offset = torch.zeros(CHANNELS) if codec.offset is None else codec.offset
    return World(cut, codec, codes, targets, components, offset.double())


def reference(place: World, masks: Tensor) -> Tensor:
    """Return the logits ``[R, M, n_classes]``, one mask at a time."""
    wide = copy.deepcopy(place.cut.module).double()[1:]
    found = []
    for image in range(IMAGES):
        for mask in masks[image].double():
            decoded = sum(m * component for m, component in zip(mask, place.components[image], strict=True))
            found.append(wide(place.cut.unpositions((decoded + place.offset).unsqueeze(0))))
    return torch.cat(found).view(*masks.shape[:2], -1)


@pytest.mark.parametrize("elements", [2**23, 300, 1])
@pytest.mark.parametrize("masks", [3, 11])
@pytest.mark.parametrize("bank", ["nmf", "sae"])
@pytest.mark.parametrize("head", HEADS)
def test_masked_reconstructions_get_the_logits_of_decoding_each(
    head: str, bank: str, masks: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "_ELEMENTS", elements)
    place = world(head, bank)
    weights = torch.rand(IMAGES, masks, place.codes.ids.shape[1], generator=torch.Generator().manual_seed(1)).double()
    expected = reference(place, weights)
    scale = float(expected.abs().max())
    seen = torch.full((IMAGES * masks, CLASSES), torch.nan)
    for rows, logits in masked_logits(place.cut, place.codec, place.codes, weights):
        assert seen[rows].isnan().all()
        seen[rows] = logits
    torch.testing.assert_close(seen.view_as(expected).double(), expected, rtol=0, atol=1e-5 * scale)
    of_targets = expected[torch.arange(IMAGES), :, place.targets]
    found = masked_target_logits(place.cut, place.codec, place.codes, weights, place.targets)
    torch.testing.assert_close(found, of_targets, rtol=0, atol=1e-5 * scale)
    logit, kept = masked_targets(place.cut, place.codec, place.codes, weights, place.targets)
    torch.testing.assert_close(logit, of_targets, rtol=0, atol=1e-5 * scale)
    assert torch.equal(kept, expected.argmax(2) == place.targets.unsqueeze(1))


@pytest.mark.parametrize("head", HEADS)
def test_importance_is_that_of_a_plain_estimate(head: str) -> None:
    place = world(head, "nmf")
    slots, n = place.codes.ids.shape[1], 1024
    designs = sobol.designs(slots, n)
    outputs = reference(place, designs.flatten(0, 1).expand(IMAGES, -1, -1))
    outputs = outputs[torch.arange(IMAGES), :, place.targets].view(IMAGES, slots + 1, n)
    expected = (outputs[:, :1] - outputs[:, 1:]).square().mean(2) / (2 * outputs[:, :1].var(2, correction=0))
    cut, codec = place.cut, place.codec
    a = cut.unpositions(codec.combine(place.codes))
    gradient = cut.positions(cut.head_gradient(a, place.targets)[1])
    contributions = codec.contributions(place.codes, gradient).total()
    batch = Explained([], torch.empty(0).numpy(), a, a, cut.head(a), place.targets, place.codes, contributions)
    found = total_indices(cut, codec, batch, n)
    # An affine head has a closed form, which the estimate comes near to; else it is the same estimate.
    tolerance = 5e-3 if head == "affine" else 1e-4
    assert (cut.facts.form == "affine") == (head == "affine")
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert not found[place.codes.ids < 0].any()


def test_gradients_may_flow_for_those_who_look_at_what_comes() -> None:
    place = world("pooled first", "nmf")
    for _ in masked_logits(place.cut, place.codec, place.codes, torch.ones(IMAGES, 9, 4)):
        assert torch.is_grad_enabled()
