"""Counterfactuals: against a search that goes by the definition, in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concepts.layout import Layout
from concepts.preprocessing import Box, Preprocessing
from offline.exemplars import Excerpt
from offline.naming import counterfactuals
from offline.naming.counterfactuals import Sought, nearest_without
from offline.naming.windows import Seen, WindowGrid

IMAGES, CHANNELS, CONCEPTS = 40, 6, 9
GRID = WindowGrid(Layout("bchw", CHANNELS, (8, 8), 0), Preprocessing(64, 64), 0.5)


@pytest.fixture(scope="module")
def seen() -> Seen:
    seen = Seen(GRID)
    a = torch.rand(IMAGES, 64, CHANNELS, generator=torch.Generator().manual_seed(0)) ** 4
    for first in range(0, IMAGES, 16):
        keys = [f"{image}.png" for image in range(first, min(first + 16, IMAGES))]
        seen.add(
            keys,
            [Box(image, 0, image + 64, 64) for image in range(len(keys))],
            a[first : first + 16],
            {},
            frozenset(keys),
        )
    return seen


@pytest.fixture(scope="module")
def sought() -> Sought:
    """Concepts of many directions; the fourth has no exemplar, the fifth is in few images at all."""
    generator = torch.Generator().manual_seed(1)
    references = [list(torch.rand(n, CHANNELS, generator=generator)) for n in (3, 1, 5, 0, 2, 4, 1, 1, 1)]
    presence = torch.rand(IMAGES, CONCEPTS, generator=generator)
    presence[:-4, 4] = 0
    return Sought(7 * torch.randn(CONCEPTS, CHANNELS, generator=generator), presence, references)


def reference(seen: Seen, sought: Sought, count: int, similarity: float) -> list[list[Excerpt]]:
    windows, presence = torch.cat(seen.windows).double().numpy(), sought.presence.double().numpy()
    found = []
    for concept, own in enumerate(sought.references):
        ranked = []
        if own:
            d = sought.directions[concept].double().numpy()
            mean = np.mean([each.double().numpy() for each in own], 0)
            rest = mean - mean @ d / (d @ d) * d
            allowed = np.quantile(presence[:, concept], 0.25)
            for image in range(IMAGES):
                if presence[image, concept] > allowed:
                    continue
                beside = [w - w @ d / (d @ d) * d for w in windows[image]]
                cosines = [w @ rest / np.linalg.norm(w) / np.linalg.norm(rest) for w in beside]
                best = int(np.argmax(cosines))
                if cosines[best] >= similarity:
                    ranked.append((-cosines[best], image, best))
        found.append(
            [
                Excerpt(seen.keys[image], GRID.box(window, seen.views[image]), float(sought.presence[image, concept]))
                for _, image, window in sorted(ranked)[:count]
            ]
        )
    return found


@pytest.mark.parametrize(("count", "similarity"), [(5, -1.0), (100, -1.0), (4, 0.7), (100, 0.95), (1, 0.3)])
def test_they_are_those_of_the_definition(seen: Seen, sought: Sought, count: int, similarity: float) -> None:
    found = nearest_without(seen, sought, count, similarity)
    assert found == reference(seen, sought, count, similarity)
    assert found[3] == []
    for own in found:
        assert len({each.key for each in own}) == len(own) <= count
    if count == 100 and similarity == -1:
        assert len(found[0]) == IMAGES / 4
        assert len(found[4]) == IMAGES - 4  # all that have nothing of it
    if similarity == 0.95:
        assert any(len(own) < len(all_) for own, all_ in zip(found, reference(seen, sought, count, -1), strict=True))


def test_how_many_are_compared_at_a_time_does_not_matter(
    seen: Seen, sought: Sought, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = nearest_without(seen, sought, 5, 0.3)
    windows = sum(part.shape[0] * part.shape[1] for part in seen.windows)
    for elements in (1, 2 * windows, 3 * windows + 1):
        monkeypatch.setattr(counterfactuals, "_ELEMENTS", elements)
        assert nearest_without(seen, sought, 5, 0.3) == whole


def test_the_length_of_directions_does_not_matter_nor_how_much_of_the_concept_a_window_has(
    seen: Seen, sought: Sought
) -> None:
    whole = nearest_without(seen, sought, 5, 0.3)
    scaled = Sought(sought.directions * torch.rand(CONCEPTS, 1).add(0.5), sought.presence, sought.references)
    assert nearest_without(seen, scaled, 5, 0.3) == whole
    more = [[each + 3 * d for each in own] for own, d in zip(sought.references, sought.directions, strict=True)]
    moved = nearest_without(seen, Sought(sought.directions, sought.presence, more), 5, 0.3)
    assert [[each.key for each in own] for own in moved] == [[each.key for each in own] for own in whole]


def test_exemplars_that_show_nothing_beside_the_concept_have_none(seen: Seen) -> None:
    direction = torch.eye(CHANNELS)[:1]
    alone = Sought(direction, torch.zeros(IMAGES, 1), [[direction[0] * 4]])
    assert nearest_without(seen, alone, 5, 0.3) == [[]]


def test_nothing_asked_or_seen_is_nothing_found(seen: Seen, sought: Sought) -> None:
    assert nearest_without(seen, sought, 0, 0.3) == [[]] * CONCEPTS
    assert nearest_without(Seen(GRID), sought, 5, 0.3) == [[]] * CONCEPTS
    nobody = Sought(sought.directions, sought.presence, [[]] * CONCEPTS)
    assert nearest_without(seen, nobody, 5, 0.3) == [[]] * CONCEPTS
