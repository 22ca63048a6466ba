"""What decides how concepts are named."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Scoring = Literal["direct", "captions"]


class NamingSettings(BaseModel):
    """Fields of everything that names concepts; a command's options are made from them."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    captions: int = Field(5, ge=1, description="Captions nearest to each crop, whose words are candidates.")
    words: int = Field(8, ge=1, description="Most words of a concept.")
    phrases: int = Field(8, ge=0, description="Most phrases of a concept.")
    scoring: Scoring = Field(
        "direct",
        description="direct (words are compared with the crops themselves) or captions (as published: by the best "
        "caption that holds them).",
    )
    weak_below: float = Field(
        0.95,
        ge=0,
        le=1,
        description="Labels are weak that fit an exemplar better than a counterfactual less often than this.",
    )

    def naming_record(self) -> dict[str, Any]:
        """Return these fields as a bank stores them."""
        return {name: getattr(self, name) for name in NamingSettings.model_fields}
