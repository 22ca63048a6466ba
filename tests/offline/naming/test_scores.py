"""How well words fit: against loops in double precision, and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor
from torch.nn import functional

from offline.naming.scores import Background, Evidence, by_captions, direct, direction, separation

D, TEXTS = 12, 7


def rows(seed: int, count: int) -> Tensor:
    return functional.normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def evidence() -> list[Evidence]:
    """Three concepts; the second has no counterfactuals."""
    return [Evidence(rows(1, 5), rows(2, 4)), Evidence(rows(3, 3), rows(4, 0)), Evidence(rows(5, 1), rows(6, 6))]


def crops_of(concepts: list[Evidence]) -> list[list[float]]:
    return [crop for own in concepts for part in own.__dict__.values() for crop in part.double().tolist()]


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def mean(vectors: list[list[float]]) -> list[float]:
    return [math.fsum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def test_direct_scores_are_those_of_the_definition() -> None:
    concepts, texts = evidence(), rows(7, TEXTS)
    background, crops = Background.of(concepts), crops_of(concepts)
    m = mean(crops)
    for own in concepts:
        e = mean(own.exemplars.double().tolist())
        f = mean(own.counterfactuals.double().tolist()) if len(own.counterfactuals) else e
        for text, score in zip(texts.double().tolist(), direct(texts, own, background).tolist(), strict=True):
            fits = [dot(text, crop) for crop in crops]
            middle = math.fsum(fits) / len(fits)
            s = math.sqrt(math.fsum((value - middle) ** 2 for value in fits) / len(fits))
            expected = (dot(text, e) - dot(text, f) + dot(text, e) - dot(text, m)) / s
            assert score == pytest.approx(expected, rel=1e-9, abs=1e-9)
            assert float(background.deviation(torch.tensor([text]))) == pytest.approx(s, rel=1e-6)


def test_where_a_clip_puts_pictures_does_not_matter() -> None:
    """A gap between pictures and texts is the same vector added to all crops."""
    concepts, texts, gap = evidence(), rows(7, TEXTS), 5 * rows(8, 1)[0].double()
    moved = [Evidence(own.exemplars.double() + gap, own.counterfactuals.double() + gap) for own in concepts]
    for one, other in zip(concepts, moved, strict=True):
        background, there = Background.of(concepts), Background.of(moved)
        torch.testing.assert_close(direct(texts, one, background), direct(texts, other, there))
        torch.testing.assert_close(direction(one, background), direction(other, there))
        for text in texts:
            assert separation(text, other, there) == pytest.approx(separation(text, one, background), abs=1e-12)


def test_longer_texts_score_no_more_and_what_all_crops_have_scores_nothing() -> None:
    concepts, texts = evidence(), rows(7, TEXTS)
    background = Background.of(concepts)
    torch.testing.assert_close(direct(3 * texts, concepts[0], background), direct(texts, concepts[0], background))
    common = torch.zeros(D)
    common[0] = 1
    alike = [
        Evidence(*(functional.pad(part[:, 1:], (1, 0), value=0.5) for part in own.__dict__.values()))
        for own in concepts
    ]
    assert float(direct(common.unsqueeze(0), alike[0], Background.of(alike))) == 0


def test_separation_counts_pairs_and_ties_as_half() -> None:
    concepts, background = evidence(), Background.of(evidence())
    for own in (concepts[0], concepts[2]):
        for text in rows(9, TEXTS):
            pairs = [
                (dot(text.double().tolist(), one), dot(text.double().tolist(), other))
                for one in own.exemplars.double().tolist()
                for other in own.counterfactuals.double().tolist()
            ]
            expected = sum(1.0 if one > other else 0.5 if one == other else 0.0 for one, other in pairs) / len(pairs)
            assert separation(text, own, background) == pytest.approx(expected)
    text, basis = torch.eye(D)[0], torch.eye(D)
    tied = Evidence(basis[[0, 1]], basis[[0, 2, 3]])  # 1 and 0 against 1, 0 and 0: ½, 1, 1, 0, ½, ½
    assert separation(text, tied, background) == pytest.approx(3.5 / 6)
    assert separation(text, Evidence(basis[[0]], basis[[1]]), background) == 1
    assert separation(text, Evidence(basis[[1]], basis[[0]]), background) == 0


def test_separation_without_counterfactuals_is_a_share_of_normal_crops() -> None:
    concepts = evidence()
    background, fits = Background.of(concepts), np.array(crops_of(concepts))
    for text in rows(9, TEXTS):
        values = fits @ text.double().numpy()
        above = (concepts[1].exemplars.double().numpy() @ text.double().numpy()).mean() - values.mean()
        assert separation(text, concepts[1], background) == pytest.approx(norm.cdf(above / values.std()), abs=1e-6)


def test_background_is_mean_and_covariance_of_all_crops() -> None:
    crops = np.array(crops_of(evidence()))
    background = Background.of(evidence())
    np.testing.assert_allclose(background.mean, crops.mean(0), atol=1e-12)
    np.testing.assert_allclose(background.covariance, np.cov(crops.T, bias=True), atol=1e-12)
    one = Background.of([Evidence(rows(1, 1), rows(2, 0))])
    assert bool(torch.isfinite(direct(rows(7, TEXTS), Evidence(rows(1, 1), rows(2, 0)), one)).all())


def test_published_scores_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    holds = torch.rand(12, 8, generator=generator) < 0.15
    holds[11] = False
    cosines = [0.2 + spread * torch.randn(n, 8, generator=generator) for n, spread in ((4, 0.02), (3, 0.1))]
    for part in cosines:
        part[:, 6:] = -torch.inf  # captions that are near other crops only

    def reference(part: Tensor) -> list[float]:
        means = []
        for held in holds.tolist():
            best = []
            for crop in part.double().tolist():
                weights = [math.exp(100 * cosine) for cosine in crop]
                shares = [weight / math.fsum(weights) for weight in weights]
                best.append(max(share if there else 0.0 for share, there in zip(shares, held, strict=True)))
            means.append(math.fsum(best) / len(best))
        return means

    against = reference(cosines[1])
    own = reference(cosines[0])
    expected = [score if other < 0.1 else -math.inf for score, other in zip(own, against, strict=True)]
    found = by_captions(holds, *cosines).tolist()
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert -math.inf in found
    assert any(0 < score < 1 for score in found)
    assert by_captions(holds, cosines[0], cosines[1][:0]).tolist() == pytest.approx(own, rel=1e-6, abs=1e-12)
