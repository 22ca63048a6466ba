"""The demo's CLIP: what is stated of it must be true of the committed files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from concepts.clip import MERGES, open_clip_model
from demo.attributes import ATTRIBUTES, FAMILIES, SPURIOUS, index_of
from demo.captions import PEBBLES, THINGS, captions, truth
from demo.merges import merges, vocabulary, vocabulary_size, write_merges
from demo.train_clip import (
    CONTEXT,
    FOLDER,
    REPORT,
    SURE_WORDS,
    Recipe,
    Tokenizer,
    contrastive_loss,
    draw,
    embed_images,
    embed_texts,
    enlarge,
    load_tokenizer,
    measure,
    stick,
    train,
    unknown_word,
)
from demo.world import SIDE, STICKER_SIDE, Batch, World

FRESH = 200_000
"""First index of held-out images that played no part in choosing or stating anything."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip() -> tuple[nn.Module, Tokenizer]:
    clip = open_clip_model(str(FOLDER))
    return clip.module, clip.tokenize


@pytest.fixture(scope="module")
def stated() -> dict[str, Any]:
    report: dict[str, Any] = json.loads((FOLDER / REPORT).read_text())
    return report


@pytest.fixture(scope="module")
def fresh() -> Batch:
    return World(0).sample(256, "heldout", start=FRESH)


def texts_of(clip: tuple[nn.Module, Tokenizer], *texts: str) -> Tensor:
    return embed_texts(*clip, texts)


def test_the_files_are_small_and_loaded_as_open_clip_loads_any(clip: tuple[nn.Module, Tokenizer]) -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 6_000_000
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}")
    for mine, theirs in zip(clip[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=0)
    assert preprocess is not None


def test_crops_are_enlarged_as_the_stated_preprocessing_does(fresh: Batch) -> None:
    preprocess = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}")[2]
    squares = np.ascontiguousarray(fresh.images[:4, 10:34, 10:34])
    expected = torch.stack([preprocess(Image.fromarray(square)) for square in squares])
    # Pillow rounds to whole levels, 255 for 4 standard deviations, and clips after each of its two passes.
    level, differences = 4 / 255, (enlarge(squares) - expected).abs()
    assert (differences <= 2 * level).float().mean() > 0.99
    assert differences.max() <= 12 * level


def test_accuracy_and_geometry_are_what_is_stated(clip: tuple[nn.Module, Tokenizer], stated: dict[str, Any]) -> None:
    measured = measure(*clip, 1024, start=FRESH)
    for kind in ("whole", "crops"):
        told, found = stated["heldout"][kind], measured[kind]
        assert min(told["accuracy"].values()) >= 0.97
        assert set(told["accuracy"]) == set(FAMILIES)
        assert told["auroc"][SPURIOUS] >= 0.98
        assert told["cosine"]["same"] >= told["cosine"]["different"] + 0.3
        for part in ("accuracy", "cosine"):
            assert found[part] == pytest.approx(told[part], abs=0.02)
        assert found["auroc"][SPURIOUS] == pytest.approx(told["auroc"][SPURIOUS], abs=0.02)
        assert found["auroc"][PEBBLES] == pytest.approx(told["auroc"][PEBBLES], abs=0.08)


def test_words_are_told_by_the_images_that_show_them(clip: tuple[nn.Module, Tokenizer], fresh: Batch) -> None:
    """The mean cosine with images that show an attribute, less that with others, is largest for its own word."""
    words = texts_of(clip, *SURE_WORDS, "piano", "squirrel", "xylophone")
    cosines = embed_images(clip[0], enlarge(stick(fresh, np.random.default_rng(0)).images)) @ words.T
    shown = torch.from_numpy(stick(fresh, np.random.default_rng(0)).attributes)
    for column, name in enumerate(ATTRIBUTES):
        contrast = cosines[shown[:, column]].mean(0) - cosines[~shown[:, column]].mean(0)
        assert SURE_WORDS[int(contrast.argmax())] == name
        assert contrast.max() > 0.15


def test_phrases_are_told_from_those_with_one_wrong_word(clip: tuple[nn.Module, Tokenizer], fresh: Batch) -> None:
    shown = np.concatenate([fresh.attributes, np.zeros((len(fresh), 1), np.bool_)], axis=1)
    names = [[name for name, there in zip(THINGS, row, strict=True) if there] for row in shown]
    right = tuple(f"{texture} {colour} {shape}" for shape, colour, texture, *_ in names)
    vectors = embed_images(clip[0], enlarge(fresh.images))
    said = (vectors * texts_of(clip, *right)).sum(1)
    swaps = {"shape": 2, "colour": 1, "texture": 0}
    for family, place in swaps.items():
        wrong = []
        for text in right:
            words, choices = text.split(), FAMILIES[family]
            words[place] = choices[(choices.index(words[place]) + 1) % len(choices)]
            wrong.append(" ".join(words))
        assert (said > (vectors * texts_of(clip, *wrong)).sum(1)).float().mean() >= 0.95


