"""The command: tables, JSON, pictures, and one line with a documented exit code where it fails."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import whence
from tests.clients.test_client import BANK, CONCEPT, HELD, MODEL, write_identity
from tests.data import real_data
from whence import cli
from whence._cli import app as commands
from whence._cli.failures import EXIT_CODES, INTERRUPTED, NOT_EXPLAINED
from whence.testing import FakeServer, make_contrast, make_explanation

Run = Callable[..., Result]
README = Path(whence.__file__).parents[1] / "README.md"


@pytest.fixture
def photo() -> str:
    return str(real_data() / "photos" / "n01614925_bald_eagle.JPEG")


@pytest.fixture
def run(server: FakeServer) -> Run:
    """Run a command against the fake service."""
    server.models, server.banks, server.concepts = {"fake": MODEL}, {BANK: HELD}, {(BANK, 7): CONCEPT}

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(commands.app, arguments, env={"WHENCE_ADDRESS": server.address, "COLUMNS": "120"})

    return invoke


@pytest.fixture
def main(server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., int]:
    """Run the whole command, and give its exit code."""
    monkeypatch.setenv("WHENCE_ADDRESS", server.address)

    def invoke(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["whence", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0)

    return invoke


def test_explain_prints_a_table(run: Run, photo: str, server: FakeServer) -> None:
    done = run("explain", photo, "--bank", BANK)
    assert done.exit_code == 0, done.output
    for part in ("75.0%", "tabby", "pointed ear", "all other concepts", "unexplained", "Exact", "same class"):
        assert part in done.output
    assert not server.calls[0].request.options.maps  # no maps are fetched that nobody sees


def test_explain_passes_every_option_on(run: Run, photo: str, server: FakeServer) -> None:
    options = ["--target", "tabby", "--top-k", "2", "--order", "activation", "--estimator", "integrated"]
    options += ["--maps", "contribution", "--maps", "activation", "--map-size", "image", "--no-substitute"]
    done = run("explain", photo, "--bank", BANK, *options, "--token", "secret", "--json")
    assert done.exit_code == 0, done.output
    (call,) = server.calls
    sent = call.request.options
    assert (sent.top_k, sent.order, sent.estimator, list(sent.maps), sent.map_size) == (2, 2, 2, [2, 1], 2)
    assert sent.HasField("substitute")
    assert call.request.target.name == "tabby"
    assert call.metadata["authorization"] == "Bearer secret"
    answer = json.loads(done.stdout)
    assert [concept["id"] for concept in answer["concepts"]] == [0, 7]
    assert set(answer["concepts"][0]["maps"]) == {"activation", "contribution"}
    assert not sent.colours
    run("explain", photo, "--bank", BANK, "--maps", "input", "--input-method", "integrated", "--concepts", "all")
    sent = server.calls.pop().request.options
    assert (sent.input_method, sent.concepts) == (3, 2)
    run("explain", photo, "--bank", BANK, "--priority", "background")
    assert server.calls.pop().request.priority == 2
    run("explain", photo, "--bank", BANK, "--target", "12")
    assert server.calls[1].request.target.index == 12


def test_explain_shows_input_maps_in_colours(run: Run, photo: str, server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "why.png"
    arguments = ("explain", photo, "--bank", BANK, "--maps", "input", "--colours")
    done = run(*arguments, "--save", str(path))
    assert done.exit_code == 0, done.output
    assert "Input maps: exact" in done.output
    assert server.calls[0].request.options.colours
    assert path.read_bytes().startswith(b"\x89PNG")
    answer = json.loads(run(*arguments, "--top-k", "1", "--json").stdout)
    assert np.shape(answer["concepts"][0]["maps"]["input"]["colours"]) == (28, 28, 4)
    assert answer["faithfulness"]["input_maps"]["exactness"] == "exact"


def test_explain_says_whose_concepts_they_are(run: Run, photo: str, server: FakeServer) -> None:
    record = make_explanation(scope="all")
    concepts = tuple(replace(c, class_index=7, class_name=f"owner {c.id}") for c in record.concepts)
    server.explain = lambda request: replace(record, concepts=concepts)
    done = run("explain", photo, "--bank", BANK, "--concepts", "all")
    assert done.exit_code == 0, done.output
    for text in ("class", "owner 0", "owner 28", "Concepts of all classes explain"):
        assert text in done.output
    server.explain = lambda request: make_explanation()
    assert "class" not in run("explain", photo, "--bank", BANK).output.replace("same class", "")


def test_explain_says_which_logit_is_explained(run: Run, photo: str, server: FakeServer) -> None:
    explanation = make_explanation()
    report = replace(explanation.faithfulness, explained_logit=3.21)
    target = replace(explanation.target, logit=3.18)
    server.explain = lambda request: replace(explanation, substitute=True, target=target, faithfulness=report)
    done = run("explain", photo, "--bank", BANK)
    assert "explained logit 3.21 of the reconstruction (the model's own: 3.18)" in done.output
    assert "Left over of the explained logit 3.21" in done.output


def test_explain_saves_a_picture(run: Run, photo: str, tmp_path: Path) -> None:
    done = run("explain", photo, "--bank", BANK, "--save", str(tmp_path / "why.png"))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")


def test_contrast_prints_tables(run: Run, photo: str, server: FakeServer) -> None:
    done = run("contrast", photo, "--bank", BANK)
    assert done.exit_code == 0, done.output
    made = make_contrast()
    sums = (f"{made.contribution_for_target:+.4g}", f"{made.contribution_for_other:+.4g}")
    expected = ("why tabby rather than tiger cat", f"{BANK}@bbbb", "91.9%", "striped fur", "share", *sums)
    for part in (*expected, *made.describe().splitlines()):
        assert part in done.output
    (call,) = server.calls
    assert not call.request.options.maps  # no maps are fetched that nobody sees
    assert {"target", "other"}.isdisjoint(field.name for field, _ in call.request.ListFields())
    server.contrast = lambda request: make_contrast(prototype_count=0)
    assert "prototype" not in run("contrast", photo, "--bank", BANK).output


def test_contrast_passes_every_option_on(run: Run, photo: str, server: FakeServer) -> None:
    options = ["--top-k", "2", "--order", "activation", "--maps", "contribution", "--map-size", "image", "--no-shift"]
    done = run("contrast", photo, "--bank", BANK, "--classes", "tabby", "12", *options, "--token", "secret", "--json")
    assert done.exit_code == 0, done.output
    (call,) = server.calls
    sent = call.request.options
    assert (sent.top_k, sent.order, list(sent.maps), sent.map_size) == (2, 2, [2], 2)
    assert (call.request.target.name, call.request.other.index, call.request.without_shift) == ("tabby", 12, True)
    assert call.metadata["authorization"] == "Bearer secret"
    answer = json.loads(done.stdout)
    assert set(answer) == set(whence.Contrast.__slots__) - {"image"}
    assert (len(answer["concepts"]), list(answer["maps"]), answer["shift_curve"]) == (2, ["contribution"], [])
    run("contrast", photo, "--bank", BANK, "--other", "tiger cat")
    run("contrast", photo, "--bank", BANK, "--target", "3")
    alone, named = (call.request for call in server.calls[1:])
    assert (alone.HasField("target"), alone.other.name) == (False, "tiger cat")
    assert (named.target.index, named.HasField("other")) == (3, False)


def test_contrast_saves_a_picture(run: Run, photo: str, server: FakeServer, tmp_path: Path) -> None:
    done = run("contrast", photo, "--bank", BANK, "--save", str(tmp_path / "why.png"))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")
    assert list(server.calls[0].request.options.maps) == [1, 2]


def test_a_contrastive_prototype_names_both_classes(run: Run, server: FakeServer) -> None:
    server.concepts = {(BANK, 7): replace(CONCEPT, other_index=5, other_name="lynx")}
    assert "class tabby, against lynx" in run("concept", BANK, "7").output
    server.concepts = {(BANK, 7): replace(CONCEPT, other_index=5)}
    assert "class tabby, against 5" in run("concept", BANK, "7").output
    server.concepts = {(BANK, 7): CONCEPT}
    assert "against" not in run("concept", BANK, "7").output


def test_intervene_prints_a_table(run: Run, photo: str, server: FakeServer) -> None:
    done = run("intervene", photo, "--bank", BANK, "--scale", "12=0", "--scale", "7=2.5")
    assert done.exit_code == 0, done.output
    for part in ("concept 12 × 0", "in place of tabby", "75.0%", "25.0%", "tiger cat", "logit after", f"{BANK}@bbbb"):
        assert part in done.output
    assert dict(server.calls[0].request.scales) == {12: 0.0, 7: 2.5}


def test_intervene_passes_every_option_on(run: Run, photo: str, server: FakeServer) -> None:
    arguments = ("intervene", photo, "--bank", BANK, "--scale", "12=-1e-1", "--token", "secret", "--json")
    done = run(*arguments, "--target", "tabby")
    assert done.exit_code == 0, done.output
    (call,) = server.calls
    assert dict(call.request.scales) == {12: pytest.approx(-0.1)}
    assert call.request.target.name == "tabby"
    assert call.metadata["authorization"] == "Bearer secret"
    answer = json.loads(done.stdout)
    assert set(answer) == set(whence.Intervention.__slots__)
    assert answer["scales"] == {"12": -0.1}
    assert [score["name"] for score in answer["after"]] == ["tiger cat", "tabby"]
    run(*arguments, "--target", "12", "--concepts", "all")
    assert server.calls[1].request.target.index == 12
    assert server.calls[1].request.concepts == 2


@pytest.mark.parametrize(
    ("scales", "says"),
    [
        (["--scale", "12"], "ID=FACTOR"),
        (["--scale", "ear=0"], "ID=FACTOR"),
        (["--scale", "12=none"], "not '12=none'"),
        (["--scale", "12=nan"], "finite"),
        (["--scale", "-3=0"], "between 0"),
        (["--scale", "12=0", "--scale", "12=1"], "concept 12 twice"),
        ([], "--scale"),
    ],
)
def test_bad_scales(
    scales: list[str],
    says: str,
    main: Callable[..., int],
    photo: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main("intervene", photo, "--bank", BANK, *scales) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "shows", "first"),
    [
        (("models",), "torchvision:resnet50", "fake"),
        (("banks",), BANK, BANK),
        (("banks", "--model", "fake"), BANK, BANK),
    ],
)
def test_lists(arguments: tuple[str, ...], shows: str, first: str, run: Run) -> None:
    done = run(*arguments)
    assert done.exit_code == 0
    assert shows in done.output
    (record,) = json.loads(run(*arguments, "--json").stdout)
    assert first in record.values()


def test_info(run: Run, server: FakeServer) -> None:
    done = run("info")
    assert done.exit_code == 0, done.output
    assert isinstance(server.server_info, whence.ServerInfo)
    limits = server.server_info.limits
    for part in (
        f"version {server.server_info.version}",
        f"{limits.request_bytes:,} bytes",
        f"{limits.deadline_s:g} s",
    ):
        assert part in done.output
    answer = json.loads(run("info", "--json").stdout)
    assert answer["limits"]["image_formats"] == list(limits.image_formats)


@pytest.mark.filterwarnings("default")
def test_an_old_server_is_a_warning_in_a_line(
    main: Callable[..., int], server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(server.server_info, whence.ServerInfo)
    server.server_info = replace(server.server_info, contract_revision=0)
    assert main("models", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == []
    assert re.fullmatch(r"whence: warning: .*\n", captured.err)


def test_concept(run: Run, tmp_path: Path) -> None:
    done = run("concept", BANK, "7", "--save", str(tmp_path / "crops"))
    assert done.exit_code == 0
    for part in ("ear #7", "tabby", "importance", "0.5", "2.jpg"):
        assert part in done.output
    assert [path.read_bytes() for path in sorted((tmp_path / "crops").iterdir())] == [b"webp"] * 3
    assert json.loads(run("concept", BANK, "7", "--json").stdout)["statistics"] == {"importance": 0.5}


def test_parts_are_listed_under_their_concept(run: Run, photo: str, server: FakeServer, tmp_path: Path) -> None:
    server.explain = lambda request: make_explanation(part_count=2)
    plain, done = (run("explain", photo, "--bank", BANK, *more) for more in ((), ("--parts",)))
    assert "part 1000" not in plain.output
    lines = [line for line in done.output.splitlines() if "pointed ear" in line or "part 100" in line]
    assert ["pointed ear" in line for line in lines][:3] == [True, False, False]
    assert all("└ part" in line for line in lines[1:3])
    assert "Parts, at earlier, are a statement of their own" in done.output
    record = json.loads(run("explain", photo, "--bank", BANK, "--parts", "--json").stdout)
    assert [part["id"] for part in record["concepts"][0]["parts"]] == [1000, 1001]
    assert record["parts"]["layer"] == "earlier"
    assert server.calls[-1].request.options.parts


def test_a_concept_and_its_parts_in_one_picture(run: Run, server: FakeServer, tmp_path: Path) -> None:
    part = replace(CONCEPT, id=9, label="tuft", parent=7, layer="earlier")
    server.concepts |= {(BANK, 7): replace(CONCEPT, children=(9,)), (BANK, 9): part}
    done = run("concept", BANK, "7")
    assert done.exit_code == 0
    for word in ("tuft", "earlier"):
        assert word in done.output
    assert "part of concept #7, at earlier" in run("concept", BANK, "9").output


def test_labels_are_not_markup(run: Run, server: FakeServer) -> None:
    fields = {name: getattr(CONCEPT, name) for name in CONCEPT.__slots__}
    server.concepts = {(BANK, 7): whence.Concept(**{**fields, "label": "[red]ear[/]"})}
    assert "[red]ear[/]" in run("concept", BANK, "7").output


@pytest.mark.parametrize("error", sorted(EXIT_CODES, key=lambda cls: cls.__name__))
def test_every_failure_is_one_line_and_a_code(
    error: type[whence.WhenceError], main: Callable[..., int], server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    retry = 60.0 if error is whence.Overloaded else None
    server.fail_next(error("first line\nsecond line", retry_after_s=retry), times=9)
    expected = EXIT_CODES[error]
    assert main("models") == expected
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"whence: first line second line \(request [0-9a-f]{32}\)\n", captured.err)


def test_every_class_of_failure_has_a_code_and_every_code_is_documented() -> None:
    def below(cls: type[whence.WhenceError]) -> set[type[whence.WhenceError]]:
        return {cls}.union(*map(below, cls.__subclasses__()))

    assert set(EXIT_CODES) == below(whence.WhenceError)
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", README.read_text(), re.MULTILINE)}
    assert documented == {0, *EXIT_CODES.values(), NOT_EXPLAINED, INTERRUPTED}
    assert {int(code) for code in re.findall(r"(\d+) \w", commands.EPILOG)} == documented


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("explain", "/nowhere.jpg", "--bank", "b"), 2, "Cannot read /nowhere.jpg"),
        (("explain", "{photo}", "--bank", "b", "--maps", "heat"), 2, "'contribution'"),
        (("explain", "{photo}", "--bank", "b", "--colours"), 2, "maps='input'"),
        (("explain", "{photo}", "--bank", "b", "--input-method", "smoothgrad"), 2, "maps='input'"),
        (("explain", "{photo}", "--bank", "b", "--concepts", "none"), 2, "--concepts"),
        (("explain", "{photo}", "--bank", "b", "--save", "/nowhere/why.png"), 2, "Cannot write"),
        (("explain", "{photo}", "--bank", "b", "--save", "why.docx"), 2, "docx"),
        (("contrast", "{photo}", "--bank", "b", "--classes", "1"), 2, "--classes"),
        (("contrast", "{photo}", "--bank", "b", "--classes", "1", "1"), 2, "not 1 and itself"),
        (
            ("contrast", "{photo}", "--bank", "b", "--classes", "1", "2", "--other", "3"),
            2,
            "leave --target and --other",
        ),
        (("contrast", "{photo}", "--bank", "b", "--target", "a", "--other", "a"), 2, "not 'a' and itself"),
        (("contrast", "{photo}", "--bank", "b", "--maps", "heat"), 2, "'contribution'"),
        (("contrast", "{photo}", "--bank", "b", "--save", "/nowhere/why.png"), 2, "Cannot write"),
        (("concept", BANK, "8"), 3, "no concept 8"),
        (("search", " "), 2, "words to look for"),
        (("search", "ear", "--by", "smell"), 2, "--by"),
        (("models", "--address", "localhost:1", "--timeout", "1"), 4, "cannot be reached"),
        (("models", "--address", "http://x"), 2, "host:port"),
        (("models", "--ca", "/nowhere/ca.pem"), 2, "Cannot read"),
        (("explain",), 2, "Missing argument"),
        (("fly",), 2, "No such command"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...],
    code: int,
    says: str,
    main: Callable[..., int],
    photo: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(*(argument.format(photo=photo) for argument in arguments)) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err


def test_the_installed_command(server: FakeServer, photo: str) -> None:
    command = Path(sys.executable).parent / "whence"
    environment = {**os.environ, "WHENCE_ADDRESS": server.address}
    done = subprocess.run(
        [command, "explain", photo, "--bank", BANK, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["target"]["name"] == "tabby"
    server.fail_next(whence.NotFound("no such bank"))
    done = subprocess.run([command, "banks"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("whence: no such bank")


def test_a_connection_that_fails_is_one_line(tmp_path: Path) -> None:
    identity, (_, other) = (write_identity(tmp_path, name) for name in ("known", "other"))
    command = Path(sys.executable).parent / "whence"
    with FakeServer(identity=identity) as server:
        arguments = ["models", "--address", server.address, "--timeout", "2"]
        done = subprocess.run([command, *arguments, "--ca", other], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert re.fullmatch(r"whence: .*CERTIFICATE_VERIFY_FAILED.*\n", done.stderr)


def test_without_the_extra_the_error_names_it() -> None:
    program = "import sys; sys.modules['typer'] = None; sys.argv = ['whence']; from whence import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert done.stderr == "whence: typer is not installed: pip install 'whence[cli]'\n"


@pytest.mark.parametrize(
    ("name", "more"),
    [("explain", set()), ("contrast", set()), ("intervene", set()), ("search", {"max_exemplars"})],
)
def test_commands_offer_what_the_client_does(name: str, more: set[str]) -> None:
    ours = {command.callback.__name__: command.callback for command in commands.app.registered_commands}  # type: ignore[union-attr]
    theirs = set(inspect.signature(getattr(whence.Client, name)).parameters)
    assert theirs - set(inspect.signature(ours[name]).parameters) == {"self", *more}
