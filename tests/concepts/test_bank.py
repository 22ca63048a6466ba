"""Banks as files: round trip, equal bytes for equal banks, and what cannot be frozen."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from concepts import bank as bank_files
from concepts.bank import Bank, Concept, Exemplar, Naming, Word, freeze, read_manifest, thaw
from concepts.errors import CorruptData, InvalidInput, UnknownConcept
from concepts.preprocessing import Box

PICTURES = {"exemplars/0-0.webp": b"RIFF picture", "exemplars/1-0.webp": b"RIFF another"}
DIGEST = "269d6d3ce199a815176b2a94a614398007e322cba6bb4dbb5676873c00c0fcf4"
"""Of ``small_bank``."""


def small_bank(**changes: Any) -> Bank:
    concepts = tuple(
        Concept(
            index,
            label=f"Streifen №{index}",
            class_index=index % 2,
            statistics={"importance": 0.25 + index, "prevalence": 1 / 3},
            exemplars=(Exemplar(f"exemplars/{index}-0.webp", "train/a.jpg", Box(1.0, 2.5, 17.0, 18.5), 3.25),)
            if index < 2
            else (),
            parent=None if index < 2 else 0,
        )
        for index in range(4)
    )
    tensors = {"dictionary": torch.rand(4, 6, generator=torch.Generator().manual_seed(0)), "extra": torch.arange(3)}
    bank = Bank(
        kind="nmf",
        model="net",
        layer="layer3",
        name="craft",
        weights_digest="c" * 64,
        channels=6,
        concepts=concepts,
        tensors=tensors,
        metrics={"relative_error": 0.1, "curve": [1.0, 0.5]},
        configuration={"seed": 7, "patch_size": 16},
        data_fingerprint="d" * 64,
    )
    return replace(bank, **changes)


def with_parts(bank: Bank) -> Bank:
    """Give concept 0 a part and concept 1 two, at an earlier layer; the first has a picture."""
    parts = tuple(
        Concept(
            index,
            class_index=parent,
            exemplars=(Exemplar("exemplars/4-0.webp", "train/b.jpg", Box(0.0, 0.0, 8.0, 8.0), 1.5),)[index:],
            parent=parent,
        )
        for index, parent in enumerate((0, 1, 1))
    )
    return bank.with_parts("nmf", "layer2", 5, parts, {"dictionary": torch.ones(3, 5)})


def named(bank: Bank) -> Bank:
    """Give the concepts names and the first one a counterfactual; the second is named by a person, the last by none."""
    naming = Naming("stripe", 0.75, False, (Word("stripe", 3.5), Word("zèbre", 0.25)), (Word("red stripe", 2.0),), 1)
    without = Exemplar("exemplars/0-without.webp", "train/c.jpg", Box(0.0, 0.0, 8.0, 8.0), 0.0)
    first, second, third, last = bank.concepts
    concepts = (
        replace(first, label="stripe", naming=naming, counterfactuals=(without,)),
        replace(second, label="mine", named_by_person=True, naming=replace(naming, weak=True)),
        replace(third, label="stripe", naming=replace(naming, weak=True, words=(), phrases=(), counterfactuals=0)),
        last,
    )
    labelling = {"clip": {"name": "tiny", "digest": "a" * 64}, "vocabulary": {"captions": 7}, "settings": {}}
    whole = replace(bank, concepts=concepts, labelling=labelling)
    embeddings = torch.randn(len(bank.all_concepts), 3, generator=torch.Generator().manual_seed(1))
    whole = replace(whole, embeddings=embeddings)
    if bank.parts is None:
        return whole
    parts = bank.parts
    own = (replace(parts.concepts[0], label="fur", naming=naming), *parts.concepts[1:])
    return whole.with_parts(parts.kind, parts.layer, parts.channels, own, parts.tensors)


def reread(files: dict[str, bytes], digest: str) -> Bank:
    manifest = read_manifest(files["bank.json"], digest)
    return thaw(manifest, digest, files["tensors.safetensors"], files["concepts.jsonl"])


def same(one: Bank, other: Bank) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype
        assert torch.equal(tensor, other.tensors[name])
    assert (one.embeddings is None) == (other.embeddings is None)
    if one.embeddings is not None and other.embeddings is not None:
        assert torch.equal(one.embeddings, other.embeddings)
    bare = {"tensors": {}, "parts": None, "embeddings": None}
    assert replace(one, **bare) == replace(other, **bare)
    assert (one.parts is None) == (other.parts is None)
    if one.parts is not None and other.parts is not None:
        same(one.parts, other.parts)


def test_round_trip() -> None:
    frozen, files = freeze(small_bank(), PICTURES)
    assert list(files) == ["tensors.safetensors", "concepts.jsonl", *sorted(PICTURES), "bank.json"]
    same(reread(files, frozen.digest), frozen)
    same(replace(frozen, files={}, digest=""), small_bank())
    assert frozen.digest == hashlib.sha256(files["bank.json"]).hexdigest()
    assert frozen.files == {name: hashlib.sha256(files[name]).hexdigest() for name in files if name != "bank.json"}


def test_the_manifest_says_what_a_reader_without_code_wants_to_know() -> None:
    _, files = freeze(small_bank(), PICTURES)
    manifest = json.loads(files["bank.json"])
    assert manifest["concept_count"] == 4
    assert manifest["tensors"]["dictionary"] == {"shape": [4, 6], "dtype": "float32"}
    assert manifest["configuration"]["seed"] == 7
    assert (manifest["schema"], manifest["kind"], manifest["weights_digest"]) == (1, "nmf", "c" * 64)


def test_equal_banks_give_equal_bytes() -> None:
    bank = small_bank()
    backwards = small_bank(
        tensors=dict(reversed(bank.tensors.items())),
        metrics=dict(reversed(bank.metrics.items())),
        configuration=dict(reversed(bank.configuration.items())),
        concepts=tuple(replace(c, statistics=dict(reversed(c.statistics.items()))) for c in bank.concepts),
        digest="e" * 64,
        files={"x": "y"},
    )
    strided = small_bank(tensors={**bank.tensors, "dictionary": bank.tensors["dictionary"].T.contiguous().T})
    files = freeze(bank, PICTURES)[1]
    assert freeze(backwards, dict(reversed(PICTURES.items())))[1] == files
    assert freeze(strided, PICTURES)[1] == files


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"layer": "layer2"},
        {"weights_digest": "f" * 64},
        {"metrics": {}},
        {"configuration": {"seed": 8}},
        {"data_fingerprint": ""},
        {"tensors": {"dictionary": torch.zeros(4, 6)}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_different_banks_have_different_digests(changes: dict[str, Any]) -> None:
    assert freeze(small_bank(**changes), PICTURES)[0].digest != freeze(small_bank(), PICTURES)[0].digest
    assert (
        freeze(small_bank(), {**PICTURES, "exemplars/1-0.webp": b""})[0].digest
        != freeze(small_bank(), PICTURES)[0].digest
    )


@pytest.mark.parametrize(
    ("changes", "pictures", "message"),
    [
        ({}, {}, r"names the picture exemplars/0-0\.webp"),
        ({"concepts": small_bank().concepts[1:]}, PICTURES, "concept 0 of the bank has the id 1"),
        ({"metrics": {"error": float("nan")}}, PICTURES, "not finite"),
        ({"configuration": {"rate": float("inf")}}, PICTURES, "not finite"),
        ({}, {**PICTURES, "bank.json": b""}, "must lie in exemplars/"),
        ({}, {**PICTURES, "exemplars/../../CURRENT": b""}, "cannot be a file"),
        ({}, {**PICTURES, "exemplars//a": b""}, "cannot be a file"),
    ],
)
def test_what_cannot_be_frozen(changes: dict[str, Any], pictures: dict[str, bytes], message: str) -> None:
    with pytest.raises(CorruptData, match=message):
        freeze(small_bank(**changes), pictures)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"schema": 2, "files": {}}, "schema 2; this version reads schema 1"),
        ({"schema": 1, "files": {}}, r"must name tensors\.safetensors"),
        ({"schema": 1}, "form of schema 1"),
        ([1], "form of schema 1"),
        ({"schema": 1, "files": {"tensors.safetensors": "", "concepts.jsonl": "", "../x": ""}}, "cannot be a file"),
        ({"schema": 1, "files": {"tensors.safetensors": "", "concepts.jsonl": "", "/etc/x": ""}}, "cannot be a file"),
        ({"schema": 1, "files": {"tensors.safetensors": "", "concepts.jsonl": "", "a\0": ""}}, "cannot be a file"),
    ],
)
def test_manifests_of_the_right_digest_and_the_wrong_form(manifest: Any, message: str) -> None:
    content = json.dumps(manifest).encode()
    with pytest.raises(CorruptData, match=message):
        read_manifest(content, hashlib.sha256(content).hexdigest())
    with pytest.raises(CorruptData, match="form of schema 1"):
        read_manifest(b"{", hashlib.sha256(b"{").hexdigest())


@pytest.mark.parametrize(
    ("tensors", "concepts"), [(b"", b""), (None, b"{}\n"), (None, b"[\n"), (b"\x08" + b"\0" * 7 + b"not json", None)]
)
def test_files_of_the_wrong_form(tensors: bytes | None, concepts: bytes | None) -> None:
    frozen, files = freeze(small_bank(), PICTURES)
    manifest = read_manifest(files["bank.json"], frozen.digest)
    with pytest.raises(CorruptData, match="form of schema 1"):
        thaw(
            manifest,
            frozen.digest,
            files["tensors.safetensors"] if tensors is None else tensors,
            files["concepts.jsonl"] if concepts is None else concepts,
        )


def test_a_file_that_is_not_the_banks_is_refused() -> None:
    manifest = {"files": {"a": hashlib.sha256(b"a").hexdigest()}}
    assert bank_files.check_file(manifest, "a", b"a") == b"a"
    for name, content in (("a", b"b"), ("b", b"a")):
        with pytest.raises(CorruptData):
            bank_files.check_file(manifest, name, content)


def test_concepts_by_id() -> None:
    bank = small_bank()
    assert bank.concept(3) is bank.concepts[3]
    for unknown in (-1, 4, 10**9):
        with pytest.raises(UnknownConcept, match="concepts 0 to 3"):
            bank.concept(unknown)


def test_a_bank_with_parts_comes_back_as_a_tree() -> None:
    pictures = {**PICTURES, "exemplars/4-0.webp": b"RIFF part"}
    frozen, files = freeze(with_parts(small_bank()), pictures)
    same(reread(files, frozen.digest), frozen)
    assert frozen.parts is not None
    assert (frozen.parts.layer, frozen.parts.channels, frozen.parts.digest) == ("layer2", 5, frozen.digest)
    assert set(frozen.tensors) == {"dictionary", "extra"}
    assert set(frozen.parts.tensors) == {"dictionary"}
    records = [json.loads(line) for line in files["concepts.jsonl"].splitlines()]
    assert [(record["id"], record["parent"]) for record in records[4:]] == [(4, 0), (5, 1), (6, 1)]
    manifest = json.loads(files["bank.json"])
    assert (manifest["concept_count"], manifest["channels"]) == (4, 6)
    assert manifest["parts"] == {"kind": "nmf", "layer": "layer2", "channels": 5, "concept_count": 3, "most": 2}


def test_parts_by_id() -> None:
    bank = with_parts(small_bank())
    assert [concept.id for concept in bank.all_concepts] == list(range(7))
    assert bank.concept(6).parent == 1
    assert [bank.children(concept) for concept in range(4)] == [[4], [5, 6], [], []]
    assert [bank.layer_of(concept) for concept in (0, 3, 4, 6)] == ["layer3", "layer3", "layer2", "layer2"]
    with pytest.raises(UnknownConcept, match="concepts 0 to 6"):
        bank.concept(7)


def test_a_bank_without_parts_is_as_it_was() -> None:
    """Digests of banks are promises: that of this one was computed before banks could have parts."""
    files = freeze(small_bank(), PICTURES)[1]
    assert "parts" not in json.loads(files["bank.json"])
    assert hashlib.sha256(files["bank.json"]).hexdigest() == DIGEST


WITHOUT = {"exemplars/0-without.webp": b"RIFF without", "exemplars/4-0.webp": b"RIFF part"}


@pytest.mark.parametrize("bank", [named(small_bank()), named(with_parts(small_bank()))], ids=["plain", "parts"])
def test_a_named_bank_comes_back_with_all_that_was_said(bank: Bank) -> None:
    frozen, files = freeze(bank, PICTURES | WITHOUT)
    back = reread(files, frozen.digest)
    same(back, frozen)
    assert back.all_concepts == bank.all_concepts
    assert back.labelling == bank.labelling
    assert back.embeddings is not None
    assert torch.equal(back.embeddings, bank.embeddings)
    assert set(back.tensors) == {"dictionary", "extra"}
    if bank.parts is not None:
        assert back.parts is not None
        assert back.parts.labelling == bank.labelling
        assert set(back.parts.tensors) == {"dictionary"}
    manifest = json.loads(files["bank.json"])
    assert manifest["labelling"] == bank.labelling
    assert manifest["tensors"]["labels/embeddings"] == {"shape": [len(bank.all_concepts), 3], "dtype": "float32"}
    with pytest.raises(CorruptData, match="0-without"):
        freeze(bank, PICTURES)


@pytest.mark.parametrize(
    "labelling",
    [
        ["tiny"],
        {"clip": {"name": "tiny", "digest": "a" * 64}},
        {"clip": "tiny", "vocabulary": {"captions": 7}},
        {"clip": {"name": "tiny", "digest": "../" + "a" * 61}, "vocabulary": {"captions": 7}},
        {"clip": {"name": None, "digest": "a" * 64}, "vocabulary": {"captions": 7}},
        {"clip": {"name": "tiny", "digest": "a" * 64}, "vocabulary": {"captions": "7"}},
    ],
)
def test_a_bank_that_does_not_say_what_it_was_named_with_is_damaged(labelling: Any) -> None:
    frozen, files = freeze(replace(small_bank(), labelling=labelling), PICTURES)
    with pytest.raises(CorruptData):
        reread(files, frozen.digest)


def test_embeddings_are_one_finite_row_of_each_concept() -> None:
    bank = named(small_bank())
    whole = bank.embeddings
    assert whole is not None
    for embeddings in (whole[:-1], whole[0], whole.half(), whole.double(), whole.long(), whole / 0):
        frozen, files = freeze(replace(bank, embeddings=embeddings), PICTURES | WITHOUT)
        with pytest.raises(CorruptData, match="embeddings"):
            reread(files, frozen.digest)


def test_labels_of_machines_are_weak_and_those_of_people_never() -> None:
    bank = named(small_bank())
    assert [concept.weak for concept in bank.concepts] == [False, False, True, False]
    assert [concept.words for concept in bank.concepts] == [("stripe", "zèbre"), ("stripe", "zèbre"), (), ()]
    assert [len(concept.pictures) for concept in bank.concepts] == [2, 1, 0, 0]
    first = bank.concepts[0]
    assert first.pictures == (*first.exemplars, *first.counterfactuals)
    naming = first.naming
    assert naming is not None
    weak = replace(first, naming=replace(naming, weak=True))
    assert weak.weak
    assert not replace(weak, named_by_person=True).weak


@pytest.mark.parametrize(
    "change",
    [
        {"named_by_person": True},
        {"naming": Naming("stripe", 0.5, weak=True)},
        {"naming": Naming("stripe", 0.5, weak=False)},
        {"naming": Naming("stripe", 0.5, False, (Word("stripe", 1.0),))},
        {"naming": Naming("stripe", 0.5, False, (), (Word("stripe", 1.0),))},
        {"naming": Naming("stripe", 0.5, False, counterfactuals=1)},
        {"counterfactuals": small_bank().concepts[1].exemplars},
        {"label": "stripe"},
    ],
    ids=str,
)
def test_all_that_is_said_of_a_concept_is_in_the_digest(change: dict[str, Any]) -> None:
    first, *others = small_bank().concepts
    changed, files = freeze(small_bank(concepts=(replace(first, **change), *others)), PICTURES)
    assert changed.digest != DIGEST
    lines = files["concepts.jsonl"].splitlines()
    assert lines[1:] == freeze(small_bank(), PICTURES)[1]["concepts.jsonl"].splitlines()[1:]
    assert set(json.loads(lines[0])) - set(json.loads(lines[1])) == set(change) - {"label"}


def test_a_bank_that_was_never_named_is_as_it_was() -> None:
    """Its bytes are those from before concepts could be named."""
    files = freeze(small_bank(), PICTURES)[1]
    assert files["concepts.jsonl"].decode().splitlines()[1] == (
        '{"class_index": 1, "exemplars": [{"activation": 3.25, "box": [1.0, 2.5, 17.0, 18.5], '
        '"file": "exemplars/1-0.webp", "source": "train/a.jpg"}], "id": 1, "label": "Streifen №1", "parent": null, '
        '"statistics": {"importance": 1.25, "prevalence": 0.3333333333333333}}'
    )
    assert set(json.loads(files["bank.json"])) == {
        "channels", "concept_count", "configuration", "data_fingerprint", "files", "kind", "layer", "metrics", "model",
        "name", "preprocessing", "schema", "tensors", "weights_digest",
    }  # fmt: skip
    assert hashlib.sha256(files["bank.json"]).hexdigest() == DIGEST
    cleared = [replace(one, naming=None, counterfactuals=(), named_by_person=False) for one in small_bank().concepts]
    assert freeze(small_bank(concepts=tuple(cleared), labelling={}), PICTURES)[1] == files


@pytest.mark.parametrize(
    "record",
    [
        {"naming": {"label": "x"}},
        {"naming": []},
        {"naming": {"label": "x", "score": 1.0, "weak": False, "words": [{"text": "x"}], "phrases": []}},
        {"counterfactuals": [{"file": "x"}]},
        {"counterfactuals": 3},
        {"named_by_person": True, "strange": 1},
    ],
    ids=str,
)
def test_records_of_the_wrong_form(record: dict[str, Any]) -> None:
    frozen, files = freeze(small_bank(), PICTURES)
    first, *others = files["concepts.jsonl"].splitlines()
    lines = [json.dumps(json.loads(first) | record).encode(), *others]
    manifest = read_manifest(files["bank.json"], frozen.digest)
    with pytest.raises(CorruptData, match="form of schema 1"):
        thaw(manifest, frozen.digest, files["tensors.safetensors"], b"\n".join(lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parent": None}, "part 0 belongs to concept None"),
        ({"parent": 4}, "part 0 belongs to concept 4"),
        ({"parent": 1}, "part 0 has another class than its concept 1"),
        ({"id": 1}, "concept 4 of the bank has the id 5"),
    ],
)
def test_parts_that_are_of_no_concept_are_refused(change: dict[str, Any], message: str) -> None:
    parts = with_parts(small_bank()).parts
    assert parts is not None
    first = replace(parts.concepts[0], exemplars=(), **change)
    broken = replace(parts, concepts=(first, *parts.concepts[1:]))
    with pytest.raises(CorruptData, match=message):
        freeze(replace(small_bank(), parts=broken), PICTURES)
    with pytest.raises(CorruptData, match="one level"):
        freeze(replace(small_bank(), parts=replace(parts, parts=parts)), PICTURES)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a" * 129, "a\n", "a\0", "ä"])
def test_names_that_folders_should_not_have(name: str) -> None:
    for place in ("model", "layer", "name"):
        with pytest.raises(InvalidInput):
            small_bank(**{place: name})
