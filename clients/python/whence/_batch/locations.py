"""Where images come from and where results go: a folder, or a part of a bucket."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from whence._errors import InvalidArgument

Scheme = Literal["file", "s3", "gs"]


@dataclass(frozen=True, slots=True)
class Location:
    """A folder of this machine, or a part of a bucket."""

    scheme: Scheme
    bucket: str
    """Empty for folders."""
    prefix: str
    """No slash at either end, but for a folder: that is its absolute path."""

    def __str__(self) -> str:
        if self.scheme == "file":
            return self.prefix
        return f"{self.scheme}://{self.bucket}/{self.prefix}" if self.prefix else f"{self.scheme}://{self.bucket}"

    def full_key(self, key: str) -> str:
        """Name within the bucket of what has this key here."""
        return f"{self.prefix}/{key}" if self.prefix else key


def parse(place: str | os.PathLike[str]) -> Location:
    """Read a path, ``file://``, ``s3://`` or ``gs://``.

    Raises
    ------
    InvalidArgument
        If it is none of these.
    """
    text = os.fspath(place)
    scheme, separator, rest = text.partition("://")
    if not separator:
        if not text:
            raise InvalidArgument("A place is a folder, s3://bucket/prefix or gs://bucket/prefix; not nothing.")
        return Location("file", "", str(Path(text).expanduser().resolve()))
    if scheme == "file":
        return Location("file", "", str(Path(unquote(urlsplit(text).path)).resolve()))
    bucket, _, prefix = rest.partition("/")
    if scheme not in ("s3", "gs") or not bucket:
        raise InvalidArgument(f"{text!r} is no place: use a folder, s3://bucket/prefix or gs://bucket/prefix.")
    return Location("s3" if scheme == "s3" else "gs", bucket, prefix.strip("/"))


def refuse_overlap(source: Location, output: Location) -> None:
    """Refuse an output that would be listed as a source, or the other way round."""
    if (source.scheme, source.bucket) != (output.scheme, output.bucket):
        return
    one, other = (place.prefix.rstrip("/") + "/" if place.prefix else "" for place in (source, output))
    if one.startswith(other) or other.startswith(one):
        raise InvalidArgument(
            f"Source {source} and output {output} lie within each other: choose an output elsewhere.",
            reason="OVERLAPPING_OUTPUT",
        )
