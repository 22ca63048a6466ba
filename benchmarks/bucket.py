"""An S3 server with pictures, in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

NAME = "pictures"
_ACCOUNT = "123456789012"


@contextmanager
def bucket(prefixes: Mapping[str, int], pictures: Sequence[bytes]) -> Iterator[dict[str, str]]:
    """Serve so many of the pictures below each prefix, again and again where they are too few.

    Yields the environment that leads a program there.
    """
    here, there = multiprocessing.Pipe()
    arguments = (there, dict(prefixes), list(pictures))
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=arguments, daemon=True)
    process.start()
    try:
        yield {
            **os.environ,
            "AWS_ENDPOINT_URL": here.recv(),
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "something",
            "AWS_REGION": "us-east-1",
        }
    finally:
        here.send(None)
        process.join()


def _serve(connection: Connection, prefixes: Mapping[str, int], pictures: Sequence[bytes]) -> None:
    import logging

    from moto.s3.models import s3_backends
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # which else has a line for every object
    backend = s3_backends[_ACCOUNT]["aws"]
    backend.create_bucket(NAME, "us-east-1")
    for prefix, count in prefixes.items():
        for number in range(count):
            backend.put_object(NAME, f"{prefix}/{number:06d}.jpg", pictures[number % len(pictures)])
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection.send(f"http://{host}:{port}")
    connection.recv()
    server.stop()
