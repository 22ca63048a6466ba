"""Completion by the shell: of commands and options, and of names that the service knows."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.clients.test_client import BANK, HELD, MODEL
from whence.testing import FakeServer

COMMAND = str(Path(sys.executable).parent / "whence")
OTHER = "other/layer/bank"


@pytest.fixture
def held(server: FakeServer) -> FakeServer:
    server.models = {"fake": MODEL, "other": replace(MODEL, name="other", class_names=("tabby", "lynx"))}
    server.banks = {BANK: HELD, OTHER: replace(HELD, reference=OTHER, model="other")}
    return server


def completed(line: str, **environment: str) -> list[str]:
    """What bash would offer for the last word of a line."""
    words = line.split(" ")
    asked = {"_WHENCE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [COMMAND], env={**os.environ, **asked, **environment}, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return [name for name in done.stdout.splitlines() if name]


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("whence explain x.jpg --bank ", [BANK, OTHER]),
        ("whence explain x.jpg --bank fa", [BANK]),
        ("whence concept o", [OTHER]),
        ("whence banks --model ", ["fake", "other"]),
        (f"whence explain x.jpg --bank {OTHER}@eeee --target ", ["tabby", "lynx"]),
        ("whence explain x.jpg --target t", ["tabby", r"tiger\ cat"]),
        (f"whence intervene x.jpg --bank {BANK} --target ti", [r"tiger\ cat"]),
        ("whence search ear --bank other", [OTHER]),
        ("whence mod", ["models"]),
        ("whence models --jso", ["--json"]),
    ],
)
def test_names_are_completed(line: str, names: list[str], held: FakeServer) -> None:
    assert completed(line, WHENCE_ADDRESS=held.address) == names


def test_names_that_a_terminal_would_obey_are_not_offered(held: FakeServer) -> None:
    held.banks = {name: replace(HELD, reference=name) for name in (BANK, f"{BANK}\x1b[2J")}
    assert completed("whence explain x.jpg --bank fa", WHENCE_ADDRESS=held.address) == [BANK]


def test_the_line_and_the_settings_say_where_to_ask(held: FakeServer, tmp_path: Path) -> None:
    line = f"whence explain x.jpg --address {held.address} --token secret --bank fa"
    assert completed(line, WHENCE_ADDRESS="localhost:1") == [BANK]
    assert held.calls[-1].metadata["authorization"] == "Bearer secret"
    file = tmp_path / "config.toml"
    file.write_text(f'address = "{held.address}"\ntoken = "exposed"')
    file.chmod(0o644)  # which other commands would warn of
    assert completed("whence explain x.jpg --bank fa", WHENCE_CONFIG=str(file)) == [BANK]


@contextmanager
def silent() -> Iterator[str]:
    """An address that accepts connections and never answers."""
    with socket.create_server(("localhost", 0)) as listener:
        yield f"localhost:{listener.getsockname()[1]}"


def test_nothing_is_offered_where_the_service_cannot_be_asked(tmp_path: Path) -> None:
    line = "whence explain x.jpg --bank "
    assert completed(line, WHENCE_ADDRESS="localhost:1") == []
    assert completed(line, WHENCE_ADDRESS="http://wrong") == []
    assert completed(line, WHENCE_CONFIG=str(tmp_path / "none.toml")) == []
    with silent() as address:
        assert completed(line, WHENCE_ADDRESS=address) == []


def test_completion_is_installed(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        [COMMAND, "--install-completion", "bash"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (script,) = (path for path in tmp_path.rglob("*.sh"))
    assert "_WHENCE_COMPLETE" in script.read_text()
