"""What operators have to say to users, kept with the voices: it outlives restarts, and all routers see it."""

from __future__ import annotations

import logging
import time
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ulid import ULID

from serve_app.errors import AnnouncementNotFound, StorageFull
from serve_app.voices.store import VoiceStore

_log = logging.getLogger(__name__)

_FOLDER: Final = "announcements"
_ID: Final = r"^[A-Za-z0-9-]{1,64}$"
#: Nobody reads more, and every status answer carries them.
_MOST: Final = 100


class AnnouncementKind(StrEnum):
    """How much it matters."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    MAINTENANCE = "maintenance"


class Announcement(BaseModel):
    """One announcement, in the fields of the v3 gateway. Times are seconds since the epoch."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str = Field(default_factory=lambda: str(ULID()), pattern=_ID)
    type: AnnouncementKind = AnnouncementKind.INFO
    title: str = Field(min_length=1, max_length=200)
    message: str = Field(max_length=5_000)
    created_at: float = Field(default_factory=time.time, allow_inf_nan=False)
    expires_at: float | None = Field(default=None, allow_inf_nan=False)

    @property
    def is_over(self) -> bool:
        """True after ``expires_at``."""
        return self.expires_at is not None and time.time() > self.expires_at


class Announcements:
    """Announcements on the object store of the voices. All methods raise what the store does."""

    def __init__(self, store: VoiceStore) -> None:
        self._store = store

    async def current(self) -> tuple[Announcement, ...]:
        """Those that are not over, oldest first. One that cannot be read is logged and left out."""
        found = []
        for announcement in await self._all():
            if announcement.is_over:
                await self._store.delete_document(_key(announcement.id))
            else:
                found.append(announcement)
        return tuple(sorted(found, key=lambda one: (one.created_at, one.id)))

    async def put(self, announcement: Announcement) -> None:
        """Keep an announcement; one of the same id is replaced.

        Raises ``StorageFull`` if there are too many.
        """
        known = await self.current()
        if len(known) >= _MOST and announcement.id not in {one.id for one in known}:
            raise StorageFull(f"There are {_MOST} announcements, as many as are kept. Delete one first.")
        await self._store.put_document(_key(announcement.id), announcement.model_dump_json().encode())

    async def remove(self, announcement_id: str) -> None:
        """Remove an announcement. Raises ``AnnouncementNotFound``."""
        if announcement_id not in {one.id for one in await self._all()}:
            raise AnnouncementNotFound("There is no such announcement. List them: GET /api/announcements.")
        await self._store.delete_document(_key(announcement_id))

    async def _all(self) -> list[Announcement]:
        found = []
        for key, blob in (await self._store.documents(_FOLDER)).items():
            try:
                announcement = Announcement.model_validate_json(blob)
            except ValidationError:
                _log.error("the announcement %s is damaged and left out", key)
                continue
            if _key(announcement.id) == key:
                found.append(announcement)
        return found


def _key(announcement_id: str) -> str:
    return f"{_FOLDER}/{announcement_id}.json"
