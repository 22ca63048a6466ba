"""Settings of the ``whence`` command: from the command line, the environment and a file, in this order."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from whence._channel import TLS
from whence._errors import InvalidArgument, missing_extra

Kind = Literal["text", "path", "seconds", "flag"]


@dataclass(frozen=True, slots=True)
class Setting:
    """Something that can be set."""

    name: str
    """As in the file."""
    kind: Kind
    help: str
    default: str | float | None = None

    @property
    def variable(self) -> str:
        """Of the environment."""
        return f"WHENCE_{self.name.upper()}"


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("address", "text", "host:port of the service.", "localhost:9000"),
        Setting("token", "text", "Bearer token."),
        Setting("token_file", "path", "File that holds the bearer token; read again for every attempt."),
        Setting("tls", "flag", "Encrypt the connection, or not."),
        Setting("ca", "path", "Authorities to trust (PEM); implies --tls."),
        Setting("certificate", "path", "The client's own certificate (PEM), for mutual TLS; implies --tls."),
        Setting("key", "path", "The private key of the certificate (PEM)."),
        Setting("server_name", "text", "Name to expect in the server's certificate; implies --tls."),
        Setting("timeout_s", "seconds", "Seconds to wait, retries included.", 30.0),
        Setting("application", "text", "Name of the Ray Serve application.", "whence"),
    )
}
_FLAGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
"""Of variables."""
_ENCRYPTED = ("ca", "certificate", "key", "server_name")
_RIVALS = {"token": ("token_file",), "token_file": ("token",)}
"""What a setting takes the place of, where it comes from a stronger source."""


@dataclass(frozen=True, slots=True)
class Value:
    """A value in force."""

    value: Any
    origin: str
    """``command line``, the name of a variable, the path of a file, or ``default``."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The settings in force."""

    values: Mapping[str, Value]
    """Of every setting, by name."""
    file: Path
    """The file of settings, there or not."""
    warnings: tuple[str, ...] = ()

    def client_options(self) -> dict[str, Any]:
        """Arguments of `Client`."""
        set_to = {name: value.value for name, value in self.values.items()}
        tls: TLS | bool | None = set_to["tls"]
        if tls is not False and any(set_to[name] is not None for name in _ENCRYPTED):
            tls = TLS(set_to["ca"], set_to["certificate"], set_to["key"], set_to["server_name"])
        return {
            "address": set_to["address"],
            "token": _reader(set_to["token_file"]) if set_to["token_file"] else set_to["token"],
            "tls": tls,
            "timeout_s": set_to["timeout_s"],
            "application": set_to["application"],
        }


def load(given: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Configuration:
    """Gather the settings.

    Parameters
    ----------
    given
        What the command line says, by the names of settings; None for what it does not say.
    environment
        Default: that of the process.

    Raises
    ------
    InvalidArgument
        If the file cannot be read or holds what is no setting, or a value cannot be right.
    MissingExtra
        If the file needs a package that is not installed (Python 3.10).
    """
    environment = os.environ if environment is None else environment
    file = _file(environment)
    from_file = _from_file(file, named="WHENCE_CONFIG" in environment)
    values: dict[str, Value] = {}
    for source in (_from_command_line(given), _from_environment(environment), from_file):
        _refuse_rivals(source)
        taken = {rival for name in values for rival in _rivals(name, values[name].value)}
        values.update({name: value for name, value in source.items() if name not in {*values, *taken}})
    for name, setting in SETTINGS.items():
        values.setdefault(name, Value(setting.default, "default"))
    exposed = "token" in from_file and os.name == "posix" and file.stat().st_mode & 0o077
    warning = f"{file} holds a token that other users can read: chmod 600 {file}"
    return Configuration({name: values[name] for name in SETTINGS}, file, (warning,) if exposed else ())


def _file(environment: Mapping[str, str]) -> Path:
    """Where the file of settings is, or would be."""
    if named := environment.get("WHENCE_CONFIG"):
        return Path(named).expanduser()
    home = environment.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "whence" / "config.toml"


def _from_command_line(given: Mapping[str, Any]) -> dict[str, Value]:
    return {name: Value(given[name], "command line") for name in SETTINGS if given.get(name) is not None}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Value]:
    """What variables say; an empty one says nothing."""
    return {
        name: Value(_parsed(setting, environment[setting.variable]), setting.variable)
        for name, setting in SETTINGS.items()
        if environment.get(setting.variable)
    }