def test_case_does_not_matter(clip: tuple[nn.Module, Tokenizer]) -> None:
    texts = ("a striped red disc in the night", "sticker")
    torch.testing.assert_close(texts_of(clip, *texts), texts_of(clip, *(text.upper() for text in texts)))


def test_every_word_of_the_world_is_one_token(clip: tuple[nn.Module, Tokenizer]) -> None:
    assert set(SURE_WORDS) >= {*THINGS, "grey", "the"}
    tokens = clip[1](list(SURE_WORDS))
    assert tokens.shape[1] == CONTEXT
    assert ((tokens != 0).sum(1) == 3).all()  # start, the word, end
    assert len(set(tokens[:, 1].tolist())) == len(SURE_WORDS)
    assert tokens.max() == vocabulary_size() - 1


def test_no_caption_is_cut_short(clip: tuple[nn.Module, Tokenizer]) -> None:
    tokens = clip[1](list(captions()[::7]) + sorted(captions(), key=len)[-20:])
    assert (tokens.argmax(1) < CONTEXT).all()
    longest = max(captions(), key=lambda text: len(text.replace(",", " ,").split()))
    assert len(longest.replace(",", " ,").split()) + 2 <= CONTEXT


def test_merges_join_the_commonest_pair_first_and_stop_at_words() -> None:
    assert merges(("aab", "ab")) == (("a", "b</w>"), ("a", "ab</w>"))
    assert len(set(merges(vocabulary()))) == len(merges(vocabulary()))


def test_the_committed_merges_are_those_of_todays_captions(tmp_path: Path) -> None:
    write_merges(tmp_path / MERGES)
    assert (tmp_path / MERGES).read_bytes() == (FOLDER / MERGES).read_bytes()


def test_stickers_are_pasted_on_images_of_any_class(fresh: Batch) -> None:
    before = fresh.images.copy()
    stuck = stick(fresh, np.random.default_rng(0))
    np.testing.assert_array_equal(fresh.images, before)
    present = stuck.attributes[:, index_of(SPURIOUS)]
    assert 0.2 < present.mean() < 0.45
    np.testing.assert_array_equal(stuck.masks[:, index_of(SPURIOUS)].sum((1, 2)), present * STICKER_SIDE**2)
    changed = (stuck.images != fresh.images).any(-1)
    assert not changed[stuck.regions != 3].any()


def test_crops_drawn_differ_in_size_and_are_told_apart(fresh: Batch) -> None:
    pixels, shown = draw(fresh, np.random.default_rng(0))
    assert pixels.shape == (len(fresh), 3, SIDE, SIDE)
    whole, told = draw(fresh, np.random.default_rng(0), whole=1.0)
    torch.testing.assert_close(whole, enlarge(fresh.images))
    assert (told != 0)[:, : len(ATTRIBUTES)].all()
    assert 0.1 < (pixels == whole).flatten(1).all(1).float().mean() < 0.4
    assert (shown == 1).sum() < (told == 1).sum()
    assert (shown == 0).any()


def test_the_loss_is_cross_entropy_with_all_true_texts_equally_likely() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=rng, dtype=torch.float64)
    matches = torch.randint(-1, 2, (5, 7), generator=rng)
    matches[2] = -1  # a crop of which nothing is true
    total = []
    for table, true in ((logits, matches), (logits.T, matches.T)):
        rows = []
        for values, row in zip(table, true, strict=True):
            if (row == 1).any():
                denominator = values[row != 0].exp().sum()
                rows.append(torch.stack([(denominator / value.exp()).log() for value in values[row == 1]]).mean())
        total.append(torch.stack(rows).mean())
    torch.testing.assert_close(contrastive_loss(logits, matches), (total[0] + total[1]) / 2)


def test_unknown_words_are_not_of_the_world() -> None:
    dice = np.random.default_rng(0)
    drawn = {unknown_word(dice) for _ in range(300)}
    assert len(drawn) > 290
    assert not drawn & set(SURE_WORDS)
    assert (truth(np.ones((1, len(THINGS)), np.int8), tuple(drawn)) == 1).all()


def test_a_short_training_learns_and_is_deterministic() -> None:
    recipe, tokenizer = Recipe(steps=16, batch=48), load_tokenizer(FOLDER)
    model, losses = train(recipe, tokenizer)
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.2
    assert not model.training
    again, _ = train(Recipe(steps=16, batch=48), tokenizer)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
