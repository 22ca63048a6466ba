"""What every training needs to know; each trainer adds its own fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from offline.locations import Bucket, Location, location

LARGEST_SEED = 2**32 - 1
"""Others are derived from it, which all generators must take."""


def _fraction_or_folder(value: object) -> object:
    """Read text from a command line: a number is a fraction, anything else a folder."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return location(value)
    return value


class TrainingConfig(BaseModel):
    """Fields of every trainer; the command's options are made from them."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    model: str = Field(description="Name of the model in the repository.")
    layer: str = Field(description="Layer to cut the model at; see `whence-bank layers`.")
    images: Location = Field(
        description="Folder of training images: <class>/*.jpg, or flat; also s3://bucket/… or gs://bucket/…."
    )
    name: str = Field(description="Name of the bank; model/layer/name is its reference.")
    classes: tuple[str, ...] = Field((), description="Classes to learn concepts for; all where none is named.")
    held_out: Annotated[float | Path | Bucket, BeforeValidator(_fraction_or_folder)] = Field(
        0.2, description="Folder of images for the metrics, or the fraction of the training images to hold out."
    )
    held_out_per_class: int = Field(200, ge=1, description="Most held-out images of a class, in images.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Of everything that is drawn.")
    batch_size: int = Field(128, ge=1, description="Images or crops a forward pass.")
    device: str = Field("auto", description="auto (a GPU where there is one), cpu, cuda or cuda:N.")

    def record(self) -> dict[str, Any]:
        """Return the configuration as a bank stores it: folders by name alone, since banks travel."""
        values = self.model_dump(mode="json")
        for key, value in self:
            if isinstance(value, (Path, Bucket)):
                values[key] = value.name
        return values


class JudgingConfig(TrainingConfig):
    """What decides how a bank is judged and shown."""

    exemplars: int = Field(8, ge=0, description="Most exemplars of a concept.")
    truth_images: int = Field(200, ge=1, description="Most held-out images to compare with known attributes.")
    encoder: str | None = Field(
        None,
        description="Encoder that judges consistency: MODEL/LAYER of the repository, or hub:dinov2_vits14; default: "
        "consistency is not measured.",
    )
    encoder_images: int = Field(1000, ge=2, description="Most held-out images that the encoder sees.")
