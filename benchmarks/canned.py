"""A service that answers at once, in a process of its own: what is left is the SDK."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from whence import Bank
from whence.testing import Call, FakeServer, make_explanation

BANK = "fake/layer/bank"


@contextmanager
def service() -> Iterator[str]:
    """Serve explanations of ten concepts by the bank `BANK`; yield the address."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there,), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.send(None)
        process.join()


class _Forgetful(FakeServer):
    """Remembers no calls, so that any number of them can be made."""

    def note(self, call: Call) -> None:
        """Forget it."""


def _serve(connection: Connection) -> None:
    explanation = make_explanation(concept_count=10)
    model, layer, name = BANK.split("/")
    bank = Bank(BANK, "b" * 64, "nmf", model, layer, name, 10, 64, weights_digest="a" * 64, created="")
    with _Forgetful(lambda _request: explanation, banks=[bank]) as server:
        connection.send(server.address)
        connection.recv()
