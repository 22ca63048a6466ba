"""What decides a contrast bank."""

from __future__ import annotations

from pydantic import Field, model_validator

from concepts.preprocessing import Preprocessing
from offline.config import TrainingConfig


class ContrastConfig(TrainingConfig):
    """All that decides a bank of planes between classes."""

    name: str = Field("contrast", description="Name of the bank; model/layer/name is its reference.")
    classes: tuple[str, ...] = Field((), description="Classes to lay planes between; all where none is named.")
    images_per_class: int = Field(60, ge=1, description="Most training images predicted as a class, in images.")
    min_images: int = Field(5, ge=1, description="Fewest training images that a class has planes from.")
    evidence: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Positions speak for their image's class where their evidence exceeds this share of its largest.",
    )
    shrinkage: float = Field(
        0.5, ge=0, le=1, description="Share of a round covariance that is mixed into the one of the vectors; 1: round."
    )
    pairs: int = Field(
        256,
        ge=0,
        description="Most ordered pairs of classes that get prototypes and are tested, those first that the model "
        "confuses most.",
    )
    concepts: int = Field(3, ge=1, description="Prototypes an ordered pair (the rank of the factorisation).")
    random_starts: int = Field(0, ge=0, description="Starts of the factorisation beside the one by singular vectors.")
    tolerance: float = Field(1e-4, gt=0, description="Relative projected gradient at which a factorisation is done.")
    max_iterations: int = Field(2000, ge=1, description="Most alternations of a factorisation.")
    exemplars: int = Field(4, ge=0, description="Most exemplars of a prototype.")
    patch_size: int | None = Field(
        None,
        ge=1,
        description="Side of an exemplar in pixels of the model's view; default: a quarter of the view, or two cells "
        "of the layer's grid where that is more.",
    )
    test_images: int = Field(
        20, ge=1, description="Most held-out images of a class to shift and to mask for each of its pairs, in images."
    )
    insertion_images: int = Field(
        10, ge=0, description="Most held-out images to paste each prototype into, in images; 0: none."
    )

    @model_validator(mode="after")
    def _enough(self) -> ContrastConfig:
        if self.images_per_class < self.min_images:
            raise ValueError(f"images_per_class {self.images_per_class} must be at least min_images {self.min_images}")
        return self

    def side(self, view: Preprocessing, grid: tuple[int, int]) -> int:
        """Return the side of an exemplar for a layer's grid, in pixels of the view."""
        least = min(view.height, view.width)
        cells = 2 * max(-(-view.height // grid[0]), -(-view.width // grid[1]))
        return min(self.patch_size or max(least // 4, cells), least)
