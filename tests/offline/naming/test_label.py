"""Naming banks of every kind on images of the known-concepts world, and renaming by people."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from concepts.bank import Bank, Concept
from concepts.clip import Clip, open_clip_model
from concepts.errors import AlreadyExists, CorruptData, InvalidInput, UnknownBank, UnknownConcept, WhenceError
from concepts.repository import Repository
from offline.exclusive import alone_in
from offline.exemplars import cut_out
from offline.images import open_folder
from offline.naming.label import LabelConfig, Labelled, label, rename
from offline.naming.scores import Background, direction, separation
from offline.naming.scores import Evidence as Crops
from offline.progress import silent
from offline.trainers.contrast import ContrastConfig
from offline.trainers.contrast import train as train_contrast
from offline.trainers.craft import CraftConfig
from offline.trainers.craft import train as train_craft
from offline.trainers.nmf import NmfConfig
from offline.trainers.nmf import train as train_nmf
from offline.trainers.sae import SaeConfig
from offline.trainers.sae import train as train_sae
from offline.trainers.subspace import SubspaceConfig
from offline.trainers.subspace import train as train_subspace
from offline.vocabulary import Texts, Vocabulary, build
from tests.clips import tiny_clip
from tests.offline.naming.conftest import CLIP

KINDS = ("craft", "nmf", "sae", "contrast", "falcon")
CLASSES = ("night-ring", "sand-striped")
MOST = 4


@pytest.fixture(scope="module")
def repository(place: Path) -> Repository:
    """A repository with a bank of each kind; that of CRAFT has parts."""
    files = Repository(place / "repository")
    base = {"model": "cnn", "layer": "stage3", "exemplars": 3, "device": "cpu"}
    base |= {"images": place / "images" / "train", "held_out": place / "images" / "heldout"}
    few = {"positions": 16, "exemplar_images": 80, "truth_images": 1}
    craft = {"concepts": 2, "patch_size": 24, "random_starts": 0, "stability_folds": 0, "min_images": 5}
    craft |= {"importance_images": 2, "truth_images": 1, "parts_layer": "stage1", "parts": 2, "parts_crops": 20}
    groups = {"clip": CLIP, "keep": "all", "deviations": 2.0, "max_groups": 4, "crops": 3, "name": "falcon"}
    train_craft(files, CraftConfig(**base, **craft, classes=CLASSES), silent)
    train_nmf(files, NmfConfig(**base, **few, ranks=(5,)), silent)
    train_sae(files, SaeConfig(**base, **few, sizes=("16/2",), epochs=1), silent)
    train_contrast(files, ContrastConfig(**base, classes=CLASSES), silent)
    train_subspace(files, SubspaceConfig(**base, **groups), silent)
    return files


def config(place: Path, **changes: object) -> LabelConfig:
    base = {"clip": CLIP, "vocabulary": place / "vocabulary", "images": place / "images" / "train", "device": "cpu"}
    return LabelConfig(**(base | {"counterfactuals": MOST, "probe_images": 250} | changes))


@pytest.fixture(scope="module")
def named(place: Path, repository: Repository) -> dict[str, tuple[Bank, Labelled]]:
    """Each bank as it was trained, and as it was named."""
    found = {}
    for name in KINDS:
        before = repository.load(repository.resolve(f"cnn/stage3/{name}"))
        found[name] = before, label(repository, before.reference, config(place), silent)
    return found


def contents(repository: Repository, bank: Bank) -> dict[str, bytes]:
    folder = repository.root / "banks" / bank.reference / bank.digest
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unnamed(concept: Concept) -> Concept:
    return replace(concept, label="", naming=None, counterfactuals=())


@pytest.mark.parametrize("name", KINDS)
def test_naming_makes_a_new_version_that_changes_nothing_but_names(
    name: str, named: dict[str, tuple[Bank, Labelled]], repository: Repository, clip: Clip, vocabulary: Vocabulary
) -> None:
    before, done = named[name]
    after = repository.load(repository.resolve(before.reference))
    assert after.digest == done.bank.digest != before.digest
    old = repository.load(repository.resolve(f"{before.reference}@{before.digest}"))
    assert [concept.naming for concept in old.all_concepts] == [None] * len(old.all_concepts)
    assert [unnamed(one) for one in after.all_concepts] == [unnamed(one) for one in before.all_concepts]
    assert after.tensors.keys() == before.tensors.keys()
    for key, tensor in before.tensors.items():
        torch.testing.assert_close(after.tensors[key], tensor, rtol=0, atol=0, equal_nan=True)
    for field in ("configuration", "metrics", "preprocessing", "data_fingerprint", "kind", "weights_digest"):
        assert getattr(after, field) == getattr(before, field)
    assert done.skipped_images.keys() == {"night-ring/broken.png"}
    kept, now = contents(repository, before), contents(repository, after)
    pictures = [exemplar.file for concept in before.all_concepts for exemplar in concept.exemplars]
    assert [now[file] for file in pictures] == [kept[file] for file in pictures]
    assert after.labelling["clip"] == {"name": "clip", "digest": clip.digest}
    assert after.labelling["vocabulary"] == vocabulary.record()
    assert after.labelling["named"] == before.digest
    assert after.labelling["settings"]["images"] == "train"
    assert str(repository.root.parent) not in json.dumps(after.labelling)


@pytest.mark.parametrize("name", KINDS)
def test_every_concept_with_exemplars_is_named_by_its_own_pictures(
    name: str, named: dict[str, tuple[Bank, Labelled]], repository: Repository, clip: Clip
) -> None:
    bank = named[name][1].bank
    version = repository.resolve(f"{bank.reference}@{bank.digest}")

    def embedded(exemplars: object) -> torch.Tensor:
        files = [repository.picture(version, each) for each in exemplars]  # type: ignore[attr-defined]
        return clip.embed_pictures([Image.open(io.BytesIO(file)).convert("RGB") for file in files])

    crops = [Crops(embedded(each.exemplars), embedded(each.counterfactuals)) for each in bank.all_concepts]
    background = Background.of(crops)
    assert bank.embeddings is not None
    assert bank.embeddings.shape == (len(bank.all_concepts), clip.width)
    for concept, own, row in zip(bank.all_concepts, crops, bank.embeddings, strict=True):
        if not concept.exemplars:
            assert (concept.naming, concept.label) == (None, "")
            assert not bool(row.any())
            continue
        expected = functional.normalize(direction(own, background), dim=0).float()
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
        naming = concept.naming
        assert naming is not None
        assert concept.label == naming.label == naming.words[0].text
        assert naming.counterfactuals == len(concept.counterfactuals) <= MOST
        text = clip.embed_texts([naming.label])[0]
        assert naming.score == pytest.approx(separation(text, own, background), abs=1e-6)
    assert sum(not concept.weak for concept in bank.all_concepts if concept.naming) >= 2


@pytest.mark.parametrize("name", KINDS)
def test_counterfactuals_are_of_the_folder_and_each_from_another_image(
    name: str, named: dict[str, tuple[Bank, Labelled]], repository: Repository, place: Path
) -> None:
    bank, folder = named[name][1].bank, open_folder(place / "images" / "train")
    version = repository.resolve(f"{bank.reference}@{bank.digest}")
    assert sum(len(concept.counterfactuals) for concept in bank.all_concepts) > len(bank.all_concepts)
    for concept in bank.all_concepts:
        sources = [each.source for each in concept.counterfactuals]
        assert len(set(sources)) == len(sources)
        assert not set(sources) & {each.source for each in concept.exemplars}
        for each in concept.counterfactuals:
            picture = Image.open(io.BytesIO(repository.picture(version, each)))
            assert picture.format == "WEBP"
            expected = cut_out(folder.open(each.source), each.box)
            assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(expected))


@pytest.mark.parametrize("name", KINDS)
def test_the_same_labels_again_are_the_same_version(
    name: str, named: dict[str, tuple[Bank, Labelled]], repository: Repository, place: Path
) -> None:
    before, done = named[name]
    again = label(repository, f"{before.reference}@{before.digest}", config(place), silent)
    assert again.bank.digest == done.bank.digest


def test_parts_are_named_after_concepts(named: dict[str, tuple[Bank, Labelled]]) -> None:
    bank = named["craft"][1].bank
    assert bank.parts is not None
    assert len(bank.parts.concepts) == 8
    assert all(part.naming for part in bank.parts.concepts)
    assert any(part.counterfactuals for part in bank.parts.concepts)
    files = [each.file for part in bank.parts.concepts for each in part.counterfactuals]
    owners = [int(re.fullmatch(r"exemplars/(\d{5})-counterfactual-\d\d\.webp", file)[1]) for file in files]  # type: ignore[index]
    first = len(bank.concepts)
    assert set(owners) == {first + part.id for part in bank.parts.concepts if part.counterfactuals}


def test_the_clip_is_stored_once_and_can_be_loaded(
    named: dict[str, tuple[Bank, Labelled]], repository: Repository, clip: Clip
) -> None:
    assert [path.name for path in (repository.root / "clips").iterdir()] == [clip.digest]
    texts = ["a red ring", "night"]
    loaded = repository.load_clip(named["sae"][1].bank.labelling["clip"]["digest"])
    torch.testing.assert_close(loaded.embed_texts(texts), clip.embed_texts(texts), rtol=0, atol=0)


@pytest.fixture
def apart(repository: Repository, named: dict[str, tuple[Bank, Labelled]], tmp_path: Path) -> Repository:
    """A copy of the repository, whose banks may change."""
    shutil.copytree(repository.root, tmp_path / "repository")
    return Repository(tmp_path / "repository")


def test_labels_of_people_stay(apart: Repository, place: Path) -> None:
    reference = "cnn/stage3/craft"
    first = apart.load(apart.resolve(reference))
    part = len(first.concepts) + 1
    bank = rename(apart, reference, 0, "  rings\n at  night ")
    bank = rename(apart, reference, part, "inner edge")
    assert (bank.concept(0).label, bank.concept(part).label) == ("rings at night", "inner edge")
    assert [bank.concept(i).weak for i in (0, part)] == [False, False]
    after = label(apart, reference, config(place, captions=7), silent).bank
    for concept, old in zip(after.all_concepts, first.all_concepts, strict=True):
        own = {0: "rings at night", part: "inner edge"}.get(concept.id)
        assert concept.named_by_person == (own is not None)
        assert concept.naming is not None
        assert concept.label == (own or concept.naming.label)
        assert concept.exemplars == old.exemplars
    cleared = rename(apart, reference, part, None)
    assert cleared.concept(0) == after.concept(0)
    machine = after.concept(part).naming
    assert machine is not None
    assert cleared.concept(part) == replace(after.concept(part), label=machine.label, named_by_person=False)
    assert cleared.digest == apart.resolve(reference).digest


def test_renaming_changes_one_record_and_nothing_else(apart: Repository) -> None:
    before = apart.load(apart.resolve("cnn/stage3/craft"))
    old = contents(apart, before)
    for concept in (1, len(before.concepts) + 2):
        bank = rename(apart, f"{before.reference}@{before.digest}", concept, "mine")
        now = contents(apart, bank)
        assert {file for file in now if now[file] != old.get(file)} == {"concepts.jsonl", "bank.json"}
        assert now.keys() == old.keys()
        lines = zip(*(files["concepts.jsonl"].splitlines() for files in (now, old)), strict=True)
        assert [i for i, (one, other) in enumerate(lines) if one != other] == [concept]
        assert bank.concept(concept).label == "mine"
    assert contents(apart, before) == old
    back = rename(apart, bank.reference, concept, None)
    assert back.digest == before.digest


def test_what_cannot_be_renamed(apart: Repository, repository: Repository) -> None:
    count = len(apart.load(apart.resolve("cnn/stage3/craft")).all_concepts)
    for concept in (-1, count, 10**9):
        with pytest.raises(UnknownConcept, match=f"concepts 0 to {count - 1}"):
            rename(apart, "cnn/stage3/craft", concept, "x")
    for empty in ("", "  \n"):
        with pytest.raises(InvalidInput, match="--clear"):
            rename(apart, "cnn/stage3/craft", 0, empty)
    for strange in ("caf\udcff", "re\x1b[31md", "a\0b"):
        with pytest.raises(InvalidInput, match="plain text"):
            rename(apart, "cnn/stage3/craft", 0, strange)
    with pytest.raises(UnknownBank):
        rename(apart, "cnn/stage3/nothing", 0, "x")
    assert apart.resolve("cnn/stage3/craft") == repository.resolve("cnn/stage3/craft")


def test_a_bank_that_no_machine_named_can_be_named_by_people(
    apart: Repository, named: dict[str, tuple[Bank, Labelled]]
) -> None:
    before = named["nmf"][0]
    bank = rename(apart, f"{before.reference}@{before.digest}", 2, "mine")
    assert [concept.label for concept in bank.concepts] == ["", "", "mine", "", ""]
    assert bank.concept(2).named_by_person
    assert rename(apart, bank.reference, 2, None).digest == before.digest


def test_without_images_the_stored_counterfactuals_serve(apart: Repository, place: Path) -> None:
    reference = "cnn/stage3/sae"
    first = apart.load(apart.resolve(reference))
    after = label(apart, reference, config(place, images=None), silent).bank
    assert [one.naming for one in after.concepts] == [one.naming for one in first.concepts]
    assert [one.counterfactuals for one in after.concepts] == [one.counterfactuals for one in first.concepts]
    torch.testing.assert_close(after.embeddings, first.embeddings, rtol=0, atol=0)
    assert after.labelling["settings"]["images"] is None
    fewer = label(apart, reference, config(place, images=None, counterfactuals=1), silent).bank
    assert {one.naming.counterfactuals for one in fewer.concepts if one.naming} == {1}
    without = label(apart, reference, config(place, images=None, counterfactuals=0), silent).bank
    assert [one.counterfactuals for one in without.concepts] == [one.counterfactuals for one in first.concepts]
    assert all(one.weak for one in without.concepts if one.naming)


def test_new_counterfactuals_take_the_place_of_those_that_were_there(apart: Repository, place: Path) -> None:
    before = apart.load(apart.resolve("cnn/stage3/nmf"))
    after = label(apart, before.reference, config(place, counterfactuals=2, seed=3), silent).bank
    assert [len(one.counterfactuals) for one in after.concepts] == [2] * 5
    shown = {each.file for one in after.concepts for each in one.pictures}
    assert {file for file in contents(apart, after) if file.startswith("exemplars/")} == shown
    assert [one.counterfactuals for one in after.concepts] != [one.counterfactuals[:2] for one in before.concepts]


def test_a_bank_without_counterfactuals_needs_images_or_a_word_for_it(
    apart: Repository, named: dict[str, tuple[Bank, Labelled]], place: Path
) -> None:
    before = named["nmf"][0]
    reference = f"{before.reference}@{before.digest}"
    with pytest.raises(InvalidInput, match=r"has no counterfactuals.*--images.*--counterfactuals 0"):
        label(apart, reference, config(place, images=None), silent)
    bank = label(apart, reference, config(place, images=None, counterfactuals=0), silent).bank
    assert all(one.weak and one.naming and one.naming.counterfactuals == 0 for one in bank.concepts)
    assert not any(one.counterfactuals for one in bank.concepts)
    # Images alone are of no use where no counterfactual is asked for.
    assert label(apart, reference, config(place, counterfactuals=0), silent).bank.concepts == bank.concepts


def emptied(bank: Bank) -> Bank:
    return replace(
        bank, name="bare", concepts=tuple(replace(one, exemplars=(), counterfactuals=()) for one in bank.concepts)
    )


def refusals(place: Path, repository: Repository, root: Path) -> list[tuple[str, dict[str, object], str]]:
    """What cannot be named, and what the refusal says."""
    other = tiny_clip(root / "other")
    (root / "empty").mkdir()
    (root / "elsewhere").mkdir()
    Image.new("RGB", (64, 64)).save(root / "elsewhere" / "a.png")
    repository.publish(emptied(repository.load(repository.resolve("cnn/stage3/nmf"))))
    right, wrong = open_clip_model(CLIP), other.digest
    nmf = "cnn/stage3/nmf"
    return [
        (nmf, {"clip": str(root / "other")}, f"{right.digest}.*{wrong}"),
        (nmf, {"clip": str(root / "nothing")}, "there is no CLIP"),
        (nmf, {"vocabulary": root}, "no vocabulary"),
        (nmf, {"images": root / "elsewhere"}, "has 0 of the .* images that the exemplars were cut from"),
        (nmf, {"images": root / "empty"}, "holds no images"),
        ("cnn/stage3/bare", {}, "--exemplars"),
        ("cnn/stage3/bare", {"images": None, "counterfactuals": 0}, "--exemplars"),
    ]


def test_what_cannot_be_named_is_refused_and_nothing_is_published(
    apart: Repository, place: Path, tmp_path: Path
) -> None:
    cases = refusals(place, apart, tmp_path)
    served = apart.banks()
    for reference, changes, message in cases:
        with pytest.raises(WhenceError, match=message):
            label(apart, reference, config(place, **changes), silent)
    with pytest.raises(UnknownBank):
        label(apart, "cnn/stage3/nothing", config(place), silent)
    assert apart.banks() == served
    version = apart.resolve("cnn/stage3/nmf")
    picture = apart.root / "banks" / version.reference / version.digest / "exemplars" / "00000-00.webp"
    picture.write_bytes(b"other")
    with pytest.raises(CorruptData, match=r"00000-00\.webp"):
        label(apart, "cnn/stage3/nmf", config(place), silent)


def test_exemplars_whose_image_is_gone_are_done_without(apart: Repository, place: Path, tmp_path: Path) -> None:
    """Some sources are missing, one cannot be read any more: the others say what is beside the concept."""
    bank = apart.load(apart.resolve("cnn/stage3/nmf"))
    shutil.copytree(place / "images" / "train", tmp_path / "images")
    gone, damaged, *_ = sorted({each.source for one in bank.concepts for each in one.exemplars})
    (tmp_path / "images" / gone).unlink()
    (tmp_path / "images" / damaged).write_bytes(b"no picture")
    done = label(apart, bank.reference, config(place, images=tmp_path / "images"), silent)
    assert done.skipped_images.keys() == {"night-ring/broken.png", damaged}
    assert [one.exemplars for one in done.bank.concepts] == [one.exemplars for one in bank.concepts]
    assert sum(len(one.counterfactuals) for one in done.bank.concepts) > 0
    only = tmp_path / "one"
    source = bank.concepts[0].exemplars[0].source
    (only / source).parent.mkdir(parents=True)
    shutil.copy(place / "images" / "train" / source, only / source)
    (only / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InvalidInput, match=r"has 1 of the \d+ images"):  # it may be another image of that name
        label(apart, bank.reference, config(place, images=only), silent)
    for picture in (tmp_path / "images").rglob("*.png"):
        picture.write_bytes(b"no picture")
    with pytest.raises(InvalidInput, match="all were skipped"):
        label(apart, bank.reference, config(place, images=tmp_path / "images"), silent)


def test_a_clip_that_is_not_portable_stays_outside(
    apart: Repository, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(apart.root / "clips")
    monkeypatch.setattr(Clip, "portable", property(lambda self: False))
    bank = label(apart, "cnn/stage3/nmf", config(place, images=None), silent).bank
    assert not apart.has_clip(bank.labelling["clip"]["digest"])


def test_progress_is_told_to_its_end(apart: Repository, place: Path) -> None:
    heard: dict[str, list[tuple[int, int]]] = {}

    def hear(stage: str, done: int, total: int, note: str = "") -> None:
        heard.setdefault(stage, []).append((done, total))

    label(apart, "cnn/stage3/nmf", config(place, batch_size=50), hear)
    assert list(heard) == ["looking through images at stage3", "embedding crops", "naming"]
    for told in heard.values():
        assert told[-1][0] == told[-1][1]
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        assert all(done < total for done, total in told[:-1])


def test_a_vocabulary_without_words_is_refused(apart: Repository, place: Path, clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("this is it\n")
    build(Texts(tmp_path / "captions.txt", clip), clip, tmp_path / "vocabulary")
    served = apart.banks()
    with pytest.raises(InvalidInput, match="no word for any concept"):
        label(apart, "cnn/stage3/nmf", config(place, images=None, vocabulary=tmp_path / "vocabulary"), silent)
    assert apart.banks() == served


def test_a_bank_is_changed_by_one_command_at_a_time(apart: Repository, place: Path) -> None:
    served = apart.banks()
    with alone_in(apart.workspace("cnn", "stage3", "nmf"), "taken"):
        with pytest.raises(AlreadyExists, match="another command"):
            rename(apart, "cnn/stage3/nmf", 0, "mine")
        with pytest.raises(AlreadyExists, match="another command"):
            label(apart, "cnn/stage3/nmf", config(place, images=None), silent)
    assert apart.banks() == served
    assert rename(apart, "cnn/stage3/nmf", 0, "mine").concepts[0].label == "mine"
