"""Commands on contrast banks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from offline import tables
from offline.cli.common import (
    REQUIRED,
    Bars,
    Root,
    Trust,
    open_repository,
    plain_errors,
    print_table,
    take,
    tell_skipped,
)
from offline.contrast import report
from offline.contrast.audit import AuditSettings, audit
from offline.options import option_of

app = typer.Typer()
contrast_app = typer.Typer(no_args_is_help=True, help="Look for what a model should not rely on.")
app.add_typer(contrast_app, name="contrast")


@contrast_app.callback()
def _group() -> None:
    """Keep ``audit`` a sub-command while it is the only one."""


def _add_audit() -> None:
    """Make the command whose options are the fields of the settings."""
    fields = {name: option_of(name, info) for name, info in AuditSettings.model_fields.items()}

    def command(bank: str, repository: str, out: Path, trust: list[str] | None, as_json: bool, **values: Any) -> None:
        with plain_errors():
            report.check_out(out)
            settings = AuditSettings(**{name: fields[name].read(value) for name, value in values.items()})
            with Bars() as bars:
                found = audit(open_repository(repository, trust), bank, settings, bars)
            page = report.write(found, out)
            if as_json:
                typer.echo(json.dumps(found.to_json()))
            else:
                print_table(tables.audited_classes(found))
                print_table(tables.audited(found))
                typer.echo(f"Open {page} in a browser; pictures and {report.NUMBERS} lie beside it.")
            tell_skipped(found.pool.skipped)

    own = {
        "bank": (Annotated[str, typer.Argument(help="model/layer/name, or model/layer/name@digest.")], REQUIRED),
        "repository": (Root, REQUIRED),
        "out": (Annotated[Path, typer.Option(help="Folder for report.html, pictures and audit.json; new.")], REQUIRED),
        "trust": (Trust, None),
        "as_json": (Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables.")], False),
    }
    take(command, own, fields)
    contrast_app.command("audit", help="Look for spurious features by pasting prototypes into other images.")(command)


_add_audit()
