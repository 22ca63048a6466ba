"""Settings of the command: where they come from, which one wins, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import whence
from whence import _config
from whence._cli import app as commands
from whence.testing import FakeServer

README = Path(whence.__file__).parents[1] / "README.md"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Write a file of settings, that the environment names."""

    def write(text: str) -> Path:
        path = tmp_path / "settings.toml"
        path.write_text(text)
        path.chmod(0o600)
        monkeypatch.setenv("WHENCE_CONFIG", str(path))
        return path

    return write


def values(given: dict[str, Any] | None = None) -> dict[str, tuple[Any, str]]:
    """What is in force and not a default."""
    found = _config.load(given or {}).values
    return {name: (value.value, value.origin) for name, value in found.items() if value.origin != "default"}


def test_without_any_settings_the_client_has_its_own_defaults() -> None:
    options = _config.load({}).client_options()
    assert options == {
        "address": "localhost:9000",
        "token": None,
        "tls": None,
        "timeout_s": 30.0,
        "application": "whence",
    }
    assert values() == {}


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file('address = "file:1"\napplication = "file"\ntimeout_s = 3\nserver_name = "file"\ntls = true')
    monkeypatch.setenv("WHENCE_ADDRESS", "environment:1")
    monkeypatch.setenv("WHENCE_TIMEOUT_S", "2.5")
    monkeypatch.setenv("WHENCE_APPLICATION", "")  # empty says nothing
    assert values({"address": "line:1", "ca": None}) == {
        "address": ("line:1", "command line"),
        "timeout_s": (2.5, "WHENCE_TIMEOUT_S"),
        "application": ("file", str(path)),
        "server_name": ("file", str(path)),
        "tls": (True, str(path)),
    }


def test_every_setting_comes_from_every_source(file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"text": "x", "path": "/x", "seconds": "7", "flag": "true"}
    typed = {"text": "x", "path": Path("/x"), "seconds": 7.0, "flag": True}
    for name, setting in _config.SETTINGS.items():
        literal = texts[setting.kind] if setting.kind in ("seconds", "flag") else json.dumps(texts[setting.kind])
        path = file(f"{name} = {literal}")
        assert values() == {name: (typed[setting.kind], str(path))}
        file("")
        with monkeypatch.context() as patch:
            patch.setenv(setting.variable, texts[setting.kind])
            assert values() == {name: (typed[setting.kind], setting.variable)}
        assert values({name: typed[setting.kind]}) == {name: (typed[setting.kind], "command line")}


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert _config.load({}).file == tmp_path / "whence" / "config.toml"
    (tmp_path / "whence").mkdir()
    (tmp_path / "whence" / "config.toml").write_text('address = "here:1"')
    assert values()["address"][0] == "here:1"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert _config.load({}).file == Path("/home/someone/.config/whence/config.toml")


