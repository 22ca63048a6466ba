"""SAE banks on real images: what is published, that it is what it says, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from concepts.bank import Bank
from concepts.engine import Engine
from concepts.errors import AlreadyExists, InvalidInput, NotTrainable, UnknownClass, UnknownLayer
from concepts.explanation import EngineRequest, ExplainOptions, Explanation
from concepts.model import ModelSpec
from concepts.preprocessing import Preprocessing
from concepts.repository import Repository
from offline.images import ImageFolder, open_folder
from offline.progress import silent
from offline.sae.presets import PRESETS, Size
from offline.store.harvest import harvest
from offline.store.reading import Store
from offline.trainers import Outcome
from offline.trainers.sae import SaeConfig, train
from tests.offline.networks import blinded
from tests.offline.worlds import MODEL, add_bcos, repository, some_images

BCOS, ENCODER = "bcos", f"{MODEL}/layer3"
QUICK = {"sizes": ("64/4",), "epochs": 2, "positions": 16, "exemplars": 2, "exemplar_images": 40, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sae")
    some_images(root / "train", "train", {"ship": 40, "truck": 40})
    some_images(root / "test", "test", {"ship": 15, "truck": 15})
    (root / "train" / "ship" / "broken.jpg").write_bytes(b"no picture")
    return root


def config(place: Path, **changes: object) -> SaeConfig:
    base = {"model": MODEL, "layer": "layer3", "images": place / "train", "held_out": place / "test"}
    return SaeConfig(**(base | QUICK | changes))


@pytest.fixture(scope="module")
def trained(place: Path) -> tuple[Repository, Outcome]:
    """Two sizes on a B-cos network, in one pass, each with another seed beside it, judged by another network."""
    files = repository(place / "repository")
    add_bcos(files)
    sizes = {"sizes": ("128/4", "48/8"), "epochs": 6, "stability_seeds": 1, "encoder": ENCODER}
    return files, train(files, config(place, model=BCOS, **sizes), silent)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository for what is refused, and for banks that are of no further use."""
    return repository(tmp_path_factory.mktemp("repository"))


def unfinished(files: Repository) -> list[Path]:
    return [path for path in (files.root / "work").rglob("*") if path.is_file()]


# What is published


def test_several_sizes_make_as_many_banks(trained: tuple[Repository, Outcome]) -> None:
    files, outcome = trained
    assert [bank.reference for bank in outcome.banks] == ["bcos/layer3/sae-128-4", "bcos/layer3/sae-48-8"]
    for bank, latents, k in zip(outcome.banks, (128, 48), (4, 8), strict=True):
        loaded = files.load(files.resolve(bank.reference))
        assert replace(loaded, tensors={}) == replace(bank, tensors={})
        assert (loaded.kind, loaded.channels, len(loaded.concepts)) == ("sae", 64, latents)
        assert {name: list(t.shape) for name, t in loaded.tensors.items()} == {
            "encoder": [latents, 64],
            "decoder": [latents, 64],
            "k": [],
        }
        assert int(loaded.tensors["k"]) == k
        norms = loaded.tensors["decoder"].norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(latents))
        assert loaded.metrics["mean"]["variance_explained"] > 0.3
        assert loaded.metrics["training"]["vectors"] == 80 * 16
        # Another seed is another dictionary.
        assert 0.2 < loaded.metrics["mean"]["stability"] < 0.98
    assert set(outcome.skipped_images) == {"ship/broken.jpg"}


def test_the_default_workspace_is_removed(trained: tuple[Repository, Outcome]) -> None:
    assert unfinished(trained[0]) == []


def test_banks_tell_nothing_of_the_machine(trained: tuple[Repository, Outcome], place: Path) -> None:
    files, outcome = trained
    for bank in outcome.banks:
        folder = files.root / "banks" / bank.model / bank.layer / bank.name / bank.digest
        for name in ("bank.json", "concepts.jsonl"):
            text = (folder / name).read_text()
            assert str(place) not in text
            assert "/tmp" not in text
            for line in text.splitlines() if name.endswith("l") else [text]:
                json.loads(line, parse_constant=pytest.fail)  # NaN and infinity are no JSON
        assert bank.configuration["images"] == "train"
        assert bank.configuration["held_out"] == "test"


