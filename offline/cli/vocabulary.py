"""Commands that build vocabularies, and look into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image
from rich.markup import escape
from rich.table import Table

from concepts import devices
from concepts.errors import InvalidImage, InvalidInput
from concepts.pictures import decode
from offline.cli.common import Bars, plain_errors, print_table
from offline.images import FORMATS, PIXEL_LIMIT
from offline.store.plan import in_words
from offline.vocabulary import SHARD_CAPTIONS, Ready, Texts, Vocabulary, build, open_vocabulary
from offline.vocabulary.texts import Source

if TYPE_CHECKING:  # importing it takes seconds
    from concepts.clip import Clip

app = typer.Typer()
vocabulary_app = typer.Typer(no_args_is_help=True, help="Build vocabularies of captions, and look into them.")
app.add_typer(vocabulary_app, name="vocabulary")

_REASONS = {"empty": "empty", "not_utf8": "not UTF-8", "too_long": "too long", "duplicates": "duplicates"}

ClipOption = Annotated[
    str,
    typer.Option(
        "--clip",
        help="A folder as open_clip saves models, or ARCHITECTURE@FILE; with network, ARCHITECTURE@TAG or "
        "hf-hub:OWNER/NAME, too.",
    ),
]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.")]
ShardCaptions = Annotated[int, typer.Option(min=1, help="Captions a shard: so many are in memory at a time.")]
Folder = Annotated[Path, typer.Argument(help="Folder of the vocabulary.")]


@vocabulary_app.command("build")
def build_vocabulary(
    captions: Annotated[Path, typer.Argument(help="Text in UTF-8, one caption a line.")],
    clip: ClipOption,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the vocabulary; by default beside the text, NAME.vocabulary.")
    ] = None,
    device: Device = "auto",
    shard_captions: ShardCaptions = SHARD_CAPTIONS,
) -> None:
    """Embed captions with a CLIP; work that was stopped goes on.

    White space is collapsed; what is empty, not UTF-8, or there already is left out.
    """
    with plain_errors():
        path = out or captions.with_suffix(".vocabulary")
        _build(lambda opened: Texts(captions, opened), clip, path, device, shard_captions)


@vocabulary_app.command("import")
def import_vocabulary(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Embeddings in text_emb/*.npy or img/text_emb/*.npy with captions in metadata/*.parquet (column "
            "caption), as LAION publishes them; or .npy files with a .parquet or .txt beside each."
        ),
    ],
    clip: ClipOption,
    out: Annotated[Path, typer.Option(help="Folder of the vocabulary.")],
    device: Device = "auto",
    shard_captions: ShardCaptions = SHARD_CAPTIONS,
) -> None:
    """Take captions whose embeddings are there already; a sample of them is embedded anew and compared."""
    with plain_errors():
        _build(lambda opened: Ready(folder, opened), clip, out, device, shard_captions)


@vocabulary_app.command("show")
def show_vocabulary(folder: Folder) -> None:
    """Say what a vocabulary holds, from which CLIP, and what was dropped."""
    with plain_errors():
        print_table(_facts(Vocabulary.open(folder)))


@vocabulary_app.command("nearest")
def nearest_captions(
    folder: Folder,
    pictures: Annotated[list[Path], typer.Argument(help="Image files.")],
    clip: ClipOption,
    top: Annotated[int, typer.Option(min=1, help="Captions of a picture.")] = 5,
    device: Device = "auto",
) -> None:
    """Say which captions are nearest to pictures."""
    with plain_errors():
        opened = _open_clip(clip, device)
        vocabulary = open_vocabulary(folder, opened)
        queries = opened.embed_pictures([_picture(path) for path in pictures])
        found = vocabulary.nearest(queries, top, device=opened.device)
        table = Table("picture", "cosine", "caption")
        for path, cosines, captions in zip(pictures, found.cosines.tolist(), found.captions.tolist(), strict=True):
            for cosine, text in zip(cosines, vocabulary.texts(captions), strict=True):
                table.add_row(escape(path.name), f"{cosine:.3f}", escape(text))
        print_table(table)


def _build(source: Callable[[Clip], Source], clip: str, path: Path, device: str, shard_captions: int) -> None:
    opened = _open_clip(clip, device)
    with Bars() as bars:
        vocabulary = build(source(opened), opened, path, shard_captions=shard_captions, report=bars)
    print_table(_facts(vocabulary))


def _open_clip(reference: str, device: str) -> Clip:
    from concepts.clip import open_clip_model

    return open_clip_model(reference, devices.choose(device))


def _picture(path: Path) -> Image.Image:
    try:
        return decode(path.read_bytes(), pixel_limit=PIXEL_LIMIT, formats=FORMATS)
    except InvalidImage as error:
        raise InvalidInput(f"{path.name}: {error.message}") from error


def _facts(vocabulary: Vocabulary) -> Table:
    """Return what is to be said of a vocabulary."""
    table = Table(show_header=False)
    table.add_row("captions", f"{len(vocabulary):,}")
    table.add_row("CLIP", escape(vocabulary.clip["name"]))
    table.add_row("digest of the CLIP", vocabulary.clip["digest"])
    table.add_row("width", str(vocabulary.width))
    table.add_row("shards", f"{len(vocabulary.shards):,}")
    table.add_row("bytes", f"{vocabulary.bytes:,} ({in_words(vocabulary.bytes)})")
    for reason, count in vocabulary.dropped.items():
        table.add_row(f"dropped: {_REASONS.get(reason, escape(reason))}", f"{count:,}")
    table.add_row("digest", vocabulary.digest)
    return table
