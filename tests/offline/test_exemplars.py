"""Exemplars: the crops that excite a concept most, as files."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from concepts.preprocessing import Box
from offline.exemplars import Excerpt, choose, draw, picture
from offline.images import ImageFolder, open_folder


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def pixels(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    assert image.format == "WEBP"
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        (Box(3, 5, 20, 30), slice(5, 30), slice(3, 20)),
        (Box(3.4, 4.6, 19.6, 30.4), slice(5, 30), slice(3, 20)),
        (Box(-0.7, -3.0, 10.2, 9.9), slice(0, 10), slice(0, 10)),  # a view may leave its image by a rounding
        (Box(30.0, 40.0, 41.0, 55.0), slice(40, 50), slice(30, 40)),
        (Box(7.1, 8.1, 7.3, 8.3), slice(8, 9), slice(7, 8)),  # less than a pixel
    ],
)
def test_a_small_picture_is_the_pixels_of_its_box(box, rows, columns):
    image = noise(40, 50)
    assert np.array_equal(pixels(picture(image, box)), np.asarray(image)[rows, columns])


def test_a_large_picture_is_reduced_and_keeps_its_shape():
    plain = Image.new("RGB", (1000, 500), (200, 100, 50))
    found = pixels(picture(plain, Box(0, 0, 1000, 500)))
    assert found.shape == (128, 256, 3)
    assert np.abs(found.astype(int) - [200, 100, 50]).max() <= 4
    assert len(picture(noise(1000, 500), Box(0, 0, 1000, 500))) < 256 * 128 * 3


def test_drawn_are_the_chosen_boxes_and_each_image_is_opened_once(tmp_path, monkeypatch):
    images = {f"{letter}.png": noise(24, 16, seed) for seed, letter in enumerate("abcd")}
    for name, image in images.items():
        image.save(tmp_path / name)
    folder = open_folder(tmp_path)
    opened: Counter[str] = Counter()
    once = ImageFolder.open
    monkeypatch.setattr(ImageFolder, "open", lambda self, key: opened.update([key]) or once(self, key))
    chosen = [
        [Excerpt("c.png", Box(0, 0, 8, 8), 2.5), Excerpt("a.png", Box(1, 2, 3, 4), 1.0)],
        [],
        [Excerpt("a.png", Box(10, 0, 24, 16), 0.5), Excerpt("c.png", Box(0, 0, 8, 8), 0.25)],
    ]
    drawn = draw(folder, chosen, first=70_000)
    assert opened == {"a.png": 1, "c.png": 1}
    assert [[exemplar.file for exemplar in concept] for concept in drawn.exemplars] == [
        ["exemplars/70000-00.webp", "exemplars/70000-01.webp"],
        [],
        ["exemplars/70002-00.webp", "exemplars/70002-01.webp"],
    ]
    assert sum(map(len, drawn.exemplars)) == len(drawn.pictures)
    for shown, excerpts in zip(drawn.exemplars, chosen, strict=True):
        for exemplar, excerpt in zip(shown, excerpts, strict=True):
            assert (exemplar.source, exemplar.box, exemplar.activation) == excerpt
            assert drawn.pictures[exemplar.file] == picture(images[excerpt.key], excerpt.box)


@pytest.mark.parametrize("levels", [3, 1000])
def test_crops_are_chosen_one_an_image_best_first(levels):
    g = np.random.default_rng(levels)
    images, crops, concepts = 9, 4, 5
    codes = g.integers(0, levels, (images, crops, concepts))
    codes[..., 4] = 0  # a concept that is never active
    found = choose(torch.from_numpy(codes).flatten(0, 1).float(), crops, 3)
    for concept in range(concepts):
        peaks = codes[..., concept].max(1)
        order = sorted(range(images), key=lambda image: (-peaks[image], image))[:3]
        assert [choice.image for choice in found[concept]] == [image for image in order if peaks[image]]
        assert [choice.activation for choice in found[concept]] == [peaks[image] for image in order if peaks[image]]
        assert all(codes[c.image, c.crop, concept] == c.activation for c in found[concept])
    assert found[4] == []
