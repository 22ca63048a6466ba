"""What a server is, and what may be asked of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server accepts; requests beyond it are refused."""

    request_bytes: int
    """Largest request, in bytes."""
    reply_bytes: int
    """Largest answer, in bytes."""
    pixels: int
    """Largest image: its width times its height."""
    image_formats: tuple[str, ...]
    """Encodings of images, by the names that Pillow has for them, e.g. ``JPEG``."""
    top_k: int
    """Most concepts listed in one answer."""
    scales: int
    """Most concepts scaled in one intervention."""
    stream_in_flight: int
    """Most images of one stream that are worked on at a time."""
    deadline_s: float
    """Longest that any answer may take, in seconds."""
    default_deadline_s: float
    """How long an answer may take where the caller does not say, in seconds."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server's version and limits."""

    version: str
    """Of the server's software, e.g. ``0.1.0``."""
    contract_revision: int
    """Counts what was added to the wire contract; a server of a lower one than the client's ignores newer options."""
    limits: Limits
