"""What the command prints: on terminals of any width, into pipes, as JSON, and whatever a label may hold."""

from __future__ import annotations

import errno
import json
import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import whence
from tests.clients.test_client import BANK, CONCEPT, HELD, MODEL
from whence._cli.failures import line, printable
from whence.testing import FakeServer

COMMAND = str(Path(sys.executable).parent / "whence")


@pytest.fixture
def environment(server: FakeServer) -> dict[str, str]:
    """What the command needs to ask the fake service."""
    server.models, server.banks, server.concepts = {"fake": MODEL}, {BANK: HELD}, {(BANK, 7): CONCEPT}
    hidden = ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM")
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**inherited, "WHENCE_ADDRESS": server.address, "TERM": "xterm-256color"}


def on_a_terminal(environment: dict[str, str], columns: int, *arguments: str) -> str:
    """What the command prints on a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [COMMAND, *arguments], env={**environment, "COLUMNS": str(columns)}, stdout=theirs, stdin=subprocess.DEVNULL
    ) as process:
        os.close(theirs)
        printed = b""
        while chunk := _read(ours):
            printed += chunk
    os.close(ours)
    assert process.returncode == 0
    return printed.decode().replace("\r\n", "\n")


def into_a_pipe(environment: dict[str, str], *arguments: str) -> str:
    """What the command prints into a pipe."""
    return subprocess.run([COMMAND, *arguments], env=environment, capture_output=True, text=True, check=True).stdout


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError as exc:  # how Linux tells of a terminal that nobody writes to any more
        if exc.errno == errno.EIO:
            return b""
        raise


def test_a_pipe_gets_one_line_a_row_without_colours(environment: dict[str, str], server: FakeServer) -> None:
    long = f"fake/{'layer' * 60}/bank"
    server.banks = {name: replace(HELD, reference=name) for name in (BANK, long)}
    printed = into_a_pipe({**environment, "COLUMNS": "40"}, "banks")
    assert "\x1b" not in printed
    assert [len(line.split("│")) for line in printed.splitlines() if "fake/" in line] == [8, 8]
    assert long in printed
    assert "2026-01-01T00:00:00Z" in printed
    assert "eeeeeeeeeeee" in printed


def test_a_wide_terminal_gets_a_table(environment: dict[str, str]) -> None:
    printed = on_a_terminal(environment, 120, "banks")
    assert "│" in printed
    assert BANK in printed


@pytest.mark.parametrize("columns", [10, 40])
def test_a_narrow_terminal_cuts_no_word(columns: int, environment: dict[str, str]) -> None:
    printed = on_a_terminal(environment, columns, "banks")
    assert printed.splitlines() == [
        f"bank: {BANK}",
        "kind: nmf",
        "concepts: 20",
        "created: 2026-01-01T00:00:00Z",
        "digest: eeeeeeeeeeee",
        "",
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï 雪 👩‍🔬", "plain ünï 雪 👩‍🔬"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("two\nlines\t", "two\\nlines\\t"),
        ("\u202eabc", "\\u202eabc"),
        ("name\udcff", "name\\udcff"),
        ("\x9b31m", "\\x9b31m"),
    ],
)
def test_a_label_does_nothing_to_a_terminal(
    text: str, shown: str, environment: dict[str, str], server: FakeServer
) -> None:
    assert printable(text) == shown
    if "\udcff" in text:
        return  # no label on the wire
    server.concepts = {(BANK, 7): replace(CONCEPT, label=text, exemplars=())}
    printed = on_a_terminal(environment, 120, "concept", BANK, "7")
    assert f"{shown} #7" in printed
    assert text == shown or text not in printed
    printed = on_a_terminal(environment, 120, "concept", BANK, "7", "--json")
    assert json.loads(printed)["label"] == text
    assert text == shown or text not in printed


def test_names_that_are_no_text_and_streams_that_know_no_unicode(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [COMMAND, "explain", b"no\xffwhere\xc3\xa9.jpg", "--bank", BANK],
        env={**environment, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("whence: Cannot read no\\udcffwhere\\xe9.jpg: No such file")


def test_json_stays_json_where_no_unicode_is_known(environment: dict[str, str], server: FakeServer) -> None:
    server.concepts = {(BANK, 7): replace(CONCEPT, label="café 🐈", exemplars=())}
    printed = into_a_pipe({**environment, "PYTHONIOENCODING": "ascii"}, "concept", BANK, "7", "--json")
    assert printed.isascii()
    assert json.loads(printed)["label"] == "café 🐈"


def test_a_failure_does_nothing_to_a_terminal() -> None:
    error = whence.InternalError("\x1b[31mred", request_id="\x9b2J")
    assert line(error, as_json=False) == "whence: \\x1b[31mred (request \\x9b2J)"


def test_who_reads_no_further_sees_no_failure(environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-c", f"'{COMMAND}' models --json | true"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["concept", BANK, "8"], 3, {"code": "NOT_FOUND", "reason": "UNKNOWN_CONCEPT", "retryable": False}),
        (["explain"], 2, {"code": "INVALID_ARGUMENT", "reason": "USAGE", "retryable": False, "request_id": ""}),
        (["fly"], 2, {"message": "No such command 'fly'. See whence --help."}),
        (["models", "--address", "localhost:1", "--timeout", "1"], 4, {"code": "UNAVAILABLE", "retryable": True}),
    ],
)
def test_failures_are_json_where_that_is_asked_for(
    arguments: list[str], code: int, expected: dict[str, object], environment: dict[str, str]
) -> None:
    done = subprocess.run([COMMAND, *arguments, "--json"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    error = json.loads(done.stderr)["error"]
    assert set(error) == {"code", "reason", "message", "request_id", "retryable"}
    assert error.items() >= expected.items()
    if code == 3:
        assert len(error["request_id"]) == 32


@pytest.mark.parametrize(("arguments", "says"), [([], "Usage: whence"), (["--version"], whence.__version__)])
def test_without_a_command(arguments: list[str], says: str, environment: dict[str, str]) -> None:
    assert says in into_a_pipe(environment, *arguments)


def test_every_command_documents_its_exit_codes(environment: dict[str, str]) -> None:
    for command in ("explain", "banks", "config"):
        assert "Exit codes: 0 done" in into_a_pipe(environment, command, "--help")
