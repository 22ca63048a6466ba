"""CLIPs: the same from whatever file, in whatever batch; what is strange is refused in words."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from concepts import clip as clips
from concepts.clip import MANIFEST, MERGES, WEIGHTS, Clip, from_files, open_clip_model
from concepts.errors import CorruptData, InvalidInput, UnsupportedOption
from demo.models import WEIGHTS as DEMO
from tests.clips import CONFIG, tiny_clip

CHECKPOINT = "open_clip_model.safetensors"
TEXTS = ["a red ring", "a striped disc on sand", "night", "", "grey pebbles"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips") / "tiny"
    tiny_clip(root)
    return root


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return open_clip_model(str(folder))


@pytest.fixture(scope="module")
def demo() -> Clip:
    return open_clip_model(str(DEMO / "clip"))


def pictures(count: int = 5) -> list[Image.Image]:
    random = np.random.default_rng(0)
    sides = [(16, 16), (40, 20), (7, 90), (64, 64), (1, 3)]
    return [Image.fromarray(random.integers(0, 256, (*sides[i % 5], 3), np.uint8)) for i in range(count)]


def state(folder: Path) -> dict[str, Tensor]:
    return dict(safetensors.torch.load_file(folder / CHECKPOINT))


def written(root: Path, weights: dict[str, Tensor], config: Any = None, name: str = CHECKPOINT) -> str:
    root.mkdir(parents=True)
    (root / "open_clip_config.json").write_text(json.dumps(config or {"model_cfg": CONFIG}))
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(weights, root / name)
    else:
        torch.save(weights, root / name)
    return str(root)


# Embedding


@pytest.mark.parametrize("which", ["clip", "demo"])
def test_embeddings_are_unit_rows_and_the_same_in_any_batch(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip: Clip = request.getfixturevalue(which)
    for embed, things in ((clip.embed_pictures, pictures(9)), (clip.embed_texts, TEXTS)):
        whole = embed(things)  # type: ignore[operator]
        assert whole.shape == (len(things), clip.width)
        assert whole.dtype == torch.float32
        torch.testing.assert_close(whole.norm(dim=1), torch.ones(len(things)))
        alone = torch.cat([embed([thing]) for thing in things])  # type: ignore[operator]
        torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)
        with monkeypatch.context() as patch:
            patch.setattr(clips, "_PICTURES", 2)
            patch.setattr(clips, "_TEXTS", 2)
            torch.testing.assert_close(embed(things), whole, rtol=0, atol=1e-5)  # type: ignore[operator]
        assert not whole.requires_grad
        assert embed([]).shape == (0, clip.width)


def test_embeddings_are_those_of_open_clip(demo: Clip) -> None:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{DEMO / 'clip'}")
    model.eval()
    x = torch.stack([transform(picture) for picture in pictures()])
    with torch.no_grad():
        expected = model.encode_image(x, normalize=True)
        spoken = model.encode_text(demo.tokenize(TEXTS), normalize=True)
    torch.testing.assert_close(demo.embed_pictures(pictures()), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(demo.embed_texts(TEXTS), spoken, rtol=0, atol=1e-5)


def test_what_is_too_long_is_cut(demo: Clip) -> None:
    words = " ".join(["disc"] * 18)  # with start and end, the twenty that it takes
    cut, longer, shorter = demo.embed_texts([words, f"{words} red ring on sand", words.removeprefix("disc ")])
    torch.testing.assert_close(longer, cut)
    assert float(shorter @ cut) < 1 - 1e-6
    assert demo.embed_texts(["disc " * 5000]).shape == (1, 64)


# Files


@pytest.mark.parametrize("which", ["clip", "demo"])
def test_files_bring_it_back_as_it_was(which: str, request: pytest.FixtureRequest) -> None:
    clip: Clip = request.getfixturevalue(which)
    files = clip.files
    assert list(files)[-1] == MANIFEST
    assert (MERGES in files) == (which == "demo")
    assert clip.digest == hashlib.sha256(files[MANIFEST]).hexdigest()
    again = from_files(files[MANIFEST], clip.digest, files.__getitem__)
    assert again.name == clip.digest[:12]
    assert (again.digest, again.files, again.width) == (clip.digest, files, clip.width)
    assert again.portable
    for one, other in ((again.embed_pictures, clip.embed_pictures), (again.embed_texts, clip.embed_texts)):
        things: Any = pictures() if one == again.embed_pictures else TEXTS
        torch.testing.assert_close(one(things), other(things), rtol=0, atol=0)


def test_the_digest_is_of_the_weights_and_not_of_their_file(folder: Path, tmp_path: Path) -> None:
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state(folder).items()}
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in half.items()}
    places = [
        written(tmp_path / "half", half),
        written(tmp_path / "single", single),
        written(tmp_path / "pickled", {"state_dict": single}, name="open_clip_pytorch_model.bin"),  # type: ignore[dict-item]
        written(tmp_path / "said", half, {"model_cfg": CONFIG, "preprocess_cfg": {"interpolation": "bicubic"}}),
    ]
    opened = [open_clip_model(place) for place in places]
    assert len({clip.digest for clip in opened}) == 1
    assert {clip.name for clip in opened} == {"half", "single", "pickled", "said"}
    assert len(opened[0].files[WEIGHTS]) < 0.6 * (tmp_path / "single" / CHECKPOINT).stat().st_size


def test_other_weights_or_another_view_are_another_clip(folder: Path, clip: Clip, tmp_path: Path) -> None:
    weights = state(folder)
    weights["logit_scale"] = torch.nextafter(weights["logit_scale"], torch.tensor(9.0))
    other = open_clip_model(written(tmp_path / "a", weights))
    view = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
    seen = open_clip_model(written(tmp_path / "b", state(folder), view))
    assert len({clip.digest, other.digest, seen.digest}) == 3
    assert from_files(other.files[MANIFEST], other.digest, other.files.__getitem__).digest == other.digest


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, MERGES])
def test_a_changed_byte_is_noticed(demo: Clip, name: str) -> None:
    files = dict(demo.files)
    for place in (0, len(files[name]) // 2, len(files[name]) - 1):
        changed = bytearray(files[name])
        changed[place] ^= 1
        read = {**files, name: bytes(changed)}
        with pytest.raises(CorruptData, match=name):
            from_files(read[MANIFEST], demo.digest, read.__getitem__)


def forged(clip: Clip, change: Callable[[dict[str, Any]], Any]) -> tuple[bytes, str]:
    """Change what the manifest says, with its digest."""
    manifest = json.loads(clip.files[MANIFEST])
    content = json.dumps(change(manifest) or manifest).encode()
    return content, hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=2), "schema 2; this version reads schema 1"),
        (lambda m: m.pop("model_cfg"), "form of schema 1"),
        (lambda m: m.update(model_cfg=[1]), "form of schema 1"),
        (lambda m: m["model_cfg"].update(text_cfg=[]), "form of schema 1"),
        (lambda m: m["model_cfg"].update(embed_dim=8), "form of schema 1"),
        (lambda m: m.update(files={}), "form of schema 1"),
        (lambda m: [m], "form of schema 1"),
        (lambda m: m["model_cfg"]["text_cfg"].update(hf_tokenizer_name="x"), "not in the repository"),
        (lambda m: m["model_cfg"]["text_cfg"].update(hf_model_name="x"), "not in the repository"),
        (lambda m: m["model_cfg"]["vision_cfg"].update(timm_model_name="hf-hub:x/y"), "not in the repository"),
    ],
)
def test_manifests_of_the_right_digest_and_the_wrong_form(
    clip: Clip, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    content, digest = forged(clip, change)
    with pytest.raises(CorruptData, match=message):
        from_files(content, digest, clip.files.__getitem__)


# Opening


def test_an_architecture_with_a_checkpoint(folder: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights by the name of an architecture are the same CLIP; open_clip's own are too large to try here."""
    monkeypatch.setattr(open_clip, "get_model_config", {"tiny": CONFIG}.get)
    opened = open_clip_model(f"tiny@{folder / CHECKPOINT}")
    assert (opened.name, opened.digest) == ("tiny", clip.digest)
    with pytest.raises(InvalidInput, match="there is no CLIP 'small@"):
        open_clip_model(f"small@{folder / CHECKPOINT}")
    with pytest.raises(InvalidInput, match="there is no CLIP 'tiny@"):
        open_clip_model("tiny@nowhere.safetensors")


