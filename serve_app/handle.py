"""RouterHandle: the router as an async Python object, whoever calls it.

Wraps the Serve handle: a ``Failure`` answer is raised as its error, a lost router becomes a typed error, and
a speech that is left is cancelled down to the engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, TypeVar, cast

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ulid import ULID

from serve_app.errors import InternalError, Unavailable
from serve_app.protocol import (
    AudioFrame,
    BatchProgress,
    Caller,
    ConsentRequest,
    EngineFacts,
    EnrolRequest,
    Failure,
    ReplicaFigures,
    RouterFigures,
    SpeechEvent,
    SpeechRequest,
    SpeechStarted,
    UtteranceVerified,
)
from serve_app.transcripts.transcript import Correction
from serve_app.voices.announcements import Announcement
from serve_app.voices.consents import ConsentPage, VoiceConsent
from serve_app.voices.store import VoicePage
from serve_app.voices.voice import BuiltInVoice, Voice

T = TypeVar("T")

#: How often the routers are asked whether they are done.
_DRAIN_POLL_S = 0.2
_BROADCAST_TIMEOUT_S = 5.0
#: Audio a reader takes between two reports, and how long it may wait for more with something unreported.
_REPORT_EVERY_S = 10.0
_REPORT_AFTER_S = 1.0

logger = logging.getLogger("ray.serve")

_LOST = "The router was lost on the way. Send the request again."


class RouterHandle:
    """Every method raises ``VoiceCloneError``."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._speak = handle.options(method_name="speak", stream=True)

    async def speak(
        self, request: SpeechRequest
    ) -> AsyncGenerator[SpeechStarted | UtteranceVerified | AudioFrame, None]:
        """``SpeechStarted`` once the first audio is there, then frames in order.

        A verdict comes before the audio it is about. The router hears how much of that was taken: it does not
        run far ahead of a slow reader.
        """
        request = replace(request, speech_id=str(ULID()))
        stream = cast(DeploymentResponseGenerator[list[SpeechEvent]], self._speak.remote(request))
        reports = HeardReports(self._handle, request.speech_id)
        try:
            async for events in stream:
                for event in events:
                    if isinstance(event, Failure):
                        raise event.error
                    yield event
                    # The reader has come back for more: what it got before is off its hands.
                    reports.took(event)
        except (RayError, RayServeException) as error:
            raise Unavailable(_LOST, retry_after_s=1.0) from error
        finally:
            reports.close()
            # Without this a client that leaves now and then leaves a running engine behind.
            stream.cancel()  # type: ignore[no-untyped-call]

    async def drain(self, timeout_s: float) -> int:
        """Let no router take a new request, and wait for the running ones; says how many are left."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                answers: list[int] = await self._handle.broadcast("drain").results_async(timeout_s=timeout_s)
            except (TimeoutError, RayError, RayServeException) as error:
                raise Unavailable(_LOST, retry_after_s=1.0) from error
            if not (running := sum(answers)) or time.monotonic() > deadline_s:
                return running
            await asyncio.sleep(_DRAIN_POLL_S)

    async def enrol(self, request: EnrolRequest) -> Voice:
        """Make a voice of a recording."""
        return await self._call("enrol", Voice, request)

    async def voice(self, voice: str, caller: Caller) -> Voice | BuiltInVoice:
        """One voice by id, name or alias."""
        return await self._call("voice", (Voice, BuiltInVoice), voice, caller)

    async def voices(self, caller: Caller, limit: int = 100, after: str | None = None) -> VoicePage:
        """The voices there are for ``caller``, in order of enrolment, and behind them those of engines."""
        return await self._call("voices", VoicePage, caller, limit, after)

    async def all_voices(self, caller: Caller) -> list[Voice | BuiltInVoice]:
        """As ``voices``, without an end."""
        found: list[Voice | BuiltInVoice] = []
        more = True
        while more:
            page = await self.voices(caller, 1000, found[-1].id if found else None)
            found += [*page.voices, *page.built_in]
            more = page.has_more
        return found

    async def delete_voice(self, voice: str, caller: Caller) -> str:
        """Remove a voice and return its id."""
        return await self._call("delete_voice", str, voice, caller)

    async def record_consent(self, request: ConsentRequest) -> VoiceConsent:
        """Keep a recording in which a speaker consents."""
        return await self._call("record_consent", VoiceConsent, request)

    async def consent(self, consent_id: str, caller: Caller) -> VoiceConsent:
        """One recorded consent."""
        return await self._call("consent", VoiceConsent, consent_id, caller)

    async def consents(self, caller: Caller, limit: int = 20, after: str | None = None) -> ConsentPage:
        """Recorded consents, oldest first."""
        return await self._call("consents", ConsentPage, caller, limit, after)

    async def rename_consent(self, consent_id: str, name: str, caller: Caller) -> VoiceConsent:
        """Give a recorded consent another name."""
        return await self._call("rename_consent", VoiceConsent, consent_id, name, caller)

    async def delete_consent(self, consent_id: str, caller: Caller) -> VoiceConsent:
        """Remove a recorded consent and return what it was."""
        return await self._call("delete_consent", VoiceConsent, consent_id, caller)

    async def correct_transcript(self, voice: str, correction: Correction, caller: Caller) -> Voice:
        """Say what is said in the recording of a voice."""
        return await self._call("correct_transcript", Voice, voice, correction, caller)

    async def models(self) -> dict[str, EngineFacts | None]:
        """Served engines by name; None for one that has no running replica now."""
        models: dict[str, EngineFacts | None] = await self._call("models", dict)
        return models

    async def announcements(self) -> tuple[Announcement, ...]:
        """What operators have to say and is not over, oldest first."""
        announcements: tuple[Announcement, ...] = await self._call("announcements", tuple)
        return announcements

    async def announce(self, announcement: Announcement) -> None:
        """Keep an announcement; one of the same id is replaced."""
        await self._call("announce", bool, announcement)

    async def withdraw(self, announcement_id: str) -> None:
        """Remove an announcement. Raises ``AnnouncementNotFound``."""
        await self._call("withdraw", bool, announcement_id)

    async def replica_figures(self) -> dict[str, list[ReplicaFigures]]:
        """Figures of the replicas by engine; an engine with a replica that does not answer has none."""
        figures: dict[str, list[ReplicaFigures]] = await self._call("replica_figures", dict)
        return figures

    async def figures(self) -> RouterFigures:
        """Figures of all routers together."""
        each: list[RouterFigures] = await self._broadcast("figures")
        return RouterFigures(
            running=sum(one.running for one in each),
            answered=sum(one.answered for one in each),
            answering_s=sum(one.answering_s for one in each),
        )

    async def report_batch(self, progress: BatchProgress) -> None:
        """Tell all routers how far a request of several texts is."""
        await self._broadcast("report_batch", progress)

    async def batches(self, caller: Caller) -> list[BatchProgress]:
        """The requests of several texts that ``caller`` has, and those that ended a moment ago."""
        batches: list[BatchProgress] = await self._call("batches", list, caller)
        return batches

    async def _broadcast(self, method: str, *args: object) -> list[Any]:
        try:
            answers = self._handle.broadcast(method, *args)
            return list(await answers.results_async(timeout_s=_BROADCAST_TIMEOUT_S))
        except (TimeoutError, RayError, RayServeException) as error:
            raise Unavailable(
                "Not every router answers. Try again in a moment.", retry_after_s=1.0
            ) from error

    async def ready(self) -> None:
        """Return if the default engine can speak; raise ``EngineUnavailable`` if not."""
        await self._call("ready", bool)

    async def _call(self, method: str, kind: type[T] | tuple[type[T], ...], *args: object) -> T:
        try:
            answer = await getattr(self._handle, method).remote(*args)
        except (RayError, RayServeException) as error:
            raise Unavailable(_LOST, retry_after_s=1.0) from error
        if isinstance(answer, Failure):
            raise answer.error
        if not isinstance(answer, kind):
            raise InternalError(f"The router answered '{method}' with something else.")
        return answer


class HeardReports:
    """Tells the routers how much of one speech its reader has taken.

    A report goes out for every ``_REPORT_EVERY_S`` of audio, and for the rest once the reader has waited for
    more: the router may be waiting for exactly that report.
    """

    def __init__(self, handle: DeploymentHandle[Any], speech_id: str) -> None:
        self._handle = handle
        self._speech_id = speech_id
        self._step = 0
        self._taken = 0
        self._reported = 0
        self._sending: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def took(self, event: SpeechStarted | UtteranceVerified | AudioFrame) -> None:
        """The reader is done with ``event``."""
        if isinstance(event, UtteranceVerified):
            return
        if isinstance(event, SpeechStarted):
            self._step = round(_REPORT_EVERY_S * event.sample_rate_hz)
            return
        self._taken += len(event.samples)
        if self._timer is not None:
            self._timer.cancel()
        if self._taken - self._reported >= self._step:
            self._report()
        else:
            self._timer = asyncio.get_running_loop().call_later(_REPORT_AFTER_S, self._report)

    def close(self) -> None:
        """No more reports."""
        for work in (self._timer, self._sending):
            if work is not None:
                work.cancel()

    def _report(self) -> None:
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())

    async def _send(self) -> None:
        while self._reported < self._taken:
            self._reported = self._taken
            try:
                await self._handle.broadcast("heard", self._speech_id, self._taken).results_async()
            except (RayError, RayServeException) as error:
                # One of the routers is gone; if it was ours, the stream says so itself.
                logger.info("Not every router heard a report: %s", type(error).__name__)
