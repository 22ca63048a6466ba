"""Learning rate and coefficients over a training."""

from __future__ import annotations

import math

from offline.sae.settings import SaeSettings


def learning_rate(settings: SaeSettings, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the learning rate of a step: linear rise, constant, then a cosine towards zero at the end.

    Parameters
    ----------
    settings
        Of the dictionary.
    step
        Steps done before this one.
    steps_per_epoch, epochs
        Of the whole training.
    """
    rise = warm_up(step, steps_per_epoch, settings.warm_up_epochs)
    first, last = settings.decay_from_epoch * steps_per_epoch, epochs * steps_per_epoch
    through = (step - first) / (last - first) if step >= first else 0.0
    return settings.learning_rate * rise * (1 + math.cos(math.pi * through)) / 2


def warm_up(step: int, steps_per_epoch: int, over_epochs: float) -> float:
    """Return how far a linear rise is with this step, 1 from its end on; no step is without effect."""
    return min((step + 1) / max(over_epochs * steps_per_epoch, 1.0), 1.0)
