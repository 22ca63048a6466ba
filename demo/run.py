"""The whole product in minutes: publish the small models, learn banks, serve them, explain images, show the answers.

``python -m demo.run`` writes pictures and one page to ``out/demo`` and stops everything that it started. It uses what a
user would: the commands ``whence-bank`` and ``whence-serve``, and the SDK.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file

import whence
from concepts.model import ModelSpec
from concepts.repository import Repository
from demo.attributes import CLASS_NAMES
from demo.captions import captions
from demo.folder import write_folder
from demo.models import CLIP, MODELS
from demo.onnx_classifier import keras_style
from demo.page import Contrasted, Shown, write_page
from demo.serving import serving

EXPLAINED = 6
"""Held-out images that each model explains."""

EXPLAINED_BY_PARTS = 2
"""Held-out images of each class that is split into parts."""

PARTS_LAYER = "stage1"
"""Where the convolutional model tells colours apart best."""

SPLIT = ("night-ring", "sand-striped")
"""Classes whose concepts mix attributes; the demo splits these into parts."""

CONTRASTED = (("bricks-triangle", "bricks-cross"), ("night-ring", "night-disc"), ("waves-red", "waves-blue"))
"""Pairs of classes of which the demo asks why the first and not the second."""

SEARCHED = ("sticker", "striped", "a red disc")
"""What the demo looks for among all concepts."""

FOUND = 6
"""Concepts that a search shows."""

REFUSED = 2
"""Exit code of ``whence-bank`` for what is the user's to mend."""

_BIN = Path(sys.executable).parent


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Learn banks for the demo's models, serve them, explain images.")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to; emptied first")
    parser.add_argument("--training-images", type=int, default=1400, help="images to learn from")
    parser.add_argument("--held-out-images", type=int, default=420, help="images to measure and explain")
    arguments = parser.parse_args()
    out: Path = arguments.out
    start = time.monotonic()
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    _say("Drawing images of the known-concepts world …")
    training = write_folder(out / "images", "train", arguments.training_images)
    held_out = write_folder(out / "images", "heldout", arguments.held_out_images)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in CLASS_NAMES))
    (out / "captions.txt").write_text("".join(f"{caption}\n" for caption in captions()))
    (out / "classifier.onnx").write_bytes(keras_style(MODELS["cnn"].load()))  # for the README's user to add
    repository = out / "repository"
    publish_models(repository)
    refusals = {name: train_craft(name, training, held_out, repository) for name in MODELS}
    train_parts(training, held_out, repository)
    train_sae(training, held_out, repository)
    train_contrast(training, held_out, repository)
    build_vocabulary(out)
    train_subspace(training, held_out, repository, out)
    label(training, repository, out)
    audit(held_out, repository, out)
    _say("Starting the service …")
    with serving(repository, log=out / "server.log") as server, whence.Client(server.address) as client:
        shown = explain(client, held_out, out) + explain_parts(client, held_out, out)
        contrasted = contrast(client, held_out, out)
        searched = [client.search(text, limit=FOUND, max_exemplars=6) for text in SEARCHED]
        refused = {name: why for name, why in refusals.items() if why}
        page = write_page(out, client.banks(), shown, contrasted, searched, refused)
    _say(f"Done in {time.monotonic() - start:.0f} s. Open {page} in a browser; the pictures lie beside it.")


def publish_models(repository: Path) -> None:
    """Publish the demo's models."""
    for name, model in MODELS.items():
        _say(f"Publishing model {name} …")
        spec = ModelSpec(
            name=name,
            architecture=model.architecture,
            options={"num_classes": len(model.class_names)},
            preprocessing=model.preprocessing,
            class_names=model.class_names,
            weights_digest="",
        )
        Repository(repository).publish_model(spec, load_file(model.weights))


