"""Metrics against cases computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from offline.metrics import consistency, curves, dictionaries, fidelity, localisation, sparsity, usage
from offline.metrics.reconstruction import ReconstructionError


def tensor(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_reconstruction_error_adds_up_over_batches():
    a = tensor([3.0, 0.0], [1.0, 4.0], [2.0, 2.0])
    reconstruction = tensor([3.0, 0.0], [1.0, 2.0], [1.0, 2.0])
    error = ReconstructionError()
    error.add(a[:2], reconstruction[:2])
    error.add(a[2:], reconstruction[2:])
    assert error.relative_error() == pytest.approx(math.sqrt(5 / 34))
    assert error.mse() == pytest.approx(5 / 6)
    # Channel means are 2 and 2: spread 1 + 1 + 0 and 4 + 4 + 0.
    assert error.variance_explained() == pytest.approx(1 - 5 / 10)


def test_kl_agreement_and_accuracy():
    logits = tensor([0.0, 0.0], [math.log(3.0), 0.0])
    reconstructed = tensor([math.log(3.0), 0.0], [0.0, math.log(3.0)])
    expected = [0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), 0.75 * math.log(3) - 0.25 * math.log(3)]
    torch.testing.assert_close(fidelity.kl_divergence(logits, reconstructed), tensor(*expected))
    predicted, labels = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 1, 0])
    assert fidelity.agreement(predicted, torch.tensor([0, 2, 2, 1])) == 0.75
    assert fidelity.accuracy(predicted, labels) == 0.5


def test_deletion_and_insertion_curves():
    masks = curves.deletion_masks(tensor([0.1, 0.7, 0.2], [5.0, 5.0, -1.0]), 3)
    assert masks.tolist() == [
        [[1, 1, 1], [1, 0, 1], [1, 0, 0], [0, 0, 0]],
        [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]],
    ]
    assert torch.equal(curves.deletion_masks(tensor([0.1, 0.7, 0.2]), 1), masks[:1, :2])
    assert curves.deletion_aopc(tensor(1.0, 0.5, 0.25, 0.0)) == pytest.approx((0.5 + 0.75 + 1.0) / 5)
    assert curves.insertion_auc(tensor(0.0, 1.0, 1.0, 1.0)) == pytest.approx(2.5 / 3)


def test_gini():
    assert sparsity.gini(tensor(1.0, 1.0, 1.0, 1.0)) == pytest.approx(0)
    assert sparsity.gini(tensor(0.0, 0.0, 5.0, 0.0)) == pytest.approx(0.75)
    assert sparsity.gini(tensor(3.0, 1.0)) == pytest.approx(0.25)
    assert sparsity.gini(tensor(0.0, 0.0)) == 0


def test_counts_of_active_concepts():
    """Two images of four positions: of five concepts one is active everywhere, one on half of one image, one once."""
    activity = sparsity.Activity(concepts=5, positions=4)
    activity.add(torch.tensor([[4, 1, 0]]), torch.tensor([[1, 3, 0]]))
    activity.add(torch.tensor([[2, 0]]), torch.tensor([[1, -1]]))
    assert activity.images == 2
    assert activity.density() == pytest.approx(7 / 40)
    assert activity.l0_per_position() == pytest.approx(7 / 8)
    assert activity.l0_per_image() == pytest.approx(1.5)
    assert activity.share().tolist() == [0, 1, 0, 0.5, 0]
    assert activity.alive_share() == pytest.approx(2 / 5)
    assert activity.dead_share() == pytest.approx(3 / 5)
    assert activity.always_on_share() == pytest.approx(1 / 5)


def test_concepts_for_share_of_the_positive_contribution():
    contributions = tensor([5.0, 3.0, 2.0, -9.0], [10.0, 0.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0])
    assert sparsity.concepts_for_share(contributions).tolist() == [2, 1, 0, 4]


def test_dictionary_health():
    assert dictionaries.hoyer(tensor([0.0, 0.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0] * 4)) == pytest.approx(0.5)
    assert dictionaries.largest_cosine(tensor([1.0, 0.0], [0.0, 2.0], [3.0, 4.0])) == pytest.approx(0.8)
    assert dictionaries.largest_cosine(tensor([1.0, 0.0])) == 0


def test_large_dictionaries_are_compared_part_by_part(monkeypatch):
    first, second = torch.randn(2, 23, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = [table / table.norm(dim=1, keepdim=True) for table in (first, second)]
    own, cosines = unit[0] @ unit[0].T - 2 * torch.eye(23), unit[0] @ unit[1].T
    monkeypatch.setattr(dictionaries, "_ROWS", 7)
    assert dictionaries.largest_cosine(first) == pytest.approx(float(own.max()), abs=1e-6)
    nearest = (cosines.max(0).values.mean() + cosines.max(1).values.mean()) / 2
    assert dictionaries.best_cosine(first, second) == pytest.approx(float(nearest), abs=1e-6)
    assert dictionaries.best_cosine(first, second) >= dictionaries.matched_cosine(first, second)
    for place in (0, 11, 22):  # a row and its double, wherever they lie
        twins = torch.cat([first, first[place : place + 1]])
        assert dictionaries.largest_cosine(twins) == pytest.approx(1, abs=1e-6)


def test_stability_matches_before_it_compares():
    base = tensor([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    swapped = tensor([0.0, 5.0, 0.0], [3.0, 0.0, 0.0])
    turned = tensor([0.0, 0.6, 0.8], [1.0, 0.0, 0.0])
    assert dictionaries.matched_cosine(base, swapped) == pytest.approx(1)
    assert dictionaries.stability([base, swapped, turned]) == pytest.approx((1 + 0.8 + 0.8) / 3)


def test_prevalence_and_reliability():
    contributions = tensor([3.0, 1.0, 0.0], [2.0, -1.0, 9.0], [0.0, 5.0, 1.0], [-4.0, 0.0, -5.0], [7.0, 7.0, 7.0])
    ids = torch.tensor([[0, 1, 2], [0, 1, -1], [0, 1, 2], [0, -1, 2], [-1, -1, -1]])
    largest = usage.largest(contributions, ids)
    assert largest.tolist() == [0, 0, 1, 0, -1]
    correct = torch.tensor([True, False, True, True, True])
    assert usage.prevalence(largest, 3).tolist() == pytest.approx([0.6, 0.2, 0])
    reliability = usage.reliability(largest, correct, 3)
    assert reliability[:2].tolist() == pytest.approx([2 / 3, 1])
    assert reliability[2].isnan()


def test_regions_are_what_an_encoder_sees_where_a_concept_is():
    features = torch.arange(8.0).view(1, 2, 2, 2).repeat(3, 1, 1, 1)
    maps = torch.tensor([[[1.0, 0.0], [0.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.5, 0.0]]])
    # Cells of the first channel are 0, 1, 2, 3, of the second 4, 5, 6, 7.
    found = consistency.regions(maps, consistency.on_grid(features, (2, 2)), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(found, torch.tensor([[9 / 4 - 1, 25 / 4 - 1], [0.0, 0.0], [1.0, 5.0]]))


def test_regions_of_a_map_finer_than_the_features_leave_no_cell_out():
    features = torch.zeros(1, 1, 2, 2)
    features[..., 0] = 1.0  # the left half
    for cell in range(64):
        maps = torch.zeros(1, 64)
        maps[0, cell] = 1.0
        coarse = consistency.resized(maps.view(1, 8, 8), (2, 2))
        seen = float(consistency.regions(coarse, consistency.on_grid(features, (2, 2)), torch.zeros(1)))
        # Columns far from the middle belong to one half alone.
        assert seen == pytest.approx({0: 1, 1: 1, 6: 0, 7: 0}.get(cell % 8, seen))
        assert (seen > 0.5) == (cell % 8 < 4)


@pytest.mark.parametrize("size", [(7, 7), (3, 9), (2, 3), (6, 10)])
def test_features_may_be_brought_to_the_maps_in_place_of_these_to_them(size):
    generator = torch.Generator().manual_seed(0)
    maps, mean = torch.rand(4, 2, 3, generator=generator), torch.rand(5, generator=generator)
    features = torch.rand(4, 5, *size, generator=generator)
    large = functional.interpolate(maps.unsqueeze(1), size=size, mode="bilinear")
    expected = (large * features).sum((2, 3)) / large.sum((2, 3)) - mean
    found = consistency.regions(maps, consistency.on_grid(features, (2, 3)), mean)
    torch.testing.assert_close(found, expected)


def test_consistency_is_the_weighted_mean_cosine_of_pairs():
    seen = tensor([1.0, 0.0], [2.0, 0.0], [0.0, 3.0])
    # Pairs (0, 1) and (0, 2) and (1, 2): cosines 1, 0, 0.
    assert consistency.consistency(seen, tensor(1.0, 1.0, 1.0)) == pytest.approx(1 / 3)
    assert consistency.consistency(seen, tensor(1.0, 2.0, 3.0)) == pytest.approx(2 / (2 + 3 + 6))
    assert consistency.consistency(tensor([3.0, 1.0], [6.0, 2.0], [1.5, 0.5]), tensor(1.0, 9.0, 2.0)) == pytest.approx(
        1
    )
    assert consistency.consistency(seen[:1], tensor(1.0)) == 0
    assert consistency.consistency(seen, tensor(0.0, 0.0, 0.0)) == 0


def test_auroc_equals_scikit_learn_with_ties():
    g = np.random.default_rng(0)
    scores, present = g.integers(0, 5, (40, 3)).astype(float), g.random((40, 2)) < 0.4
    table = localisation.auroc(torch.from_numpy(scores), torch.from_numpy(present))
    expected = [[roc_auc_score(present[:, a], scores[:, k]) for a in range(2)] for k in range(3)]
    np.testing.assert_allclose(table.numpy(), expected)


def test_matching_is_one_to_one_and_leaves_out_what_never_changes():
    present = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1], [0, 1, 1]]).bool()
    # Concept 0 follows the first attribute, concept 2 is the second; the third attribute is always there.
    scores = torch.stack([present[:, 0] + tensor(0.0, 0.0, 0.0, 1.0), torch.zeros(4), present[:, 1] * 1.0], dim=1)
    matching = localisation.match(scores, present)
    assert matching.attributes.tolist() == [0, 1]
    assert matching.concepts.tolist() == [0, 2]
    assert matching.auroc.tolist() == [0.75, 1.0]


def test_pointing_game_and_iou():
    heatmaps = torch.zeros(2, 4, 4)
    heatmaps[0, :2, :2] = 3.0
    heatmaps[0, 0, 2] = 1.0
    heatmaps[1, 3, 3] = 3.0
    heatmaps[1, 3, 2] = 2.0
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :2, :2] = True
    masks[1, 3, 1:3] = True
    assert localisation.pointing_game(heatmaps, masks).tolist() == [True, False]
    # At 3: 1 and 0; at 2: 1 and 1/3; at 1: 4/5 and 1/3.
    assert localisation.best_iou(heatmaps, masks) == pytest.approx((1 + 1 / 3) / 2)
    assert localisation.best_iou(torch.zeros(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)) == 0
