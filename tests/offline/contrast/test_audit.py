"""``whence-bank contrast audit``: it finds the sticker without being told where, and refuses what cannot be audited."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from itertools import takewhile

import numpy as np
import pytest
import torch
from PIL import Image

from concepts.bank import Concept, Exemplar
from concepts.errors import CorruptData
from concepts.preprocessing import Box
from concepts.repository import Repository
from demo.attributes import CLASS_NAMES, SPURIOUS, SPURIOUS_CLASS, index_of
from demo.folder import read_truth, write_folder
from demo.run import publish_models
from offline import exemplars
from offline.contrast import audit as auditing
from offline.contrast import report
from offline.contrast.audit import Audit, AuditSettings, Finding, audit
from offline.contrast.config import ContrastConfig
from offline.contrast.insertion import PLACES, VARIANTS, Effect, Insertion
from offline.progress import silent
from offline.trainers.contrast import train
from tests.offline.contrast import worlds
from tests.offline.test_cli import refused, run

BANK = "cnn/stage3/contrast"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The demo's world, where the sticker goes with one class in training and with none elsewhere; a bank of it."""
    root = tmp_path_factory.mktemp("world")
    training, held_out = write_folder(root, "train", 700), write_folder(root, "heldout", 420)
    publish_models(root / "repository")
    config = ContrastConfig(
        model="cnn", layer="stage3", images=training, held_out=held_out, images_per_class=20, pairs=60, test_images=1,
        insertion_images=2, max_iterations=100, device="cpu",
    )  # fmt: skip
    train(Repository(root / "repository"), config, silent)
    return root


@pytest.fixture(scope="module")
def found(world) -> Audit:
    settings = AuditSettings(images=world / "heldout", images_per_pair=20, spread_images=100, device="cpu")
    return audit(Repository(world / "repository"), BANK, settings, silent)


def stickers(world, finding: Finding) -> list[bool]:
    """Say of each exemplar whether it shows most of a sticker."""
    truth = read_truth(world / "train")
    shows = []
    for exemplar in finding.concept.exemplars:
        mask = truth.masks[truth.files.index(exemplar.source), index_of(SPURIOUS)]
        left, top, right, bottom = (round(side) for side in exemplar.box)
        shows.append(bool(mask.any()) and mask[top:bottom, left:right].sum() > 0.5 * mask.sum())
    return shows


def test_the_sticker_is_found_by_what_it_does(world, found):
    spurious = CLASS_NAMES.index(SPURIOUS_CLASS)
    top = list(takewhile(lambda finding: finding.insertion.target == spurious, found.findings))
    assert len(top) >= 2
    assert all(all(stickers(world, finding)) for finding in top)
    flips = {variant: np.mean([finding.effect.flips(variant) for finding in top]) for variant in VARIANTS}
    assert flips["insertion"] >= 0.5
    # A patch in that corner does flip 5 to 6 % of bricks-triangle images by itself (of 192), and one of 20 here is 5 %.
    assert flips["blank"] <= 0.1
    assert flips["random"] <= 0.2
    first = found.spreads[0]
    assert found.class_names[first.target] == SPURIOUS_CLASS
    assert first.suspicious
    assert first.flips()["blank"] <= 0.05
    assert first.area == pytest.approx(1 / 16)
    assert "bricks-triangle" in [found.class_names[other] for other in first.flipped]


def test_findings_are_ranked_by_what_they_do_beyond_the_patches(found):
    excess = [
        effect.flips("insertion") - max(effect.flips("blank"), effect.flips("random"))
        for effect in (finding.effect for finding in found.findings)
    ]
    assert excess == sorted(excess, reverse=True)
    assert [finding.excess for finding in found.findings] == excess
    assert len(found.findings) + len(found.untested) == len(found.bank.concepts)
    strongest = [spread.finding for spread in found.spreads]
    assert len({finding.insertion.target for finding in strongest}) == len(strongest)
    for finding in strongest:
        own = [other for other in found.findings if other.insertion.target == finding.insertion.target]
        assert own[0] is finding


def test_what_a_prototype_does_everywhere_is_the_mean_over_images(found):
    for spread in found.spreads:
        assert spread.target not in spread.effects
        effects = spread.effects.values()
        rows = np.concatenate([effect.predicted for effect in effects], axis=1)
        gains = np.concatenate([effect.after - effect.before for effect in effects], axis=1)
        for row, variant in enumerate(VARIANTS):
            assert spread.flips()[variant] == pytest.approx((rows[row] == spread.target).mean())
            assert spread.gain()[variant] == pytest.approx(gains[row].mean())
        assert spread.images == rows.shape[1]