def train_craft(name: str, training: Path, held_out: Path, repository: Path) -> str:
    """Learn a CRAFT bank for a model's best layer; return why not, where that is refused."""
    layer = MODELS[name].layers[0]
    _say(f"Learning concepts of {name} at {layer} …")
    command = ["train", "craft", "--model", name, "--layer", layer, "--repository", str(repository)]
    command += ["--images", str(training), "--held-out", str(held_out), "--concepts", "8", "--patch-size", "24"]
    # To be quick: by default a bank is tried from several starts, its stability is measured, and more images are used.
    command += ["--random-starts", "0", "--stability-folds", "0", "--importance-images", "8", "--truth-images", "100"]
    possible = MODELS[name].nonnegative
    ended = subprocess.run(  # noqa: S603 - our own command
        [str(_BIN / "whence-bank"), *command], stderr=None if possible else subprocess.PIPE, text=True, check=possible
    )
    if possible:
        return ""
    if ended.returncode != REFUSED:
        sys.exit(f"learning concepts of {name} ended with exit code {ended.returncode}: {ended.stderr}")
    refusal = ended.stderr.strip().splitlines()[-1].removeprefix("error: ")
    _say(f"  refused, as it should be: {refusal}")
    return refusal


def train_parts(training: Path, held_out: Path, repository: Path) -> None:
    """Learn concepts of two classes of the convolutional model, and the parts of these at an earlier layer."""
    layer = MODELS["cnn"].layers[0]
    _say(f"Learning concepts of cnn at {layer}, and their parts at {PARTS_LAYER} …")
    command = ["train", "craft", "--name", "parts", "--model", "cnn", "--layer", layer, "--repository", str(repository)]
    command += ["--images", str(training), "--held-out", str(held_out), "--concepts", "4", "--patch-size", "24"]
    command += ["--random-starts", "0", "--stability-folds", "0", "--importance-images", "8", "--truth-images", "100"]
    command += ["--parts-layer", PARTS_LAYER, "--parts-images", "60"]
    command += ["--classes", ",".join(SPLIT)]
    subprocess.run([str(_BIN / "whence-bank"), *command], check=True)  # noqa: S603


def train_sae(training: Path, held_out: Path, repository: Path) -> None:
    """Learn a sparse dictionary of the B-cos model, and publish the layer's channels to compare it with."""
    layer = MODELS["bcos"].layers[0]
    shared = ["--model", "bcos", "--layer", layer, "--repository", str(repository), "--images", str(training)]
    shared += ["--held-out", str(held_out), "--encoder", "cnn/stage2", "--truth-images", "100"]
    shared += ["--exemplars", "12", "--exemplar-images", "700"]
    for trainer, options in (("sae", ["--sizes", "128/4", "--epochs", "8"]), ("channels", [])):
        _say(f"Learning concepts of bcos at {layer} ({trainer}) …")
        subprocess.run([str(_BIN / "whence-bank"), "train", trainer, *shared, *options], check=True)  # noqa: S603


def train_contrast(training: Path, held_out: Path, repository: Path) -> None:
    """Learn planes between all pairs of classes of the convolutional model."""
    layer = MODELS["cnn"].layers[0]
    _say(f"Learning what tells classes of cnn apart at {layer} …")
    command = ["train", "contrast", "--model", "cnn", "--layer", layer, "--repository", str(repository)]
    command += ["--images", str(training), "--held-out", str(held_out), "--pairs", "60", "--test-images", "10"]
    subprocess.run([str(_BIN / "whence-bank"), *command], check=True)  # noqa: S603


def audit(held_out: Path, repository: Path, out: Path) -> None:
    """Look for features that the model should not rely on; there is one, the sticker."""
    _say("Looking for spurious features of cnn …")
    command = ["contrast", "audit", f"cnn/{MODELS['cnn'].layers[0]}/contrast", "--repository", str(repository)]
    command += ["--images", str(held_out), "--images-per-pair", "10", "--out", str(out / "audit")]
    subprocess.run([str(_BIN / "whence-bank"), *command], check=True)  # noqa: S603


def build_vocabulary(out: Path) -> None:
    """Embed the world's captions with the demo's CLIP."""
    _say("Building a vocabulary of captions …")
    command = ["vocabulary", "build", str(out / "captions.txt"), "--clip", str(CLIP)]
    subprocess.run([str(_BIN / "whence-bank"), *command], check=True)  # noqa: S603


def train_subspace(training: Path, held_out: Path, repository: Path, out: Path) -> None:
    """Find groups of features of the convolutional model that mean something together, and name them."""
    layer = MODELS["cnn"].layers[0]
    _say(f"Looking for groups of features of cnn at {layer} …")
    command = ["train", "subspace", "--model", "cnn", "--layer", layer, "--repository", str(repository)]
    command += ["--images", str(training), "--held-out", str(held_out), "--truth-images", "100"]
    command += ["--clip", str(CLIP), "--vocabulary", str(out / "captions.vocabulary")]
    # A small layer has no features as far out as those of large networks, for which the defaults were published.
    command += ["--deviations", "1.5", "--cohesion", "0.6", "--max-groups", "300"]
    subprocess.run([str(_BIN / "whence-bank"), *command], check=True)  # noqa: S603


