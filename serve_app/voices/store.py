"""Where enrolled voices are kept: a directory, or a bucket, without a database beside it.

Layout::

    voice-store.json                                       proves that this is a voice store and is reachable
    records/<owner>/<hash of the name>.json                THE voice: one JSON document, a ``Voice``
    voices/<voice id>/record                               where the record of that id is
    voices/<voice id>/<revision>/reference.flac
    voices/<voice id>/<revision>/conditioning/<engine>-<weights fingerprint>.safetensors
    consents/<owner>/…                                     recorded consents: ``consents.py``

A voice exists if, and only if, its record does. Everything else is written before it and removed after it, so
that a process killed at any moment leaves a voice whole or absent, and some blobs that ``sweep`` removes. The
record is created with put-if-absent under a key made from the name, which makes "no two voices of one name"
and "all or nothing" the same atomic operation, for any number of processes on one store.

Replacing a recording keeps the id and writes a new revision beside the old one; the record that names it is
overwritten last. Blobs of a revision never change.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import time
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, MemoryStore, from_url
from ulid import ULID

from engines.contract import Conditioning, ConditioningMismatch, Reference
from serve_app.errors import (
    AudioUndecodable,
    VoiceDamaged,
    VoiceExists,
    VoiceNotFound,
)
from serve_app.voices.local_disk import sweep_directory
from serve_app.voices.object_access import ObjectAccess, says
from serve_app.voices.reference import CheckedReference, decode_flac, fingerprint_of
from serve_app.voices.voice import (
    PUBLIC,
    BuiltInVoice,
    NewVoice,
    Voice,
    checked_name,
    is_owner,
    is_voice_id,
)

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

_log = logging.getLogger(__name__)

_MARKER: Final = "voice-store.json"
_LAYOUT: Final = 1
_PATH_PART: Final = re.compile(r"[a-z0-9][a-z0-9_]{0,63}", re.ASCII)
_RECORD_KEY: Final = re.compile(r"records/[A-Za-z0-9_-]{1,64}/[0-9a-f]{64}\.json", re.ASCII)
_READS_AT_ONCE: Final = 64
_NEXT_STEP: Final = "List voices: GET /v1/audio/voices."


class StoreNotUsable(Exception):
    """The store cannot be used at all. The message is for the operator and may name its place."""


@dataclass(frozen=True, slots=True)
class VoicePage:
    """Some of a list of voices, oldest first. ``has_more``: ask again after the last id."""

    voices: tuple[Voice, ...]
    has_more: bool
    #: Behind the last enrolled voice: those that come with an engine.
    built_in: tuple[BuiltInVoice, ...] = ()


@dataclass(slots=True)
class SweepReport:
    """What ``sweep`` removed."""

    removed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Cached:
    version: tuple[str | None, float]
    voice: Voice


class VoiceStore(ObjectAccess):
    """Voices on an object store. Safe for any number of tasks, processes and machines on one store.

    All methods may raise ``StoreUnavailable`` (cannot be reached, read or written) and ``StorageFull``.
    """

    def __init__(self, store: ObjectStore) -> None:
        """Use ``store``, any of obstore's: a directory, a bucket, memory."""
        super().__init__(store)
        self._cache: dict[str, _Cached] = {}
        self._checked = False

    @classmethod
    def open(cls, location: str | Path) -> Self:
        """Open the store at a directory, which is made if it is absent, or at a URL.

        URLs: ``memory://`` (of this process alone), ``file:///dir``, ``s3://bucket/prefix``,
        ``gs://…``, ``az://…``; credentials come from the environment as their own tools read them. Raises
        ``StoreNotUsable``.
        """
        text = str(location)
        try:
            if text.startswith("memory:"):
                return cls(MemoryStore())
            if text.startswith("file://"):
                return cls(from_url(text, mkdir=True))
            if "://" in text:
                return cls(
                    from_url(
                        text,
                        client_options={"connect_timeout": "5s", "timeout": "30s"},
                        # obstore would go on for three minutes; a client waits for the answer.
                        retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=15)},
                    )
                )
            return cls(LocalStore(Path(text).expanduser().absolute(), mkdir=True))
        except (BaseError, OSError, ValueError) as error:
            raise StoreNotUsable(_operator_sentence(text, error)) from error

    async def check(self) -> None:
        """Prove at start that voices can be written, created once only, read and deleted.

        Raises ``StoreNotUsable`` with a sentence for the operator. From then on a store that has vanished is
        told from one that is empty.
        """
        place = str(self._store)
        probe = f"probes/{ULID()}"
        try:
            marker = json.dumps({"layout": _LAYOUT}).encode()
            with suppress(AlreadyExistsError):
                await obstore.put_async(self._store, _MARKER, marker, mode="create")
            layout = json.loads(bytes(await (await obstore.get_async(self._store, _MARKER)).bytes_async()))
            if layout["layout"] != _LAYOUT:
                raise StoreNotUsable(
                    f"The voice store {place} has layout {layout['layout']}, this version writes {_LAYOUT}. "
                    "Choose another store or another version."
                )
            await obstore.put_async(self._store, probe, b"1", mode="create")
            try:
                await obstore.put_async(self._store, probe, b"2", mode="create")
            except AlreadyExistsError:
                pass
            else:
                raise StoreNotUsable(
                    f"The voice store {place} does not support creating a file only if it is absent. "
                    "Choose a local disk, NFS, or an S3 service with conditional writes."
                )
            await obstore.delete_async(self._store, probe)
        except (BaseError, OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
            raise StoreNotUsable(_operator_sentence(place, error)) from error
        self._checked = True

    async def create(self, new: NewVoice, reference: CheckedReference) -> Voice:
        """Enrol a voice. Raises ``VoiceExists`` if its owner has one of that name."""
        key = _record_key(new.owner, new.name)
        async with self._access("enrol"):
            await self._ensure_reachable()
            if await self._meta(key) is not None:
                raise _exists()
            voice = _voice_of(new, reference, f"voice_{ULID()}", int(time.time()))
            await self._put_blobs(voice, key, reference)
            try:
                await self._put(key, _record_bytes(voice), mode="create")
            except (BaseError, OSError) as error:
                # A lost answer, or its retry, looks like a failure too: only the store knows.
                if not await self._is_current(voice, key):
                    if isinstance(error, AlreadyExistsError):
                        await self._remove_blobs(voice, pointer=True)
                        raise _exists() from None
                    raise
        return voice

    async def replace(self, new: NewVoice, reference: CheckedReference) -> Voice:
        """Give the voice of that name and owner a new recording, or enrol it if there is none.

        Id and creation time stay. Until the new record is in place the old voice is; its blobs are left to
        ``sweep`` for those who still read them.
        """
        key = _record_key(new.owner, new.name)
        async with self._access("replace"):
            await self._ensure_reachable()
            damaged = False
            old = None
            try:
                old = await self._read_record(key)
            except VoiceDamaged:
                damaged = True
            if old is None:
                voice = _voice_of(new, reference, f"voice_{ULID()}", int(time.time()))
            else:
                voice = _voice_of(new, reference, old.id, old.created_at)
            await self._put_blobs(voice, key, reference)
            try:
                absent = old is None and not damaged
                await self._put(key, _record_bytes(voice), mode="create" if absent else "overwrite")
            except (BaseError, OSError) as error:
                if not await self._is_current(voice, key):
                    if isinstance(error, AlreadyExistsError):  # someone enrolled the name meanwhile
                        await self._remove_blobs(voice, pointer=True)
                        return await self.replace(new, reference)
                    raise
            with suppress(BaseError, OSError):
                # If the voice was deleted meanwhile, a sweep may have taken the pointer since it was written.
                await self._put(_pointer(voice.id), key.encode(), mode="overwrite")
        return voice

    async def get(self, id_or_name: str, owner: str = PUBLIC) -> Voice:
        """The voice of that id or name. Raises ``VoiceNotFound``, for voices of other owners too."""
        async with self._access("read"):
            key = await self._locate(id_or_name, owner)
            voice = None if key is None else await self._read_record(key)
            if voice is None or (is_voice_id(id_or_name) and voice.id != id_or_name):
                await self._ensure_reachable()
                raise _not_found()
            return voice

    async def list(self, owner: str = PUBLIC, *, limit: int = 100, after: str | None = None) -> VoicePage:
        """Up to ``limit`` voices of ``owner``, oldest first, beginning after the id ``after``.

        A record that cannot be read is logged and left out.
        """
        if not is_owner(owner):
            return VoicePage((), has_more=False)
        async with self._access("list"):
            metas = await self._list(f"records/{owner}")
            if not metas:
                await self._ensure_reachable()
            voices = sorted(await self._read_records(metas, scope=f"records/{owner}/"), key=_id_of)
        rest = [voice for voice in voices if after is None or voice.id > after]
        return VoicePage(tuple(rest[:limit]), has_more=len(rest) > limit)

    async def delete(self, id_or_name: str, owner: str = PUBLIC) -> Voice | None:
        """Remove a voice: its record at once, then its recording and all conditioning.

        Gives what was removed, None if its record was damaged. Raises ``VoiceNotFound``.
        """
        async with self._access("delete"):
            key = await self._locate(id_or_name, owner)
            if key is None:
                await self._ensure_reachable()
                raise _not_found()
            voice: Voice | None
            try:
                voice = await self._read_record(key)
            except VoiceDamaged:
                voice = None
            else:
                if voice is None or (is_voice_id(id_or_name) and voice.id != id_or_name):
                    await self._ensure_reachable()
                    raise _not_found()
            try:
                await obstore.delete_async(self._store, key)
            except FileNotFoundError:
                raise _not_found() from None
            self._cache.pop(key, None)
        if voice is not None:
            # Only of the revision that was read: a replacement may be writing another. The pointer is left
            # to ``sweep`` for the same reason; without the record it leads nowhere.
            await self._remove_blobs(voice, pointer=False)
        return voice

    async def reference(self, voice: Voice) -> Reference:
        """The recording of ``voice``.

        Raises ``VoiceNotFound`` if the voice was deleted meanwhile, ``StoreUnavailable`` if the recording is
        damaged.
        """
        async with self._access("read"):
            blob = await self._get(f"{_blobs(voice)}/reference.flac")
            if blob is None:
                await self._ensure_reachable()
                raise _not_found()
        try:
            return await asyncio.to_thread(_decode_reference, voice, blob)
        except AudioUndecodable as error:
            _log.exception("the recording of voice %s is damaged", voice.id)
            raise _damaged() from error

    async def conditioning(self, voice: Voice, engine: str, weights_fingerprint: str) -> Conditioning | None:
        """What ``put_conditioning`` stored for this recording, engine and weights; None if nothing fits."""
        async with self._access("read"):
            blob = await self._get(_conditioning_key(voice, engine, weights_fingerprint))
        if blob is None:
            return None
        try:
            found = await asyncio.to_thread(Conditioning.from_bytes, blob)
        except ConditioningMismatch:
            _log.warning("the conditioning of voice %s for %s is damaged", voice.id, engine)
            return None
        fits = (found.engine, found.weights_fingerprint) == (engine, weights_fingerprint)
        return found if fits else None

    async def put_conditioning(self, voice: Voice, conditioning: Conditioning) -> None:
        """Keep ``conditioning`` with the recording it was computed from."""
        blob = await asyncio.to_thread(conditioning.to_bytes)
        key = _conditioning_key(voice, conditioning.engine, conditioning.weights_fingerprint)
        async with self._access("write"):
            await self._put(key, blob, mode="overwrite")

    async def sweep(self, *, grace_s: float = 3600.0) -> SweepReport:
        """Remove blobs that belong to no voice and have not for ``grace_s`` seconds.

        The grace has to be longer than an enrolment takes, and clocks of machines differ. Nothing is removed
        that a record which cannot be read might need.
        """
        report = SweepReport()
        before = time.time() - grace_s
        async with self._access("sweep"):
            # Blobs first: a voice enrolled between the two listings is then seen as a record.
            blobs = [*await self._list("voices"), *await self._list("probes")]
            metas = await self._list("records")
            voices = await self._read_records(metas, scope="records/")
            changed = {meta["path"]: meta["last_modified"].timestamp() for meta in metas}
            live = {voice.id: voice for voice in voices}
            readable = {_record_key(voice.owner, voice.name) for voice in voices}
            unreadable = changed.keys() - readable
            spared = await self._behind_pointers(blobs, unreadable) if unreadable else set()
            for blob in blobs:
                _, voice_id, revision = (*blob["path"].split("/", 3), "", "")[:3]
                voice = live.get(voice_id)
                if voice is not None and revision in {voice.revision, "record"}:
                    continue
                if voice_id in spared:
                    continue
                since = blob["last_modified"].timestamp()
                if voice is not None:  # an earlier revision: unused since the record changed
                    since = max(since, changed[_record_key(voice.owner, voice.name)])
                if since <= before:
                    with suppress(FileNotFoundError):
                        await obstore.delete_async(self._store, blob["path"])
                    report.removed.append(blob["path"])
        if isinstance(self._store, LocalStore) and self._store.prefix is not None:
            root = Path(self._store.prefix)
            report.removed += await asyncio.to_thread(sweep_directory, root, before)
        if report.removed:
            _log.info("removed %d files that belonged to no voice", len(report.removed))
        return report

    # --- below: the object store, one step at a time ---

    async def _ensure_reachable(self) -> None:
        if self._checked and await self._meta(_MARKER) is None:
            raise OSError("the marker file of the voice store is gone")

    async def _locate(self, id_or_name: str, owner: str) -> str | None:
        """Key of the record an id or name stands for; None if there cannot be one."""
        if not is_owner(owner):
            return None
        if is_voice_id(id_or_name):
            blob = await self._get(_pointer(id_or_name))
            key = "" if blob is None else blob.decode("ascii", "replace")
            return key if _RECORD_KEY.fullmatch(key) and key.startswith(f"records/{owner}/") else None
        try:
            return _record_key(owner, checked_name(id_or_name))
        except ValueError:
            return None

    async def _read_record(self, key: str) -> Voice | None:
        blob = await self._get(key)
        if blob is None:
            return None
        try:
            return _parse_record(key, blob)
        except ValueError as error:
            _log.exception("the voice record %s is damaged", key)
            raise _damaged() from error

    async def _read_records(self, metas: Sequence[ObjectMeta], *, scope: str) -> Sequence[Voice]:
        """All that can be read of ``metas``. Unchanged records come from the cache."""
        stale = [meta["path"] for meta in metas if not self._is_cached(meta)]
        versions = {meta["path"]: _version(meta) for meta in metas}
        gate = asyncio.Semaphore(_READS_AT_ONCE)

        async def read(key: str) -> tuple[str, bytes | None]:
            async with gate:
                return key, await self._get(key)

        for start in range(0, len(stale), 1000):
            blobs = await asyncio.gather(*map(read, stale[start : start + 1000]))
            for key, voice in await asyncio.to_thread(_parse_records, blobs):
                self._cache[key] = _Cached(versions[key], voice)
        for key in [key for key in self._cache if key.startswith(scope) and key not in versions]:
            self._cache.pop(key, None)
        return [
            entry.voice
            for path, version in versions.items()
            if (entry := self._cache.get(path)) is not None and entry.version == version
        ]

    def _is_cached(self, meta: ObjectMeta) -> bool:
        entry = self._cache.get(meta["path"])
        return entry is not None and entry.version == _version(meta)

    async def _put_blobs(self, voice: Voice, key: str, reference: CheckedReference) -> None:
        try:
            await self._put(f"{_blobs(voice)}/reference.flac", reference.flac, mode="create")
            await self._put(_pointer(voice.id), key.encode(), mode="overwrite")
        except (BaseError, OSError):
            # Without a record nobody can have seen them. The pointer may be that of a voice to be replaced.
            await self._remove_blobs(voice, pointer=False)
            raise

    async def _is_current(self, voice: Voice, key: str) -> bool:
        """True if the record under ``key`` is this very revision."""
        try:
            found = await self._read_record(key)
        except VoiceDamaged:
            return False
        return found is not None and (found.id, found.revision) == (voice.id, voice.revision)

    async def _remove_blobs(self, voice: Voice, *, pointer: bool) -> None:
        """Best effort: what stays, ``sweep`` removes."""
        try:
            paths = [meta["path"] for meta in await self._list(_blobs(voice))]
            for path in [*paths, *([_pointer(voice.id)] if pointer else [])]:
                with suppress(FileNotFoundError):
                    await obstore.delete_async(self._store, path)
        except (BaseError, OSError):
            _log.warning("blobs of voice %s stay until the next sweep", voice.id, exc_info=True)

    async def _behind_pointers(self, blobs: Sequence[ObjectMeta], keys: set[str]) -> set[str]:
        """Ids of the voices whose record is one of ``keys``."""
        ids = set()
        for blob in blobs:
            if blob["path"].endswith("/record"):
                target = await self._get(blob["path"])
                if target is not None and target.decode("ascii", "replace") in keys:
                    ids.add(blob["path"].split("/")[1])
        return ids


def _id_of(voice: Voice) -> str:
    return voice.id


def _version(meta: ObjectMeta) -> tuple[str | None, float]:
    return meta["e_tag"], meta["last_modified"].timestamp()


def _voice_of(new: NewVoice, reference: CheckedReference, voice_id: str, created_at: int) -> Voice:
    return Voice(
        id=voice_id,
        revision=str(ULID()),
        name=new.name,
        owner=new.owner,
        language=new.language,
        transcript=new.transcript,
        description=new.description,
        consent=new.consent,
        created_at=created_at,
        duration_s=reference.duration_s,
        sample_rate_hz=reference.sample_rate_hz,
        fingerprint=reference.fingerprint,
        warnings=reference.warnings,
    )


def _record_key(owner: str, name: str) -> str:
    # Folding can take a name out of its normal form, so it is normalised once more.
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    return f"records/{owner}/{hashlib.sha256(folded.encode()).hexdigest()}.json"


def _blobs(voice: Voice) -> str:
    return f"voices/{voice.id}/{voice.revision}"


def _pointer(voice_id: str) -> str:
    return f"voices/{voice_id}/record"


def _conditioning_key(voice: Voice, engine: str, weights_fingerprint: str) -> str:
    parts = [
        part if _PATH_PART.fullmatch(part) else hashlib.sha256(part.encode()).hexdigest()
        for part in (engine, weights_fingerprint)
    ]
    return f"{_blobs(voice)}/conditioning/{'-'.join(parts)}.safetensors"


def _record_bytes(voice: Voice) -> bytes:
    return voice.model_dump_json(indent=1).encode()


def _parse_record(key: str, blob: bytes) -> Voice:
    """Raises ``ValueError`` if ``blob`` is not the voice that belongs under ``key``."""
    voice = Voice.model_validate_json(blob)
    if _record_key(voice.owner, voice.name) != key:
        raise ValueError("the record belongs under another key")
    return voice


def _parse_records(blobs: Sequence[tuple[str, bytes | None]]) -> list[tuple[str, Voice]]:
    parsed = []
    for key, blob in blobs:
        if blob is None:  # deleted since it was listed
            continue
        try:
            parsed.append((key, _parse_record(key, blob)))
        except ValueError as error:
            _log.error("the voice record %s is damaged and left out: %s", key, type(error).__name__)
    return parsed


def _decode_reference(voice: Voice, flac: bytes) -> Reference:
    samples, sample_rate_hz = decode_flac(flac)
    if fingerprint_of(samples, sample_rate_hz) != voice.fingerprint:
        raise AudioUndecodable("The recording is not the one that was enrolled. Enrol the voice again.")
    return Reference(samples, sample_rate_hz, voice.transcript, voice.language)


def _operator_sentence(place: str, error: Exception) -> str:
    if says(error, "os error 30", "ReadOnlyFilesystem"):
        return f"The voice store {place} is read-only. Mount it writable or choose another."
    if says(error, "os error 13", "PermissionDenied", "Permission denied"):
        return f"The voice store {place} may not be written by this user. Change its owner or mode."
    if says(error, "os error 20", "os error 17", "File exists"):
        return f"The voice store {place} is a file, not a directory. Move it away or choose another place."
    if says(error, "os error 28"):
        return f"There is no space left on the voice store {place}. Free some or choose another."
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"The voice store {place} cannot be used: {reason}"


def _exists() -> VoiceExists:
    return VoiceExists(
        "There is a voice of this name already. Choose another name, replace it or delete it first.",
        param="name",
    )


def _not_found() -> VoiceNotFound:
    return VoiceNotFound(f"There is no such voice. {_NEXT_STEP}", param="voice")


def _damaged() -> VoiceDamaged:
    return VoiceDamaged("This voice is damaged in the store. Delete it and enrol it again.", param="voice")
