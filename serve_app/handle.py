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
    ConsentRequest,
    EngineFacts,
    EnrolRequest,
    Failure,
    SpeechEvent,
    SpeechRequest,
    SpeechStarted,
)
from serve_app.voices.consents import ConsentPage, VoiceConsent
from serve_app.voices.store import VoicePage
from serve_app.voices.voice import BuiltInVoice, Voice

T = TypeVar("T")

#: How often the routers are asked whether they are done.
_DRAIN_POLL_S = 0.2
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

    async def speak(self, request: SpeechRequest) -> AsyncGenerator[SpeechStarted | AudioFrame, None]:
        """``SpeechStarted`` once the first audio is there, then frames in order.

        The router hears how much of it was taken: it does not run far ahead of a slow reader.
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

    async def voice(self, voice: str, owner: str = "public") -> Voice | BuiltInVoice:
        """One voice by id, name or alias."""
        return await self._call("voice", (Voice, BuiltInVoice), voice, owner)

    async def voices(self, owner: str = "public", limit: int = 100, after: str | None = None) -> VoicePage:
        """Voices in order of enrolment, and behind them those that come with an engine."""
        return await self._call("voices", VoicePage, owner, limit, after)

    async def delete_voice(self, voice: str, owner: str = "public") -> Voice:
        """Remove a voice and return what it was."""
        return await self._call("delete_voice", Voice, voice, owner)

    async def record_consent(self, request: ConsentRequest) -> VoiceConsent:
        """Keep a recording in which a speaker consents."""
        return await self._call("record_consent", VoiceConsent, request)

    async def consent(self, consent_id: str, owner: str = "public") -> VoiceConsent:
        """One recorded consent."""
        return await self._call("consent", VoiceConsent, consent_id, owner)

    async def consents(self, owner: str = "public", limit: int = 20, after: str | None = None) -> ConsentPage:
        """Recorded consents, oldest first."""
        return await self._call("consents", ConsentPage, owner, limit, after)

    async def rename_consent(self, consent_id: str, name: str, owner: str = "public") -> VoiceConsent:
        """Give a recorded consent another name."""
        return await self._call("rename_consent", VoiceConsent, consent_id, name, owner)

    async def delete_consent(self, consent_id: str, owner: str = "public") -> VoiceConsent:
        """Remove a recorded consent and return what it was."""
        return await self._call("delete_consent", VoiceConsent, consent_id, owner)

    async def models(self) -> dict[str, EngineFacts | None]:
        """Served engines by name; None for one that has no running replica now."""
        models: dict[str, EngineFacts | None] = await self._call("models", dict)
        return models

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

    def took(self, event: SpeechStarted | AudioFrame) -> None:
        """The reader is done with ``event``."""
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
