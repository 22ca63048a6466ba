"""Where images are: a folder of this machine, or one of a bucket."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

from pyarrow import fs
from pydantic import BeforeValidator

from concepts.errors import InvalidInput

_CODE = re.compile(r"AWS Error (\w+)")
"""What the trouble is, in an error of Arrow's."""


@dataclass(frozen=True)
class Bucket:
    """A folder of a bucket, ``s3://bucket/prefix`` or ``gs://bucket/prefix``.

    Credentials, region and endpoint come from the environment, by the names of each provider's own tools
    (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``, …).
    """

    url: str

    def __post_init__(self) -> None:
        if not self._bucket or ":" in self._bucket or "@" in self._bucket:
            raise InvalidInput("a bucket is given as s3://bucket/prefix; credentials belong into the environment")

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self._path.rpartition("/")[2]

    @property
    def _scheme(self) -> str:
        return self.url.partition("://")[0]

    @property
    def _path(self) -> str:
        return self.url.partition("://")[2].rstrip("/")

    @property
    def _bucket(self) -> str:
        return self._path.partition("/")[0]

    @cached_property
    def _files(self) -> fs.FileSystem:
        if self._scheme == "gs":
            return fs.GcsFileSystem()
        # Arrow does not heed these two variables, which Amazon's own tools do.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            return fs.S3FileSystem(endpoint_override=endpoint)
        told = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return fs.S3FileSystem(region=told or fs.resolve_s3_region(self._bucket))

    def keys(self) -> list[str]:
        """Return the paths of all files below the folder.

        Raises
        ------
        InvalidInput
            If there is no such bucket or folder, or it may not be listed.
        """
        with self._errors():
            found = self._files.get_file_info(fs.FileSelector(self._path, recursive=True))
        return [info.path[len(self._path) + 1 :] for info in found if info.type == fs.FileType.File]

    def read(self, key: str) -> bytes:
        """Return a file's content.

        Raises
        ------
        FileNotFoundError
            If there is no such file any more.
        InvalidInput
            If the bucket does not answer, or not to us: that is no fault of one image.
        """
        with self._errors(missing=FileNotFoundError), self._files.open_input_file(f"{self._path}/{key}") as file:
            return bytes(file.read())

    @contextmanager
    def _errors(self, missing: type[Exception] = InvalidInput) -> Iterator[None]:
        """Turn what the bucket answers wrong into one line."""
        try:
            yield
        except FileNotFoundError as error:
            raise missing(f"there is no folder {self.url}: give the folder that holds the images") from error
        except OSError as error:
            code = _CODE.search(str(error))
            reason = code[1].lower().replace("_", " ") if code else type(error).__name__
            raise InvalidInput(
                f"bucket {self._bucket!r} cannot be read ({reason}): look at the URL, and at the credentials, region "
                "and endpoint in the environment"
            ) from error


def location(value: Path | Bucket | str) -> Path | Bucket:
    """Read a place from text: a bucket's URL, one of this machine (``file://``), or a path.

    Raises
    ------
    InvalidInput
        If it is a URL of another kind.
    """
    if not isinstance(value, str):
        return value
    scheme, separator, _ = value.partition("://")
    if not separator:
        return Path(value)
    if scheme == "file":
        return Path(unquote(urlsplit(value).path))
    if scheme not in ("s3", "gs"):
        raise InvalidInput(f"images are not read from {scheme}://: give a folder, s3://bucket/… or gs://bucket/…")
    return Bucket(value)


Location = Annotated[Path | Bucket, BeforeValidator(location)]
"""A folder of this machine or of a bucket; configurations read it from text."""