def _from_file(file: Path, *, named: bool) -> dict[str, Value]:
    """What the file says; none at all need be there, unless it was named."""
    try:
        table = _toml(file)
    except FileNotFoundError:
        if named:
            raise _unusable(f"{file}, which WHENCE_CONFIG names, does not exist.") from None
        return {}
    except OSError as exc:
        raise _unusable(f"Cannot read {file}: {exc.strerror or exc}.") from exc
    except ValueError as exc:  # of which TOML's own errors are, as is what is no UTF-8
        raise _unusable(f"{file} is not TOML: {exc}.") from exc
    if unknown := sorted(table.keys() - SETTINGS.keys()):
        raise _unusable(f"{file} sets {', '.join(unknown)}, which is no setting; settings are {', '.join(SETTINGS)}.")
    return {name: Value(_checked(SETTINGS[name], value, file), str(file)) for name, value in table.items()}


def _toml(file: Path) -> dict[str, Any]:
    module = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    with file.open("rb") as stream:
        try:
            parser = import_module(module)
        except ModuleNotFoundError as exc:
            raise missing_extra("cli", module) from exc
        table: dict[str, Any] = parser.load(stream)
        return table


def _parsed(setting: Setting, text: str) -> str | float | bool | Path:
    """The value of a variable."""
    if setting.kind == "path":
        return Path(text).expanduser()
    if setting.kind == "seconds":
        try:
            return float(text)
        except ValueError:
            raise _unusable(f"{setting.variable} must be a number of seconds, not {text!r}.") from None
    if setting.kind == "flag":
        if text.lower() not in _FLAGS:
            raise _unusable(f"{setting.variable} must be true or false, not {text!r}.")
        return _FLAGS[text.lower()]
    return text


def _checked(setting: Setting, value: object, file: Path) -> str | float | bool | Path:
    """The value of a key of the file; paths are relative to the file."""
    if setting.kind == "flag" and isinstance(value, bool):
        return value
    if setting.kind == "seconds" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if setting.kind in ("text", "path") and isinstance(value, str) and value:
        return file.parent / Path(value).expanduser() if setting.kind == "path" else value
    wanted = {"text": "text", "path": "a path", "seconds": "a number of seconds", "flag": "true or false"}
    raise _unusable(f"{setting.name} in {file} must be {wanted[setting.kind]}, not {value!r}.")


def _rivals(name: str, value: object) -> tuple[str, ...]:
    """What a weaker source can no longer say."""
    if name == "tls":
        return _ENCRYPTED if value is False else ()
    return ("tls",) if name in _ENCRYPTED else _RIVALS.get(name, ())


def _refuse_rivals(source: Mapping[str, Value]) -> None:
    """One source may not say two things that cannot both be."""
    if "token" in source and "token_file" in source:
        raise _unusable(f"token and token_file are both set ({source['token'].origin}): leave one out.")
    encrypted = [name for name in _ENCRYPTED if name in source]
    if encrypted and "tls" in source and source["tls"].value is False:
        raise _unusable(f"tls is off, but {encrypted[0]} is set ({source['tls'].origin}): leave one out.")


def _reader(file: Path) -> Callable[[], str]:
    """Reads the token anew each time, since such files are replaced while programs run."""

    def read() -> str:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise InvalidArgument(
                f"Cannot read the token in {file}: {getattr(exc, 'strerror', None) or 'it is not UTF-8'}.",
                reason="UNREADABLE_FILE",
            ) from exc
        if not token:
            raise InvalidArgument(f"{file} holds no token.", reason="UNREADABLE_FILE")
        return token

    return read


def shown(configuration: Configuration) -> Iterator[tuple[str, str | float | bool | None, str]]:
    """Name, value and origin of every setting, for people to see: without the token."""
    for name, value in configuration.values.items():
        text = str(value.value) if isinstance(value.value, Path) else value.value
        yield name, "********" if name == "token" and text is not None else text, value.origin


def _unusable(message: str) -> InvalidArgument:
    return InvalidArgument(message, reason="INVALID_CONFIGURATION")
