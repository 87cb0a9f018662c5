"""Recorded consents: a speaker says, in their own voice, that it may be cloned.

Layout, in the store of the voices::

    consents/<owner>/<consent id>/record.json       THE consent: one JSON document, a ``VoiceConsent``
    consents/<owner>/<consent id>/recording.flac    written before the record and removed after it

What is said is kept as evidence for whoever has to judge it. It is neither transcribed nor compared with the
voice that refers to it.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import obstore
from obstore.exceptions import BaseError
from pydantic import BaseModel, ConfigDict, Field
from ulid import ULID

from serve_app.errors import ConsentNotFound
from serve_app.voices.object_access import ObjectAccess
from serve_app.voices.reference import CheckedReference
from serve_app.voices.voice import LANGUAGE_PATTERN, Name, is_owner

if TYPE_CHECKING:
    from obstore import ObjectMeta

_log = logging.getLogger(__name__)

_CONSENT_ID: Final = re.compile(r"cons_[0-7][0-9A-HJKMNP-TV-Z]{25}", re.ASCII)


def is_consent_id(text: str) -> bool:
    """True if ``text`` has the form of an id made here. Nothing else ever becomes part of a path."""
    return _CONSENT_ID.fullmatch(text) is not None


class VoiceConsent(BaseModel):
    """What the record of a consent holds."""

    # Fields that a later version adds do not make its records unreadable here.
    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str = Field(pattern=f"^{_CONSENT_ID.pattern}$")
    owner: str
    name: Name = Field(description="Whose consent it is.")
    language: str = Field(pattern=LANGUAGE_PATTERN, description="BCP-47 of what is said.")
    created_at: int = Field(description="Seconds since the epoch.")
    duration_s: float = Field(description="Length of the recording.")
    fingerprint: str = Field(description="See ``reference.fingerprint_of``.")


@dataclass(frozen=True, slots=True)
class ConsentPage:
    """Some of a list of consents, oldest first. ``has_more``: ask again after the last id."""

    consents: tuple[VoiceConsent, ...]
    has_more: bool


class ConsentStore(ObjectAccess):
    """Consents on the object store of the voices. Methods raise what those of ``VoiceStore`` raise."""

    async def create(self, name: str, language: str, owner: str, recording: CheckedReference) -> VoiceConsent:
        """Keep a consent. Raises pydantic's ``ValidationError`` for a name or a language that is none."""
        consent = VoiceConsent(
            id=f"cons_{ULID()}",
            owner=owner,
            name=name,
            language=language,
            created_at=int(time.time()),
            duration_s=recording.duration_s,
            fingerprint=recording.fingerprint,
        )
        place = _place(owner, consent.id)
        async with self._access("keep a consent"):
            try:
                await self._put(f"{place}/recording.flac", recording.flac, mode="create")
                await self._put(f"{place}/record.json", _bytes(consent), mode="create")
            except (BaseError, OSError):
                await self._remove(place)
                raise
        return consent

    async def get(self, consent_id: str, owner: str) -> VoiceConsent:
        """The consent of that id. Raises ``ConsentNotFound``, for those of other owners too."""
        blob = None
        if is_consent_id(consent_id) and is_owner(owner):
            async with self._access("read a consent"):
                blob = await self._get(f"{_place(owner, consent_id)}/record.json")
        if blob is None:
            raise ConsentNotFound(
                "There is no such consent. List consents: GET /v1/audio/voice_consents.", param="consent"
            )
        return VoiceConsent.model_validate_json(blob)

    async def rename(self, consent_id: str, name: str, owner: str) -> VoiceConsent:
        """Give a consent another name."""
        old = await self.get(consent_id, owner)
        consent = VoiceConsent.model_validate({**old.model_dump(), "name": name})
        async with self._access("rename a consent"):
            await self._put(f"{_place(owner, consent_id)}/record.json", _bytes(consent), mode="overwrite")
        return consent

    async def list(self, owner: str, *, limit: int, after: str | None) -> ConsentPage:
        """Up to ``limit`` consents of ``owner``, oldest first, beginning after the id ``after``."""
        if not is_owner(owner):
            return ConsentPage((), has_more=False)
        async with self._access("list consents"):
            found = await self._list(f"consents/{owner}")
            ids = sorted(_id_of(meta) for meta in found if meta["path"].endswith("/record.json"))
            rest = [consent_id for consent_id in ids if after is None or consent_id > after]
            consents = []
            for consent_id in rest[:limit]:
                # Deleted since it was listed: left out.
                with suppress(ConsentNotFound):
                    consents.append(await self.get(consent_id, owner))
        return ConsentPage(tuple(consents), has_more=len(rest) > limit)

    async def delete(self, consent_id: str, owner: str) -> VoiceConsent:
        """Remove a consent. Voices that were enrolled with it keep what was noted then."""
        consent = await self.get(consent_id, owner)
        place = _place(owner, consent_id)
        async with self._access("delete a consent"):
            with suppress(FileNotFoundError):
                await obstore.delete_async(self._store, f"{place}/record.json")
            await self._remove(place)
        return consent

    async def sweep(self, *, grace_s: float = 3600.0) -> Sequence[str]:
        """Remove recordings that have been without a record for ``grace_s`` seconds; says which."""
        before = time.time() - grace_s
        removed = []
        async with self._access("sweep consents"):
            found = await self._list("consents")
            whole = {_id_of(meta) for meta in found if meta["path"].endswith("/record.json")}
            for meta in found:
                if _id_of(meta) not in whole and meta["last_modified"].timestamp() <= before:
                    with suppress(FileNotFoundError):
                        await obstore.delete_async(self._store, meta["path"])
                    removed.append(meta["path"])
        return removed

    async def _remove(self, place: str) -> None:
        """Best effort: what stays, ``sweep`` removes."""
        try:
            with suppress(FileNotFoundError):
                await obstore.delete_async(self._store, f"{place}/recording.flac")
        except (BaseError, OSError):
            _log.warning("the recording of a consent stays until the next sweep", exc_info=True)


def _place(owner: str, consent_id: str) -> str:
    return f"consents/{owner}/{consent_id}"


def _id_of(meta: ObjectMeta) -> str:
    return meta["path"].split("/")[2]


def _bytes(consent: VoiceConsent) -> bytes:
    return consent.model_dump_json(indent=1).encode()
