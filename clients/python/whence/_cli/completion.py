"""Completion of names that only the service knows: silently none where it cannot be asked."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import typer

from whence import _config
from whence._cli.failures import printable
from whence._client import Client
from whence._errors import WhenceError

_TIMEOUT_S = 1.0
"""Longer, and whoever pressed the key believes that nothing comes."""


def bank_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Banks of the service."""
    return _beginning(incomplete, _ask(ctx.params, lambda client: [bank.reference for bank in client.banks()]))


def model_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Models of the service."""
    return _beginning(incomplete, _ask(ctx.params, lambda client: [model.name for model in client.models()]))


def class_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Classes of the bank's model; of all models, where no bank is named yet."""
    named, _, _ = (ctx.params.get("bank") or "").partition("/")

    def ask(client: Client) -> list[str]:
        models = [model for model in client.models() if named in ("", model.name)]
        return list(dict.fromkeys(name for model in models for name in model.class_names))

    names = _beginning(incomplete, _ask(ctx.params, ask))
    if os.environ.get("_WHENCE_COMPLETE") == "complete_bash":  # which, of all shells, does not quote what it is given
        return [re.sub(r"([^\w./-])", r"\\\1", name) for name in names]
    return names


def _ask(given: Mapping[str, Any], question: Callable[[Client], list[str]]) -> list[str]:
    """Ask the service that the command line names so far, or the settings."""
    try:
        options = _config.load(given).client_options()
        with Client(**{**options, "timeout_s": _TIMEOUT_S}, max_attempts=1, check_version=False) as client:
            return question(client)
    except WhenceError:
        return []


def _beginning(incomplete: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete) and name == printable(name)]
