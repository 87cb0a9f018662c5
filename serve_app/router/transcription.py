"""Transcripts for engines that want one: from the store, or heard once by the transcriber."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray.serve.handle import DeploymentHandle

from engines.contract import EngineCard, Samples
from serve_app.errors import TranscriberUnavailable, TranscriptNeeded, VoiceCloneError
from serve_app.protocol import Failure
from serve_app.router.detached import start_detached
from serve_app.router.dispatch import REPLICA_LOST
from serve_app.transcripts.transcript import Hearing, Transcript, transcript_of
from serve_app.voices.reference import CheckedReference
from serve_app.voices.store import VoiceStore
from serve_app.voices.voice import Voice

logger = logging.getLogger("ray.serve")


class Transcription:
    """Sees to it that an engine gets the words it wants; concurrent demand is served by one hearing."""

    def __init__(
        self, store: VoiceStore, transcriber: DeploymentHandle[Any] | None, *, timeout_s: float
    ) -> None:
        """``transcriber``: None where none is configured. ``timeout_s``: longest wait for its answer."""
        self._store = store
        self._transcriber = transcriber
        self._timeout_s = timeout_s
        self._pending: dict[str, asyncio.Task[None]] = {}

    async def of_voice(self, voice: Voice, card: EngineCard) -> Transcript | None:
        """What an engine is told about an enrolled recording; None if it wants nothing or does without.

        Raises ``TranscriptNeeded`` and what ``hear`` raises.
        """
        if not card.needs_transcript:
            return None
        known = await self._store.transcript(voice)
        if not self._worth_hearing(known, voice.duration_s, card):
            return known
        try:
            await self._hear_voice(voice)
        except VoiceCloneError as error:
            if known is None:
                raise
            logger.warning("Words of %s go untimed: %s", voice.id, error.code)
        return await self._store.transcript(voice)

    async def of_recording(
        self, given: str, language: str, recording: CheckedReference, card: EngineCard
    ) -> tuple[Transcript | None, Hearing | None]:
        """The same for a recording that is no voice (yet), and what was heard in it.

        ``given``, ``language``: what came with it, both may be empty.
        """
        if not card.needs_transcript:
            return None, None
        known = transcript_of(given, language, None)
        if not self._worth_hearing(known, recording.duration_s, card):
            return known, None
        try:
            hearing = await self.hear(recording.samples, recording.sample_rate_hz, language)
        except VoiceCloneError as error:
            if known is None:
                raise
            logger.warning("Words of a new recording go untimed: %s", error.code)
            return known, None
        return transcript_of(given, language, hearing), hearing

    async def hear(self, samples: Samples, sample_rate_hz: int, language: str) -> Hearing:
        """Have the transcriber listen.

        Raises ``TranscriberUnavailable`` and what ``Recogniser.hear`` raises.
        """
        if self._transcriber is None:
            raise TranscriberUnavailable("This server has no transcriber. Send the transcript.")
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._transcriber.hear.remote(samples, sample_rate_hz, language)
        except (TimeoutError, *REPLICA_LOST) as error:
            raise TranscriberUnavailable(
                "The transcriber does not answer. Send the transcript of the recording, or try again later.",
                retry_after_s=5.0,
            ) from error
        if isinstance(answer, Failure):
            raise answer.error
        hearing: Hearing = answer
        return hearing

    def _worth_hearing(self, known: Transcript | None, duration_s: float, card: EngineCard) -> bool:
        """True if hearing would tell the engine something. Raises ``TranscriptNeeded`` if nobody can hear."""
        if known is not None:
            # Times matter only to an engine that uses a part of the recording.
            unhurt = known.confidence is not None or duration_s <= card.max_reference_s
            return self._transcriber is not None and not unhurt
        if self._transcriber is not None:
            return True
        if card.transcript_optional:
            return False
        raise TranscriptNeeded(
            f"Engine '{card.name}' needs to know what is said in the recording of this voice. "
            "Send it: as 'ref_text' at enrolment, or as 'transcript' in PATCH /v1/audio/voices/{voice}. "
            "A server with a transcriber hears it itself.",
            param="voice",
        )

    async def _hear_voice(self, voice: Voice) -> None:
        task = self._pending.get(voice.revision)
        if task is None:
            task = start_detached(self._hear_and_keep(voice))
            self._pending[voice.revision] = task
            task.add_done_callback(lambda _: self._pending.pop(voice.revision, None))
        # One caller leaving must not stop the hearing others wait for.
        await asyncio.shield(task)

    async def _hear_and_keep(self, voice: Voice) -> None:
        known = await self._store.transcript(voice)
        if known is not None and known.confidence is not None:
            return  # heard since the caller looked
        reference = await self._store.reference(voice)
        hearing = await self.hear(reference.samples, reference.sample_rate_hz, voice.language)
        await self._store.put_hearing(voice, hearing)
