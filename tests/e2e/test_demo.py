"""What a newcomer does: run the demo, then follow the README to the letter."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import whence
from concepts.repository import Repository
from demo.serving import serving
from tests.e2e.conftest import ROOT

MARK = "STARTED_BY_THE_DEMO_IN"
README = (ROOT / "README.md").read_text()

pytestmark = pytest.mark.timeout(900)  # a demo takes minutes where others use the machine, too


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a fresh clone in which a small demo was run."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("deploy", "demo"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    for command in ("whence", "whence-bank", "whence-serve"):
        (folder / ".venv" / "bin" / command).symlink_to(Path(sys.executable).parent / command)
    small = ["--training-images", "420", "--held-out-images", "70"]
    demo = [sys.executable, "-m", "demo.run", "--out", str(folder / "out" / "demo"), *small]
    marked = {**os.environ, MARK: str(folder)}
    done = subprocess.run(demo, cwd=ROOT, env=marked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    images = sorted((folder / "out" / "demo" / "images" / "heldout").glob("*/*.png"))
    (folder / "photo.png").write_bytes(images[0].read_bytes())
    return folder


@pytest.fixture(scope="module")
def address(clone: Path) -> Iterator[str]:
    """The demo's banks, served with the settings of the README."""
    config = ROOT / "deploy" / "serve.yaml"
    with serving(clone / "out" / "demo" / "repository", config) as server:
        yield server.address


def test_the_demo_shows_pictures_and_a_page(clone: Path) -> None:
    demo = clone / "out" / "demo"
    page = (demo / "index.html").read_text()
    pictures = set(re.findall(r'src="([^"]+\.png)"', page))
    assert len(pictures) == 37
    for name in pictures:
        with Image.open(demo / name) as picture:
            assert min(picture.size) > 400
    assert page.count("data:image/webp") > 100
    assert page.count("top-1 agreement") == 5  # groups of features do not reconstruct
    assert page.count("best-match AUROC") == 6
    assert "Found by words" in page
    assert "40 parts at stage1" in page
    assert "can be negative" in page  # why there is no NMF bank of the B-cos model
    assert "why bricks-triangle and not bricks-cross?" in page
    assert (demo / "audit" / "report.html").stat().st_size > 10_000
    banks = [version.reference for version in Repository(demo / "repository").banks()]
    learned = ["bcos/stage3/channels", "bcos/stage3/sae", "cnn/stage3/contrast", "cnn/stage3/craft", "cnn/stage3/parts"]
    learned += ["cnn/stage3/subspace", "vit/encoder.layers.relu/craft"]
    assert banks == learned


def test_the_demo_leaves_nothing_running(clone: Path) -> None:
    # Every process that it started inherited the mark.
    mark = f"{MARK}={clone}".encode()
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                left.append((process / "cmdline").read_text())
    assert left == []


def test_concepts_are_explained_and_found_by_words(clone: Path, address: str) -> None:
    images = sorted((clone / "out" / "demo" / "images" / "heldout").glob("night-*/*.png"))
    with whence.Client(address) as client:
        found = client.search("sticker", limit=3)
        assert [one.concept.label for one in found] == ["sticker"] * 3
        assert [bank.reference for bank in found.unsearched] == ["bcos/stage3/channels"]
        best = client.concept(found[0].bank, found[0].concept.id)
        assert best.naming is not None
        assert best.naming.words[0].text == "sticker"
        assert best.counterfactuals
        groups = [concept for image in images for concept in client.explain(image, bank="cnn/stage3/subspace").concepts]
    assert groups
    assert all(group.label == group.words[0] for group in groups)
    assert "night" in {group.label for group in groups}


def test_the_python_of_the_readme_runs(
    clone: Path, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(clone)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block.replace("localhost:9000", address), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "bricks-cross"
    assert sum(line.endswith("(16, 16)") for line in lines) == 8
    with Image.open(clone / "why.png") as picture:
        assert min(picture.size) > 400
    (clone / "why.png").unlink()


def test_the_commands_of_the_readme_run(clone: Path, address: str) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line for line in lines if line.startswith(".venv/bin/") and "whence-serve" not in line]
    assert len(commands) == 23
    for line in commands:
        done = subprocess.run(
            shlex.split(line),
            cwd=clone,
            env={**os.environ, "WHENCE_ADDRESS": address},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    for picture in ("why.png", "parts.png", "contrast.png", "mine.png", "colours.png"):
        assert (clone / picture).stat().st_size > 10_000
    assert whence.read_batch(clone / "out" / "batch").num_rows == 70
    assert "cnn/stage3/craft" in (clone / "report.html").read_text()


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)\b", README)) - {"help"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
