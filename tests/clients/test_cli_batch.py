"""The command for whole buckets: what it prints, how it ends, and how it is stopped."""

from __future__ import annotations

import inspect
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich import progress
from rich.console import Console
from typer.testing import CliRunner, Result

import whence
from tests.clients.test_client import BANK, HELD, MODEL
from whence._batch.records import Progress
from whence._cli import app as commands
from whence._cli import batch, batch_progress
from whence.testing import FakeServer, make_explanation

COMMAND = str(Path(sys.executable).parent / "whence")
IMAGES = 20


@pytest.fixture
def held(server: FakeServer) -> FakeServer:
    server.models, server.banks = {"fake": MODEL}, {BANK: HELD}
    return server


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of images, one of them broken."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(IMAGES):
        (folder / f"image {number}.jpg").write_bytes(b"image %d" % number)
    (folder / "empty.jpg").touch()
    return folder


@pytest.fixture
def run(held: FakeServer, source: Path, tmp_path: Path) -> Callable[..., Result]:
    """Run a batch of the folder."""

    def invoke(*arguments: str, source: str = str(source)) -> Result:
        environment = {"WHENCE_ADDRESS": held.address}
        whole = ["batch", source, str(tmp_path / "out"), "--bank", BANK, *arguments]
        return CliRunner().invoke(commands.app, whole, env=environment)

    return invoke


