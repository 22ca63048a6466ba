"""Codecs: rebuilding them from what a bank stores, and the laws of the NMF kind."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch

from concepts.bank import Bank, Concept
from concepts.codec import DenseCodes
from concepts.errors import CorruptData, UnsupportedOption
from concepts.kinds import concept_codec, contrast, directions, load_codec
from concepts.kinds.nmf import NmfCodec
from concepts.kinds.sae import SaeCodec
from concepts.kinds.subspace import SubspaceCodec

OWNERS = [4, 1, 4, 4, 1, 7, 4]
"""Classes of seven concepts, out of order and in unequal numbers."""


def codec() -> tuple[NmfCodec, torch.Tensor]:
    dictionary = torch.rand(7, 10, generator=torch.Generator().manual_seed(0))
    return NmfCodec(dictionary, OWNERS), dictionary


def test_each_image_has_the_concepts_of_its_target() -> None:
    nmf, dictionary = codec()
    positions = torch.rand(4, 6, 10, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([7, 4, 1, 4])
    codes = nmf.encode(positions, targets)
    assert nmf.classes() == {1, 4, 7}
    assert codes.ids.tolist() == [[5, -1, -1, -1], [0, 2, 3, 6], [1, 4, -1, -1], [0, 2, 3, 6]]
    for image, target in enumerate(targets.tolist()):
        owned = [k for k, owner in enumerate(OWNERS) if owner == target]
        atoms = dictionary[owned].double().numpy()
        for place in range(6):
            expected = scipy.optimize.nnls(atoms.T, positions[image, place].double().numpy())[0]
            np.testing.assert_allclose(codes.values[image, place, : len(owned)], expected, rtol=1e-5, atol=1e-6)
    assert (codes.values[codes.ids.unsqueeze(1).expand_as(codes.values) < 0] == 0).all()


def test_components_add_up_to_the_reconstruction_and_contributions_to_its_inner_product() -> None:
    for nmf in (codec()[0], NmfCodec(codec()[1], [None] * 7)):
        positions, gradient = torch.rand(3, 6, 10), torch.randn(3, 6, 10)
        codes = nmf.encode(positions, torch.tensor([1, 4, 7]))
        whole = nmf.combine(codes)
        slots = codes.ids.shape[1]
        single = torch.eye(slots).unsqueeze(1).expand(slots, 3, slots)
        components = torch.stack([nmf.combine(codes, weights) for weights in single])
        torch.testing.assert_close(components.sum(0), whole)
        contributions = nmf.contributions(codes, gradient)
        expected = (components * gradient).sum(3).permute(1, 2, 0)
        torch.testing.assert_close(contributions.values, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(contributions.total().sum(1), (whole * gradient).sum((1, 2)), rtol=1e-4, atol=1e-4)
        if nmf.per_class:  # each component points along the atom that its id names
            for image, slot in ((0, 1), (1, 3), (2, 0)):
                atom = codec()[1][codes.ids[image, slot]]
                expected = codes.values[image, :, slot, None] * atom
                torch.testing.assert_close(components[slot, image], expected)


def test_gradients_are_finite_differences_of_scipys_codes() -> None:
    """Each image with the dictionary of its target; a slot that is empty or silent has no gradient."""
    step = 1e-5
    for nmf, owners in ((codec()[0], OWNERS), (NmfCodec(codec()[1], [None] * 7), [None] * 7)):
        dictionary = codec()[1].double().numpy()
        positions = torch.rand(3, 4, 10, generator=torch.Generator().manual_seed(2))
        targets = torch.tensor([1, 7, 4])
        codes = nmf.encode(positions, targets)
        slots = torch.tensor([[1, 0, 2], [0, 3, 0], [3, 1, 0]])
        found = nmf.gradients(codes, slots)
        assert found.shape == (3, 3, 4, 10)
        for image, target in enumerate(targets.tolist()):
            owned = [k for k, owner in enumerate(owners) if owner in (target, None)]
            for place in range(4):
                a = positions[image, place].double().numpy()
                moved = [
                    [scipy.optimize.nnls(dictionary[owned].T, a + side * step * unit)[0] for side in (1, -1)]
                    for unit in np.eye(10)
                ]
                slope = np.array([(up - down) / (2 * step) for up, down in moved])  # [C, K]
                for chosen, slot in enumerate(slots[image].tolist()):
                    expected = slope[:, slot] if slot < len(owned) else np.zeros(10)
                    np.testing.assert_allclose(found[image, chosen, place], expected, rtol=1e-4, atol=1e-5)
        along = (found * positions.unsqueeze(1)).sum((2, 3))  # codes grow in proportion to the activation
        torch.testing.assert_close(along, codes.total().gather(1, slots), rtol=1e-4, atol=1e-5)


def test_together_all_concepts_are_one_dictionary() -> None:
    nmf, dictionary = codec()
    together = nmf.together()
    positions = torch.rand(2, 5, 10, generator=torch.Generator().manual_seed(3))
    codes = together.encode(positions, torch.tensor([0, 9]))  # classes without concepts, too
    assert isinstance(codes, DenseCodes)
    assert (together.classes(), together.per_class, together.together()) == (None, False, together)
    assert codes.ids.tolist() == [list(range(7))] * 2
    for image, place in np.ndindex(2, 5):
        expected = scipy.optimize.nnls(dictionary.double().numpy().T, positions[image, place].double().numpy())[0]
        np.testing.assert_allclose(codes.values[image, place], expected, rtol=1e-5, atol=1e-6)


def test_ill_conditioned_dictionaries_keep_the_stated_tolerance() -> None:
    """Nearly equal atoms: rounding the right-hand sides to float32 would move the codes far."""
    torch.manual_seed(0)
    dictionary = torch.rand(1, 50) + 3e-4 * torch.rand(6, 50)
    positions = torch.rand(1, 40, 50)
    codes = NmfCodec(dictionary, [None] * 6).encode(positions, torch.tensor([0]))
    expected = np.stack(
        [scipy.optimize.nnls(dictionary.double().numpy().T, p)[0] for p in positions[0].double().numpy()]
    )
    np.testing.assert_allclose(codes.values[0], expected, rtol=1e-3, atol=1e-4 * expected.max())
    assert codes.tolerance is not None
    assert (codes.tolerance <= 1e-9).all()


def test_a_class_without_concepts_is_refused() -> None:
    for target in (0, 8, -1, 10**6):
        with pytest.raises(UnsupportedOption):
            codec()[0].encode(torch.rand(1, 2, 10), torch.tensor([target]))


@pytest.mark.parametrize(
    ("dictionary", "owners", "message"),
    [
        (torch.zeros(0, 4), [], "shape"),
        (torch.rand(3, 4), [None] * 2, "cannot hold 2 concepts"),
        (torch.rand(3), [None] * 3, "shape"),
        (torch.rand(3, 4, 1), [None] * 3, "shape"),
        (-torch.rand(3, 4), [None] * 3, "non-negative"),
        (torch.full((3, 4), torch.nan), [None] * 3, "finite"),
        (torch.full((3, 4), torch.inf), [None] * 3, "finite"),
        (torch.rand(3, 4), [None, 1, 2], "some have none"),
    ],
)
def test_dictionaries_that_are_none(dictionary: torch.Tensor, owners: list[int | None], message: str) -> None:
    with pytest.raises(CorruptData, match=message):
        load_codec("nmf", {"dictionary": dictionary}, owners)


def test_kinds_by_name() -> None:
    dictionary = torch.rand(2, 3).double()
    loaded = load_codec("nmf", {"dictionary": dictionary}, [None, None])
    assert isinstance(loaded, NmfCodec)
    assert loaded.encode(torch.rand(1, 1, 3), torch.tensor([0])).values.dtype == torch.float32
    assert (loaded.reconstructs, loaded.needs_non_negative, loaded.per_class) == (True, True, False)
    assert loaded.classes() is None
    for kind in ("", "none", "../nmf", "nmf.x", "NMF", "__init__"):
        with pytest.raises(CorruptData, match="cannot read banks of kind"):
            load_codec(kind, {"dictionary": dictionary}, [None, None])
    with pytest.raises(CorruptData, match="needs the tensor 'dictionary'"):
        load_codec("nmf", {}, [])


def bank(kind: str, tensors: dict[str, torch.Tensor], concepts: tuple[Concept, ...]) -> Bank:
    return Bank(kind, "m", "l", "b", "a" * 64, 6, concepts, tensors)


def free(count: int) -> tuple[Concept, ...]:
    return tuple(map(Concept, range(count)))


def contrast_bank(pairs: list[tuple[int, int]]) -> Bank:
    """Planes between four classes, and prototypes of some ordered pairs."""
    tensors = {name: torch.zeros(4, 4) for name in ("products", *contrast.REPORTED)}
    tensors |= {"directions": torch.zeros(4, 6), "centre": torch.zeros(6), "unit": torch.tensor(1.0)}
    tensors["images"] = torch.full((4,), 5)
    if pairs:
        tensors["dictionary"] = torch.rand(len(pairs), 6, generator=torch.Generator().manual_seed(0))
    concepts = (Concept(i, class_index=one, other_index=other) for i, (one, other) in enumerate(pairs))
    return bank("contrast", tensors, tuple(concepts))


def test_what_codes_concepts_one_by_one() -> None:
    dictionary = torch.rand(3, 6)
    nmf = concept_codec(bank("nmf", {"dictionary": dictionary}, tuple(Concept(i, class_index=i % 2) for i in range(3))))
    assert isinstance(nmf, NmfCodec)
    assert nmf.classes() == {0, 1}
    sae = concept_codec(bank("sae", {"encoder": dictionary, "decoder": dictionary, "k": torch.tensor(1)}, free(3)))
    assert isinstance(sae, SaeCodec)
    groups = {"features": torch.tensor([0, 5, 1]), "offsets": torch.tensor([0, 2, 3]), "threshold": torch.tensor(0.1)}
    assert isinstance(concept_codec(bank("subspace", groups, free(2))), SubspaceCodec)
    assert concept_codec(bank("nmf", {"dictionary": dictionary[:0]}, ())) is None
    assert concept_codec(contrast_bank([])) is None
    with pytest.raises(CorruptData, match="cannot read banks of kind"):
        concept_codec(bank("none", {}, ()))


def test_prototypes_are_coded_by_those_of_their_ordered_pair() -> None:
    pairs = [(2, 0), (2, 0), (0, 2), (3, 1), (0, 2), (2, 1)]
    whole = contrast_bank(pairs)
    codec = concept_codec(whole)
    assert codec is not None
    owners = sorted(codec.classes() or ())
    positions = torch.rand(1, 4, 6)
    coded = [codec.encode(positions, torch.tensor([owner])) for owner in owners]
    groups = [tuple(sorted(i for i in codes.ids[0].tolist() if i >= 0)) for codes in coded]
    assert sorted(groups) == [(0, 1), (2, 4), (3,), (5,)]
    for codes, group in zip(coded, groups, strict=True):
        atoms = whole.tensors["dictionary"][list(group)].double().numpy().T
        for place in range(4):
            expected = scipy.optimize.nnls(atoms, positions[0, place].double().numpy())[0]
            np.testing.assert_allclose(codes.values[0, place, : len(group)], expected, rtol=1e-4, atol=1e-5)


def test_directions_are_what_components_point_along() -> None:
    """A component of a codec is a multiple of its concept's direction; of a group, what lies on its features."""
    generator = torch.Generator().manual_seed(0)
    encoder, decoder, dictionary = (torch.rand(5, 6, generator=generator) for _ in range(3))
    positions = torch.rand(2, 3, 6, generator=generator)
    for whole in (
        bank("nmf", {"dictionary": dictionary.double()}, free(5)),
        bank("sae", {"encoder": encoder, "decoder": decoder.half(), "k": torch.tensor(3)}, free(5)),
    ):
        found, codec = directions(whole), whole.codec()
        assert (found.shape, found.dtype) == ((5, 6), torch.float32)
        codes = codec.encode(positions, torch.zeros(2, dtype=torch.int64))
        for slot in range(codes.ids.shape[1]):
            weights = torch.zeros(codes.ids.shape)
            weights[:, slot] = 1
            for image, component in enumerate(codec.combine(codes, weights)):
                if codes.ids[image, slot] >= 0:
                    along = found[codes.ids[image, slot]]
                    torch.testing.assert_close(component, (component @ along).unsqueeze(1) * along / along.dot(along))
    groups = {"features": torch.tensor([0, 5, 1, 2, 5]), "offsets": torch.tensor([0, 2, 5])}
    groups["threshold"] = torch.tensor(0.1)
    assert directions(bank("subspace", groups, free(2))).tolist() == [[1, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 1]]
    prototypes = contrast_bank([(2, 0), (0, 1)])
    assert torch.equal(directions(prototypes), prototypes.tensors["dictionary"])
    assert directions(contrast_bank([])).shape == (0, 6)


def test_slots_by_concept() -> None:
    codes = DenseCodes(torch.zeros(2, 1, 3), torch.tensor([[4, 2, -1], [2, 9, 7]]))
    wanted = torch.tensor([[2, 4, -1, 7], [2, 4, -1, 7]])
    assert codes.slots_of(wanted).tolist() == [[1, 0, -1, -1], [0, -1, -1, 2]]


def test_codes_by_position() -> None:
    codes = DenseCodes(torch.arange(12.0).view(2, 3, 2), torch.tensor([[0, 1], [5, -1]]))
    assert codes.total().tolist() == [[6, 9], [24, 27]]
    assert codes.peak().tolist() == [[4, 5], [10, 11]]
    assert codes.maps(torch.tensor([1, 0]), torch.tensor([0, 1])).tolist() == [[6, 8, 10], [1, 3, 5]]
    assert codes.with_values(codes.values * 2).ids is codes.ids
