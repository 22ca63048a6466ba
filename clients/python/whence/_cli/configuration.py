"""The settings in force."""

from __future__ import annotations

from whence import _config
from whence._cli.connection import Connection, connecting
from whence._cli.printing import Json, print_json, print_table, say


@connecting
def config(connection: Connection, json: Json = False) -> None:
    """Show the settings in force, and where each comes from."""
    configuration = connection.configuration()
    rows = list(_config.shown(configuration))
    if json:
        settings = {name: {"value": value, "from": origin} for name, value, origin in rows}
        print_json({"file": str(configuration.file), "exists": configuration.file.exists(), "settings": settings})
        return
    there = "" if configuration.file.exists() else " (not there)"
    say(f"file: {configuration.file}{there}")
    print_table(("setting", "value", "from"), [(name, _cell(value), origin) for name, value, origin in rows])


def _cell(value: str | float | bool | None) -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as in the file
    return "" if value is None else str(value)