def recomputed(files: Repository, bank: Bank, folder: ImageFolder) -> list[Explanation]:
    """Explain every held-out image by the published bank, all concepts of it."""
    engine = Engine(files.load_model(bank.model), files.load(files.resolve(bank.reference)))
    views = np.stack([np.asarray(folder.open(key)) for key in folder.keys])
    request = EngineRequest(options=ExplainOptions(top_k=10_000))
    found = engine.explain(views, [request] * len(views))
    assert all(isinstance(one, Explanation) for one in found)
    return found  # type: ignore[return-value]


def test_metrics_are_those_of_the_published_bank_on_held_out_images(
    trained: tuple[Repository, Outcome], place: Path
) -> None:
    files, outcome = trained
    folder = open_folder(place / "test")
    for bank in outcome.banks:
        explained, mean = recomputed(files, bank, folder), bank.metrics["mean"]
        assert mean["images"] == len(explained) == 30
        reports = [one.faithfulness for one in explained]
        assert mean["kl"] == pytest.approx(np.mean([report.kl for report in reports]), rel=1e-3)
        assert mean["top1_agreement"] == np.mean([report.top1_agrees for report in reports])
        labels = [folder.label(key) for key in folder.keys]
        right = np.array(
            [one.predictions[0].name == label for one, label in zip(explained, labels, strict=True)], float
        )
        assert mean["accuracy"] == pytest.approx(right.mean())
        active = [[concept for concept in one.concepts if concept.activation > 0] for one in explained]
        assert mean["l0_image"] == pytest.approx(np.mean([len(concepts) for concepts in active]))
        contributions = np.zeros((30, len(bank.concepts)))
        silent_ = np.ones((30, len(bank.concepts)), bool)
        for row, concepts in enumerate(active):
            for concept in concepts:
                contributions[row, concept.id], silent_[row, concept.id] = concept.contribution, False
        largest = np.where(silent_, -np.inf, contributions).argmax(1)
        for concept in bank.concepts:
            decided = largest == concept.id
            expected = {
                "active_share": (~silent_[:, concept.id]).mean(),
                "contribution": contributions[:, concept.id].mean(),
                "importance": np.abs(contributions[:, concept.id]).mean(),
                "prevalence": decided.mean(),
            }
            expected |= {"reliability": right[decided].mean()} if decided.any() else {}
            found = {name: value for name, value in concept.statistics.items() if name != "consistency"}
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_engine_explains_without_loss(trained: tuple[Repository, Outcome], place: Path) -> None:
    files, outcome = trained
    for bank in outcome.banks:
        for one in recomputed(files, bank, open_folder(place / "test")):
            assert one.substitute
            assert abs(one.faithfulness.completeness_residual) < 1e-4 * max(1, abs(one.target.logit))
            assert one.faithfulness.exactness == "exact"


def test_consistency_is_also_that_of_what_contributes(trained: tuple[Repository, Outcome]) -> None:
    for bank in trained[1].banks:
        scored = [concept.statistics for concept in bank.concepts if "consistency" in concept.statistics]
        assert len(scored) > 10
        # A concept that is active in one image alone has none.
        assert all(row["active_share"] >= 2 / 30 for row in scored)
        scores, weights = (np.array([row[name] for row in scored]) for name in ("consistency", "importance"))
        mean = bank.metrics["mean"]
        assert mean["consistency"] == pytest.approx(scores.mean())
        assert mean["consistency_of_contributions"] == pytest.approx((scores * weights).sum() / weights.sum())
        assert ((scores >= -2) & (scores <= 2)).all()


def test_exemplars_are_images_that_excite_their_concept(trained: tuple[Repository, Outcome], place: Path) -> None:
    files, outcome = trained
    model, bank = files.load_model(BCOS), outcome.bank
    cut, codec, folder = model.cut("layer3"), bank.codec(), open_folder(place / "train")
    shown = [concept for concept in bank.concepts if concept.exemplars][:20]
    assert len(shown) == 20
    for concept in shown:
        for exemplar in concept.exemplars:
            view = np.asarray(folder.open(exemplar.source))[None]
            codes = codec.encode(cut.positions(cut.trunk(model.inputs(view))), torch.zeros(1, dtype=torch.int64))
            slot = codes.ids[0].tolist().index(concept.id)
            assert float(codes.peak()[0, slot]) == pytest.approx(exemplar.activation, rel=1e-4)
            row, column = divmod(int(codes.peak_position()[0, slot]), 8)
            assert exemplar.box.left <= 4 * column + 2 <= exemplar.box.right
            assert exemplar.box.top <= 4 * row + 2 <= exemplar.box.bottom
    statistics = [concept.statistics["active_share"] for concept in bank.concepts]
    assert all(share > 0 for share, concept in zip(statistics, bank.concepts, strict=True) if concept.exemplars)


