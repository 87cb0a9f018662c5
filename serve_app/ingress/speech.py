"""From the router's frames to an audio body: the first frame decides the status, one encoder per response.

Server-sent events (``stream_format: sse``) carry the same encoded stream in slices::

    data: {"type": "speech.audio.delta", "audio": "<base64>", "response_format": "mp3"}
    data: {"type": "speech.audio.sentence", "text": …, "start_ms": …, "end_ms": …}     if asked for
    data: {"type": "speech.audio.done", "usage": {…}}

or, if it fails after the first audio, and before the connection is cut for clients that know no such event::

    data: {"type": "speech.audio.error", "error": {…, "partial_audio": true, "action": "discard"}}
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from engines.contract import Samples
from serve_app.audio.encode import AudioFormat, StreamEncoder, encode_whole
from serve_app.errors import EngineFailed, VoiceCloneError
from serve_app.handle import RouterHandle
from serve_app.ingress.problems import error_member
from serve_app.ingress.timestamps import SentenceClock, TimedText, Timestamps, subtitles
from serve_app.protocol import AudioFrame, SpeechRequest, SpeechStarted, UtteranceVerified

Frames = AsyncGenerator[SpeechStarted | UtteranceVerified | AudioFrame, None]


class AudioResponse(StreamingResponse):
    """A streamed body that is closed with the connection, whatever way the connection ends."""

    def __init__(
        self, body: AsyncGenerator[bytes, None], headers: Mapping[str, str], media_type: str
    ) -> None:
        super().__init__(body, headers=headers, media_type=media_type)
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the body; an error in it cuts the connection, so the client knows."""
        async with aclosing(self._body):
            await super().__call__(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Spoken:
    """A speech that is finished, as one encoded file."""

    started: SpeechStarted
    body: bytes
    duration_ms: int
    sentences: tuple[TimedText, ...]
    verdicts: tuple[UtteranceVerified, ...]

    @property
    def headers(self) -> dict[str, str]:
        """What the answer says about it."""
        return {**_facts(self.started), **_verdict(self.verdicts)}

    def times(self, timestamps: Timestamps) -> dict[str, Any]:
        """When each sentence is heard, as JSON answers say it."""
        return {
            "sentences": [sentence.as_dict() for sentence in self.sentences],
            "subtitles": subtitles(self.sentences, timestamps),
        }


async def speak_whole(
    router: RouterHandle,
    request: SpeechRequest,
    audio_format: AudioFormat,
    sample_rate_hz: int | None,
    bits_per_second: int | None = None,
) -> Spoken:
    """Speak ``request`` and wait for all of it."""
    started, frames = await begin(router, request)
    clock = SentenceClock(started)
    parts: list[Samples] = []
    sentences: list[TimedText] = []
    verdicts = list(started.verified)
    async with aclosing(frames):
        async for frame in frames:
            if isinstance(frame, UtteranceVerified):
                verdicts.append(frame)
            elif isinstance(frame, AudioFrame):
                sentences.extend(clock.heard(frame))
                parts.append(frame.samples)
    samples = np.concatenate(parts)
    body = await asyncio.to_thread(
        encode_whole, audio_format, samples, started.sample_rate_hz, sample_rate_hz, bits_per_second
    )
    duration_ms = round(1000 * len(samples) / started.sample_rate_hz)
    return Spoken(started, body, duration_ms, (*sentences, *clock.finish()), tuple(verdicts))


async def speech_response(
    router: RouterHandle,
    request: SpeechRequest,
    audio_format: AudioFormat,
    *,
    sample_rate_hz: int | None,
    stream: bool,
    headers: Mapping[str, str],
    events: bool = False,
    timestamps: Timestamps | None = None,
    bits_per_second: int | None = None,
) -> Response:
    """Speak ``request``; raises its ``VoiceCloneError`` if it fails before the first audio.

    ``events`` sends a stream as server-sent events. ``timestamps`` makes JSON of everything else.
    """
    if timestamps is not None and not events:
        spoken = await speak_whole(router, request, audio_format, sample_rate_hz, bits_per_second)
        return JSONResponse(
            {
                "object": "audio.speech",
                "audio": base64.b64encode(spoken.body).decode(),
                "media_type": audio_format.media_type,
                "duration_ms": spoken.duration_ms,
                **spoken.times(timestamps),
                "usage": usage(request.text),
            },
            headers={**headers, **spoken.headers},
        )
    if not stream:
        spoken = await speak_whole(router, request, audio_format, sample_rate_hz, bits_per_second)
        facts = {**spoken.headers, "X-Audio-Duration-Ms": str(spoken.duration_ms)}
        return Response(spoken.body, headers={**headers, **facts}, media_type=audio_format.media_type)
    started, frames = await begin(router, request)
    try:
        encoder = StreamEncoder(
            audio_format,
            started.sample_rate_hz,
            sample_rate_hz=sample_rate_hz,
            bits_per_second=bits_per_second,
        )
    except BaseException:
        await frames.aclose()
        raise
    # What is verified later comes too late for the headers.
    headers = {**headers, **_facts(started), **_verdict(started.verified), "X-Accel-Buffering": "no"}
    if events:
        headers = {**headers, "Cache-Control": "no-cache"}
        clock = None if timestamps is None else SentenceClock(started)
        body = _events(frames, encoder, request.text, clock)
        return AudioResponse(body, headers, "text/event-stream")
    return AudioResponse(encoded(frames, encoder), headers, audio_format.media_type)


def usage(text: str) -> dict[str, int]:
    """OpenAI's usage of a speech. Nothing here has tokens: what is counted are the characters of the text."""
    return {"input_tokens": len(text), "output_tokens": 0, "total_tokens": len(text)}


async def begin(router: RouterHandle, request: SpeechRequest) -> tuple[SpeechStarted, Frames]:
    """Wait for the first audio of ``request``: what speaks, and the frames, which the caller must close."""
    frames = router.speak(request)
    try:
        started = await anext(frames)
        if not isinstance(started, SpeechStarted):
            raise EngineFailed("The router sent audio before it said whose.")
    except BaseException:
        await frames.aclose()
        raise
    return started, frames


def _facts(started: SpeechStarted) -> dict[str, str]:
    return {
        "X-Engine": started.engine,
        # A one-shot reference has no voice to name.
        **({"X-Voice-Id": started.voice_id} if started.voice_id else {}),
        "X-Language": started.language,
        "X-Seed": str(started.seed),
        "X-Utterances": str(started.utterances),
        "X-Sample-Rate": str(started.sample_rate_hz),
        "X-AI-Generated": "true",
    }


def _verdict(verdicts: Sequence[UtteranceVerified]) -> dict[str, str]:
    """What was heard again so far: passed of all, tries in all, and how far off the worst is."""
    if not verdicts:
        return {}
    return {
        "X-Verified": f"{sum(verdict.passed for verdict in verdicts)}/{len(verdicts)}",
        "X-Verify-Tries": str(sum(verdict.tries for verdict in verdicts)),
        "X-Verify-Worst-WER": f"{max(verdict.word_error_rate for verdict in verdicts):.3f}",
    }


async def encoded(frames: Frames, encoder: StreamEncoder) -> AsyncGenerator[bytes, None]:
    """Encoded bytes as the frames come. Closing it closes the frames, and so the engine."""
    try:
        async with aclosing(frames):
            async for frame in frames:
                if isinstance(frame, AudioFrame) and (
                    part := await asyncio.to_thread(encoder.encode, frame.samples)
                ):
                    yield part
        if tail := await asyncio.to_thread(encoder.finish):
            yield tail
    finally:
        encoder.close()


async def _events(
    frames: Frames, encoder: StreamEncoder, text: str, clock: SentenceClock | None
) -> AsyncGenerator[bytes, None]:
    """Encoded bytes as server-sent events, and the sentences between them if there is a ``clock``."""
    ended: list[TimedText] = []
    body = encoded(_timed(frames, clock, ended) if clock else frames, encoder)
    try:
        async with aclosing(body):
            async for part in body:
                while ended:
                    yield _event("speech.audio.sentence", **ended.pop(0).as_dict())
                audio = base64.b64encode(part).decode()
                yield _event("speech.audio.delta", audio=audio, response_format=encoder.audio_format.value)
    except VoiceCloneError as error:
        member = {**error_member(error), "partial_audio": True, "action": "discard"}
        yield _event("speech.audio.error", error=member)
        raise
    for sentence in ended:
        yield _event("speech.audio.sentence", **sentence.as_dict())
    yield _event("speech.audio.done", usage=usage(text))


async def _timed(frames: Frames, clock: SentenceClock, ended: list[TimedText]) -> Frames:
    """``frames``, while the sentences that have ended are put into ``ended``."""
    async with aclosing(frames):
        async for frame in frames:
            if isinstance(frame, AudioFrame):
                ended.extend(clock.heard(frame))
            yield frame
    ended.extend(clock.finish())


def _event(kind: str, **fields: Any) -> bytes:
    return f"data: {json.dumps({'type': kind, **fields})}\n\n".encode()
