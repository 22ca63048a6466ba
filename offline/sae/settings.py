"""What decides a training: the settings of each dictionary, and how the vectors are read for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from concepts.errors import InvalidInput

Variant = Literal["topk", "batchtopk", "jumprelu"]
EncoderDtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class SaeSettings:
    """One dictionary of K latents; the defaults are those of FaCT (arXiv 2510.25512, appendix).

    Lengths and thresholds are in units of the root mean square norm of the vectors, by which training divides.
    """

    latents: int
    """K."""
    k: int
    """Active latents of a vector: exactly (topk), on average (batchtopk), or on average at the start (jumprelu)."""
    variant: Variant = "topk"
    seed: int = 0
    """Of the first weights."""
    encoder_bias: bool = False
    decoder_bias: bool = False
    """Also subtracted before the encoder; starts at the mean of the vectors."""
    learning_rate: float = 1e-3
    """Adam's, after the warm-up."""
    warm_up_epochs: float = 1.0
    """Epochs in which the learning rate rises linearly."""
    decay_from_epoch: float = 2.0
    """Epochs after which it falls to zero along a cosine."""
    gradient_norm: float = 1.0
    """Longest gradient of all parameters together; a longer one is shortened to it."""
    auxk: int = 256
    """Dead latents a vector that learn what the living leave over (Gao et al., arXiv 2406.04093, appendix A.2)."""
    auxk_coefficient: float = 1 / 32
    """Weight α of their loss; 0 leaves the dead alone."""
    dead_after_epochs: float = 0.5
    """Epochs' worth of vectors without firing after which a latent is dead."""
    bandwidth: float = 1e-3
    """ε, width of the window around a threshold whose vectors move it (jumprelu)."""
    sparsity_coefficient: float = 3e-3
    """λ, the price of one active latent in squared error (jumprelu)."""
    sparsity_warm_up_epochs: float = 1.0
    """Epochs in which λ rises linearly (jumprelu)."""
    encoder_dtype: EncoderDtype = "auto"
    """In which the latents are chosen; auto is bfloat16 where the device is faster in it."""

    def check(self) -> None:
        """Raise ``InvalidInput`` if these settings cannot be trained with."""
        if self.variant not in get_args(Variant):
            raise InvalidInput(f"there is no variant {self.variant!r}: use {', '.join(get_args(Variant))}")
        if self.encoder_dtype not in get_args(EncoderDtype):
            raise InvalidInput(
                f"an encoder cannot compute in {self.encoder_dtype!r}: use {', '.join(get_args(EncoderDtype))}"
            )
        if self.latents < 1:
            raise InvalidInput(f"a dictionary of {self.latents} latents is none: ask for 1 or more")
        if not 1 <= self.k <= self.latents:
            raise InvalidInput(f"{self.k} of {self.latents} latents cannot be active: k must be 1 to {self.latents}")
        if self.auxk < 1:
            raise InvalidInput(f"auxk must be 1 or more, not {self.auxk}; auxk_coefficient = 0 switches it off")
        for name in ("learning_rate", "gradient_norm", "dead_after_epochs", "bandwidth"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidInput(f"{name} must be positive and finite, not {getattr(self, name)}")
        for name in (
            "warm_up_epochs",
            "decay_from_epoch",
            "auxk_coefficient",
            "sparsity_coefficient",
            "sparsity_warm_up_epochs",
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidInput(f"{name} must be zero or positive and finite, not {getattr(self, name)}")


@dataclass(frozen=True)
class Reading:
    """How the vectors are read: once an epoch for all dictionaries that are trained together."""

    batch_size: int = 32_786
    """Vectors a step, of all devices together."""
    epochs: int = 16
    seed: int = 0
    """Of the order of the vectors."""

    def check(self, vectors: int) -> None:
        """Raise ``InvalidInput`` if so many vectors cannot be read so."""
        if not 1 <= self.batch_size <= vectors:
            raise InvalidInput(
                f"a batch of {self.batch_size} cannot be drawn from {vectors} vectors: ask for 1 to {vectors}"
            )
        if self.epochs < 1:
            raise InvalidInput(f"training takes 1 epoch or more, not {self.epochs}")

    def steps_per_epoch(self, vectors: int) -> int:
        """Return the number of batches of an epoch, the last one perhaps smaller."""
        return -(-vectors // self.batch_size)