def test_seeds_beside_it_change_nothing_but_stability(place: Path, files: Repository) -> None:
    alone = train(files, config(place), silent).bank
    beside = train(files, config(place, stability_seeds=2), silent).bank
    for name, tensor in alone.tensors.items():
        assert torch.equal(tensor, beside.tensors[name])
    assert beside.metrics["mean"].keys() - alone.metrics["mean"].keys() == {"stability"}
    assert alone.name == beside.name == "sae"


@pytest.mark.parametrize("variant", ["batchtopk", "jumprelu"])
def test_other_variants_with_biases_are_served(place: Path, files: Repository, variant: str) -> None:
    bank = train(files, config(place, variant=variant, biases=True, name=variant), silent).bank
    assert set(bank.tensors) == {"encoder", "decoder", "encoder_bias", "decoder_bias", "threshold"}
    for one in recomputed(files, bank, open_folder(place / "test"))[:5]:
        assert abs(one.faithfulness.completeness_residual) < 1e-3


def test_a_flat_folder_has_no_labels(place: Path, files: Repository, tmp_path: Path) -> None:
    for path in (place / "test" / "ship").iterdir():
        shutil.copy(path, tmp_path)
    bank = train(files, config(place, held_out=tmp_path, name="flat"), silent).bank
    assert "accuracy" not in bank.metrics["mean"]
    assert all("reliability" not in concept.statistics for concept in bank.concepts)
    assert bank.metrics["mean"]["images"] == 15


# Sizes


def test_published_sizes_have_names(place: Path) -> None:
    assert PRESETS == {
        "fact-resnet50-layer4": (16384, 16),
        "fact-resnet50-layer3": (16384, 32),
        "fact-resnet50-layer2": (8192, 32),
        "fact-densenet121-norm5": (16384, 16),
        "fact-vitc-s-encoder_10": (8192, 32),
        "fact-vitc-s-encoder_9": (16384, 32),
        "fact-vitc-s-encoder_8": (16384, 32),
        "fact-vitc-s-encoder_4": (16384, 64),
    }
    wanted = config(place, preset="fact-resnet50-layer3", sizes=("64/4", "64/4", "16384/32"), stability_seeds=1)
    found = wanted.dictionary_settings(1024)
    assert [(one.latents, one.k, one.seed) for one in found] == [
        (16384, 32, 0), (16384, 32, 1), (64, 4, 0), (64, 4, 1),
    ]  # fmt: skip
    by_default = config(place, sizes=()).dictionary_settings(512)
    assert [(one.latents, one.k) for one in by_default] == [(4096, 16)]
    assert [(one.latents, one.k) for one in config(place, sizes=()).dictionary_settings(8)] == [(64, 8)]
    with pytest.raises(InvalidInput, match="no preset 'fact': use fact-resnet50-layer4"):
        config(place, preset="fact").dictionary_settings(512)


@pytest.mark.parametrize("text", ["64", "64/", "/4", "64x4", "64/4/2", "a/b", ""])
def test_sizes_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="must be LATENTS/K"):
        Size.read(text)


