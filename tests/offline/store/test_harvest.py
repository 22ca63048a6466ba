"""Harvesting a real network on real images: what is kept, what is left out, and going on after the end of a process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from concepts.cut import Cut
from concepts.errors import AlreadyExists, InvalidCut, InvalidInput, NotTrainable
from concepts.model import Model
from concepts.storage import LocalStorage
from offline.images import Stream, fingerprint, open_folder
from offline.store.harvest import harvest
from offline.store.plan import make_plan
from offline.store.reading import Store
from offline.store.settings import HarvestSettings
from offline.store.shards import drafting
from tests.offline.store.stores import contents, every_row
from tests.offline.worlds import MODEL, repository, some_images

IMAGES = {"cat": 20, "ship": 20, "truck": 20}
SMALL = {"positions": 5, "shard_size": 5 * (64 * 2 + 8) * 9, "batch_size": 4}
"""Shards of nine images."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harvest")
    some_images(root / "images", "train", IMAGES)
    repository(root / "repository")
    return root


@pytest.fixture(scope="module")
def model(place: Path) -> Model:
    return repository(place / "again").load_model(MODEL, torch.device("cpu"))


@pytest.fixture(scope="module")
def cut(model: Model) -> Cut:
    return model.cut("layer3")


@pytest.fixture(scope="module")
def folder(place: Path):
    return open_folder(place / "images")


def settings(**fields: object) -> HarvestSettings:
    return HarvestSettings(**(SMALL | fields))


