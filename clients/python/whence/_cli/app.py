"""All commands together, and how they are run."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, cast

import typer

from whence import __version__
from whence._cli import batch, configuration, contrast, explain, intervene, inventory, printing, search
from whence._cli.failures import INTERRUPTED
from whence._errors import InvalidArgument

EPILOG = (
    "Exit codes: 0 done; 1 a fault; 2 wrong command line or request; 3 no such bank, model or concept; "
    "4 not now (unreachable, busy, over a limit, too slow); 5 not allowed; 6 not offered here; "
    "7 batch: nothing explained, or with --strict not all; 130 interrupted."
)

app = typer.Typer(epilog=EPILOG, invoke_without_command=True, pretty_exceptions_enable=False)

for command in (
    explain.explain,
    contrast.contrast,
    intervene.intervene,
    inventory.info,
    inventory.models,
    inventory.banks,
    inventory.concept,
    search.search,
    configuration.config,
):
    app.command(epilog=EPILOG)(command)

batches = typer.Typer(cls=batch.RunByDefault, epilog=EPILOG, invoke_without_command=True)
batches.callback()(batch.batch)
for command in (batch.run, batch.report):
    batches.command(epilog=EPILOG)(command)
app.add_typer(batches, name="batch")

# Typer has a click of its own, or uses that which is installed: either way this is its class for wrong command lines.
_UsageError = cast("type[Exception]", typer.BadParameter.__bases__[0])


@app.callback()
def whence(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version of this command.")] = False,
) -> None:
    """Where a vision model's prediction came from, in concepts."""
    if version:
        typer.echo(__version__)
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def run() -> int:
    """Run the command that the command line names; gives the exit code.

    Raises
    ------
    WhenceError
        If it fails.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: printing.warn(str(message))
            return app(standalone_mode=False) or 0
    except _UsageError as exc:
        failure: Any = exc
        see = f" See {failure.ctx.command_path} --help." if failure.ctx else ""
        raise InvalidArgument(f"{failure.format_message().rstrip('.')}.{see}", reason="USAGE") from None
    except typer.Abort:  # how click of old tells of Ctrl-C
        return INTERRUPTED
