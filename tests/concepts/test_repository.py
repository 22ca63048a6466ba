"""The repository: every byte checked, every publication atomic, every reference safe."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from torch import Tensor

from concepts.bank import Bank
from concepts.clip import Clip
from concepts.errors import (
    AlreadyExists,
    CorruptData,
    InvalidInput,
    InvalidModel,
    UnknownBank,
    UnknownModel,
    WeightsMismatch,
)
from concepts.model import ModelSpec
from concepts.preprocessing import Preprocessing
from concepts.repository import BankVersion, Repository
from concepts.storage import LocalStorage
from tests.clips import tiny_clip
from tests.concepts.test_bank import PICTURES, WITHOUT, named, same, small_bank, with_parts

SPEC = ModelSpec("net", "tests.concepts.networks:tiny", Preprocessing(8, 8), ("cat", "dog"), "", {"width": 6})
TRUSTED = ("tests.concepts",)
REFERENCE = "net/layer3/craft"


def weights(seed: int = 0) -> dict[str, Tensor]:
    from tests.concepts.networks import tiny

    torch.manual_seed(seed)
    return tiny(6).state_dict()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "repository"


@pytest.fixture
def repository(root: Path) -> Repository:
    """Return a repository that holds one model."""
    repository = Repository(root, TRUSTED)
    repository.publish_model(SPEC, weights())
    return repository


def bank_for(repository: Repository, **changes: object) -> Bank:
    return small_bank(weights_digest=repository.model_spec("net").weights_digest, **changes)


def files_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# What is stored comes back


def test_a_bank_comes_back_as_it_was(repository: Repository, root: Path) -> None:
    frozen = repository.publish(bank_for(repository), PICTURES)
    version = repository.resolve(REFERENCE)
    assert version == BankVersion("net", "layer3", "craft", frozen.digest)
    same(Repository(root, TRUSTED).load(version), frozen)
    assert repository.picture(version, frozen.concepts[1].exemplars[0]) == PICTURES["exemplars/1-0.webp"]
    folder = root / "banks/net/layer3/craft"
    assert (folder / "CURRENT").read_text() == f"{frozen.digest}\n"
    assert {str(path.relative_to(folder / frozen.digest)) for path in files_under(folder / frozen.digest)} == {
        "bank.json", "tensors.safetensors", "concepts.jsonl", *PICTURES,
    }  # fmt: skip


def test_publishing_the_same_bank_again_changes_nothing(repository: Repository, root: Path) -> None:
    first = repository.publish(bank_for(repository), PICTURES)
    before = {path: path.read_bytes() for path in files_under(root)}
    assert repository.publish(bank_for(repository), PICTURES).digest == first.digest
    assert {path: path.read_bytes() for path in files_under(root)} == before


def test_a_model_comes_back_as_it_was(repository: Repository) -> None:
    model = repository.load_model("net")
    assert repository.models() == ["net"]
    assert model.spec == repository.model_spec("net")
    assert replace(model.spec, weights_digest="") == SPEC
    for name, value in weights().items():
        assert torch.equal(model.module.state_dict()[name], value)
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_nothing_is_there_before_something_is_published(root: Path) -> None:
    empty = Repository(root)
    assert empty.models() == []
    assert empty.banks() == []
    with pytest.raises(UnknownModel, match="none"):
        empty.model_spec("net")
    with pytest.raises(UnknownBank):
        empty.resolve(REFERENCE)
    with pytest.raises(UnknownBank):
        empty.versions(REFERENCE)
    assert not root.exists()


# Every flipped byte


def load_all(root: Path, touched: Path) -> None:
    """Read, in a fresh process's place, the model or the bank that a file belongs to."""
    repository = Repository(root, TRUSTED)
    if "models" in touched.parts:
        repository.load_model("net")
    else:
        repository.load(repository.resolve(REFERENCE))


