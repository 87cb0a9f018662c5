"""One step at a time on an object store: what every kind of record here is read and written with."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore

from serve_app.errors import StorageFull, StoreUnavailable
from serve_app.voices.local_disk import flush

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

_log = logging.getLogger(__name__)


class ObjectAccess:
    """Base of the stores for voices and for consents."""

    def __init__(self, store: ObjectStore) -> None:
        """Use ``store``, any of obstore's: a directory, a bucket, memory."""
        self._store = store

    @property
    def objects(self) -> ObjectStore:
        """The object store underneath."""
        return self._store

    @asynccontextmanager
    async def _access(self, what: str) -> AsyncIterator[None]:
        """Turn what the object store raises into our errors; details go to the log, not to the client."""
        try:
            yield
        except (BaseError, OSError, NotImplementedError) as error:
            _log.exception("the voice store failed to %s", what)
            if says(error, "os error 28", "os error 122", "StorageFull", "QuotaExceeded"):
                raise StorageFull(
                    "There is no space left for voices. Delete voices, or ask the operator for more space."
                ) from error
            if (
                says(error, "os error 30", "os error 13", "os error 1)")
                or "Permission" in type(error).__name__
            ):
                raise StoreUnavailable(
                    "The server may not write to its voice store. Ask the operator to make it writable."
                ) from error
            raise StoreUnavailable(
                "The voice store cannot be reached. Try again later, or ask the operator to look at it."
            ) from error

    async def _put(self, key: str, blob: bytes, *, mode: str) -> None:
        await obstore.put_async(
            self._store, key, blob, mode="create" if mode == "create" else "overwrite", use_multipart=False
        )
        if isinstance(self._store, LocalStore) and self._store.prefix is not None:
            # obstore does not wait for the disk. Without this a power cut could keep a record and lose the
            # recording it promises.
            await asyncio.to_thread(flush, Path(self._store.prefix), key)

    async def _get(self, key: str) -> bytes | None:
        try:
            return bytes(await (await obstore.get_async(self._store, key)).bytes_async())
        except FileNotFoundError:
            return None

    async def _meta(self, key: str) -> ObjectMeta | None:
        try:
            return await obstore.head_async(self._store, key)
        except FileNotFoundError:
            return None

    async def _list(self, prefix: str) -> Sequence[ObjectMeta]:
        return await obstore.list(self._store, prefix, chunk_size=1000).collect_async()


def says(error: BaseException, *signs: str) -> bool:
    """True if any of ``signs`` is in the words of ``error``: obstore's errors have no numbers."""
    text = str(error)
    return any(sign in text for sign in signs)
