"""Loading what the repository holds: one bad model spares the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from concepts.bank import Bank, Concept
from concepts.errors import InvalidModel
from concepts.model import ModelSpec
from concepts.preprocessing import Preprocessing
from concepts.repository import Repository
from service.explainer import EngineKey, Explainer
from tests.concepts import networks

TRUSTED = ("tests.concepts",)


def publish(repository: Repository, name: str, factory: str) -> str:
    torch.manual_seed(0)
    spec = ModelSpec(name, f"tests.concepts.networks:{factory}", Preprocessing(8, 8), ("a", "b"), "", {"width": 4})
    spec = repository.publish_model(spec, networks.tiny(4).state_dict())
    tensors = {"dictionary": torch.eye(4)}
    concepts = tuple(Concept(index) for index in range(4))
    return repository.publish(Bank("nmf", name, "layer3", "b", spec.weights_digest, 4, concepts, tensors)).reference


async def test_a_model_that_fails_when_it_is_warmed_up_spares_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repository = Repository(tmp_path, TRUSTED)
    bad, good = publish(repository, "a-bad", "AfraidOfTheDark"), publish(repository, "good", "tiny")
    explainer = Explainer(repository, device=torch.device("cpu"), threads=1, batch_limit=2, queue_limit=2, engines=4)
    await explainer.preload()
    assert f"bank {bad} is not served" in caplog.text
    assert f"bank {good} is not served" not in caplog.text
    key = EngineKey(repository.resolve(bad), repository.model_spec("a-bad").digest)
    with pytest.raises(InvalidModel) as problem:
        await explainer._load_engine(key)
    assert "secret" not in problem.value.message
    await explainer.close()
