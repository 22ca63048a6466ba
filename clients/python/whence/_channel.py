"""Opening a gRPC channel the way a Whence service needs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from whence._errors import InvalidArgument


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


def connect(address: str, tls: TLS | None, max_message_bytes: int) -> grpc.Channel:
    """Open a channel; no connection is made before the first call.

    Parameters
    ----------
    address
        ``host:port``, or any gRPC target.
    tls
        None for plain text.
    max_message_bytes
        Largest message in either direction, in bytes; gRPC's own limit of 4 MiB is less than a photo with maps.

    Raises
    ------
    InvalidArgument
        If the address is empty, or a file of ``tls`` cannot be read.
    """
    if not address.strip() or address.startswith(("http://", "https://", "grpc://")):
        raise InvalidArgument(f"{address!r} is not an address: use host:port, e.g. localhost:9000.")
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # Servers end connections that ping more often than every 5 minutes, unless they are told otherwise; load
        # balancers drop silent ones after 350 s.
        ("grpc.keepalive_time_ms", 300_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # whence._retry decides what is tried again, so that attempts are counted in one place.
        ("grpc.enable_retries", 0),
        # gRPC's first pause of 1 s would outlast the first retries, which would then fail without a connection attempt.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]
    if tls is None:
        return grpc.insecure_channel(address, options)
    if tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.secure_channel(address, _credentials(tls), options)


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
        return Path(path).read_bytes()
    except OSError as exc:
        raise InvalidArgument(f"Cannot read {path}: {exc.strerror or exc}.", reason="UNREADABLE_FILE") from exc