def test_pages_stand_alone_and_numbers_agree(found, tmp_path):
    page = report.write(replace(found, settings=found.settings.model_copy(update={"top": 3})), tmp_path / "out")
    html = page.read_text()
    assert "<script" not in html
    assert re.findall(r'src="(?!data:image/webp;base64,)', html) == []
    assert not re.search(r"https?://|url\(|@import|<link", html)
    for content in re.findall(r'src="data:image/webp;base64,([^"]+)"', html)[:10]:
        assert Image.open(io.BytesIO(base64.b64decode(content))).format == "WEBP"
    assert html.count("<figure") == len(found.spreads) + 3
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert [path.name[:3] for path in pictures] == ["01-", "02-", "03-"]
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width > 500
    numbers = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert numbers == found.to_json() | {"settings": numbers["settings"]}
    assert [row["concept"] for row in numbers["findings"]] == [finding.concept.id for finding in found.findings]
    assert numbers["findings"][0]["insertion_flips"] == found.findings[0].effect.flips("insertion")
    assert numbers["classes"][0]["class"] == SPURIOUS_CLASS


def test_examples_are_what_was_measured(found):
    finding, spread = found.findings[0], found.spreads[-1]
    row = report._row(found, finding.insertion, finding.effect, finding.excess)
    shown = [(finding.effect, number, example) for number, example in enumerate(row.examples)]
    others = report._section(found, spread).row.examples
    assert len(row.examples) == len(others) == 3
    by_key = {effect.keys[0]: effect for effect in spread.effects.values()}
    shown += [(by_key[example.key], 0, example) for example in others]
    for effect, number, example in shown:
        assert example.key == effect.keys[number]
        before, *pasted = example.shown
        assert before.target_share == pytest.approx(effect.before[number], abs=1e-5)
        for place, one in enumerate(pasted):
            assert one.target_share == pytest.approx(effect.after[place, number], abs=1e-5)
            assert one.predicted == CLASS_NAMES[effect.predicted[place, number]]
            assert one.flipped == (effect.predicted[place, number] == effect.target)


def test_the_trainer_measures_as_an_audit_does(world):
    files = Repository(world / "repository")
    bank = files.load(files.resolve(BANK))
    known = [concept.statistics for concept in bank.concepts if "insertion_flips" in concept.statistics]
    assert known
    assert bank.metrics["mean"]["insertion_flips"] == pytest.approx(np.mean([one["insertion_flips"] for one in known]))
    assert {one["insertion_images"] for one in known} <= {1.0, 2.0}
    assert bank.tensors[PLACES].shape == (len(bank.concepts), 4, 4)


def test_pictures_are_read_together_as_one_by_one(world, found):
    files = Repository(world / "repository")
    version = files.resolve(BANK)
    shown = [exemplar for concept in found.bank.concepts[:5] for exemplar in concept.exemplars]
    assert len(shown) > 5
    assert files.pictures(version, shown) == {exemplar.file: files.picture(version, exemplar) for exemplar in shown}
    shown[0] = replace(shown[0], file="exemplars/none.webp")
    with pytest.raises(CorruptData, match=r"none\.webp"):
        files.pictures(version, shown)


def test_the_command_prints_writes_and_refuses_to_mix(world, tmp_path):
    few = tmp_path / "few"
    for name in ("bricks-cross", "bricks-triangle"):
        (few / name).mkdir(parents=True)
        for path in sorted((world / "heldout" / name).iterdir())[:4]:
            (few / f"{name}-{path.name}").write_bytes(path.read_bytes())  # unlabelled
    (few / "broken.png").write_bytes(b"no picture")
    at = ("--images", few, "--repository", world / "repository", "--out", tmp_path / "out", "--device", "cpu")
    code, out, err = run("contrast", "audit", BANK, *at, "--top", 2)
    assert code == 0, err
    assert re.search(r"bricks-cross +│ bricks-triangle", out)
    assert "the 2 strongest of" in out
    assert "skipped image broken.png" in err
    assert (tmp_path / "out" / "report.html").exists()
    assert "is not empty: name another folder" in refused("contrast", "audit", BANK, *at)
    (tmp_path / "empty").mkdir()
    code, out, _ = run("contrast", "audit", BANK, *at[:-4], "--out", tmp_path / "empty", "--device", "cpu", "--json")
    assert code == 0
    numbers = json.loads(out)
    assert numbers == json.loads((tmp_path / "empty" / "audit.json").read_text())
    assert numbers["untested"]
    assert "broken.png" in numbers["skipped_images"]


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """Real images, and a bank with two prototypes that were never learned."""
    root = worlds.place(tmp_path_factory.mktemp("cifar"))
    files = Repository(root / "repository")
    config = worlds.config(root, pairs=0, test_images=1)
    return root, files, train(files, config, silent).bank