def test_real_architectures_are_known(folder: Path) -> None:
    with pytest.raises(InvalidInput, match=r"open_clip_model\.safetensors do not fit the architecture of CLIP 'RN50'"):
        open_clip_model(f"RN50@{folder / CHECKPOINT}")
    for unknown in ("x", "RN50", "RN51@laion", "no/folder"):
        with pytest.raises(InvalidInput, match="give a folder"):
            open_clip_model(unknown)


class Code:
    """What no file of weights should hold."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._mark),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    place = written(
        tmp_path / "a",
        {"state_dict": Code(tmp_path / "ran")},  # type: ignore[dict-item]
        name="open_clip_pytorch_model.bin",
    )
    with pytest.raises(InvalidInput, match=r"open_clip_pytorch_model\.bin"):
        open_clip_model(place)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "config",
    [
        [],
        None,
        "text",
        {},
        {"model_cfg": None},
        {"model_cfg": []},
        {"model_cfg": {}},
        {"model_cfg": {**CONFIG, "strange": 1}},
        {"model_cfg": {**CONFIG, "embed_dim": 8}},
        {"model_cfg": {**CONFIG, "embed_dim": "wide"}},
        {"model_cfg": {**CONFIG, "text_cfg": None}},
        {"model_cfg": {**CONFIG, "vision_cfg": {"timm_model_name": "no_such", "image_size": 16}}},
        {"model_cfg": CONFIG, "preprocess_cfg": {"strange": 1}},
        {"model_cfg": CONFIG, "preprocess_cfg": [1]},
        {"model_cfg": CONFIG, "preprocess_cfg": 3},
        {"model_cfg": CONFIG, "preprocess_cfg": {"mean": "grey"}},
        {"model_cfg": CONFIG, "preprocess_cfg": {"std": [0, 0, 0]}},
        {"model_cfg": CONFIG, "preprocess_cfg": {"interpolation": "strange"}},
        {"model_cfg": CONFIG, "preprocess_cfg": {"resize_mode": "strange"}},
        {"model_cfg": CONFIG, "preprocess_cfg": {"mode": "L"}},
    ],
    ids=json.dumps,
)
def test_strange_configurations_are_refused(config: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "odd")
    (tmp_path / "odd" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="odd") as caught:
        open_clip_model(str(tmp_path / "odd"))
    assert str(tmp_path) not in caught.value.message


def test_what_says_nothing_of_preprocessing_or_towers_is_open_clips_own(
    folder: Path, clip: Clip, tmp_path: Path
) -> None:
    for name, view in (("a", None), ("b", {})):
        place = written(tmp_path / name, state(folder), {"model_cfg": CONFIG, "preprocess_cfg": view})
        assert open_clip_model(place).digest == clip.digest
    bare = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "timm_model_name": None}}  # type: ignore[dict-item]
    assert open_clip_model(written(tmp_path / "c", state(folder), {"model_cfg": bare})).portable


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (CHECKPOINT, None),
        (CHECKPOINT, b"no weights"),
        ("open_clip_config.json", None),
        ("open_clip_config.json", b"{"),
        ("open_clip_config.json", b"\xff\xfe"),
        (MERGES, b"no gzip"),
    ],
)
def test_damaged_folders_are_refused(file: str, content: bytes | None, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "odd")
    (tmp_path / "odd" / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / "odd" / file).write_bytes(content)
    with pytest.raises(InvalidInput, match=r"odd|weights"):
        open_clip_model(str(tmp_path / "odd"))


def test_a_tokenizer_from_elsewhere_is_refused_where_it_cannot_be_had(folder: Path, tmp_path: Path) -> None:
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "hf_tokenizer_name": "x/y"}}  # type: ignore[dict-item]
    place = written(tmp_path / "a", state(folder), {"model_cfg": config})
    with pytest.raises(UnsupportedOption, match="take a CLIP with open_clip's own tokenizer"):
        open_clip_model(place)


def test_only_what_is_all_in_its_files_is_portable(clip: Clip) -> None:
    assert clip.portable
    text, vision = CONFIG["text_cfg"], CONFIG["vision_cfg"]
    assert isinstance(text, dict)
    assert isinstance(vision, dict)
    for change in (
        {"text_cfg": {**text, "hf_tokenizer_name": "x"}},
        {"text_cfg": {**text, "hf_model_name": "x"}},
        {"vision_cfg": {**vision, "timm_model_name": "hf-hub:x/y"}},
    ):
        assert not replace(clip, model_cfg={**CONFIG, **change}).portable
    assert replace(clip, model_cfg={**CONFIG, "vision_cfg": {**vision, "timm_model_name": "resnet18"}}).portable
