"""The service as a batch sees it: few questions, all about one bank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from whence import _requests
from whence._async_client import AsyncClient
from whence._channel import TLS
from whence._errors import Unavailable, Unimplemented
from whence._explanation import ConceptScope, Estimator, Explanation, InputMethod, MapKind, MapSize, Order
from whence._inventory import Bank


class Explain(Protocol):
    """Explains the bytes of an image file, with no retries of its own."""

    async def __call__(self, content: bytes, timeout_s: float) -> Explanation: ...


@dataclass(frozen=True)
class Options:
    """What is asked about every image; as of `Client.explain`."""

    target: int | str | None = None
    top_k: int = 10
    order: Order = "contribution"
    estimator: Estimator = "gradient"
    maps: tuple[MapKind, ...] = ()
    map_size: MapSize = "grid"
    substitute: bool | None = None
    input_method: InputMethod = "gradient"
    concepts: ConceptScope = "target"

    def check(self, bank: str) -> None:
        """Refuse what cannot be valid for any bank."""
        _requests.question(bank=bank, colours=False, parts=False, priority="background", **asdict(self))

    def record(self) -> dict[str, Any]:
        """As a manifest holds it."""
        return {**asdict(self), "maps": list(self.maps)}


@dataclass(frozen=True)
class Connection:
    """How to reach a service; as of `Client`."""

    address: str = "localhost:9000"
    timeout_s: float = 30.0
    token: str | Callable[[], str] | None = None
    tls: TLS | bool | None = None
    application: str = "whence"

    def client(self) -> AsyncClient:
        """A client that leaves retries to the batch, which counts them."""
        return AsyncClient(
            self.address,
            timeout_s=self.timeout_s,
            token=self.token,
            tls=self.tls,
            application=self.application,
            max_attempts=1,
        )

    def patient_client(self) -> AsyncClient:
        """A client for the few questions before the first image."""
        return AsyncClient(
            self.address, timeout_s=self.timeout_s, token=self.token, tls=self.tls, application=self.application
        )


async def find_bank(connection: Connection, reference: str) -> tuple[Bank, int | None]:
    """The bank that a reference names, and the largest request that the service takes, in bytes."""
    async with connection.patient_client() as client:
        bank = await client.bank(reference)
        try:
            limit: int | None = (await client.server_info()).limits.request_bytes
        except (Unimplemented, Unavailable):
            limit = None
    return bank, limit


def explainer(client: AsyncClient, bank: str, options: Options) -> Explain:
    """Asks a client about a bank, after all who wait for their answers."""
    asked: Mapping[str, Any] = {field: getattr(options, field) for field in asdict(options)}

    async def explain(content: bytes, timeout_s: float) -> Explanation:
        return await client.explain(content, bank=bank, priority="background", timeout_s=timeout_s, **asked)

    return explain