def label(training: Path, repository: Path, out: Path) -> None:
    """Name the concepts of all other banks but the channels."""
    banks = [version.reference for version in Repository(repository).banks()]
    named = [bank for bank in banks if not bank.endswith(("/channels", "/subspace"))]
    _say(f"Naming the concepts of {', '.join(named)} …")
    command = ["label", *named, "--clip", str(CLIP), "--vocabulary", str(out / "captions.vocabulary")]
    command += ["--images", str(training), "--probe-images", "700", "--repository", str(repository)]
    subprocess.run([str(_BIN / "whence-bank"), *command], check=True)  # noqa: S603


def explain(client: whence.Client, held_out: Path, out: Path) -> list[Shown]:
    """Explain held-out images with every bank; write a picture of each answer."""
    shown = []
    for bank in (bank for bank in client.banks() if not bank.part_count and bank.kind != "contrast"):
        _say(f"Explaining with {bank.reference} …")
        images = _one_of_each(held_out, EXPLAINED)
        # Gradients add up where what follows the layer is affine; for the transformer they must be integrated.
        estimator: Literal["gradient", "integrated"] = "integrated" if bank.model == "vit" else "gradient"
        # B-cos models tell which pixels, and which of their colours, a concept comes from.
        exact = bank.kind == "sae"
        outcomes = client.explain_many(
            images,
            bank=bank.reference,
            estimator=estimator,
            top_k=6,
            maps="input" if exact else "activation",
            colours=exact,
        )
        for image, outcome in zip(images, outcomes, strict=True):
            explanation = outcome.result()
            picture = out / f"{bank.model}-{bank.name}-{image.parent.name}-{image.stem}.png"
            explanation.save(picture)
            concepts = [client.concept(bank.reference, c.id, max_exemplars=6) for c in explanation.concepts[:3]]
            shown.append(
                Shown(bank.reference, image.relative_to(held_out).as_posix(), picture.name, explanation, concepts)
            )
    return shown


def explain_parts(client: whence.Client, held_out: Path, out: Path) -> list[Shown]:
    """Explain held-out images of the split classes by concepts and their parts; show what the best concept's are."""
    shown = []
    bank = f"cnn/{MODELS['cnn'].layers[0]}/parts"
    _say(f"Explaining with {bank} …")
    for image in (image for name in SPLIT for image in sorted((held_out / name).iterdir())[:EXPLAINED_BY_PARTS]):
        # What follows the parts' layer is far from affine: their contributions must be integrated.
        explanation = client.explain(
            image, bank=bank, target=image.parent.name, estimator="integrated", top_k=2, maps="activation", parts=True
        )
        picture = out / f"cnn-parts-{image.parent.name}-{image.stem}.png"
        explanation.save(picture)
        best = client.concept(bank, explanation.concepts[0].id, max_exemplars=6)
        concepts = [best, *(client.concept(bank, part, max_exemplars=6) for part in best.children)]
        shown.append(Shown(bank, image.relative_to(held_out).as_posix(), picture.name, explanation, concepts))
    return shown


def contrast(client: whence.Client, held_out: Path, out: Path) -> list[Contrasted]:
    """Ask of held-out images why one class and not another."""
    contrasted = []
    bank = f"cnn/{MODELS['cnn'].layers[0]}/contrast"
    _say(f"Contrasting with {bank} …")
    for target, other in CONTRASTED:
        image = min((held_out / target).iterdir())
        answer = client.contrast(image, target, other, bank=bank)
        picture = out / f"cnn-contrast-{target}-{other}.png"
        answer.save(picture)
        concepts = [client.concept(bank, concept.id) for concept in answer.concepts]
        contrasted.append(Contrasted(bank, image.relative_to(held_out).as_posix(), picture.name, answer, concepts))
    return contrasted


def _one_of_each(held_out: Path, count: int) -> list[Path]:
    """Return the first image of classes spread over all of them."""
    classes = sorted(folder for folder in held_out.iterdir() if folder.is_dir())
    step = max(1, len(classes) // count)
    return [min(folder.iterdir()) for folder in classes[::step][:count]]


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