def test_a_folder_is_explained(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run()
    assert done.exit_code == 0, done.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    for row in (
        ["bank", f"{BANK}@eeeeeeeeeeee"],
        ["explained", "20"],
        ["failed", "1"],
        ["INVALID_IMAGE", "1"],
        ["chunks done", "2 of 2"],
    ):
        assert row in rows
    assert done.stderr.splitlines()[-1].startswith("21 of 21, ")
    assert len(whence.read_batch(tmp_path / "out")) == IMAGES


def test_again_there_is_nothing_to_do(run: Callable[..., Result], held: FakeServer) -> None:
    run()
    asked = len(held.calls)
    summary = json.loads(run("--json").stdout)
    assert (summary["explained"], summary["failed"], summary["finished_now"]) == (IMAGES, 1, 0)
    assert not [call for call in held.calls[asked:] if call.method == "Explain"]


def test_a_dry_run_only_counts(run: Callable[..., Result], held: FakeServer, tmp_path: Path) -> None:
    done = run("--dry-run")
    assert done.exit_code == 0, done.output
    for part in ("counted only", "left to do", "21, 0.0 MB", "0 of 2"):
        assert part in done.stdout
    assert not [call for call in held.calls if call.method == "Explain"]
    assert not list(tmp_path.glob("out/*/*"))


def test_every_option_is_passed_on(run: Callable[..., Result], held: FakeServer, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("".join(f"image {number}.jpg\n" for number in range(12)))
    options = ["--target", "tabby", "--top-k", "2", "--order", "activation", "--estimator", "integrated"]
    options += ["--maps", "contribution", "--map-size", "image", "--no-substitute", "--concepts", "all"]
    options += [
        "--keys",
        str(keys),
        "--include",
        "*.jpg",
        "--exclude",
        "image 1*",
        "--chunk-size",
        "4",
        "--shard",
        "2/3",
    ]
    done = run(*options, "--patience", "60", "--token", "secret", "--json")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert (summary["objects"], summary["chunks"], summary["chunks_done"]) == (9, 3, 1)
    call = next(call for call in held.calls if call.method == "Explain")
    sent = call.request.options
    assert (sent.top_k, sent.order, sent.estimator, list(sent.maps), sent.map_size, sent.concepts) == (
        2,
        2,
        2,
        [2],
        2,
        2,
    )
    assert sent.HasField("substitute")
    assert (call.request.target.name, call.request.priority) == ("tabby", 2)
    assert call.metadata["authorization"] == "Bearer secret"
    run(*options, "--shard", "1/3", "--json")
    assert len(whence.read_batch(tmp_path / "out", "maps")) == 2 * 8


def test_it_offers_what_the_sdk_does() -> None:
    theirs = set(inspect.signature(whence.explain_batch).parameters) - {"progress"}
    ours = set(inspect.signature(batch.run).parameters) - {"strict", "json"}
    connection = {"token_file", "ca", "certificate", "key", "server_name"}
    assert ours - connection == theirs


@pytest.mark.parametrize(
    ("options", "good", "code"),
    [([], True, 0), (["--strict"], True, 7), ([], False, 7), (["--dry-run", "--strict"], False, 0)],
)
def test_how_it_ends_where_images_fail(
    options: list[str], good: bool, code: int, run: Callable[..., Result], held: FakeServer
) -> None:
    def refuse(request: object) -> whence.Explanation:
        raise whence.InvalidArgument("no image", reason="INVALID_IMAGE")

    if not good:
        held.explain = refuse
    assert run(*options).exit_code == code


@pytest.mark.parametrize(
    ("text", "index", "share"),
    [("1/8", None, (1, 8)), ("/8", "0", (1, 8)), ("/8", "7", (8, 8)), (None, "3", (1, 1))],
)
def test_shares(text: str | None, index: str | None, share: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    if index is not None:
        monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
    assert batch._share(text) == share


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("2", "such as 1/8"),
        ("a/b", "not 'a/b'"),
        ("/8", "JOB_COMPLETION_INDEX, which is not set"),
        ("9/8", ""),
        ("0/8", ""),
    ],
)
def test_bad_shares(text: str, says: str, run: Callable[..., Result]) -> None:
    done = run("--shard", text)
    assert isinstance(done.exception, whence.InvalidArgument)
    assert says in done.exception.message


def test_shares_come_from_the_environment(held: FakeServer, source: Path, tmp_path: Path) -> None:
    arguments = ["batch", str(source), str(tmp_path / "out"), "--bank", BANK, "--chunk-size", "7", "--json"]
    for index in ("0", "1", "2"):
        environment = {"WHENCE_ADDRESS": held.address, "WHENCE_SHARD": "/3", "JOB_COMPLETION_INDEX": index}
        done = CliRunner().invoke(commands.app, arguments, env=environment)
        assert json.loads(done.stdout)["finished_now"] == 7
    assert json.loads(done.stdout)["chunks_done"] == 3


def test_ctrl_c_stops_and_says_how_to_go_on(held: FakeServer, source: Path, tmp_path: Path) -> None:
    held.explain = lambda request: (time.sleep(0.2), make_explanation())[1]
    environment = {**os.environ, "WHENCE_ADDRESS": held.address}
    arguments = [COMMAND, "batch", str(source), str(tmp_path / "out"), "--bank", BANK, "--json"]
    process = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not any(call.method == "Explain" for call in held.calls):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert json.loads(err.splitlines()[-1])["error"]["reason"] == "INTERRUPTED"
    held.explain = lambda request: make_explanation()
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["explained"] == IMAGES


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["batch"], "batch [OPTIONS] COMMAND"),
        (["batch", "--help"], "whence batch report"),
        (["batch", "run", "--help"], "--chunk-size"),
        (["batch", "report", "--help"], "--no-pictures"),
    ],
)
def test_help(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(commands.app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 0
    assert says in done.output


def test_options_may_come_first_and_folders_be_called_as_commands(
    held: FakeServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source.rename("report")
    arguments = ["batch", "--bank", BANK, "./report", "out", "--json"]
    done = CliRunner().invoke(commands.app, arguments, env={"WHENCE_ADDRESS": held.address})
    assert json.loads(done.stdout)["explained"] == IMAGES


def test_how_far_it_is_in_a_line() -> None:
    now = Progress(2000, 1000, 3, 8, 16, 52.25, 19.1)
    says = "1,000 of 2,000, 52.2 a second, 0:00:19 left, 3 failed, 8 of 16 in flight"
    assert batch_progress.described(now) == says
    assert batch_progress.described(Progress(5, 5, 0, 0, 4, 10.0, 0.0)) == "5 of 5, 10.0 a second"


def test_lines_come_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(batch_progress.time, "monotonic", lambda: now_s)
    show = batch_progress.Lines()
    for finished in range(5):
        show(Progress(5, finished, 0, 1, 1, 1.0, None))
        now_s += 6
    for _ in range(2):
        show(Progress(5, 5, 0, 0, 1, 1.0, 0.0, "the service is \x1b away"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["0", "2", "4", "5"]
    assert lines[-1].endswith(", waiting: the service is \\x1b away")


def test_a_bar_says_once_why_nothing_goes_on() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress.Progress(console=console) as drawn:
        show = batch_progress.Bar(drawn)
        for waiting in ("", "the service is away", "the service is away", "", "the store is away"):
            show(Progress(5, 2, 0, 1, 1, 1.0, None, waiting))
        assert (drawn.tasks[0].completed, drawn.tasks[0].total) == (2, 5)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert (printed.count("service is away"), printed.count("store is away")) == (1, 1)
