"""S3 by boto3 and obstore together.

boto3 finds credentials, region and endpoint as AWS's own tools do, and can name every key; obstore reads and writes
asynchronously, but refuses some keys and silently mends others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from whence._batch.locations import Location
from whence._batch.sources import Content, Listed
from whence._batch.store_errors import from_store, unauthenticated
from whence._errors import missing_extra

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_CREDENTIALS_LAST = timedelta(minutes=10)
"""How long obstore may use credentials before it asks again. boto3 renews those that last less than 10 minutes."""


class Bucket:
    """A bucket that exists and lets us in."""

    def __init__(self, place: Location) -> None:
        try:
            import boto3
            from botocore.config import Config
        except ImportError as failure:
            raise missing_extra("batch", "boto3") from failure
        self.place = place
        try:
            session = boto3.Session()
            # 16 threads may read at a time: as many as keys that obstore cannot name are read with.
            settings = Config(max_pool_connections=16, retries={"mode": "standard"})
            self.client: Any = session.client("s3", region_name=session.region_name or "us-east-1", config=settings)
            self._credentials = session.get_credentials()
            if self._credentials is None:
                raise unauthenticated(place, "are missing")
            answer = self.client.head_bucket(Bucket=place.bucket)
        except Exception as failure:
            error = from_store(failure, place)
            if error.reason == "NO_SUCH_OBJECT":  # asked for its head, a bucket has no more to say than 404
                error = from_store(RuntimeError("NoSuchBucket"), place)
            raise error from failure
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        self._region = headers.get("x-amz-bucket-region") or self.client.meta.region_name

    def store(self, prefix: str = "") -> ObjectStore:
        """An obstore of a part of the bucket."""
        from obstore.store import S3Store

        endpoint = self.client.meta.endpoint_url
        elsewhere = {} if ".amazonaws.com" in endpoint else {"endpoint": endpoint}
        return S3Store(
            self.place.bucket,
            prefix=prefix or None,
            region=self._region,
            credential_provider=self._frozen_credentials,
            client_options={"allow_http": endpoint.startswith("http://")},
            **elsewhere,
        )

    def _frozen_credentials(self) -> Any:
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(timezone.utc) + _CREDENTIALS_LAST,
        }


class S3Source:
    """Objects below a prefix of a bucket."""

    def __init__(self, place: Location) -> None:
        self.place = place
        self._bucket = Bucket(place)
        self._store = self._bucket.store()
        self._client = self._bucket.client
        self._root = f"{place.prefix}/" if place.prefix else ""

    def list(self) -> Iterator[Listed]:
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.place.bucket, Prefix=self._root, PaginationConfig={"PageSize": 1000}
            )
            for page in pages:
                for found in page.get("Contents", ()):
                    key = found["Key"][len(self._root) :]
                    # What consoles make in place of folders.
                    if key and not (found["Size"] == 0 and key.endswith("/")):
                        yield Listed(key, found["ETag"], found["Size"])
        except Exception as failure:
            raise from_store(failure, self.place) from failure

    async def head(self, key: str) -> Listed | None:
        return await asyncio.to_thread(self._head, key)

    async def read(self, key: str) -> Content:
        full = self.place.full_key(key)
        if not nameable(full):
            return await asyncio.to_thread(self._read, full)
        import obstore

        try:
            found = await obstore.get_async(self._store, full)
            return Content(bytes(await found.bytes_async()), found.meta["e_tag"])
        except Exception as failure:
            raise from_store(failure, key) from failure

    async def check(self) -> None:
        await asyncio.to_thread(self._list_one)

    def _head(self, key: str) -> Listed | None:
        try:
            found = self._client.head_object(Bucket=self.place.bucket, Key=self.place.full_key(key))
        except Exception as failure:
            error = from_store(failure, self.place)
            if error.reason == "NO_SUCH_OBJECT":
                return None
            raise error from failure
        return Listed(key, found["ETag"], found["ContentLength"])

    def _read(self, full: str) -> Content:
        try:
            found = self._client.get_object(Bucket=self.place.bucket, Key=full)
            with found["Body"] as body:
                return Content(body.read(), found["ETag"])
        except Exception as failure:
            raise from_store(failure, full) from failure

    def _list_one(self) -> None:
        try:
            self._client.list_objects_v2(Bucket=self.place.bucket, Prefix=self._root, MaxKeys=1)
        except Exception as failure:
            raise from_store(failure, self.place) from failure


def nameable(full: str) -> bool:
    """Whether obstore reads the object of this key: it refuses ``a//b`` and takes ``/a`` for ``a``."""
    return full.isprintable() and not {"", ".", ".."} & set(full.split("/"))