def reference(model: Model, cut: Cut, folder, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all vectors of an image, ``[P, C]``, and the weight of each, from the whole model's gradient."""
    batch = next(iter(Stream(folder, [key], model.spec.preprocessing, 1)))
    found: dict[str, torch.Tensor] = {}

    def keep(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        found["a"] = output.detach().requires_grad_()
        return found["a"]

    handle = model.module.get_submodule("layer3").register_forward_hook(keep)
    with torch.enable_grad():
        model.module(model.inputs(batch.views)).max().backward()
    handle.remove()
    a = found["a"]
    weights = (a.grad * a).sum(1).abs().flatten().detach()
    return a.detach()[0].flatten(1).T.numpy(), weights.numpy()


def test_vectors_are_activations_where_they_say_they_are(model, cut, folder, tmp_path):
    store = harvest(model, cut, folder, tmp_path / "s", settings(dtype="float32"))
    vectors, origins = every_row(store)
    keys = {place: key for number in range(store.plan.shards) for place, key in store.shard(number).keys.items()}
    assert sorted(keys.values()) == list(folder.keys)
    assert len(store) == len(vectors) == 60 * 5
    assert len({tuple(row) for row in origins.tolist()}) == len(origins)
    for place in list(keys)[:12]:
        expected, _ = reference(model, cut, folder, keys[place])
        mine = origins[:, 0] == place
        assert mine.sum() == 5
        assert np.allclose(vectors[mine], expected[origins[mine, 1]], atol=1e-5)
    assert np.allclose(store.mean, vectors.mean(0), rtol=1e-12)
    assert store.mean_square == pytest.approx((vectors**2).sum(1).mean(), rel=1e-12)
    digests = {key: hashlib.sha256((folder.root / key).read_bytes()).hexdigest() for key in folder.keys}
    assert store.data_fingerprint == fingerprint(digests)
    store.verify()
    store.check(model.spec, "layer3", 64)
    halved = harvest(model, cut, folder, tmp_path / "h", settings())
    rows, where = every_row(halved)  # in shards of other sizes, so in another order
    order, there = np.lexsort(origins.T), np.lexsort(where.T)
    assert np.array_equal(where[there], origins[order])
    assert np.allclose(rows[there], vectors[order], rtol=2**-10, atol=1e-5)
    assert halved.mean == pytest.approx(every_row(halved)[0].mean(0))


def test_positions_that_count_are_drawn_more_often(model, cut, folder, tmp_path):
    weighted, alike = np.zeros(2), np.zeros(2)
    for total, sampling in ((weighted, "attribution"), (alike, "uniform")):
        store = harvest(model, cut, folder, tmp_path / sampling, settings(sampling=sampling, limit=40))
        for number in range(store.plan.shards):
            shard = store.shard(number)
            for place, key in shard.keys.items():
                _, weights = reference(model, cut, folder, key)
                chosen = shard.origins[shard.origins[:, 0] == place, 1]
                total += (weights[chosen].mean() / weights.mean(), 1)
    assert alike[0] / alike[1] == pytest.approx(1, abs=0.15)
    assert weighted[0] / weighted[1] > 1.3


def test_an_image_gives_the_same_whatever_comes_with_it(model, cut, folder, tmp_path):
    one = harvest(model, cut, folder, tmp_path / "1", settings(batch_size=1, dtype="float32"))
    many = harvest(model, cut, folder, tmp_path / "64", settings(batch_size=64, dtype="float32"))
    (a, where), (b, there) = every_row(one), every_row(many)
    assert np.array_equal(where, there)
    assert np.allclose(a, b, atol=1e-5)
    # In another folder, and other shards.
    few = harvest(model, cut, folder, tmp_path / "cats", settings(classes=("cat",), shard_size=10**6, dtype="float32"))
    shards = [few.shard(0), *(one.shard(number) for number in range(one.plan.shards))]
    drawn: list[dict[str, list[int]]] = [{}, {}]
    for number, shard in enumerate(shards):
        for place, position in shard.origins.tolist():
            drawn[number > 0].setdefault(shard.keys[place], []).append(position)
    assert len(drawn[0]) == 20
    assert all(sorted(positions) == sorted(drawn[1][key]) for key, positions in drawn[0].items())


def test_all_positions_and_the_default(model, cut, folder, tmp_path):
    whole = harvest(model, cut, folder, tmp_path / "all", HarvestSettings(sampling="all", limit=7))
    assert len(whole) == 7 * 64
    assert whole.plan.positions == 64
    early = model.cut("layer2")
    assert early.layout.positions == 256
    # ⌊72·512 / 32⌋ = 1152 are more than there are.
    assert harvest(model, early, folder, tmp_path / "2", HarvestSettings(limit=2)).plan.positions == 256


def test_neighbours_come_from_different_images(model, cut, folder, tmp_path):
    store = harvest(model, cut, folder, tmp_path / "s", HarvestSettings(sampling="all"))
    _, origins = every_row(store)
    assert (np.diff(origins[:, 0]) == 0).mean() < 0.05


def test_classes_and_limits(model, cut, folder, tmp_path):
    store = harvest(model, cut, folder, tmp_path / "s", settings(classes=("ship", "truck")))
    assert store.images == 40
    assert harvest(model, cut, folder, tmp_path / "l", settings(limit=11)).images == 11
    with pytest.raises(InvalidInput, match="no images of class 'zebra'; folders of classes that hold some: cat, ship"):
        harvest(model, cut, folder, tmp_path / "z", settings(classes=("ship", "zebra")))
    assert not (tmp_path / "z").exists()


def test_a_complete_store_is_opened_and_no_image_read(model, cut, folder, tmp_path):
    first = harvest(model, cut, folder, tmp_path / "s", settings())
    gone = dataclasses.replace(folder, root=tmp_path / "nowhere")
    before = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    assert len(harvest(model, cut, gone, tmp_path / "s", settings(batch_size=9))) == len(first)
    assert {file: file.stat().st_mtime_ns for file in first.path.iterdir()} == before


def test_other_settings_in_the_same_folder_are_refused(model, cut, folder, tmp_path):
    harvest(model, cut, folder, tmp_path / "s", settings())
    for change, words in {
        "positions": (6, "positions 5, not 6"),
        "sampling": ("uniform", "sampling 'attribution', not 'uniform'"),
        "dtype": ("float32", "dtype 'float16', not 'float32'"),
        "seed": (1, "seed 0, not 1"),
        "limit": (30, "images 60, not 30"),
    }.items():
        with pytest.raises(AlreadyExists, match=f"harvested with {words[1]}: name another folder"):
            harvest(model, cut, folder, tmp_path / "s", settings(**{change: words[0]}))
    with pytest.raises(AlreadyExists, match="layer 'layer3', not 'layer2'"):
        harvest(model, model.cut("layer2"), folder, tmp_path / "s", settings())
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(AlreadyExists, match="holds other files"):
        harvest(model, cut, folder, tmp_path / "other", settings())
    assert (tmp_path / "other/file").read_text() == "mine"


class _Stop(BaseException):
    """The end of a process, as far as a test in it can tell."""


def test_it_goes_on_after_a_stop_at_any_write(model, cut, folder, tmp_path, monkeypatch):
    whole = contents(harvest(model, cut, folder, tmp_path / "whole", settings(limit=20)).path)
    write, writes = LocalStorage.write, 0

    def failing(self: LocalStorage, key: str, content: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == last:
            (self._root / f".{key}.0.tmp").write_bytes(content[: len(content) // 2])
            raise _Stop
        write(self, key, content)

    monkeypatch.setattr(LocalStorage, "write", failing)
    stops = len(whole)
    assert stops == 1 + 3 * 3 + 1
    for last in range(1, stops + 1):
        writes, path = 0, tmp_path / f"{last}"
        with pytest.raises(_Stop):
            harvest(model, cut, folder, path, settings(limit=20))
        writes = -1000
        harvest(model, cut, folder, path, settings(limit=20))
        assert contents(path) == whole, last


def test_a_shard_that_lost_bytes_is_harvested_again(model, cut, folder, tmp_path):
    store = harvest(model, cut, folder, tmp_path / "s", settings(limit=30))
    whole = contents(store.path)
    (store.path / "store.json").unlink()
    (store.path / "000001.vectors.npy").write_bytes(b"short")
    (store.path / "000002.json").write_bytes(b"{")
    harvest(model, cut, folder, tmp_path / "s", settings(limit=30))
    assert contents(store.path) == whole


_PRELUDE = """
import os, resource, signal, sys, time
from pathlib import Path
import torch
from concepts.errors import InvalidInput
from concepts.repository import Repository
from offline.images import open_folder
from offline.store.harvest import harvest
from tests.offline.store.test_harvest import MODEL, settings
root, path = Path(sys.argv[1]), Path(sys.argv[2])
model = Repository(root / "repository").load_model(MODEL, torch.device("cpu"))
cut, folder = model.cut("layer3"), open_folder(root / "images")
"""

_KILLED = (
    _PRELUDE
    + """
def end_at(instant):
    child = os.fork()
    if not child:
        harvest(model, cut, folder, path, settings())
        os._exit(0)
    while not instant():
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    print(-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), (path / "store.json").exists())

end_at(lambda: any(path.glob(".0*.tmp")))
end_at(lambda: (path / "000002.vectors.npy").exists())
end_at(lambda: (path / "000004.json").exists())
harvest(model, cut, folder, path, settings())
harvest(model, cut, folder, path.with_name("whole"), settings())
"""
)


def outside(script: str, place: Path, path: Path) -> list[str]:
    """Run a script in a process of its own, with one thread, so that it may fork; return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", script, place, path],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return result.stdout.splitlines()


def test_it_goes_on_after_its_process_is_killed(place, tmp_path):
    """Kill it when a draft lies there, when a shard lies there without its record, and right after a record."""
    path = tmp_path / "killed"
    assert outside(_KILLED, place, path) == ["9 False"] * 3
    assert contents(path) == contents(tmp_path / "whole")
    Store.open(path).verify()


def test_two_at_a_time_are_refused(model, cut, folder, tmp_path):
    errors: list[str] = []

    def report(_stage: str, done: int, total: int) -> None:
        if done < total and not errors:
            with pytest.raises(AlreadyExists) as caught:
                harvest(model, cut, folder, tmp_path / "s", settings())
            errors.append(caught.value.message)

    assert len(harvest(model, cut, folder, tmp_path / "s", settings(), report)) == 300
    assert "another harvest" in errors[0]


def test_progress_is_in_images_and_ends(model, cut, folder, tmp_path):
    heard: list[tuple[str, int, int]] = []
    harvest(model, cut, folder, tmp_path / "s", settings(), lambda *said: heard.append(said))
    assert {stage for stage, _, _ in heard} == {"harvesting"}
    done = [now for _, now, _ in heard]
    assert done == sorted(done)
    assert heard[-1] == ("harvesting", 60, 60)
    assert done.count(60) == 1


class _Moody(nn.Module):
    """A small network whose activations depend on the brightness of an image, beyond all bounds."""

    def __init__(self, dark: float = 0.0, narrow: bool = False) -> None:
        super().__init__()
        self.features, self.pool, self.head = nn.Conv2d(3, 4, 4, 4), _Bend(dark, narrow), nn.Linear(1, 3)
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
            parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.pool(self.features(x), x.flatten(1).amax(1))
        return self.head(a.flatten(1).mean(1, keepdim=True))


class _Bend(nn.Module):
    def __init__(self, dark: float, narrow: bool) -> None:
        super().__init__()
        self.dark, self.narrow = dark, narrow

    def forward(self, a: torch.Tensor, brightest: torch.Tensor) -> torch.Tensor:
        a = torch.where((brightest == 0).view(-1, 1, 1, 1), a.new_tensor(self.dark), a)
        return a[:, :2] if self.narrow and bool((brightest == 0).any()) else a


def moody(model: Model, root: Path, **how: object) -> tuple[Model, Cut, object]:
    """Return a network, cut, and a folder with five pictures of noise and one, b/1.png, that is black."""
    random = np.random.default_rng(0)
    for number in range(6):
        path = root / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(1, 256, (32, 32, 3), np.uint8) * (number != 1)).save(path)
    spec = dataclasses.replace(
        model.spec, preprocessing=dataclasses.replace(model.spec.preprocessing, mean=(0.0,) * 3, std=(1.0,) * 3)
    )
    odd = dataclasses.replace(model, module=_Moody(**how).eval(), spec=spec)
    return odd, Cut(odd.module, "pool", odd.example()), open_folder(root / "pictures")


@pytest.mark.parametrize("dark", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sampling", ["attribution", "uniform", "all"])
def test_images_with_activations_that_are_no_numbers_are_skipped(model, tmp_path, dark, sampling):
    odd, cut, folder = moody(model, tmp_path, dark=dark)
    store = harvest(odd, cut, folder, tmp_path / "s", HarvestSettings(sampling=sampling))
    assert store.images == 5
    assert store.skipped == {"b/1.png": "The model answers with activations that are NaN or infinite."}
    assert np.isfinite(every_row(store)[0]).all()
    without = dataclasses.replace(folder, keys=tuple(key for key in folder.keys if key != "b/1.png"))
    assert store.data_fingerprint == harvest(odd, cut, without, tmp_path / "w", HarvestSettings()).data_fingerprint
    only = dataclasses.replace(folder, keys=("b/1.png",))
    with pytest.raises(NotTrainable, match=r"none of 1 images gave any vector \(b/1.png: The model answers"):
        harvest(odd, cut, only, tmp_path / "o", HarvestSettings(sampling=sampling))


def test_files_that_are_no_images_are_skipped(model, cut, folder, tmp_path):
    for name in ("a/1.png", "a/2.png"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes((folder.root / folder.keys[0]).read_bytes())
    (tmp_path / "f/a/2.png").write_bytes(b"no image")
    store = harvest(model, cut, open_folder(tmp_path / "f"), tmp_path / "s", settings())
    assert store.images == 1
    assert set(store.skipped) == {"a/2.png"}


def test_values_beyond_float16_are_refused_with_the_remedy(model, tmp_path):
    odd, cut, folder = moody(model, tmp_path, dark=1e5)
    with pytest.raises(InvalidInput, match=r"beyond what float16 can hold.*float32"):
        harvest(odd, cut, folder, tmp_path / "s", HarvestSettings())
    store = harvest(odd, cut, folder, tmp_path / "s32", HarvestSettings(dtype="float32"))
    assert every_row(store)[0].max() == np.float32(1e5)


def test_activations_of_another_width_are_refused(model, tmp_path):
    odd, cut, folder = moody(model, tmp_path, narrow=True)
    with pytest.raises(InvalidCut, match=r"shape \[2, 8, 8\] here, and of \[4, 8, 8\] elsewhere"):
        harvest(odd, cut, folder, tmp_path / "s", HarvestSettings(sampling="all"))


def test_a_budget_takes_fewer_positions(model, cut, folder, tmp_path):
    full = harvest(model, cut, folder, tmp_path / "full", HarvestSettings(sampling="all", shard_size=200_000))
    size = sum(len(content) for content in contents(full.path).values())
    sizes = []
    for budget in (size // 2, size // 5, size * 2):
        store = harvest(
            model, cut, folder, tmp_path / f"{budget}",
            HarvestSettings(sampling="all", shard_size=200_000, disk_budget=budget),
        )  # fmt: skip
        sizes.append(sum(len(content) for content in contents(store.path).values()))
        assert sizes[-1] <= budget
        assert store.plan.positions_wanted == 64
        assert store.plan.sampling == ("all" if budget > size else "uniform")
    assert sizes[0] > 0.8 * (size // 2)
    assert sizes[2] == size
    with pytest.raises(InvalidInput, match=r"one position an image takes (\d+) bytes.*disk budget is 5.0KB") as caught:
        harvest(model, cut, folder, tmp_path / "no", settings(disk_budget="5KB"))
    assert not (tmp_path / "no").exists()
    least = int(caught.value.message.split("takes ")[1].split()[0])
    assert harvest(model, cut, folder, tmp_path / "least", settings(disk_budget=least)).plan.positions == 1


def test_a_disk_without_room_is_refused_before_the_first_image(model, cut, folder, tmp_path):
    plan, _ = make_plan(model, cut, folder, settings())
    words = "needs .*B more, the disk of the store has .*B: make room, or set a disk budget"
    free = shutil.disk_usage(tmp_path).free
    with drafting(tmp_path / "s", plan, 2 * free) as draft, pytest.raises(InvalidInput, match=words):
        draft.check_room()
    with drafting(tmp_path / "s", plan, free // 2) as draft:
        draft.check_room()


_FULL = (
    _PRELUDE
    + """
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
try:
    harvest(model, cut, folder, path, settings())
except InvalidInput as error:
    print(error.message)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(sorted(file.name for file in path.iterdir()))
harvest(model, cut, folder, path, settings())
"""
)


def test_a_disk_that_fills_up_ends_it_cleanly_and_the_same_call_goes_on(place, model, cut, folder, tmp_path):
    """A limit on the size of files stands for the end of the disk: it, too, cuts a file off in the middle."""
    message, left = outside(_FULL, place, tmp_path / "s")
    assert message.startswith("the disk of the store is full, and the harvest needs ")
    assert message.endswith("KB more: make room, and the same command goes on")
    assert left == "['plan.json']"
    assert json.loads((tmp_path / "s/store.json").read_text())["images"] == 60
    Store.open(tmp_path / "s").verify()
