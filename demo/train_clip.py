"""Train the demo's CLIP: ``python -m demo.train_clip``.

A model of an open_clip architecture for crops of the known-concepts world and words about them, small enough to embed
thousands of crops on a processor. Every step draws fresh images, cuts a crop of each and says something true of it.
Every text of the step that is true of a crop counts as its positive; pairs that cannot be told count as nothing (the
loss of UniCL; Yang et al. 2022). Among the texts are always all single words, those that say nothing included, and
some letters that are no word of the world's, so that a model asked for ``piano`` finds it nowhere.

The folder written is one that `concepts.clip.open_clip_model` opens. Weights are stored in float16; the report is
measured from the stored file, on held-out images. Seeds are fixed, as in `demo.train`. Processor time on one core with
AVX-512: 15 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import string
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional

from concepts.clip import MERGES, open_clip_model
from demo.attributes import FAMILIES, SPURIOUS, index_of
from demo.captions import PEBBLES, THINGS, crops, random_caption, seen, truth
from demo.merges import vocabulary, vocabulary_size, write_merges
from demo.world import SIDE, Batch, World, paste_sticker

Tokenizer = Callable[[list[str]], Tensor]

FOLDER = Path(__file__).parent / "weights" / "clip"
CONFIG, WEIGHTS, REPORT = "open_clip_config.json", "open_clip_model.safetensors", "report.json"
HELDOUT = 4096
"""Held-out images, from index 0 on, that the report is measured on: whole, and a crop of each."""
SEED = 0
CONTEXT = 20
"""Tokens of a text; the longest caption has 19."""
SMALLEST_CROP = 16
"""Side of the smallest crops, in pixels."""
WHOLE = 0.25
"""Share of whole images among the crops trained on."""
STICKERS = 0.3
"""Share of images that a sticker is pasted into, whatever they show: the split alone would tie it to one class."""
SURE_WORDS = (*THINGS, *(word for word in vocabulary() if word not in THINGS))
"""The texts of every step."""
PREPROCESSING = MappingProxyType(
    {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
)


@dataclass(frozen=True)
class Recipe:
    """How the model is trained."""

    steps: int = 2800
    batch: int = 128
    """Crops per step, each of another image."""
    learning_rate: float = 3e-3
    """Highest learning rate of AdamW; it rises over the first 5 % of the steps and falls to zero by a cosine."""
    weight_decay: float = 0.05
    unknown_words: int = 16
    """Texts per step that are true of nothing."""


def model_config() -> dict[str, Any]:
    """Return what open_clip builds the model from."""
    return {
        "embed_dim": 64,
        "vision_cfg": {  # timm's smallest ResNet, 0.4 million parameters
            "timm_model_name": "test_resnet",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": SIDE,
        },
        "text_cfg": {"context_length": CONTEXT, "vocab_size": vocabulary_size(), "width": 96, "heads": 4, "layers": 2},
    }


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokeniser of a folder with its merges."""
    tokenizer: Tokenizer = SimpleTokenizer(str(folder / MERGES), context_length=CONTEXT)
    return tokenizer


