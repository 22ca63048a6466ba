"""Which pairs of classes are looked at more closely."""

from __future__ import annotations

import torch

from offline.contrast.pairs import by_target, confused

RUNNERS_UP = torch.tensor([[0, 3, 1], [5, 0, 1], [1, 0, 0]])


def test_what_the_model_confuses_most_comes_first_and_of_equals_the_lowest_index():
    exists = ~torch.eye(3, dtype=torch.bool)
    assert confused(RUNNERS_UP, exists, 1) == [(1, 0)]
    assert confused(RUNNERS_UP, exists, 3) == [(0, 1), (0, 2), (1, 0)]  # of three pairs with one image each
    assert confused(RUNNERS_UP, exists, 100) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert confused(RUNNERS_UP, exists, 0) == []


def test_pairs_without_a_plane_are_left_out():
    exists = torch.tensor([[False, False, True], [False, False, True], [True, True, False]])
    assert confused(RUNNERS_UP, exists, 100) == [(0, 2), (1, 2), (2, 0), (2, 1)]


def test_pairs_go_by_their_first_class():
    assert by_target([(0, 2), (1, 0), (0, 1)]) == {0: [2, 1], 1: [0]}