def flips(path: Path) -> list[int]:
    """Return the places of a file to damage: all of a small file, one in a few of a larger one, ends included."""
    size = path.stat().st_size
    return list(range(size)) if size <= 2500 else sorted({*range(0, size, size // 800), *range(64), size - 1})


def test_every_flipped_byte_is_detected_and_named(repository: Repository, root: Path) -> None:
    frozen = repository.publish(bank_for(repository), PICTURES)
    checked = 0
    for path in files_under(root):
        content = path.read_bytes()
        for place in flips(path):
            damaged = bytearray(content)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            with pytest.raises(CorruptData) as refusal:
                load_all(root, path)
            said = f"{refusal.value.message} {refusal.value.metadata}"
            assert path.name in said, (path, place, said)
            assert str(root) not in said
            assert ("net/layer3/craft" if "banks" in path.parts else "'net'") in said
            checked += 1
        path.write_bytes(content)
    assert checked > 3000
    same(repository.load(repository.resolve(REFERENCE)), frozen)


def test_a_truncated_file_and_a_longer_one_are_detected(repository: Repository, root: Path) -> None:
    repository.publish(bank_for(repository), PICTURES)
    for path in files_under(root):
        content = path.read_bytes()
        for damaged in (b"", content[:-2], content + b"\n", content * 2):
            path.write_bytes(damaged)
            with pytest.raises(CorruptData, match=path.name.split("-")[0]):
                load_all(root, path)
        path.write_bytes(content)
    repository.load(repository.resolve(REFERENCE))


def test_a_missing_file_is_named(repository: Repository, root: Path) -> None:
    frozen = repository.publish(bank_for(repository), PICTURES)
    folder = root / "banks/net/layer3/craft" / frozen.digest
    for path in files_under(folder):
        path.rename(root / "aside")
        with pytest.raises(CorruptData, match=f"{path.name} is missing"):
            repository.load(repository.resolve(REFERENCE))
        (root / "aside").rename(path)
    (stored,) = (root / "models/net").glob("weights-*")
    stored.unlink()
    with pytest.raises(CorruptData, match=r"weights-.* is missing"):
        repository.load_model("net")


def test_a_picture_is_checked_when_it_is_read(repository: Repository, root: Path) -> None:
    frozen = repository.publish(bank_for(repository), PICTURES)
    version, exemplar = repository.resolve(REFERENCE), frozen.concepts[0].exemplars[0]
    (root / "banks/net/layer3/craft" / frozen.digest / exemplar.file).write_bytes(b"another")
    with pytest.raises(CorruptData, match=exemplar.file):
        repository.picture(version, exemplar)
    with pytest.raises(CorruptData, match="missing"):
        repository.picture(version, replace(exemplar, file="exemplars/none.webp"))


def test_a_bank_that_was_put_in_another_place_is_refused(repository: Repository, root: Path) -> None:
    repository.publish(bank_for(repository), PICTURES)
    shutil.copytree(root / "banks/net/layer3", root / "banks/net/layer2")
    with pytest.raises(CorruptData, match="is that of bank net/layer3/craft"):
        repository.load(repository.resolve("net/layer2/craft"))


def test_one_damaged_bank_does_not_hide_the_others(repository: Repository, root: Path) -> None:
    for name in ("a", "b", "c"):
        repository.publish(bank_for(repository, name=name), PICTURES)
    (root / "banks/net/layer3/a/CURRENT").write_text("nonsense\n")
    (version,) = [v for v in repository.banks() if v.name == "b"]
    (root / "banks/net/layer3/b" / version.digest / "bank.json").write_text("{}")
    assert [v.name for v in repository.banks("net")] == ["a", "b", "c"]
    states = []
    for version in repository.banks():
        try:
            states.append(repository.load(version).name)
        except CorruptData as error:
            states.append(type(error).__name__)
    assert states == ["CorruptData", "CorruptData", "c"]
    assert repository.banks("other") == []


# Crashes


class Crash(BaseException):
    """The machine stops: nothing after this instant happens."""


class CrashingStorage(LocalStorage):
    """Stops at the n-th write: before it, or in the middle of it with a draft left behind."""

    def __init__(self, root: Path, writes: int, *, halfway: bool) -> None:
        super().__init__(root)
        self.root, self.left, self.halfway = root, writes, halfway

    def write(self, key: str, content: bytes) -> None:
        if self.left == 0:
            if self.halfway:
                path = self.root / key
                path.parent.mkdir(parents=True, exist_ok=True)
                (path.parent / f".{path.name}.0123.tmp").write_bytes(content[: len(content) // 2])
            raise Crash
        self.left -= 1
        super().write(key, content)


def crash(root: Path, writes: int, halfway: bool, action: Callable[[Repository], object]) -> bool:
    """Do something on a machine that stops after some writes; return whether it did stop."""
    repository = Repository(root, TRUSTED)
    repository._files = CrashingStorage(root, writes, halfway=halfway)
    try:
        action(repository)
    except Crash:
        return True
    return False


@pytest.mark.parametrize("halfway", [False, True])
def test_a_crash_at_any_write_leaves_the_old_bank_served(repository: Repository, root: Path, halfway: bool) -> None:
    old = repository.publish(bank_for(repository), PICTURES)
    new = bank_for(repository, metrics={"relative_error": 0.05})
    for writes in range(len(PICTURES) + 4):
        crashed = crash(root, writes, halfway, lambda repository: repository.publish(new, PICTURES))
        assert crashed == (writes < len(PICTURES) + 4)
        fresh = Repository(root, TRUSTED)
        assert fresh.banks() == [BankVersion("net", "layer3", "craft", old.digest)]
        same(fresh.load(fresh.resolve(REFERENCE)), old)
        for summary in fresh.versions(REFERENCE):  # what can be seen can be loaded
            fresh.load(summary.version)
    assert not crash(root, 99, halfway, lambda repository: repository.publish(new, PICTURES))
    assert Repository(root).resolve(REFERENCE).digest != old.digest
    assert len(Repository(root).versions(REFERENCE)) == 2


def test_a_crash_in_the_first_publication_shows_nothing(repository: Repository, root: Path) -> None:
    for writes in range(len(PICTURES) + 4):
        assert crash(root, writes, True, lambda repository: repository.publish(bank_for(repository), PICTURES))
        assert Repository(root).banks() == []
        with pytest.raises(UnknownBank):
            Repository(root).resolve(REFERENCE)
    repository.publish(bank_for(repository), PICTURES)
    assert len(repository.banks()) == 1


@pytest.mark.parametrize("halfway", [False, True])
def test_a_crash_while_a_model_is_replaced_leaves_the_old_one(
    repository: Repository, root: Path, halfway: bool
) -> None:
    old = repository.model_spec("net")
    for writes in range(2):
        assert crash(root, writes, halfway, lambda r: r.publish_model(SPEC, weights(1), replace=True))
        fresh = Repository(root, TRUSTED)
        assert fresh.models() == ["net"]
        assert fresh.load_model("net").spec == old
    assert crash(root, 1, halfway, lambda r: r.publish_model(replace(SPEC, name="second"), weights()))
    assert Repository(root).models() == ["net"]


def test_a_failed_write_leaves_no_draft(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(root)
    storage.write("a/b", b"old")

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write("a/b", b"new")
    assert files_under(root) == [root / "a/b"]
    assert storage.read("a/b") == b"old"


# Versions


def test_roll_back_and_prefixes(repository: Repository) -> None:
    digests = [repository.publish(bank_for(repository, metrics={"m": m}), PICTURES).digest for m in range(3)]
    assert repository.resolve(REFERENCE).digest == digests[2]
    assert {summary.version.digest for summary in repository.versions(REFERENCE)} == set(digests)
    published = [summary.published for summary in repository.versions(REFERENCE)]
    assert published == sorted(published, reverse=True)
    assert repository.roll_back(f"{REFERENCE}@{digests[0]}").digest == digests[0]
    assert repository.resolve(REFERENCE).digest == digests[0]
    assert repository.resolve(f"{REFERENCE}@{digests[1][:8]}").digest == digests[1]
    assert len(repository.versions(REFERENCE)) == 3


def test_a_prefix_of_two_versions_is_refused(repository: Repository, root: Path) -> None:
    digest = repository.publish(bank_for(repository), PICTURES).digest
    folder = root / "banks/net/layer3/craft"
    twin = digest[:20] + "0" * 44
    shutil.copytree(folder / digest, folder / twin)
    with pytest.raises(UnknownBank, match="2 versions"):
        repository.resolve(f"{REFERENCE}@{digest[:12]}")
    assert repository.resolve(f"{REFERENCE}@{digest[:21]}").digest == digest
    # The twin holds another version's bank.json: it is no version at all.
    assert [summary.version.digest for summary in repository.versions(REFERENCE)] == [digest]
    with pytest.raises(CorruptData):
        repository.load(repository.resolve(f"{REFERENCE}@{twin}"))


def test_nothing_damaged_is_rolled_back_to(repository: Repository, root: Path) -> None:
    old, new = (repository.publish(bank_for(repository, metrics={"m": m}), PICTURES).digest for m in range(2))
    (root / "banks/net/layer3/craft" / old / "concepts.jsonl").write_bytes(b"")
    with pytest.raises(CorruptData):
        repository.roll_back(f"{REFERENCE}@{old}")
    assert repository.resolve(REFERENCE).digest == new


def test_rolling_back_mends_a_damaged_current(repository: Repository, root: Path) -> None:
    digest = repository.publish(bank_for(repository), PICTURES).digest
    (root / "banks/net/layer3/craft/CURRENT").write_text("f" * 64)
    with pytest.raises(CorruptData, match="CURRENT names the version"):
        repository.resolve(REFERENCE)
    (summary,) = repository.versions(REFERENCE)
    repository.roll_back(f"{REFERENCE}@{summary.version.digest}")
    assert repository.resolve(REFERENCE).digest == digest


MALFORMED = [
    *("", "/", "net", "net/layer3", "net/layer3/craft/x", "/layer3/craft", "net//craft", "net/layer3/"),
    *("../../etc", "../../../etc/passwd", "net/../craft", "net/layer3/..", "net/./craft", "~/layer3/craft"),
    *("net\\layer3\\craft", "net/layer3/cr\0aft", "net/layer3/craft\n", " net/layer3/craft", "-net/layer3/craft"),
    *("nét/layer3/craft", "n" * 129 + "/layer3/craft", "net/layer3/" + "c" * 10**6),
    *(f"net/layer3/craft@{digest}" for digest in ("", "abc", "g" * 64, "a" * 65, "../../x", "ABCDEF0123")),
    "net/layer3/craft@" + "a" * 32 + "@" + "b" * 8,
]


@pytest.mark.parametrize("reference", MALFORMED, ids=lambda reference: repr(reference[:40]))
def test_malformed_references(repository: Repository, reference: str) -> None:
    repository.publish(bank_for(repository), PICTURES)
    for ask in (repository.resolve, repository.roll_back, repository.versions):
        with pytest.raises(InvalidInput) as refusal:
            ask(reference)
        assert len(refusal.value.message) < 1000  # what was sent is not sent back whole


@pytest.mark.parametrize("name", ["", "..", "../models/net", "a/b", "net\0", "n" * 129, "/etc"])
def test_malformed_model_names(repository: Repository, name: str) -> None:
    for ask in (repository.model_spec, repository.load_model, repository.banks):
        with pytest.raises(InvalidInput):
            ask(name)


def test_unknown_references(repository: Repository) -> None:
    repository.publish(bank_for(repository), PICTURES)
    for reference in ("net/layer3/other", "net/layer9/craft", "other/layer3/craft", f"{REFERENCE}@{'0' * 64}"):
        with pytest.raises(UnknownBank):
            repository.resolve(reference)
    with pytest.raises(InvalidInput, match="@digest"):
        repository.roll_back(REFERENCE)
    with pytest.raises(UnknownModel, match="models: net"):
        repository.load_model("other")


# Weights


def test_a_bank_of_other_weights_is_refused_and_both_digests_named(repository: Repository) -> None:
    old = repository.publish(bank_for(repository), PICTURES)
    first = repository.model_spec("net").weights_digest
    second = repository.publish_model(SPEC, weights(1), replace=True).weights_digest
    assert first != second
    with pytest.raises(WeightsMismatch) as refusal:
        repository.load(repository.resolve(REFERENCE))
    assert first in refusal.value.message
    assert second in refusal.value.message
    with pytest.raises(WeightsMismatch):
        repository.publish(old)
    with pytest.raises(WeightsMismatch):
        repository.roll_back(f"{REFERENCE}@{old.digest}")
    # With the first weights back, the bank is served again.
    repository.publish_model(SPEC, weights(), replace=True)
    same(repository.load(repository.resolve(REFERENCE)), old)


def test_a_bank_of_images_prepared_otherwise_is_refused_and_both_are_named(repository: Repository) -> None:
    """Equal weights see something else in other images."""
    old = repository.publish(bank_for(repository, preprocessing=SPEC.preprocessing.to_json()), PICTURES)
    unknown = repository.publish(bank_for(repository, name="older"), PICTURES)
    same(repository.load(repository.resolve(REFERENCE)), old)
    spec = replace(SPEC, preprocessing=Preprocessing(8, 8, mean=(0.5, 0.5, 0.25), interpolation="bicubic"))
    assert repository.publish_model(spec, weights(), replace=True).weights_digest == old.weights_digest
    with pytest.raises(WeightsMismatch) as refusal:
        repository.load(repository.resolve(REFERENCE))
    assert "interpolation bilinear (now bicubic), mean [0.0, 0.0, 0.0] (now [0.5, 0.5, 0.25])" in refusal.value.message
    assert "std" not in refusal.value.message
    with pytest.raises(WeightsMismatch):
        repository.publish(old, PICTURES)
    # Banks that do not say how their images were prepared are taken for what they are.
    same(repository.load(repository.resolve("net/layer3/older")), unknown)
    repository.publish_model(SPEC, weights(), replace=True)
    same(repository.load(repository.resolve(REFERENCE)), old)


def test_a_bank_that_knows_less_of_its_images_is_judged_by_what_it_knows(repository: Repository) -> None:
    """As banks of a version that had fewer ways to prepare images."""
    known = {"height": 8, "width": 8, "mean": [0.0, 0.0, 0.0]}
    bank = repository.publish(bank_for(repository, preprocessing=known), PICTURES)
    same(repository.load(repository.resolve(REFERENCE)), bank)


def test_models_are_replaced_only_when_that_is_meant(repository: Repository) -> None:
    before = repository.model_spec("net")
    assert repository.publish_model(SPEC, weights()) == before
    with pytest.raises(AlreadyExists, match=before.weights_digest[:12]):
        repository.publish_model(SPEC, weights(1))
    with pytest.raises(AlreadyExists):
        repository.publish_model(replace(SPEC, class_names=("cow", "pig")), weights())
    assert repository.model_spec("net") == before
    assert repository.publish_model(replace(SPEC, class_names=("cow", "pig")), weights(), replace=True) != before


def test_weights_that_do_not_fit_are_not_published(repository: Repository) -> None:
    spec = replace(SPEC, name="second")
    without = weights()
    del without["head.bias"]
    for wrong, message in [
        (without, r"missing head\.bias"),
        ({**weights(), "extra": torch.zeros(1)}, "unexpected extra"),
        ({**weights(), "head.bias": torch.zeros(3)}, r"head\.bias is \[3\], not \[2\]"),
        ({}, "and 4 more|and 3 more|and 1 more"),
    ]:
        with pytest.raises(InvalidModel, match=message):
            repository.publish_model(spec, wrong)
    with pytest.raises(InvalidModel, match="not trusted"):
        repository.publish_model(replace(spec, architecture="os:system"), weights())
    assert repository.models() == ["net"]


def test_a_model_whose_factory_is_not_trusted_here_is_not_loaded(repository: Repository, root: Path) -> None:
    assert Repository(root).model_spec("net").architecture == SPEC.architecture
    with pytest.raises(InvalidModel, match="not trusted"):
        Repository(root).load_model("net")


def test_a_bank_that_cannot_be_loaded_is_not_published(repository: Repository, root: Path) -> None:
    for broken in (
        bank_for(repository, kind="none"),
        bank_for(repository, kind="../x"),
        bank_for(repository, tensors={}),
        bank_for(repository, tensors={"dictionary": -torch.ones(4, 6)}),
        bank_for(repository, tensors={"dictionary": torch.ones(3, 6)}),
    ):
        with pytest.raises(CorruptData):
            repository.publish(broken, PICTURES)
    with pytest.raises(UnknownModel):
        repository.publish(small_bank(model="other"), PICTURES)
    assert not (root / "banks").exists()


# Many at once


def test_publishers_at_the_same_time(repository: Repository, root: Path) -> None:
    """Whoever is last is served, whole; readers in between always find some whole bank."""
    banks = [bank_for(repository, metrics={"m": m % 4}) for m in range(16)]
    repository.publish(banks[0], PICTURES)

    def publish(bank: Bank) -> str:
        return Repository(root, TRUSTED).publish(bank, PICTURES).digest

    def read(_: int) -> str:
        fresh = Repository(root, TRUSTED)
        return fresh.load(fresh.resolve(REFERENCE)).digest

    with ThreadPoolExecutor(8) as pool:
        published, seen = pool.map(publish, banks), pool.map(read, range(60))
        digests = set(published)
        assert set(seen) <= digests
    assert len(digests) == 4
    assert repository.resolve(REFERENCE).digest in digests
    assert not list(root.rglob("*.tmp"))
    for summary in repository.versions(REFERENCE):
        repository.load(summary.version)


def test_real_weights_without_batch_counters_are_published(root: Path) -> None:
    """Published files often lack the counters of batch norm, which do nothing in evaluation."""
    from demo.cifar import CLASS_NAMES, PREPROCESSING
    from tests.data import real_data

    stored = load_file(real_data() / "cifar10" / "resnet20.safetensors")
    assert not any(name.endswith("num_batches_tracked") for name in stored)
    repository = Repository(root)
    spec = repository.publish_model(ModelSpec("r20", "demo.cifar:resnet20", PREPROCESSING, CLASS_NAMES, ""), stored)
    assert repository.load_model("r20").spec == spec


def onnx_file(size: int = 8, classes: int = 2) -> bytes:
    """Write a classifier as another framework would: images in, one fully connected layer, softmax out."""
    weight = numpy_helper.from_array(np.full((3, classes), 0.5, np.float32), "w")
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["pooled"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["pooled", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["y"], axis=1),
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, size, size])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", classes])
    graph = helper.make_graph(nodes, "g", [image], [answer], [weight])
    opset = helper.make_opsetid("", 13)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString())


ONNX_SPEC = ModelSpec("imported", "onnx", Preprocessing(8, 8), ("cat", "dog"), "")


def test_an_onnx_file_is_a_model_like_any_other(repository: Repository, root: Path) -> None:
    content = onnx_file()
    spec = repository.publish_model(ONNX_SPEC, content)
    assert spec.weights_digest == hashlib.sha256(content).hexdigest()
    assert repository.models() == ["imported", "net"]
    model = repository.load_model("imported")
    assert model.onnx is not None
    assert model.onnx() == content
    assert [layer.name for layer in model.layers()] == ["pooled", "logits"]
    file = next((root / "models" / "imported").glob("*.onnx"))
    file.write_bytes(content[:-1])
    with pytest.raises(CorruptData, match="has digest"):
        repository.load_model("imported")
    file.unlink()
    with pytest.raises(CorruptData, match="missing"):
        repository.load_model("imported")


def test_an_onnx_file_that_does_not_fit_is_refused(repository: Repository) -> None:
    with pytest.raises(InvalidModel, match=r"takes images of 3×16×16 .*makes 3×8×8"):
        repository.publish_model(ONNX_SPEC, onnx_file(size=16))
    with pytest.raises(InvalidModel, match="5 outputs but 2 class names"):
        repository.publish_model(ONNX_SPEC, onnx_file(classes=5))
    with pytest.raises(InvalidModel):
        repository.publish_model(ONNX_SPEC, b"not an ONNX file")
    assert repository.models() == ["net"]


def test_an_exported_file_is_read_when_it_is_needed_and_checked(repository: Repository, root: Path) -> None:
    exported = (onnx_file(), {"layer3": "pooled"})
    spec = repository.publish_model(SPEC, weights(), exported=exported, replace=True)
    assert repository.model_spec("net") == spec
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert spec.weights_digest == repository.publish_model(SPEC, weights(), replace=True).weights_digest
    repository.publish_model(SPEC, weights(), exported=exported)  # which needs no leave to replace
    next((root / "models" / "net").glob("*.onnx")).write_bytes(b"other")
    model = repository.load_model("net")
    assert model.onnx is not None
    with pytest.raises(CorruptData, match="has digest"):
        model.onnx()


def test_tied_weights_are_stored_twice_and_other_things_refused(repository: Repository) -> None:
    state = weights()
    state["head.bias"] = state["head.weight"][:, 0]
    repository.publish_model(replace(SPEC, name="tied"), state)
    loaded = repository.load_model("tied").module.state_dict()
    assert torch.equal(loaded["head.bias"], loaded["head.weight"][:, 0])
    with pytest.raises(InvalidModel, match=r"more than tensors: head\.bias"):
        repository.publish_model(replace(SPEC, name="odd"), {**state, "head.bias": 3})  # type: ignore[dict-item]


# CLIPs, and banks that were named by them


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return tiny_clip(tmp_path_factory.mktemp("clips"))


def test_a_clip_comes_back_as_it_was_and_is_stored_once(
    repository: Repository, root: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not repository.has_clip(clip.digest)
    assert repository.publish_clip(clip.files) == clip.digest
    assert repository.has_clip(clip.digest)
    folder = root / "clips" / clip.digest
    assert {path.name: path.read_bytes() for path in files_under(folder)} == clip.files
    loaded = Repository(root).load_clip(clip.digest)
    assert (loaded.digest, loaded.name) == (clip.digest, clip.digest[:12])
    texts = ["a red ring", "night"]
    assert torch.equal(loaded.embed_texts(texts), clip.embed_texts(texts))
    monkeypatch.setattr(LocalStorage, "write", lambda *_: pytest.fail("it is there"))
    assert repository.publish_clip(clip.files) == clip.digest


def test_every_file_of_a_clip_is_checked(repository: Repository, root: Path, clip: Clip) -> None:
    repository.publish_clip(clip.files)
    folder = root / "clips" / clip.digest
    for name, content in clip.files.items():
        for damaged in (bytes([content[0] ^ 1]) + content[1:], content[:-1], content + b"x", b""):
            (folder / name).write_bytes(damaged)
            with pytest.raises(CorruptData, match=name) as caught:
                repository.load_clip(clip.digest)
            assert str(root) not in caught.value.message
        (folder / name).unlink()
        with pytest.raises(CorruptData, match=f"{clip.digest[:12]}: {name} is missing"):
            repository.load_clip(clip.digest)
        (folder / name).write_bytes(content)
    assert repository.load_clip(clip.digest).digest == clip.digest


def test_clips_that_are_not_there(repository: Repository) -> None:
    with pytest.raises(CorruptData, match=r"clip\.json is missing"):
        repository.load_clip("0" * 64)
    for digest in ("", "..", "../models/net", "A" * 64, "0" * 63, "0" * 64 + "/x"):
        with pytest.raises(CorruptData, match="digest is none"):
            repository.load_clip(digest)


@pytest.mark.parametrize("halfway", [False, True])
def test_a_crash_while_a_clip_is_stored_leaves_none(
    repository: Repository, root: Path, clip: Clip, halfway: bool
) -> None:
    for writes in range(len(clip.files)):
        assert crash(root, writes, halfway, lambda repository: repository.publish_clip(clip.files))
        assert not repository.has_clip(clip.digest)
    repository.publish_clip(clip.files)
    assert repository.load_clip(clip.digest).digest == clip.digest


@pytest.mark.parametrize("parts", [False, True])
def test_a_named_bank_is_a_new_version_and_the_old_one_stays(repository: Repository, root: Path, parts: bool) -> None:
    plain = with_parts(bank_for(repository)) if parts else bank_for(repository)
    pictures = PICTURES | (WITHOUT if parts else {})
    old = repository.publish(plain, pictures)
    folder = root / "banks/net/layer3/craft"
    before = {path: path.read_bytes() for path in files_under(folder / old.digest)}
    new = repository.publish(named(plain), PICTURES | WITHOUT)
    assert new.digest != old.digest
    assert {path: path.read_bytes() for path in files_under(folder / old.digest)} == before
    version = repository.resolve(REFERENCE)
    same(repository.load(version), new)
    same(repository.load(repository.resolve(f"{REFERENCE}@{old.digest}")), old)
    first = new.concepts[0]
    assert repository.picture(version, first.counterfactuals[0]) == b"RIFF without"
    shown = PICTURES | WITHOUT
    assert repository.pictures(version, first.pictures) == {each.file: shown[each.file] for each in first.pictures}
    said = repository.named(version)
    assert said.all_concepts == new.all_concepts
    assert torch.equal(said.embeddings, new.embeddings)
    assert said.tensors == {}
    assert (said.parts is None) == (not parts)