def enlarge(images: NDArray[np.uint8]) -> Tensor:
    """Enlarge and normalise squares [n, side, side, 3] as the model's preprocessing does: [n, 3, 64, 64]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    large = functional.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    return (large - mean) / std


def embed_images(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return unit vectors [n, D] of enlarged images [n, 3, 64, 64]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
        vectors = model.encode_image(pixels.contiguous(memory_format=torch.channels_last))  # type: ignore[operator]
    return functional.normalize(vectors.float(), dim=1)


def embed_texts(model: nn.Module, tokenizer: Tokenizer, texts: tuple[str, ...]) -> Tensor:
    """Return unit vectors [n, D] of texts."""
    return functional.normalize(model.encode_text(tokenizer(list(texts))), dim=1)  # type: ignore[operator]


def stick(batch: Batch, dice: np.random.Generator) -> Batch:
    """Paste the sticker into some of the images that have none."""
    column = index_of(SPURIOUS)
    rows = np.flatnonzero(~batch.attributes[:, column] & (dice.random(len(batch)) < STICKERS))
    images, attributes, regions = batch.images.copy(), batch.attributes.copy(), batch.regions.copy()
    pasted = paste_sticker(np.zeros_like(images[:1])).any(-1)
    images[rows], attributes[rows, column] = paste_sticker(images[rows]), True
    regions[rows] = np.where(pasted, 3, regions[rows])
    return Batch(images, batch.labels, attributes, regions)


def draw(batch: Batch, dice: np.random.Generator, whole: float = WHOLE) -> tuple[Tensor, NDArray[np.int8]]:
    """Cut a square of random size and place out of each image.

    Parameters
    ----------
    batch
        The images, n of them.
    dice
        Says where.
    whole
        Share of images that are left whole.

    Returns
    -------
    The crops as the model takes them, [n, 3, 64, 64], and what is seen in them (`captions.seen`), [n, len(THINGS)].
    """
    n = len(batch)
    sides = np.where(dice.random(n) < whole, SIDE, dice.integers(SMALLEST_CROP, SIDE, n))
    tops, lefts = (dice.integers(0, SIDE - sides + 1) for _ in range(2))
    pixels, shown = torch.empty(n, 3, SIDE, SIDE), np.empty((n, len(THINGS)), np.int8)
    for side in np.unique(sides):
        rows = np.flatnonzero(sides == side)
        part = Batch(batch.images[rows], batch.labels[rows], batch.attributes[rows], batch.regions[rows])
        pixels[rows] = enlarge(crops(part.images, tops[rows], lefts[rows], side))
        shown[rows] = seen(part, tops[rows], lefts[rows], side)
    return pixels, shown


def unknown_word(dice: np.random.Generator) -> str:
    """Return letters that are, but for an unlikely chance, no word of the world's."""
    return "".join(dice.choice(list(string.ascii_lowercase), dice.integers(3, 11)))


def contrastive_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the mean of the losses from crops to texts and from texts to crops.

    Parameters
    ----------
    logits
        Cosine times the inverse temperature, [crops, texts].
    truth
        1 where the text is true of the crop, -1 where it is false, 0 where the pair counts as neither, [crops, texts].
    """
    return (_one_way(logits, truth) + _one_way(logits.T, truth.T)) / 2


def _one_way(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean cross-entropy of the rows that have positives, all of which are to be equally likely."""
    logs = logits.masked_fill(truth == 0, -torch.inf).log_softmax(1)
    count = (truth == 1).sum(1)
    losses = -logs.where(truth == 1, 0).sum(1) / count.clamp(min=1)
    return losses[count > 0].mean()


def step_loss(
    model: nn.Module, tokenizer: Tokenizer, batch: Batch, unknown_words: int, dice: np.random.Generator
) -> Tensor:
    """Draw crops and texts from a few images and return their loss."""
    pixels, shown = draw(stick(batch, dice), dice)
    said = {caption for row in shown if (caption := random_caption(row, dice))}
    known = (*SURE_WORDS, *sorted(said.difference(SURE_WORDS)))
    unknown = tuple(unknown_word(dice) for _ in range(unknown_words))
    matches = np.concatenate([truth(shown, known), np.full((len(batch), unknown_words), -1, np.int8)], axis=1)
    scaled = model.get_parameter("logit_scale").exp() * embed_images(model, pixels)
    return contrastive_loss(scaled @ embed_texts(model, tokenizer, known + unknown).T, torch.from_numpy(matches))


def train(recipe: Recipe, tokenizer: Tokenizer) -> tuple[nn.Module, list[float]]:
    """Train the model from scratch; return it in evaluation mode, and the loss of each step."""
    torch.manual_seed(SEED)
    dice = np.random.default_rng(SEED)
    model = open_clip.CLIP(**model_config())
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.05, cycle_momentum=False
    )
    losses = []
    for batch in World(SEED).batches(recipe.steps * recipe.batch, "train", recipe.batch):
        loss = step_loss(model, tokenizer, batch, recipe.unknown_words, dice)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(0, math.log(100))  # as in CLIP (Radford et al. 2021)
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            print(f"clip: step {len(losses)}/{recipe.steps}, loss {losses[-1]:.4f}", flush=True)
    return model.eval().requires_grad_(False), losses


