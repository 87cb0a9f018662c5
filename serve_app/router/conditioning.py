"""Conditioning of a voice for an engine: from memory, from the store, or computed once by the engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from engines.contract import Conditioning, EngineError, Reference
from serve_app.errors import VoiceCloneError, from_engine
from serve_app.protocol import EngineFacts, OneShotReference
from serve_app.router.detached import start_detached
from serve_app.router.dispatch import EngineDispatch
from serve_app.router.transcription import Transcription
from serve_app.transcripts.transcript import Transcript
from serve_app.voices.reference import ReferenceReader
from serve_app.voices.store import VoiceStore
from serve_app.voices.voice import BuiltInVoice, Voice

logger = logging.getLogger("ray.serve")

_Key = tuple[str, str, str, str]
#: In place of a voice's revision, which never begins so.
_ONE_SHOT = "once:"


@dataclass(frozen=True, slots=True)
class VoiceConditioning:
    """Conditioning, and a hash of its content that stands for it in keys."""

    conditioning: Conditioning
    digest: str
    read_at_s: float

    @classmethod
    def of(cls, conditioning: Conditioning) -> VoiceConditioning:
        """As of now."""
        digest = blake2b(conditioning.to_bytes(), digest_size=16).hexdigest()
        return cls(conditioning, digest, time.monotonic())


class ConditioningSource:
    """Hands out conditioning; concurrent demand for the same one is served by one computation.

    Entries live for ``ttl_s`` so that what another router refined is noticed, and the least recently used
    leave when ``max_bytes`` is exceeded.
    """

    def __init__(self, store: VoiceStore, *, max_bytes: int, ttl_s: float) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._entries: OrderedDict[_Key, VoiceConditioning] = OrderedDict()
        self._pending: dict[_Key, asyncio.Task[VoiceConditioning]] = {}
        self._refining: set[asyncio.Task[None]] = set()

    @property
    def held_bytes(self) -> int:
        """Memory of what is remembered."""
        return sum(entry.conditioning.size_bytes for entry in self._entries.values())

    async def get(
        self, voice: Voice, facts: EngineFacts, engine: EngineDispatch, transcript: Transcript | None = None
    ) -> VoiceConditioning:
        """Conditioning of ``voice`` for the weights in ``facts``, and for ``transcript`` if that matters."""
        key = _key(voice, facts.card.name, facts.weights_fingerprint, transcript)
        return await self._shared(key, lambda: self._load(key, voice, facts, engine, transcript))

    async def once(
        self,
        one_shot: OneShotReference,
        facts: EngineFacts,
        engine: EngineDispatch,
        reader: ReferenceReader,
        transcription: Transcription,
    ) -> VoiceConditioning:
        """Conditioning of a recording that is no voice, through all of ``reader``'s checks.

        It is never stored. In memory it serves the next request with the same recording, for ``ttl_s``.
        """
        content = blake2b(f"{len(one_shot.audio)}\n{one_shot.transcript}\n".encode(), digest_size=16)
        content.update(one_shot.audio)
        key = (_ONE_SHOT + content.hexdigest(), facts.card.name, facts.weights_fingerprint, "")

        async def compute() -> VoiceConditioning:
            try:
                checked = await reader.read(one_shot.audio)
                reference = checked.as_reference(transcript=one_shot.transcript)
                transcript, _ = await transcription.of_recording(one_shot.transcript, "", checked, facts.card)
                if transcript is not None:
                    reference = transcript.completes(reference)
                conditioning = self._remember(key, await extract(engine, reference))
            except VoiceCloneError as error:
                error.param = error.param or "ref_audio"
                raise
            # Whose voice it is has not enrolled: nothing of it is kept for longer than it is of use.
            asyncio.get_running_loop().call_later(self._ttl_s, self._entries.pop, key, None)
            return conditioning

        return await self._shared(key, compute)

    async def built_in(
        self, voice: BuiltInVoice, facts: EngineFacts, engine: EngineDispatch
    ) -> VoiceConditioning:
        """Conditioning of a voice that comes with the weights in ``facts``."""
        key = (voice.id, facts.card.name, facts.weights_fingerprint, "")

        async def load() -> VoiceConditioning:
            return self._remember(key, await engine.built_in_voice(voice.name))

        return await self._shared(key, load)

    async def _shared(
        self, key: _Key, compute: Callable[[], Coroutine[Any, Any, VoiceConditioning]]
    ) -> VoiceConditioning:
        """What is remembered under ``key`` and fresh, else what ``compute`` gives, once for all who ask."""
        entry = self._entries.get(key)
        if entry is not None and time.monotonic() - entry.read_at_s < self._ttl_s:
            self._entries.move_to_end(key)
            return entry
        task = self._pending.get(key)
        if task is None:
            task = start_detached(compute())
            self._pending[key] = task
            task.add_done_callback(lambda _: self._pending.pop(key, None))
        # One caller leaving must not stop the computation others wait for.
        return await asyncio.shield(task)

    async def _load(
        self,
        key: _Key,
        voice: Voice,
        facts: EngineFacts,
        engine: EngineDispatch,
        transcript: Transcript | None,
    ) -> VoiceConditioning:
        stored = await self._store.conditioning(voice, facts.card.name, facts.weights_fingerprint, transcript)
        if stored is not None:
            return self._remember(key, stored)
        reference = await self._store.reference(voice)
        if transcript is not None:
            reference = transcript.completes(reference)
        conditioning = await extract(engine, reference)
        prepared = await self.keep(voice, conditioning, transcript)
        self.refine_later(voice, reference, conditioning, engine, transcript)
        return prepared

    async def keep(
        self, voice: Voice, conditioning: Conditioning, transcript: Transcript | None = None
    ) -> VoiceConditioning:
        """Remember and store. A store that cannot be written costs a warning: the voice works without."""
        key = _key(voice, conditioning.engine, conditioning.weights_fingerprint, transcript)
        prepared = self._remember(key, conditioning)
        try:
            await self._store.put_conditioning(voice, conditioning, transcript)
        except VoiceCloneError as error:
            logger.warning("Conditioning of %s was not stored: %s", voice.id, error.code)
        return prepared

    def refine_later(
        self,
        voice: Voice,
        reference: Reference,
        conditioning: Conditioning,
        engine: EngineDispatch,
        transcript: Transcript | None = None,
    ) -> None:
        """Let the engine refine in the background; the result takes the place of ``conditioning``."""

        async def refine() -> None:
            try:
                better = await engine.refine_voice(reference, conditioning)
            except (EngineError, VoiceCloneError) as error:
                logger.warning("Conditioning of %s was not refined: %s", voice.id, error.message)
                return
            if better is not None:
                await self.keep(voice, better, transcript)

        task = start_detached(refine())
        self._refining.add(task)
        task.add_done_callback(self._refining.discard)

    def forget(self, voice: Voice) -> None:
        """Drop everything about a voice."""
        for key in [key for key in self._entries if key[0] == voice.revision]:
            del self._entries[key]

    def _remember(self, key: _Key, conditioning: Conditioning) -> VoiceConditioning:
        self._entries[key] = prepared = VoiceConditioning.of(conditioning)
        self._entries.move_to_end(key)
        held_bytes = self.held_bytes
        while held_bytes > self._max_bytes and len(self._entries) > 1:
            _, oldest = self._entries.popitem(last=False)
            held_bytes -= oldest.conditioning.size_bytes
        return prepared


def _key(voice: Voice, engine: str, weights_fingerprint: str, transcript: Transcript | None) -> _Key:
    return (voice.revision, engine, weights_fingerprint, "" if transcript is None else transcript.digest)


async def extract(engine: EngineDispatch, reference: Reference) -> Conditioning:
    """Conditioning of a reference; what the engine refuses is raised as the client's error."""
    try:
        return await engine.extract_voice(reference)
    except EngineError as error:
        raise from_engine(error) from error