# What is refused, before any work is done


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"sizes": ("4/8",)}, InvalidInput, "8 of 4 latents"),
        ({"sizes": ("0/0",)}, InvalidInput, "0 latents"),
        ({"preset": "large"}, InvalidInput, "no preset 'large'"),
        ({"classes": ("zebra",)}, UnknownClass, "zebra"),
        ({"classes": ("frog",)}, InvalidInput, "no images of class 'frog'; .*: ship, truck"),
        ({"layer": "layer9"}, UnknownLayer, "layer9"),
        ({"encoder": "layer3"}, InvalidInput, "MODEL/LAYER"),
        ({"encoder": f"{MODEL}/layer9"}, UnknownLayer, "layer9"),
        ({"disk_budget": 2000}, InvalidInput, "disk budget is 2.0KB"),
        ({"device": "abacus"}, InvalidInput, "abacus"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_work(
    place: Path, files: Repository, changes: dict[str, object], error: type[Exception], words: str
) -> None:
    before = files.banks()
    with pytest.raises(error, match=words):
        train(files, config(place, name="refused", **changes), silent)
    assert files.banks() == before
    assert unfinished(files) == []


def test_a_batch_beyond_the_vectors_is_refused_and_a_smaller_one_goes_on(place: Path, files: Repository) -> None:
    with pytest.raises(InvalidInput, match="a batch of 5000 cannot be drawn from 1280 vectors"):
        train(files, config(place, name="batch", vectors_per_step=5000), silent)
    train(files, config(place, name="batch", vectors_per_step=1280), silent)
    assert unfinished(files) == []


def test_without_a_held_out_image_of_its_classes_nothing_is_published(
    place: Path, files: Repository, tmp_path: Path
) -> None:
    some_images(tmp_path / "frogs", "test", {"frog": 5})
    ships = {"classes": ("ship",), "name": "unjudged"}
    with pytest.raises(InvalidInput, match="no held-out image is predicted as a class that is wanted"):
        train(files, config(place, held_out=tmp_path / "frogs", **ships), silent)
    assert not any(version.name == "unjudged" for version in files.banks())
    # What was learned is not lost.
    stages: list[str] = []
    bank = train(files, config(place, **ships), lambda stage, *_: stages.append(stage)).bank
    assert "train" not in stages
    assert 0 < bank.metrics["mean"]["images"] < 30


# The store


def test_a_store_is_kept_and_serves_other_trainings(place: Path, files: Repository, tmp_path: Path) -> None:
    settings = config(place).harvest_settings()
    model = files.load_model(MODEL)
    harvest(model, model.cut("layer3"), open_folder(place / "train"), tmp_path / "s", settings)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "s").iterdir()}
    first = train(files, config(place, store=tmp_path / "s", name="one"), silent).bank
    second = train(files, config(place, store=tmp_path / "s", name="two", sizes=("96/4",)), silent).bank
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "s").iterdir()} == before
    assert unfinished(files) == []
    assert first.data_fingerprint == second.data_fingerprint == Store.open(tmp_path / "s").data_fingerprint
    assert str(tmp_path) not in json.dumps(dict(first.configuration))
    without = train(files, config(place, name="one"), silent).bank
    assert all(torch.equal(tensor, without.tensors[name]) for name, tensor in first.tensors.items())


def test_a_store_of_something_else_is_refused(place: Path, files: Repository, tmp_path: Path) -> None:
    store = tmp_path / "s"
    train(files, config(place, store=store, name="kept"), silent)
    for changes, words in (
        ({"layer": "layer2"}, "layer 'layer3', not 'layer2'"),
        ({"positions": 5}, "positions 16, not 5"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"held_out": 0.5}, "images 81, not"),
    ):
        with pytest.raises(AlreadyExists, match=f"{words}.*name another folder"):
            train(files, config(place, store=store, name="refused", **changes), silent)
    spec = files.model_spec(MODEL)
    other = Repository(tmp_path / "other")
    weights = {name: value * 1.5 for name, value in files.load_model(MODEL).module.state_dict().items()}
    other.publish_model(spec, weights)
    with pytest.raises(AlreadyExists, match=f"weights digest '{spec.weights_digest}', not"):
        train(other, config(place, store=store), silent)
    assert other.banks() == []


def test_a_budget_takes_fewer_positions(place: Path, files: Repository, tmp_path: Path) -> None:
    bank = train(files, config(place, store=tmp_path / "s", disk_budget="100kB", name="small"), silent).bank
    assert sum(file.stat().st_size for file in (tmp_path / "s").iterdir()) < 100_000
    assert 80 <= bank.metrics["training"]["vectors"] < 80 * 16
    assert bank.configuration["disk_budget"] == 100_000


# Activations that are no numbers


