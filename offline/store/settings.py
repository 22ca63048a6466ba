"""What can be chosen of a harvest."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field

Sampling = Literal["attribution", "uniform", "all"]
Dtype = Literal["float16", "float32"]


class HarvestSettings(BaseModel):
    """All that decides what is harvested of a folder; the command's options are made from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    sampling: Sampling = Field(
        "attribution",
        description="Which positions of an image: attribution draws those that count for the predicted class more "
        "often, uniform draws all alike, all takes them all.",
    )
    positions: int | None = Field(
        None, ge=1, description="Positions an image; default: 72·512 / channels, at most as many as there are."
    )
    dtype: Dtype = Field("float16", description="float16, or float32 for a layer whose values are beyond 65504.")
    classes: tuple[str, ...] = Field((), description="Folders of classes to take images from; all where none is named.")
    limit: int | None = Field(None, ge=1, description="Most images, drawn at random; default: all.")
    disk_budget: ByteSize | None = Field(
        None, ge=1, description="Most bytes on disk, e.g. 20GB: as many positions an image are taken as fit."
    )
    seed: int = Field(0, ge=0, description="Of everything that is drawn.")
    batch_size: int = Field(128, ge=1, description="Images a forward pass.")
    shard_size: ByteSize = Field(
        ByteSize(32 * 2**20), ge=1, description="Bytes a shard: what is held in memory, and lost when work is stopped."
    )