def refusal(cifar, bank, tmp_path, **more: object) -> str:
    root, files, _ = cifar
    shown = exemplars.picture(Image.new("RGB", (8, 8), "red"), Box(0, 0, 8, 8))
    pictures = {e.file: shown for concept in bank.concepts for e in concept.exemplars}
    files.publish(replace(bank, name="odd"), pictures)
    images = more.get("images", root / "test")
    reference = f"{bank.model}/{bank.layer}/odd"
    line = refused(
        "contrast", "audit", reference, "--images", images, "--repository", root / "repository", "--out", tmp_path / "o"
    )
    assert not (tmp_path / "o").exists()
    return line


def with_prototype(bank, places: bool = True):
    exemplar = Exemplar("exemplars/0.webp", "frog/x.jpg", Box(0, 0, 8, 8), 1.0)
    concept = Concept(0, class_index=CLASSES["frog"], other_index=CLASSES["ship"], exemplars=(exemplar,))
    tensors = {**bank.tensors, "dictionary": torch.ones(1, bank.channels)}
    tensors |= {PLACES: torch.tensor([[[0.0, 0.0, 0.25, 0.25]]])} if places else {}
    return replace(bank, concepts=(concept,), tensors=tensors)


CLASSES = {"frog": 6, "ship": 8}


def test_banks_that_have_nothing_to_paste_are_refused(cifar, tmp_path):
    bank = cifar[2]
    assert "has no prototypes to paste (asked for no pairs)" in refusal(cifar, bank, tmp_path)
    one = with_prototype(bank)
    bare = replace(one, concepts=tuple(replace(concept, exemplars=()) for concept in one.concepts))
    assert "--exemplars above 0" in refusal(cifar, bare, tmp_path)
    assert "train it anew" in refusal(cifar, with_prototype(bank, places=False), tmp_path)
    other = replace(bank, kind="nmf", concepts=(Concept(0),), tensors={"dictionary": torch.ones(1, bank.channels)})
    assert "is of kind nmf" in refusal(cifar, other, tmp_path)


def test_signed_layers_have_no_prototypes_to_paste(cifar, tmp_path):
    bank = replace(cifar[2], configuration={"prototypes": "none: activations at this layer can be negative"})
    assert "(activations at this layer can be negative)" in refusal(cifar, bank, tmp_path)


def test_images_of_other_classes_are_not_enough(cifar, tmp_path):
    root = cifar[0]
    frogs = tmp_path / "frogs"
    frogs.mkdir()
    for path in sorted((root / "test" / "frog").iterdir())[:3]:
        (frogs / path.name).write_bytes(path.read_bytes())
    assert "give images of its classes" in refusal(cifar, with_prototype(cifar[2]), tmp_path, images=frogs)
    assert "there is no folder" in refusal(cifar, with_prototype(cifar[2]), tmp_path, images=tmp_path / "nowhere")


def test_a_file_is_no_place_for_a_report(cifar, tmp_path):
    (tmp_path / "file").touch()
    at = ("--images", cifar[0] / "test", "--repository", cifar[0] / "repository")
    assert "is a file" in refused("contrast", "audit", "a/b/c", *at, "--out", tmp_path / "file")
    assert "no bank" in refused("contrast", "audit", "a/b/c", *at, "--out", tmp_path / "new")


def test_images_are_gathered_by_what_they_are_predicted_as(world):
    files = Repository(world / "repository")
    model = files.load_model("cnn")
    settings = AuditSettings(images=world / "heldout", images_per_pair=5, batch_size=50)
    pool = auditing.gather(model, auditing.open_folder(world / "heldout"), settings, silent)
    for target, keys in pool.members.items():
        assert len(keys) == 5
        seen = pool.seen(target, 5)
        assert (seen.probabilities.argmax(1) == target).all()


def test_a_patch_that_cannot_be_made_does_not_count():
    nothing = np.full(2, np.nan)
    effect = Effect(
        1, ["a", "b"], np.zeros(2), np.stack([np.ones(2), np.zeros(2), nothing]), np.array([[1, 1], [0, 1], [-1, -1]])
    )
    finding = Finding(Concept(0), Insertion(1, 0, [], 0), effect)
    assert finding.excess == 0.5
    assert "random_flips" not in effect.statistics()