def test_images_with_nan_activations_are_left_out_everywhere(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for number in range(20):
            path = tmp_path / part / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(1, 256, (16, 16, 3), np.uint8) * (number != 4)).save(path)
    files = Repository(tmp_path / "repository", ("tests.offline",))
    torch.manual_seed(0)
    spec = ModelSpec("net", "tests.offline.networks:blinded", Preprocessing(16, 16), ("a", "b"), "")
    files.publish_model(spec, blinded().state_dict())
    small = {"model": "net", "layer": "layer", "sizes": ("8/2",), "exemplar_concepts": 8, "encoder": "net/layer"}
    outcome = train(files, config(tmp_path, **small), silent)
    reason = "The model answers with activations that are NaN or infinite."
    assert outcome.skipped_images == {"a/4.png": reason}
    assert outcome.bank.metrics["mean"]["images"] == 19
    sources = {exemplar.source for concept in outcome.bank.concepts for exemplar in concept.exemplars}
    assert sources
    assert "a/4.png" not in sources
    only = tmp_path / "dark" / "a"
    only.mkdir(parents=True)
    shutil.copy(tmp_path / "train" / "a" / "4.png", only)
    with pytest.raises(NotTrainable, match="none of 1 images gave any vector"):
        train(files, config(tmp_path, **small, images=tmp_path / "dark", name="dark"), silent)


# The end of a process


_KILLED = """
import os, signal, sys, time
from pathlib import Path
from concepts.repository import Repository
from offline.progress import silent
from offline.trainers.sae import train
from tests.offline.test_sae_trainer import config, unfinished

place, root = Path(sys.argv[1]), Path(sys.argv[2])
files = Repository(root)
how = {"sizes": ("64/4", "32/2"), "epochs": 4}
whole = train(Repository(sys.argv[3]), config(place, **how), silent)

def end_at(name, instant):
    child = os.fork()
    if not child:
        train(files, config(place, **how), silent)
        os._exit(0)
    while not instant():
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    print(name, -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(files.banks()))

def found(pattern):
    return lambda: any((root / "work").glob(f"*/*/*/{pattern}"))

end_at("harvest", found("vectors/plan.json"))
end_at("training", found("checkpoints/*/checkpoint.safetensors"))
end_at("publishing", lambda: len(files.banks()) == 1)
seen = []
outcome = train(files, config(place, **how), lambda stage, *_: seen.append(stage))
print("train" in seen, unfinished(files), [bank.digest for bank in outcome.banks] == [b.digest for b in whole.banks])
"""


def test_it_goes_on_after_its_process_is_killed(place: Path, tmp_path: Path) -> None:
    """Killed while it harvests, trains and publishes, the same call makes the very banks that it makes unharmed."""
    roots = [repository(tmp_path / name).root for name in ("killed", "whole")]
    result = subprocess.run(
        [sys.executable, "-c", _KILLED, place, *roots],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.stdout.splitlines() == ["harvest 9 0", "training 9 0", "publishing 9 1", "False [] True"]


def test_another_training_is_not_in_the_way(place: Path, files: Repository) -> None:
    """What another call of the same name left behind is not taken up, and is removed in the end."""

    class Stop(BaseException):
        pass

    def stop(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "train" and done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        train(files, config(place, name="again"), stop)
    assert any(path.suffix == ".safetensors" for path in unfinished(files))
    bank = train(files, config(place, name="again", sizes=("32/2",)), silent).bank
    assert len(bank.concepts) == 32
    assert unfinished(files) == []


def test_one_training_of_a_bank_at_a_time(place: Path, files: Repository) -> None:
    refused: list[str] = []

    def begin_another(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "train" and not refused:
            with pytest.raises(AlreadyExists) as caught:
                train(files, config(place, name="twice"), silent)
            refused.append(caught.value.message)

    assert train(files, config(place, name="twice"), begin_another).bank.name == "twice"
    assert "another training of this bank is running" in refused[0]


def test_what_another_configuration_left_is_named_with_what_to_do(place: Path, files: Repository) -> None:
    with pytest.raises(InvalidInput, match="a batch of"):
        train(files, config(place, name="left", vectors_per_step=10**6), silent)
    wanted = config(place, name="left", seed=1)
    with pytest.raises(
        AlreadyExists, match=f"seed 0, not 1.*--store.*delete work/{MODEL}/layer3/left/vectors"
    ) as caught:
        train(files, wanted, silent)
    assert str(files.root) not in caught.value.message
    shutil.rmtree(files.root / f"work/{MODEL}/layer3/left/vectors")
    assert train(files, wanted, silent).bank.name == "left"
