"""One training step of a TopK autoencoder, 2048 channels to 16,384 latents, k 16: ours beside overcomplete's dense one.

Both include Adam. The dense step is the leanest that overcomplete offers: a plain linear encoder instead of its default
with batch normalisation, the squared error alone as loss, no clipping. Ours does all that a step of a training does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from offline.sae.group import Group
from offline.sae.learner import Learner
from offline.sae.settings import EncoderDtype, Reading, SaeSettings

CHANNELS, LATENTS, ACTIVE, BATCH = 2048, 16_384, 16, 8192
EPOCH = 100 * BATCH
REPEATS = 5
TARGETS = {"cpu": 4.0, "cuda": 5.0}


def main() -> None:
    """Measure vectors per second of both, in float32 and with bfloat16 where either uses it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vectors = torch.randn(BATCH, CHANNELS, generator=torch.Generator().manual_seed(0)).clamp_min(0)
    vectors = (vectors / vectors.square().sum(1).mean().sqrt()).to(device)
    dense = dense_model(device)
    work = {
        "ours, float32 encoder": our_step(vectors, "float32"),
        "ours, bfloat16 encoder": our_step(vectors, "bfloat16"),
        "dense, float32": dense_step(dense, vectors),
        "dense, bfloat16 autocast": dense_step(dense, vectors, torch.bfloat16),
    }
    seconds = measure.interleaved({name: waited(run, device) for name, run in work.items()}, REPEATS)
    rates = {name: BATCH / value for name, value in seconds.items()}
    measure.publish(
        "sae_train_step",
        [
            measure.row(
                f"sae_train_step: {ours}",
                rates[f"ours, {ours}"],
                "vectors/s",
                baseline=f"overcomplete's TopKSAE, {baseline}",
                baseline_value=rates[f"dense, {baseline}"],
                target=target,
            )
            for ours, baseline, target in (
                ("bfloat16 encoder", "float32", TARGETS[device.type]),
                ("float32 encoder", "float32", None),
                ("bfloat16 encoder", "bfloat16 autocast", None),
            )
        ],
    )


def our_step(vectors: Tensor, dtype: EncoderDtype) -> Callable[[], object]:
    """Return a step of ours."""
    settings = SaeSettings(LATENTS, ACTIVE, encoder_dtype=dtype)
    learner = Learner(settings, vectors.mean(0).cpu(), EPOCH, Reading(BATCH), Group(vectors.device))
    return lambda: learner.step(vectors, BATCH)


def dense_model(device: torch.device) -> Any:
    """Return overcomplete's autoencoder with an encoder of its own that starts as the dictionary."""
    import matplotlib

    # overcomplete imports a function that matplotlib has moved.
    colours: Any = matplotlib.cm
    colours.get_cmap = matplotlib.colormaps.get_cmap
    from overcomplete.sae import TopKSAE

    return TopKSAE(CHANNELS, nb_concepts=LATENTS, top_k=ACTIVE, device=str(device)).untied(bias=False)


def dense_step(model: Any, vectors: Tensor, autocast: torch.dtype | None = None) -> Callable[[], object]:
    """Return a step of the dense autoencoder."""
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast(vectors.device.type, autocast, enabled=autocast is not None):
            _, _, decoded = model(vectors)
            loss = (vectors - decoded).square().mean()
        loss.backward()
        optimiser.step()

    return step


def waited(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return the same work, over only when the device is done."""

    def whole() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return whole


if __name__ == "__main__":
    main()
