"""NMF banks of all classes together, on real images: what is published, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from concepts.engine import Engine
from concepts.errors import InvalidInput, NotTrainable
from concepts.explanation import EngineRequest, ExplainOptions, Explanation
from concepts.repository import Repository
from offline.images import open_folder
from offline.nmf import best_of
from offline.progress import silent
from offline.store.reading import Store
from offline.trainers import Outcome
from offline.trainers.nmf import NmfConfig, train
from tests.offline.store.stores import every_row
from tests.offline.worlds import MODEL, add_bcos, repository, some_images

QUICK = {"positions": 16, "exemplars": 2, "exemplar_images": 40, "truth_images": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nmf")
    some_images(root / "train", "train", {"ship": 40, "truck": 40})
    some_images(root / "test", "test", {"ship": 15, "truck": 15})
    return root


def config(place: Path, **changes: object) -> NmfConfig:
    base = {"model": MODEL, "layer": "layer3", "images": place / "train", "held_out": place / "test"}
    return NmfConfig(**(base | QUICK | changes))


@pytest.fixture(scope="module")
def trained(place: Path) -> tuple[Repository, Outcome]:
    files = repository(place / "repository")
    how = {"ranks": (8, 4), "store": place / "store", "stability_seeds": 2}
    return files, train(files, config(place, **how), silent)


def unfinished(files: Repository) -> list[Path]:
    return [path for path in (files.root / "work").rglob("*") if path.is_file()]


def test_a_bank_a_rank_with_concepts_of_no_class(trained: tuple[Repository, Outcome]) -> None:
    files, outcome = trained
    assert [bank.name for bank in outcome.banks] == ["nmf-8", "nmf-4"]
    for bank, rank in zip(outcome.banks, (8, 4), strict=True):
        loaded = files.load(files.resolve(bank.reference))
        assert (loaded.kind, loaded.digest, len(loaded.concepts)) == ("nmf", bank.digest, rank)
        assert all(concept.class_index is None for concept in loaded.concepts)
        torch.testing.assert_close(loaded.tensors["dictionary"].norm(dim=1), torch.ones(rank))
        assert 0.2 < loaded.metrics["mean"]["stability"] <= 1
        assert loaded.metrics["training"]["projected_gradient"] <= 1e-3
        assert sum(len(concept.exemplars) for concept in loaded.concepts) > rank
        json.dumps(loaded.metrics, allow_nan=False)
    errors = [bank.metrics["mean"]["relative_error"] for bank in outcome.banks]
    assert 0 < errors[0] < errors[1] < 1
    assert unfinished(files) == []


def test_the_dictionary_is_as_good_as_one_learned_in_memory(trained: tuple[Repository, Outcome], place: Path) -> None:
    rows = torch.from_numpy(every_row(Store.open(place / "store"))[0])
    for bank in trained[1].banks:
        inside = best_of(rows, len(bank.concepts), tolerance=1e-4)
        assert bank.metrics["training"]["objective"] * len(rows) <= 1.01 * float(inside.objective)


def test_the_engine_explains_with_the_bank(trained: tuple[Repository, Outcome], place: Path) -> None:
    files, outcome = trained
    folder = open_folder(place / "test")
    engine = Engine(files.load_model(MODEL), outcome.bank)
    views = np.stack([np.asarray(folder.open(key)) for key in folder.keys[:4]])
    for one in engine.explain(views, [EngineRequest(options=ExplainOptions(top_k=8))] * 4):
        assert isinstance(one, Explanation)
        assert abs(one.faithfulness.completeness_residual) < 1e-3


def test_same_seed_same_digest_and_penalties_are_obeyed(place: Path, tmp_path: Path) -> None:
    files = repository(tmp_path)
    one, again = (train(files, config(place, ranks=(6,)), silent).bank for _ in range(2))
    assert one.digest == again.digest
    assert one.name == "nmf"
    sparse = train(files, config(place, ranks=(6,), codes_l1=0.2, name="sparse"), silent).bank
    assert (sparse.metrics["training"]["objective"]) > one.metrics["training"]["objective"]
    thin = train(files, config(place, ranks=(6,), dictionary_l1=0.3, name="thin"), silent).bank
    assert thin.metrics["mean"]["hoyer"] > one.metrics["mean"]["hoyer"]
    with pytest.raises(NotTrainable, match="lower them"):
        train(files, config(place, ranks=(6,), codes_l1=50.0, name="none"), silent)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"ranks": (65,)}, InvalidInput, "65 concepts do not fit layer 'layer3' of 64 channels: ask for 1 to 64"),
        ({"ranks": (0,)}, InvalidInput, "ask for 1 to 64"),
        ({"layer": "bn1"}, NotTrainable, r"which NMF cannot learn; non-negative layers: .*layer3"),
        ({"model": "bcos"}, NotTrainable, "can be negative.*sae"),
        ({"ranks": (40,), "image_limit": 2}, NotTrainable, "40 concepts do not fit 32 vectors"),
    ],
)
def test_what_does_not_fit_is_refused(
    place: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], words: str
) -> None:
    files = repository(tmp_path)
    add_bcos(files)
    with pytest.raises(error, match=words):
        train(files, config(place, **changes), silent)
    assert files.banks() == []
