"""A whole folder or bucket: explaining it, and the report on it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from whence._batch.records import BatchSummary
from whence._cli.batch_progress import shown_progress
from whence._cli.connection import Connection, connecting
from whence._cli.failures import INTERRUPTED, NOT_EXPLAINED, line
from whence._cli.options import Bank, By, How, InputMaps, Scope, Size, Substitute, Target, TopK, class_of
from whence._cli.printing import Json, print_json, print_table, say
from whence._errors import Cancelled, InvalidArgument
from whence._explanation import MapKind
from whence._inventory_words import counted


class RunByDefault(TyperGroup):
    """Commands of which ``run`` is meant where none is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


def batch(ctx: typer.Context) -> None:
    """Explain a whole folder or bucket.

    whence batch SOURCE OUTPUT --bank BANK explains it (whence batch run --help lists the options); whence batch report
    OUTPUT makes a page of what came of it. A folder whose name is that of a command is written ./report.
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@connecting
def run(
    connection: Connection,
    source: Annotated[str, typer.Argument(help="A folder, s3://bucket/prefix or gs://bucket/prefix.")],
    output: Annotated[str, typer.Argument(help="Likewise; must not lie within the source.")],
    bank: Bank,
    target: Target = None,
    top_k: TopK = 10,
    order: By = "contribution",
    estimator: How = "gradient",
    maps: Annotated[
        list[str] | None,
        typer.Option(help="Write these, too: activation, contribution or input; may be repeated.", show_default=False),
    ] = None,
    map_size: Size = "grid",
    substitute: Substitute = None,
    input_method: InputMaps = "gradient",
    concepts: Scope = "target",
    keys: Annotated[
        str | None,
        typer.Option(help="Only the keys in this file, one a line; - for standard input.", show_default=False),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Only keys like this, e.g. *.jpg; may be repeated.", show_default=False)
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="No keys like this; may be repeated.", show_default=False)
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            envvar="WHENCE_SHARD",
            help="Do the i-th of n shares, i from 1; /n takes i from the index of a Kubernetes job.",
            show_default=False,
        ),
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(help="Images that are committed together; else by their number.", show_default=False)
    ] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Do what is new or changed, drop what is gone.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failures again that may pass.")] = False,
    patience_s: Annotated[
        float, typer.Option("--patience", help="Seconds to wait for a service or store that is away.")
    ] = 900.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help=f"Exit with {NOT_EXPLAINED} if any image failed.")] = False,
    json: Json = False,
) -> None:
    """Explain all images of a folder or bucket; run it again to go on after whatever stopped it."""
    from whence import explain_batch

    options = connection.configuration().client_options()
    try:
        with shown_progress() as progress:
            summary = explain_batch(
                source,
                output,
                bank=bank,
                target=class_of(target),
                top_k=top_k,
                order=order,
                estimator=estimator,
                maps=cast("list[MapKind]", maps or []),  # they are checked there
                map_size=map_size,
                substitute=substitute,
                input_method=input_method,
                concepts=concepts,
                keys=keys,
                include=include or (),
                exclude=exclude or (),
                shard=_share(shard),
                chunk_size=chunk_size,
                refresh=refresh,
                retry_failed=retry_failed,
                patience_s=patience_s,
                progress=progress,
                dry_run=dry_run,
                **options,
            )
    except KeyboardInterrupt:
        stopped = Cancelled(
            "Stopped. What is finished stays: run the same command again to go on.", reason="INTERRUPTED"
        )
        typer.echo(line(stopped, as_json=json), file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if json:
        print_json(summary)
    else:
        _print_summary(summary)
    if not dry_run and summary.failed and (strict or not summary.explained):
        raise typer.Exit(NOT_EXPLAINED)


def report(
    output: Annotated[str, typer.Argument(help="What whence batch wrote: a folder or bucket.")],
    to: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    source: Annotated[
        str | None,
        typer.Option(help="Where the images are now, for examples; else where they were.", show_default=False),
    ] = None,
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Show examples.")] = True,
    json: Json = False,
) -> None:
    """Make one HTML page of what a batch found: classes, concepts, how far to trust them, and failures."""
    from whence._batch.report import write_report

    written = write_report(output, to, source=source, pictures=pictures)
    if json:
        print_json(written)
    else:
        say(f"{to}: {counted(written.explained, 'image')}, {counted(written.failed, 'failure')}")


def _share(text: str | None) -> tuple[int, int]:
    """Read I/N, or /N in a Kubernetes job, whose indices are from 0."""
    if text is None:
        return 1, 1
    number, _, count = text.partition("/")
    try:
        if not number:
            number = str(int(os.environ["JOB_COMPLETION_INDEX"]) + 1)
        return int(number), int(count)
    except KeyError:
        raise InvalidArgument(
            f"--shard {text} takes its number from JOB_COMPLETION_INDEX, which is not set: use I/N, such as 1/8."
        ) from None
    except ValueError:
        raise InvalidArgument(f"--shard takes I/N, such as 1/8 for the first of eight; not {text!r}.") from None


def _print_summary(summary: BatchSummary) -> None:
    rows = [
        ("source", summary.source),
        ("output", summary.output),
        ("bank", f"{summary.bank}@{summary.bank_digest[:12]}"),
        ("images", f"{summary.objects:,}, {summary.bytes / 1e6:,.1f} MB"),
        ("chunks done", f"{summary.chunks_done:,} of {summary.chunks:,}"),
        ("explained", f"{summary.explained:,}"),
        ("failed", f"{summary.failed:,}"),
        *((f"  {reason}", f"{count:,}") for reason, count in sorted(summary.reasons.items())),
    ]
    if summary.dry_run:
        left = summary.objects - summary.explained - summary.failed
        rows.append(("left to do", f"{max(left, 0):,}"))
    else:
        rate = summary.finished_now / summary.seconds if summary.seconds else 0.0
        rows.append(("in this run", f"{summary.finished_now:,} in {summary.seconds:,.1f} s, {rate:,.1f} a second"))
    print_table(("batch", "counted only" if summary.dry_run else "done" if summary.complete else "unfinished"), rows)
