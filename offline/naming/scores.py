"""How well words fit concepts: the rule that compares them with crops, and the published one that goes by captions.

*Direct.* Let t be the embedding of a word, e the mean of the exemplars' embeddings, f that of the counterfactuals', m
that of all crops of the bank, and s the standard deviation of ⟨t, x⟩ over these crops x. The word's score is

    (⟨t, e − f⟩ + ⟨t, e − m⟩) / s:

how much more it fits the exemplars than what is alike but for the concept, and than crops in general, in standard
deviations. The first takes away what accompanies the concept, the second what fits everything; without counterfactuals
there is the second alone. Both are differences between crops, so that it does not matter where in the space, far from
texts, a CLIP puts pictures.

*Captions* (FALCON, arXiv 2307.10504). A word's score for a crop is the softmax, over the crop's nearest captions, of
100 × cosine of the best of them that holds it; the score is the mean over exemplars, and words whose mean over
counterfactuals is 0.1 or more are dropped. Nearest are those of the whole vocabulary: theirs are of one shard each, and
cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_TEMPERATURE = 100.0
_DROPPED_FROM = 0.1


@dataclass(frozen=True)
class Evidence:
    """Embeddings of one concept's crops, float32 rows of norm 1."""

    exemplars: Tensor
    """``[n, D]``."""
    counterfactuals: Tensor
    """``[m, D]``."""


@dataclass(frozen=True)
class Background:
    """What crops in general look like."""

    mean: Tensor
    """``[D]``."""
    covariance: Tensor
    """``[D, D]``."""

    @classmethod
    def of(cls, evidence: Sequence[Evidence]) -> Background:
        """Measure the crops of all concepts."""
        crops = torch.cat([part for own in evidence for part in (own.exemplars, own.counterfactuals)]).double()
        mean = crops.mean(0)
        centred = crops - mean
        return cls(mean, centred.T @ centred / max(len(crops), 1))

    def deviation(self, texts: Tensor) -> Tensor:
        """Return the standard deviation of each text's cosine over the crops, ``[W]``."""
        wide = texts.double()
        return ((wide @ self.covariance) * wide).sum(1).clamp_min(1e-12).sqrt()


def direction(evidence: Evidence, background: Background) -> Tensor:
    """Return where a concept's exemplars differ from counterfactuals and other crops, float64 ``[D]``."""
    mean = evidence.exemplars.double().mean(0)
    against = mean - background.mean
    if len(evidence.counterfactuals):
        against = against + mean - evidence.counterfactuals.double().mean(0)
    return against


def direct(texts: Tensor, evidence: Evidence, background: Background) -> Tensor:
    """Return the scores of texts ``[W, D]``, in standard deviations; see the module."""
    scores: Tensor = (texts.double() @ direction(evidence, background)) / background.deviation(texts)
    return scores


def separation(text: Tensor, evidence: Evidence, background: Background) -> float:
    """Return how often a text ``[D]`` fits an exemplar better than a counterfactual (ties count half).

    Without counterfactuals: how much of the crops in general, taken as normal, it fits less than the mean exemplar.
    """
    fits = evidence.exemplars.double() @ text.double()
    if not len(evidence.counterfactuals):
        above = (fits.mean() - background.mean @ text.double()) / background.deviation(text.unsqueeze(0))[0]
        return float(torch.special.ndtr(above))
    less = fits.unsqueeze(1) - (evidence.counterfactuals.double() @ text.double()).unsqueeze(0)
    return float((less.sign() + 1).mean() / 2)


def by_captions(holds: Tensor, exemplars: Tensor, counterfactuals: Tensor) -> Tensor:
    """Return the published scores of candidates, ``[W]``; −inf for those that are dropped.

    Parameters
    ----------
    holds
        Whether captions hold candidates, bool ``[W, N]``.
    exemplars, counterfactuals
        Cosines of crops with captions, ``[n, N]`` and ``[m, N]``; −inf where a caption is not among a crop's nearest.
    """
    scores = _best_caption(holds, exemplars)
    if len(counterfactuals):
        scores = scores.masked_fill(_best_caption(holds, counterfactuals) >= _DROPPED_FROM, -torch.inf)
    return scores


def _best_caption(holds: Tensor, cosines: Tensor) -> Tensor:
    shares = functional.softmax(_TEMPERATURE * cosines.double(), dim=1)
    return torch.stack([(shares * held).amax(1).mean() for held in holds])
