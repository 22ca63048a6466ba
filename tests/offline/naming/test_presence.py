"""How much of each concept is in images: as the measures against known attributes have it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from concepts.kinds.nmf import NmfCodec
from concepts.kinds.sae import SaeCodec
from concepts.kinds.subspace import SubspaceCodec
from concepts.parts import PartsCodec
from offline.localise import _totals
from offline.naming import presence

OWNERS = [4, 1, 4, 4, 1, 7, 4]
CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_without_classes_it_is_the_sum_over_positions() -> None:
    positions = draw(5, 6, 10)
    sae = SaeCodec(draw(12, 10, seed=1) - 0.5, draw(12, 10, seed=2), 2)
    free = NmfCodec(draw(7, 10, seed=3), [None] * 7)
    groups = SubspaceCodec(torch.tensor([0, 3, 1, 2, 9]), torch.tensor([0, 2, 5]), 0.3)
    for codec, concepts in ((sae, 12), (free, 7), (groups, 2)):
        found = presence.of_positions(codec, positions, concepts)
        codes = codec.encode(positions, torch.zeros(5, dtype=torch.int64))
        torch.testing.assert_close(found, _totals([codes], concepts))
        expected = torch.zeros(5, concepts)
        for image, (ids, totals) in enumerate(zip(codes.ids.tolist(), codes.total().tolist(), strict=True)):
            for concept, total in zip(ids, totals, strict=True):
                if concept >= 0:
                    expected[image, concept] = total
        torch.testing.assert_close(found, expected)


def test_of_one_window_it_is_the_code_of_every_class() -> None:
    codec = NmfCodec(draw(7, 10, seed=3), OWNERS)
    windows = draw(9, 1, 10)
    codes = [codec.encode(windows, torch.full((9,), owner)) for owner in (1, 4, 7)]
    torch.testing.assert_close(presence.of_windows(codec, windows, 7, CPU), _totals(codes, 7))


@pytest.mark.parametrize("most", [2**16, 12, 1])
def test_of_several_windows_it_is_the_largest_code(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(presence, "_WINDOWS", most)
    dictionary, windows = draw(7, 10, seed=3), draw(9, 4, 10)
    found = presence.of_windows(NmfCodec(dictionary, OWNERS), windows, 7, CPU)
    for owner in (1, 4, 7):
        own = [concept for concept, of in enumerate(OWNERS) if of == owner]
        atoms = dictionary[own].double().numpy().T
        for image in range(9):
            codes = np.array([nnls(atoms, window.double().numpy())[0] for window in windows[image]])
            np.testing.assert_allclose(found[image, own], codes.max(0), rtol=1e-4, atol=1e-5)


def test_parts_are_coded_by_those_of_one_concept_alone() -> None:
    dictionary, windows = draw(6, 10, seed=3), draw(5, 3, 10)
    classes, parents = [2, 2, 2, 2, 5, 5], [0, 0, 1, 1, 2, 2]
    found = presence.of_windows(PartsCodec(dictionary, classes, parents), windows, 6, CPU)
    for parent in (0, 1, 2):
        own = [part for part, of in enumerate(parents) if of == parent]
        atoms = dictionary[own].double().numpy().T
        for image in range(5):
            codes = np.array([nnls(atoms, window.double().numpy())[0] for window in windows[image]])
            np.testing.assert_allclose(found[image, own], codes.max(0), rtol=1e-4, atol=1e-5)
