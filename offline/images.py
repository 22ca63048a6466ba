"""Folders of images: found in a stable order, decoded as a stream, never all in memory."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from concepts.errors import InvalidImage, InvalidInput
from concepts.pictures import decode
from concepts.preprocessing import Box, Preprocessing
from offline.locations import Bucket, location

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PIXEL_LIMIT = 100_000_000
"""Larger images are skipped: decoded, one would take more than 300 MB."""

_WORKERS = 4


@dataclass(frozen=True)
class ImageFolder:
    """Images under a root, by key: the path below the root, with ``/``."""

    root: Path | Bucket
    keys: tuple[str, ...]
    """Sorted."""

    def label(self, key: str) -> str | None:
        """Return the folder of the class that an image is in (``<root>/<class>/…``); None directly under the root."""
        first, separator, _ = key.partition("/")
        return first if separator else None

    def open(self, key: str) -> Image.Image:
        """Return an image, upright, in mode RGB.

        Raises
        ------
        InvalidImage
            If it cannot be decoded.
        """
        return _decode(self._read(key))

    def _read(self, key: str) -> bytes:
        try:
            return self.root.read(key) if isinstance(self.root, Bucket) else (self.root / key).read_bytes()
        except OSError as error:
            raise InvalidImage(f"The file cannot be read: {error.strerror or type(error).__name__}.") from error


@dataclass(frozen=True)
class ImageBatch:
    """Some decoded images."""

    keys: list[str]
    views: NDArray[np.uint8]
    """``[B, height, width, 3]``: what the model sees."""
    boxes: list[Box]
    """Where in each image its view lies."""
    digests: list[str]
    """sha256 of each file."""

    def rows(self, rows: Sequence[int]) -> ImageBatch:
        """Return chosen images of it."""
        return ImageBatch(
            keys=[self.keys[row] for row in rows],
            views=self.views[list(rows)],
            boxes=[self.boxes[row] for row in rows],
            digests=[self.digests[row] for row in rows],
        )


@dataclass
class Stream:
    """Images decoded in batches while they are consumed; iterate over it once.

    At most ``2 · batch_size + 8`` decoded views exist at a time, however many images there are. What cannot be
    decoded is left out and noted in ``skipped``.

    Parameters
    ----------
    folder
        Where the images are.
    keys
        Which of them, in the order wanted.
    preprocessing
        How the model wants them.
    batch_size
        Images a batch.
    """

    folder: ImageFolder
    keys: Sequence[str]
    preprocessing: Preprocessing
    batch_size: int
    skipped: dict[str, str] = field(default_factory=dict)
    """Why an image was left out, by key."""

    def __iter__(self) -> Iterator[ImageBatch]:
        ready: list[tuple[str, _Decoded]] = []
        pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="decode")
        try:
            for key, future in _ahead(pool, self._load, self.keys):
                try:
                    ready.append((key, future.result()))
                except InvalidImage as error:
                    self.skipped[key] = error.message
                if len(ready) == self.batch_size:
                    yield _batch(ready)
                    ready = []
            if ready:
                yield _batch(ready)
        finally:
            pool.shutdown(cancel_futures=True)

    def _load(self, key: str) -> _Decoded:
        content = self.folder._read(key)
        view, box = self.preprocessing.fit(_decode(content))
        return _Decoded(view, box, hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class _Decoded:
    view: NDArray[np.uint8]
    box: Box
    digest: str


def open_folder(root: Path | Bucket | str) -> ImageFolder:
    """Find the images of a folder, ``<root>/<class>/*.jpg`` or flat.

    Parameters
    ----------
    root
        A folder of this machine or of a bucket, or the URL of either; see ``location``.

    Raises
    ------
    InvalidInput
        If there is no such folder, or no image in it, or a bucket cannot be read.
    """
    root = location(root)
    files = root.keys() if isinstance(root, Bucket) else _files(root)
    keys = sorted(key for key in files if _is_image(key))
    if not keys:
        name = root.url if isinstance(root, Bucket) else root
        raise InvalidInput(f"folder {name} holds no images ({', '.join(sorted(SUFFIXES))})")
    return ImageFolder(root, tuple(keys))


def _files(root: Path) -> Iterator[str]:
    if not root.is_dir():
        raise InvalidInput(f"there is no folder {root}: give the folder that holds the images")
    return (path.relative_to(root).as_posix() for path in root.rglob("*") if _is_image(path.name) and path.is_file())


def _is_image(key: str) -> bool:
    path = PurePosixPath(key)
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def split(folder: ImageFolder, fraction: float, seed: int) -> tuple[ImageFolder, ImageFolder]:
    """Split into training and held-out images.

    The side of an image depends on its key and the seed alone: adding images moves none.

    Parameters
    ----------
    folder
        The images.
    fraction
        Expected share of held-out images, in (0, 1).
    seed
        Another seed is another split.

    Raises
    ------
    InvalidInput
        If a side stays empty.
    """
    limit = int(fraction * 2**64)
    held_out = tuple(key for key in folder.keys if lot(key, f"split {seed}") < limit)
    chosen = set(held_out)
    training = tuple(key for key in folder.keys if key not in chosen)
    if not training or not held_out:
        raise InvalidInput(f"{len(folder.keys)} images are too few to hold out {fraction:.0%} of them: add images")
    return replace(folder, keys=training), replace(folder, keys=held_out)


def shuffled(keys: Iterable[str], seed: int) -> list[str]:
    """Return keys in an order that depends on each key and the seed alone."""
    return sorted(keys, key=lambda key: (lot(key, f"order {seed}"), key))


def fingerprint(digests: dict[str, str]) -> str:
    """Return one sha256 over keys and contents: of a dictionary from key to sha256."""
    lines = "".join(f"{key}\0{digest}\n" for key, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def lot(key: str, salt: str) -> int:
    """Draw 64 bits that are fixed for a key and a salt."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{key}".encode()).digest()[:8], "big")


def _ahead(
    pool: ThreadPoolExecutor, load: Callable[[str], _Decoded], keys: Sequence[str]
) -> Iterator[tuple[str, Future[_Decoded]]]:
    """Yield keys with their results in order, a few loads ahead of the consumer."""
    waiting: deque[tuple[str, Future[_Decoded]]] = deque()
    for key in keys:
        waiting.append((key, pool.submit(load, key)))
        if len(waiting) >= 2 * _WORKERS:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _batch(ready: list[tuple[str, _Decoded]]) -> ImageBatch:
    return ImageBatch(
        keys=[key for key, _ in ready],
        views=np.stack([decoded.view for _, decoded in ready]),
        boxes=[decoded.box for _, decoded in ready],
        digests=[decoded.digest for _, decoded in ready],
    )


def _decode(content: bytes) -> Image.Image:
    return decode(content, pixel_limit=PIXEL_LIMIT, formats=FORMATS)