def measure(model: nn.Module, tokenizer: Tokenizer, n: int = HELDOUT, start: int = 0) -> dict[str, Any]:
    """Measure a model on held-out images, `start` to `start + n - 1`: whole, and on a crop of each.

    Returns
    -------
    For each, ``accuracy``: by family, the share of crops that show one of its attributes whose word has the largest
    cosine; ``auroc`` of the cosine with a word, crops that show the thing against those that do not; mean ``cosine`` of
    two crops that show the same things, and of two that do not.
    """
    words = embed_texts(model, tokenizer, THINGS)
    return {
        name: _measure(vectors, (vectors @ words.T).numpy(), shown)
        for name, whole in (("whole", 1.0), ("crops", 0.0))
        for vectors, shown in [_embed_heldout(model, n, start, whole)]
    }


def _embed_heldout(model: nn.Module, n: int, start: int, whole: float) -> tuple[Tensor, NDArray[np.int8]]:
    """Unit vectors of crops of held-out images, and what is seen in them."""
    dice = np.random.default_rng(SEED)
    drawn = [draw(batch, dice, whole) for batch in World(SEED).batches(n, "heldout", 256, start)]
    vectors = torch.cat([embed_images(model, pixels) for pixels, _ in drawn])
    return vectors, np.concatenate([shown for _, shown in drawn])


def _measure(vectors: Tensor, cosines: NDArray[np.float32], shown: NDArray[np.int8]) -> dict[str, Any]:
    """Figures of one kind of crops, given their cosines with `THINGS`."""
    accuracy = {}
    for family, names in FAMILIES.items():
        columns = [index_of(name) for name in names]
        rows = (shown[:, columns] == 1).any(1)
        right = cosines[rows][:, columns].argmax(1) == (shown[rows][:, columns] == 1).argmax(1)
        accuracy[family] = float(right.mean())
    marks = [THINGS.index(name) for name in (SPURIOUS, PEBBLES)]
    return {
        "accuracy": accuracy,
        "auroc": {THINGS[mark]: _auroc(cosines[:, mark], shown[:, mark]) for mark in marks},
        "cosine": dict(zip(("same", "different"), _mean_cosines(vectors, shown == 1), strict=True)),
    }


def _auroc(scores: NDArray[np.float32], shown: NDArray[np.int8]) -> float:
    """How likely a crop that shows something scores above one without; crops that do not tell are left out."""
    ranks, present = rankdata(scores[shown != 0]), shown[shown != 0] == 1
    positives, negatives = int(present.sum()), int((~present).sum())
    return float((ranks[present].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _mean_cosines(vectors: Tensor, shown: NDArray[np.bool_]) -> Iterator[float]:
    """Mean cosine of two crops that show the same things, then of two that do not."""
    signs = torch.from_numpy(np.where(shown, 1.0, -1.0).astype(np.float32))
    same = signs @ signs.T == len(THINGS)
    others = ~torch.eye(len(vectors), dtype=torch.bool)
    cosines = vectors @ vectors.T
    yield cosines[same & others].mean().item()
    yield cosines[~same].mean().item()


def write(model: nn.Module, folder: Path) -> None:
    """Write configuration and weights, in half precision, beside the merges."""
    config = {"model_cfg": model_config(), "preprocess_cfg": dict(PREPROCESSING)}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    halves = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    save_file({key: value.contiguous() for key, value in halves.items()}, folder / WEIGHTS)


def write_report(folder: Path, seconds: int) -> None:
    """Measure what was written, and write the figures beside it."""
    clip = open_clip_model(str(folder))
    report = {"heldout": measure(clip.module, clip.tokenize), "heldout_images": HELDOUT, **asdict(Recipe())}
    report |= {"seed": SEED, "training_seconds": seconds, "device": f"cpu, {torch.get_num_threads()} threads"}
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def main() -> None:
    """Train, write and measure the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    write_merges(options.out / MERGES)
    begin = time.monotonic()
    model, _ = train(Recipe(), load_tokenizer(options.out))
    seconds = round(time.monotonic() - begin)
    write(model, options.out)
    write_report(options.out, seconds)


if __name__ == "__main__":
    main()
