"""What every trainer of concepts of each class needs to know."""

from __future__ import annotations

from pydantic import Field

from offline.config import JudgingConfig


class PerClassConfig(JudgingConfig):
    """Fields of every such trainer; each adds its own."""

    concepts: int = Field(10, ge=1, description="Concepts a class (the rank of the factorisation).")
    images_per_class: int = Field(400, ge=1, description="Most training images of a class, in images.")
    min_images: int = Field(10, ge=1, description="Fewest images that a class can be learned from.")
    importance_images: int = Field(50, ge=1, description="Most images of a class to measure importance on.")
    designs: int = Field(32, ge=2, description="Designs of the Sobol estimator, where the head is not affine.")
    random_starts: int = Field(4, ge=0, description="Starts of the factorisation beside the one by singular vectors.")
    tolerance: float = Field(1e-4, gt=0, description="Relative projected gradient at which a factorisation is done.")
    max_iterations: int = Field(2000, ge=1, description="Most alternations of a factorisation.")
    stability_folds: int = Field(5, ge=0, description="Refits to measure stability with; fewer than 2: not measured.")