def test_paths_are_relative_to_the_file(file: Callable[[str], Path]) -> None:
    path = file('ca = "ca.pem"\ntoken_file = "~/token"')
    assert values()["ca"][0] == path.parent / "ca.pem"
    assert values()["token_file"][0] == Path.home() / "token"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('adress = "x:1"', "adress, which is no setting"),
        ("[batch]\nx = 1", "batch, which is no setting"),
        ("address = 7", "address in {file} must be text, not 7"),
        ('address = ""', "address in {file} must be text"),
        ('tls = "yes"', "tls in {file} must be true or false"),
        ("timeout_s = true", "must be a number of seconds"),
        ("ca = 7", "ca in {file} must be a path"),
        ('address = "x:1', "{file} is not TOML"),
        ('token = "a"\ntoken_file = "b"', "token and token_file are both set ({file})"),
        ('tls = false\nca = "b"', "tls is off, but ca is set ({file})"),
    ],
)
def test_what_a_file_may_not_say(text: str, says: str, file: Callable[[str], Path]) -> None:
    path = file(text)
    with pytest.raises(whence.InvalidArgument) as caught:
        _config.load({})
    assert says.format(file=path) in caught.value.message
    assert caught.value.reason == "INVALID_CONFIGURATION"


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHENCE_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(whence.InvalidArgument, match="which WHENCE_CONFIG names, does not exist"):
        _config.load({})
    monkeypatch.setenv("WHENCE_CONFIG", str(tmp_path))
    with pytest.raises(whence.InvalidArgument, match="Cannot read"):
        _config.load({})
    (tmp_path / "latin.toml").write_bytes(b'address = "\xe9"')
    monkeypatch.setenv("WHENCE_CONFIG", str(tmp_path / "latin.toml"))
    with pytest.raises(whence.InvalidArgument, match="is not TOML"):
        _config.load({})


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("WHENCE_TIMEOUT_S", "soon", "WHENCE_TIMEOUT_S must be a number of seconds, not 'soon'"),
        ("WHENCE_TLS", "maybe", "WHENCE_TLS must be true or false, not 'maybe'"),
    ],
)
def test_what_the_environment_may_not_say(name: str, text: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(whence.InvalidArgument, match=says):
        _config.load({})


def test_a_stronger_source_takes_the_place_of_what_contradicts_it(file: Callable[[str], Path]) -> None:
    file('token_file = "token"\nca = "ca.pem"')
    assert set(values({"token": "secret"})) == {"token", "ca"}
    options = _config.load({"tls": False}).client_options()
    assert options["tls"] is False
    file('token = "secret"\ntls = false')
    assert set(values({"token_file": Path("token")})) == {"token_file", "tls"}
    options = _config.load({"ca": Path("ca.pem")}).client_options()
    assert options["tls"] == whence.TLS(authorities=Path("ca.pem"))


@pytest.mark.parametrize(
    ("given", "tls"),
    [
        ({}, None),
        ({"tls": True}, True),
        ({"tls": False}, False),
        ({"ca": Path("a")}, whence.TLS(Path("a"))),
        ({"tls": True, "server_name": "n"}, whence.TLS(server_name="n")),
        ({"certificate": Path("c"), "key": Path("k")}, whence.TLS(certificate=Path("c"), key=Path("k"))),
    ],
)
def test_what_encrypts(given: dict[str, Any], tls: whence.TLS | bool | None) -> None:
    assert _config.load(given).client_options()["tls"] == tls


def test_a_token_file_is_read_for_every_attempt(server: FakeServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    options = _config.load({"address": server.address, "token_file": token}).client_options()
    with whence.Client(**options) as client:
        for text in ("first", "second\n"):
            token.write_text(text)
            client.banks()
        token.write_text(" \n")
        with pytest.raises(whence.InvalidArgument, match="holds no token"):
            client.banks()
        token.write_bytes(b"\xff")
        with pytest.raises(whence.InvalidArgument, match="not UTF-8"):
            client.banks()
        token.unlink()
        with pytest.raises(whence.InvalidArgument, match="Cannot read the token in"):
            client.banks()
    sent = [call.metadata["authorization"] for call in server.calls if call.method == "ListBanks"]
    assert sent == ["Bearer first", "Bearer second"]


@pytest.mark.parametrize(
    ("mode", "text", "warned"), [(0o600, 'token = "t"', 0), (0o640, 'token = "t"', 1), (0o644, "", 0)]
)
def test_a_token_that_others_can_read_is_warned_of(
    mode: int, text: str, warned: int, file: Callable[[str], Path]
) -> None:
    path = file(text)
    path.chmod(mode)
    configuration = _config.load({})
    assert len(configuration.warnings) == warned
    done = CliRunner().invoke(commands.app, ["config"])
    assert done.exit_code == 0
    assert (
        done.stderr == warned * f"whence: warning: {path} holds a token that other users can read: chmod 600 {path}\n"
    )


def test_the_command_shows_what_is_in_force(file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = file('address = "file:1"\ntls = true')
    monkeypatch.setenv("WHENCE_TOKEN", "very secret")
    done = CliRunner().invoke(commands.app, ["config", "--timeout", "5"])
    assert done.exit_code == 0, done.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.output.splitlines() if "│" in line]
    assert [row[0] for row in rows] == list(_config.SETTINGS)
    for row in (
        ["address", "file:1", str(path)],
        ["token", "********", "WHENCE_TOKEN"],
        ["tls", "true", str(path)],
        ["timeout_s", "5.0", "command line"],
        ["application", "whence", "default"],
    ):
        assert row in rows
    found = json.loads(CliRunner().invoke(commands.app, ["config", "--json"]).stdout)
    assert (found["file"], found["exists"]) == (str(path), True)
    assert found["settings"]["token"] == {"value": "********", "from": "WHENCE_TOKEN"}
    assert found["settings"]["ca"] == {"value": None, "from": "default"}
    assert "secret" not in done.output + json.dumps(found)


def test_commands_use_what_is_in_force(server: FakeServer, file: Callable[[str], Path]) -> None:
    file(f'address = "{server.address}"\ntoken = "secret"\napplication = "other"')
    assert CliRunner().invoke(commands.app, ["models"]).exit_code == 0
    (call,) = server.calls
    assert (call.metadata["authorization"], call.metadata["application"]) == ("Bearer secret", "other")


def test_every_setting_is_documented() -> None:
    page = README.read_text()
    for name, setting in _config.SETTINGS.items():
        assert f"| `{name}` | `{setting.variable}` | `--" in page


def test_without_a_parser_of_toml_the_error_names_the_extra(
    file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file("")
    monkeypatch.setitem(sys.modules, "tomllib" if sys.version_info >= (3, 11) else "tomli", None)
    with pytest.raises(whence.MissingExtra, match=r"whence\[cli\]"):
        _config.load({})
