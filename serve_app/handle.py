"""RouterHandle: the router as an async Python object, whoever calls it.

Wraps the Serve handle: a ``Failure`` answer is raised as its error, a lost router becomes a typed error, and
a speech that is left is cancelled down to the engine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, TypeVar, cast

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve_app.errors import InternalError, Unavailable
from serve_app.protocol import (
    AudioFrame,
    EngineFacts,
    EnrolRequest,
    Failure,
    SpeechEvent,
    SpeechRequest,
    SpeechStarted,
)
from serve_app.voices.store import VoicePage
from serve_app.voices.voice import Voice

T = TypeVar("T")

_LOST = "The router was lost on the way. Send the request again."


class RouterHandle:
    """Every method raises ``VoiceCloneError``."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._speak = handle.options(method_name="speak", stream=True)

    async def speak(self, request: SpeechRequest) -> AsyncGenerator[SpeechStarted | AudioFrame, None]:
        """``SpeechStarted`` once the first audio is there, then frames in order."""
        stream = cast(DeploymentResponseGenerator[list[SpeechEvent]], self._speak.remote(request))
        try:
            async for events in stream:
                for event in events:
                    if isinstance(event, Failure):
                        raise event.error
                    yield event
        except (RayError, RayServeException) as error:
            raise Unavailable(_LOST, retry_after_s=1.0) from error
        finally:
            # Without this a client that leaves now and then leaves a running engine behind.
            stream.cancel()  # type: ignore[no-untyped-call]

    async def enrol(self, request: EnrolRequest) -> Voice:
        """Make a voice of a recording."""
        return await self._call("enrol", Voice, request)

    async def voice(self, voice: str, owner: str = "public") -> Voice:
        """One voice by id, name or alias."""
        return await self._call("voice", Voice, voice, owner)

    async def voices(self, owner: str = "public", limit: int = 100, after: str | None = None) -> VoicePage:
        """Voices in order of enrolment."""
        return await self._call("voices", VoicePage, owner, limit, after)

    async def delete_voice(self, voice: str, owner: str = "public") -> Voice:
        """Remove a voice and return what it was."""
        return await self._call("delete_voice", Voice, voice, owner)

    async def models(self) -> dict[str, EngineFacts | None]:
        """Served engines by name; None for one that has no running replica now."""
        models: dict[str, EngineFacts | None] = await self._call("models", dict)
        return models

    async def ready(self) -> None:
        """Return if the default engine can speak; raise ``EngineUnavailable`` if not."""
        await self._call("ready", bool)

    async def _call(self, method: str, kind: type[T], *args: object) -> T:
        try:
            answer = await getattr(self._handle, method).remote(*args)
        except (RayError, RayServeException) as error:
            raise Unavailable(_LOST, retry_after_s=1.0) from error
        if isinstance(answer, Failure):
            raise answer.error
        if not isinstance(answer, kind):
            raise InternalError(f"The router answered '{method}' with something else.")
        return answer
