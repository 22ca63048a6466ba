"""A contrast bank of ResNet-20, from the positions of twenty images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from concepts.bank import Bank, Concept
from concepts.kinds.contrast import REPORTED
from concepts.model import Model

UNKNOWN = 9
"""The class without planes."""
PROTOTYPES = ((3, 5), (3, 5), (5, 3), (0, 8), (0, 8), (0, 8))
"""The ordered pair of each prototype."""
UNIT = 10.0


def make_bank(model: Model, views: NDArray[np.uint8], layer: str) -> Bank:
    """Make planes from class means and the covariance of all positions; prototypes of positions drawn at random."""
    cut = model.cut(layer)
    positions = cut.positions(cut.trunk(model.inputs(views))).double()
    classes, channels = 10, positions.shape[2]
    means = positions.view(classes, -1, channels).mean(1)
    rows = positions.flatten(0, 1)
    centre = rows.mean(0)
    covariance = (rows - centre).T @ (rows - centre) / len(rows) + 0.05 * torch.eye(channels)
    directions = torch.linalg.solve(covariance, (means - centre).T).T
    drawn = torch.randint(len(rows), (len(PROTOTYPES), 4), generator=torch.Generator().manual_seed(0))
    images = torch.full((classes,), 60)
    images[UNKNOWN] = 0
    reports = {name: torch.full((classes, classes), torch.nan) for name in REPORTED}
    reports["accuracy"][3, 5] = 0.75
    reports["swap_shift"][3, 5] = 0.5
    return Bank(
        kind="contrast",
        model=model.spec.name,
        layer=layer,
        name="contrast",
        weights_digest=model.spec.weights_digest,
        channels=channels,
        concepts=tuple(
            Concept(index, label=f"prototype {index}", class_index=target, other_index=other)
            for index, (target, other) in enumerate(PROTOTYPES)
        ),
        tensors={
            "directions": directions.float(),
            "products": ((means - centre) @ directions.T).float(),
            "centre": centre.float(),
            "images": images,
            "unit": torch.tensor(UNIT),
            "dictionary": rows[drawn].mean(1).float(),
            **reports,
        },
    )


@pytest.fixture(scope="session")
def contrast_bank(model: Model, views: NDArray[np.uint8]) -> Bank:
    """At ``layer3``, where the head is affine."""
    return make_bank(model, views, "layer3")


@pytest.fixture(scope="session")
def early_contrast_bank(model: Model, views: NDArray[np.uint8]) -> Bank:
    """At ``layer2``, where it is not."""
    return make_bank(model, views, "layer2")
