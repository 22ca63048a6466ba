"""Opening a gRPC channel the way a Whence service needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from whence._errors import FailedPrecondition, InvalidArgument

ChannelT = TypeVar("ChannelT")

_GENEROUS_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class TLS:
    """An encrypted connection: files in PEM format.

    ``TLS()`` trusts the authorities that gRPC ships. With ``certificate`` and ``key`` the client proves who it is
    (mutual TLS).
    """

    authorities: str | Path | None = None
    """Certificates of the authorities to trust in place of the usual ones."""
    certificate: str | Path | None = None
    """The client's own certificate chain."""
    key: str | Path | None = None
    """The client's private key."""
    server_name: str | None = None
    """Name to expect in the server's certificate, where it is not that of the address."""


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    """All that a channel is opened with."""

    address: str
    options: tuple[tuple[str, int | str], ...]
    credentials: grpc.ChannelCredentials | None

    def open(self, open_insecure: Callable[..., ChannelT], open_secure: Callable[..., ChannelT]) -> ChannelT:
        """Open a channel; no connection is made before the first call."""
        if self.credentials is None:
            return open_insecure(self.address, self.options)
        return open_secure(self.address, self.credentials, self.options)


def channel_settings(address: str, tls: TLS | bool | None, max_message_bytes: int | None) -> ChannelSettings:
    """How to open a channel to a Whence service.

    Parameters
    ----------
    address
        ``host:port``, or any gRPC target.
    tls
        None or False for plain text, True for an encrypted connection with the usual authorities.
    max_message_bytes
        Largest message in either direction, in bytes. None leaves it to the service, which bounds its answers.

    Raises
    ------
    InvalidArgument
        If the address is empty, or a file of ``tls`` cannot be read.
    """
    if not address.strip() or address.startswith(("http://", "https://", "grpc://")):
        raise InvalidArgument(f"{address!r} is not an address: use host:port, e.g. localhost:9000.")
    tls = (TLS() if tls else None) if isinstance(tls, bool) else tls
    options: list[tuple[str, int | str]] = [
        # gRPC's own limit of 4 MiB is less than a photo with maps.
        ("grpc.max_send_message_length", max_message_bytes or _GENEROUS_BYTES),
        ("grpc.max_receive_message_length", max_message_bytes or _GENEROUS_BYTES),
        # Servers end connections that ping more often than every 5 minutes, unless they are told otherwise; load
        # balancers drop silent ones after 350 s. An idle connection is not pinged: what drops it is found at the next
        # call, which connects again.
        ("grpc.keepalive_time_ms", 300_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # whence._retry decides what is tried again, so that attempts are counted in one place.
        ("grpc.enable_retries", 0),
        # gRPC's first pause of 1 s would outlast the first retries, which would then fail without a connection attempt.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return ChannelSettings(address, tuple(options), None if tls is None else _credentials(tls))


def client_closed() -> FailedPrecondition:
    """The error of calls after `close`."""
    return FailedPrecondition("The client is closed: make a new one.", reason="CLIENT_CLOSED")


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    if (tls.certificate is None) != (tls.key is None):
        raise InvalidArgument("Mutual TLS needs both certificate and key.")
    return grpc.ssl_channel_credentials(
        root_certificates=_read(tls.authorities),
        private_key=_read(tls.key),
        certificate_chain=_read(tls.certificate),
    )


def _read(path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as exc:
        raise InvalidArgument(f"Cannot read {path}: {exc.strerror or exc}.", reason="UNREADABLE_FILE") from exc
    if b"-----BEGIN " not in content:  # of which gRPC would only say that it cannot connect
        raise InvalidArgument(f"{path} holds nothing in PEM format.", reason="UNREADABLE_FILE")
    return content
