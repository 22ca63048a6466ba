"""Whether the model predicts the same from the reconstruction as from the activation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def kl_divergence(logits: Tensor, reconstructed: Tensor) -> Tensor:
    """Return ``KL(softmax h(a) ‖ softmax h(â))`` of each image, in nats (FACE, eq. 3).

    Parameters
    ----------
    logits, reconstructed
        ``h(a)`` and ``h(â)``, ``[N, n_classes]``.

    Returns
    -------
    float64 ``[N]``.
    """
    p, q = functional.log_softmax(logits.double(), 1), functional.log_softmax(reconstructed.double(), 1)
    return functional.kl_div(q, p, reduction="none", log_target=True).sum(1).clamp_min(0.0)


def agreement(predicted: Tensor, reconstructed: Tensor) -> float:
    """Return the share of images with the same most probable class, ``mean[argmax h(a) = argmax h(â)]``.

    Parameters
    ----------
    predicted, reconstructed
        ``argmax h(a)`` and ``argmax h(â)``, int64 ``[N]``.
    """
    return float((predicted == reconstructed).double().mean())


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of images whose most probable class is the true one.

    Parameters
    ----------
    predicted
        ``argmax h(a)`` or ``argmax h(â)``, int64 ``[N]``.
    labels
        True classes, int64 ``[N]``.
    """
    return float((predicted == labels).double().mean())
