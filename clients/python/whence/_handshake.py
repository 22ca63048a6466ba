"""Whether this client and its server understand each other, which a client asks before its first call."""

from __future__ import annotations

import time
import warnings

import whence
from whence._errors import FailedPrecondition, Unavailable, Unimplemented, WhenceError
from whence._server_info import ServerInfo
from whence.v1 import explanation_service_pb2 as service_pb2

PATIENCE_S = 5.0
"""How long an answer is waited for, at most."""
CONTRACT_REVISION = max(service_pb2.ContractRevision.values())
"""That of this client."""

_ASK_AGAIN_S = 30.0


class VersionWarning(UserWarning):
    """The server is older than the client: it may ignore what the client asks for."""


class Handshake:
    """What a client knows of its server; nothing here waits.

    Parameters
    ----------
    enabled
        Whether to ask at all.
    """

    def __init__(self, enabled: bool) -> None:
        self.info: ServerInfo | None = None
        """None until the server said what it is."""
        self._due_at_s: float | None = 0.0 if enabled else None

    def due(self) -> bool:
        """Whether the server is to be asked."""
        return self._due_at_s is not None and time.monotonic() >= self._due_at_s

    def learn(self, info: ServerInfo) -> None:
        """Take in what the server said; one that cannot be understood is asked again at the next call.

        Raises
        ------
        FailedPrecondition
            If the server's major version is another; reason ``INCOMPATIBLE_SERVER``.
        """
        ours, theirs = _major(whence.__version__), _major(info.version)
        if theirs is not None and ours != theirs:
            raise FailedPrecondition(
                f"The service is Whence {info.version}, and this client {whence.__version__}: install a client of the "
                f"service's major version (pip install 'whence=={theirs}.*'), or pass check_version=False to try.",
                reason="INCOMPATIBLE_SERVER",
                metadata={"server_version": info.version, "client_version": whence.__version__},
            )
        self.info = info
        self._due_at_s = None
        if info.contract_revision < CONTRACT_REVISION:
            warnings.warn(
                f"The service (Whence {info.version}) has contract revision {info.contract_revision}, and this client "
                f"{CONTRACT_REVISION}: it may ignore newer options. Upgrade the service.",
                VersionWarning,
                stacklevel=2,
            )

    def fail(self, error: WhenceError) -> None:
        """Take in that the server did not say what it is, which is no reason not to call it.

        Raises
        ------
        Unavailable
            The error itself: what cannot be reached need not be asked anything more.
        """
        if isinstance(error, Unavailable):
            raise error
        # A server that does not know the question never will; any other may answer another time.
        self._due_at_s = None if isinstance(error, Unimplemented) else time.monotonic() + _ASK_AGAIN_S


def _major(version: str) -> int | None:
    """The first number of a version; None where there is none."""
    first = version.partition(".")[0]
    return int(first) if first.isdecimal() else None
