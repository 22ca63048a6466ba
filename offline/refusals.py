"""What several trainers refuse, in the same words."""

from __future__ import annotations

from concepts.errors import NotTrainable
from concepts.model import Model


def negative_activations(model: Model, layer: str) -> NotTrainable:
    """Return the refusal of a layer whose activations can be negative, naming some where they cannot."""
    possible = [found.name for found in model.layers() if found.non_negative and found.layout.order != "bc"]
    layers = f"non-negative layers: {', '.join(possible[-5:])}" if possible else "this model has no non-negative layer"
    return NotTrainable(
        f"activations at layer {layer!r} of model {model.spec.name!r} can be negative, which NMF cannot learn; "
        f"{layers}; a bank of kind sae takes any sign",
        layer=layer,
    )
