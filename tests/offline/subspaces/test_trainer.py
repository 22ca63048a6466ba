"""``whence-bank train subspace`` on real images: what is published, what is refused, and what answers say."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from concepts.clip import open_clip_model
from concepts.cut import Cut
from concepts.engine import Engine
from concepts.errors import InvalidInput, NotTrainable
from concepts.explanation import EngineRequest, ExplainOptions
from concepts.kinds.subspace import representations
from concepts.model import Model
from concepts.preprocessing import Box
from concepts.repository import Repository
from offline.exemplars import cut_out
from offline.images import open_folder, shuffled
from offline.progress import silent
from offline.subspaces.crops import cohesion, place_of
from offline.trainers.subspace import SubspaceConfig, train
from offline.vocabulary import Texts, build
from tests.clips import tiny_clip
from tests.offline.test_cli import refused, run
from tests.offline.worlds import MODEL, add_bcos, repository, some_images

ALL = 10_000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("subspace")
    training = some_images(root / "train", "train", {"frog": 40, "ship": 40, "truck": 40})
    some_images(root / "test", "test", {"frog": 10, "ship": 10, "truck": 10})
    (training / "ship" / "broken.jpg").write_bytes(b"no picture")
    add_bcos(repository(root / "repository"))
    tiny_clip(root / "clip")
    return root


def config(place, **changes) -> SubspaceConfig:
    base = {
        "model": MODEL,
        "layer": "layer3",
        "images": place / "train",
        "held_out": place / "test",
        "clip": str(place / "clip"),
        "deviations": 2.0,
        "keep": "all",
        "max_groups": 40,
        "overlap": 1.0,
        "crops": 6,
        "exemplars": 3,
        "counterfactuals": 4,
        "device": "cpu",
    }
    return SubspaceConfig(**(base | changes))


def trained(place, **changes):
    files = Repository(place / "repository")
    return files, train(files, config(place, **changes), silent)


@pytest.fixture(scope="module")
def falcon(place):
    return trained(place, name="falcon")


def groups_of(bank) -> list[list[int]]:
    starts = bank.tensors["offsets"].tolist()
    features = bank.tensors["features"].tolist()
    return [features[start:end] for start, end in pairwise(starts)]


def seen(model: Model, cut: Cut, folder, keys) -> torch.Tensor:
    views = np.stack([np.asarray(folder.open(key)) for key in keys])
    return torch.cat([cut.trunk(model.inputs(views[i : i + 50])) for i in range(0, len(views), 50)])


@pytest.fixture(scope="module")
def training(place, falcon):
    """Keys of the training images, their activations, and their representations in float64."""
    model = falcon[0].load_model(MODEL)
    cut, folder = model.cut("layer3"), open_folder(place / "train")
    keys = [key for key in folder.keys if "broken" not in key]
    a = seen(model, cut, folder, keys)
    pooled = a.double().mean((2, 3))
    return keys, a, (pooled / pooled.norm(dim=1, keepdim=True)).numpy()


def test_groups_are_highly_active_together_in_more_images_than_asked(falcon, training):
    bank, (_, _, r) = falcon[1].bank, training
    threshold = r.mean() + 2 * r.std()
    assert float(bank.tensors["threshold"]) == pytest.approx(threshold, rel=1e-5)
    assert bank.metrics["training"]["images"] == len(r) == 120
    high = r >= threshold
    groups = groups_of(bank)
    assert len(groups) == len(bank.concepts) == 40
    for concept, group in zip(bank.concepts, groups, strict=True):
        images = high[:, group].all(1)
        assert concept.statistics["images"] == images.sum() > 10
        assert concept.statistics["features"] == len(group)
        assert np.flatnonzero(high[images].all(0)).tolist() == group
    assert bank.metrics["training"]["highly_active"] == pytest.approx(high.sum(1).mean())
    together = np.any([high[:, group].all(1) for group in groups], axis=0)
    assert bank.metrics["training"]["grouped_share"] == pytest.approx(together.mean())


def test_exemplars_are_of_any_images_of_a_group_those_that_excite_it_most_first(falcon, training, place):
    (files, outcome), (keys, a, r) = falcon, training
    folder, bank = open_folder(place / "train"), outcome.bank
    version = files.resolve(bank.reference)
    drawn = np.array([keys.index(key) for key in shuffled(folder.keys, 0) if key in keys])
    for concept, group in list(zip(bank.concepts, groups_of(bank), strict=True))[::8]:
        images = drawn[(r[drawn] >= float(bank.tensors["threshold"])).T[group].all(0)][:6]
        codes = a.double().mean((2, 3))[images][:, group].mean(1)
        best = images[codes.argsort(descending=True, stable=True)[:3].numpy()]
        assert [exemplar.source for exemplar in concept.exemplars] == [keys[image] for image in best]
        for exemplar, image in zip(concept.exemplars, best, strict=True):
            assert exemplar.activation == pytest.approx(float(a[image].double().mean((1, 2))[group].mean()), rel=1e-4)
            map_ = torch.nn.functional.interpolate(
                a[image, group].sum(0).relu()[None, None], size=(32, 32), mode="bilinear", align_corners=False
            )
            assert exemplar.box == place_of(map_[0, 0].numpy(), 0.6, Box(0, 0, 32, 32))
            picture = Image.open(io.BytesIO(files.picture(version, exemplar))).convert("RGB")
            shown = cut_out(folder.open(exemplar.source), exemplar.box)
            assert np.array_equal(np.asarray(picture), np.asarray(shown))


def test_cohesion_is_that_of_the_crops_to_the_clip(place, training):
    bank = trained(place, exemplars=6, max_groups=4)[1].bank
    clip, folder = open_clip_model(str(place / "clip")), open_folder(place / "train")
    for concept in bank.concepts:
        crops = [cut_out(folder.open(exemplar.source), exemplar.box) for exemplar in concept.exemplars]
        assert len(crops) == 6
        assert concept.statistics["cohesion"] == pytest.approx(cohesion(clip.embed_pictures(crops)), abs=1e-5)
    values = [concept.statistics["cohesion"] for concept in bank.concepts]
    assert bank.metrics["mean"]["cohesion"] == pytest.approx(np.mean(values))


def test_only_interpretable_groups_are_kept(place, falcon):
    everything = falcon[1].bank
    values = sorted(concept.statistics["cohesion"] for concept in everything.concepts)
    bar = (values[19] + values[20]) / 2
    bank = trained(place, keep="interpretable", cohesion=bar, name="some")[1].bank
    assert len(bank.concepts) == 20
    assert min(concept.statistics["cohesion"] for concept in bank.concepts) > bar
    assert bank.metrics["mean"]["interpretable_share"] == 0.5
    assert bank.metrics["training"]["groups"] == 40
    with pytest.raises(NotTrainable, match=rf"the best one is {values[-1]:.3f}.*--cohesion.*--keep all"):
        trained(place, keep="interpretable", cohesion=1.0)


def test_counterfactuals_lack_the_group_and_are_cut_where_its_crops_are(falcon, training):
    (files, outcome), (keys, _, r) = falcon, training
    bank = outcome.bank
    version, numbers = files.resolve(bank.reference), []
    for concept, group in zip(bank.concepts, groups_of(bank), strict=True):
        places = [exemplar.box for exemplar in concept.exemplars]
        for turn, shown in enumerate(concept.counterfactuals):
            assert (r[keys.index(shown.source), group] < r.mean() + 1e-7).all()
            assert turn >= 3 or shown.box == places[turn]  # all images are of one size
            assert "counterfactual" in shown.file
            assert Image.open(io.BytesIO(files.picture(version, shown))).format == "WEBP"
        numbers.append(len(concept.counterfactuals))
    assert max(numbers) == 4


def test_metrics_are_of_held_out_images(place, falcon):
    files, outcome = falcon
    bank, model = outcome.bank, falcon[0].load_model(MODEL)
    cut, folder = model.cut("layer3"), open_folder(place / "test")
    a = seen(model, cut, folder, folder.keys)
    active = representations(cut.positions(a)) >= bank.tensors["threshold"]
    on = torch.stack([active[:, group].all(1) for group in groups_of(bank)], 1)
    mean = bank.metrics["mean"]
    assert mean["images"] == 30
    assert mean["active_share"] == pytest.approx(float(on.any(1).double().mean()))
    assert mean["l0_image"] == pytest.approx(float(on.double().sum(1).mean()))
    for concept in bank.concepts:
        assert concept.statistics["active_share"] == pytest.approx(float(on[:, concept.id].double().mean()))
    engine = Engine(model, files.load(files.resolve(bank.reference)), cut)
    views = np.stack([np.asarray(folder.open(key)) for key in folder.keys])
    answers = engine.explain(views, [EngineRequest(None, ExplainOptions(top_k=ALL))] * 30)
    carried = [answer.faithfulness.carried_share for answer in answers]
    assert mean["carried_share"] == pytest.approx(np.median(carried), rel=1e-3)
    largest = [max(answer.concepts, key=lambda score: score.contribution).id for answer in answers if answer.concepts]
    for concept in bank.concepts:
        assert concept.statistics["prevalence"] == pytest.approx(largest.count(concept.id) / 30)
        own = [score.contribution for answer in answers for score in answer.concepts if score.id == concept.id]
        assert concept.statistics["contribution"] == pytest.approx(sum(own) / 30, rel=1e-3, abs=1e-5)
    assert "relative_error" not in mean
    assert "hoyer" not in mean


def test_same_training_same_bank_which_names_its_clip_alone(place, falcon):
    first = falcon[1].bank
    again = trained(place, name="falcon")[1].bank
    assert again.digest == first.digest
    assert first.configuration["clip"]["name"] == "clip"
    assert len(first.configuration["clip"]["digest"]) == 64
    assert str(place) not in repr(first.configuration)
    assert set(falcon[1].skipped_images) == {"ship/broken.jpg"}


def test_exact_groups_are_found_among_itemsets(place):
    sets = trained(place, max_groups=ALL, exemplars=0, counterfactuals=0, min_images=3, crops=2)[1].bank
    exact = trained(place, grouping="exact", exemplars=0, counterfactuals=0, min_images=3, crops=2)[1].bank
    held = {tuple(group) for group in groups_of(sets)}
    published = {tuple(group) for group in groups_of(exact)}
    assert published < held
    assert len(published) > 2


def test_a_vocabulary_names_the_groups(place):
    clip = open_clip_model(str(place / "clip"))
    (place / "captions.txt").write_text("a green frog\nthe grey ship at sea\na red truck\n")
    vocabulary = build(Texts(place / "captions.txt", clip), clip, place / "vocabulary")
    files, outcome = trained(place, vocabulary=place / "vocabulary", words=3, max_groups=5, name="named")
    bank = outcome.bank
    assert bank.embeddings.shape == (5, clip.width)
    assert bank.labelling["clip"] == {"name": "clip", "digest": clip.digest}
    assert bank.labelling["vocabulary"] == vocabulary.record()
    assert bank.labelling["settings"]["words"] == 3
    assert files.has_clip(clip.digest)
    for concept in bank.concepts:
        assert concept.label in {"frog", "green", "grey", "red", "sea", "ship", "truck"}
        assert len(concept.naming.words) == 3
        assert concept.naming.counterfactuals == len(concept.counterfactuals)
    tiny_clip(place / "other", seed=1)
    with pytest.raises(InvalidInput):
        trained(place, vocabulary=place / "vocabulary", clip=str(place / "other"))


def test_classes_choose_the_images(place):
    bank = trained(place, classes=("frog",), deviations=1.5, name="frogs")[1].bank
    sources = {picture.source.split("/")[0] for concept in bank.concepts for picture in concept.pictures}
    assert 30 < bank.metrics["training"]["images"] < 45
    assert sources == {"frog"}


def test_activations_of_any_sign_will_do(place):
    bank = trained(place, model="bcos", deviations=1.5)[1].bank
    assert len(bank.concepts) > 5


def test_a_layer_without_positions_has_the_same_groups_and_whole_views(place, falcon):
    flat = trained(place, layer="flatten")[1].bank  # after the mean over positions, which representations take anyway
    assert groups_of(flat) == groups_of(falcon[1].bank)
    assert {picture.box for concept in flat.concepts for picture in concept.pictures} == {Box(0, 0, 32, 32)}
    for name in ("active_share", "carried_share", "l0_image"):
        assert flat.metrics["mean"][name] == pytest.approx(falcon[1].bank.metrics["mean"][name], rel=1e-4)


def test_what_cannot_be_found_is_said_with_the_remedy(place):
    with pytest.raises(NotTrainable) as caught:
        trained(place, deviations=9.0)
    would = float(str(caught.value).partition("--deviations")[2].partition("--deviations")[2].split()[0])
    assert trained(place, deviations=would, name="would")[1].bank.concepts
    with pytest.raises(NotTrainable, match="no group"):
        trained(place, deviations=would + 0.1)
    with pytest.raises(NotTrainable, match=r"120 images are too few.*--min-images"):
        trained(place, min_images=120)
    with pytest.raises(InvalidInput, match="no CLIP"):
        trained(place, clip="nowhere")
    with pytest.raises(ValidationError, match="at most 6"):
        config(place, exemplars=7)


def test_the_command_trains_and_refuses(place):
    given = [
        "--model", MODEL, "--layer", "layer3", "--images", place / "train", "--held-out", place / "test",
        "--clip", place / "clip", "--repository", place / "repository", "--device", "cpu", "--name", "command",
        "--max-groups", 3, "--crops", 2, "--exemplars", 1, "--keep", "all",
    ]  # fmt: skip
    assert "set --deviations" in refused("train", "subspace", *given)
    code, out, _ = run("train", "subspace", *given, "--deviations", 2)
    assert code == 0
    assert "cohesion" in out
    assert "carried" in out
    assert "do not add up" in refused(
        "evaluate", f"{MODEL}/layer3/command", "--images", place / "test", "--repository", place / "repository"
    )
