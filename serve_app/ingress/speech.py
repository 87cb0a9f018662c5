"""From the router's frames to an audio body: the first frame decides the status, one encoder per response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

import numpy as np
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve_app.audio.encode import AudioFormat, StreamEncoder, encode_whole
from serve_app.errors import EngineFailed
from serve_app.handle import RouterHandle
from serve_app.protocol import AudioFrame, SpeechRequest, SpeechStarted, UtteranceVerified


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


async def speech_response(
    router: RouterHandle,
    request: SpeechRequest,
    audio_format: AudioFormat,
    *,
    sample_rate_hz: int | None,
    stream: bool,
    headers: Mapping[str, str],
) -> Response:
    """Speak ``request``; raises its ``VoiceCloneError`` if it fails before the first audio."""
    frames = router.speak(request)
    try:
        started = await anext(frames)
        if not isinstance(started, SpeechStarted):
            raise EngineFailed("The router sent audio before it said whose.")
        headers = {**headers, **_facts(started)}
        verdicts: list[UtteranceVerified] = []
        first = await _audio(frames, verdicts)
        if stream:
            # What is verified later comes too late for the headers.
            headers = {**headers, **_verdict(verdicts)}
            encoder = StreamEncoder(audio_format, started.sample_rate_hz, sample_rate_hz=sample_rate_hz)
            headers = {**headers, "X-Accel-Buffering": "no"}
            return AudioResponse(_encode(first, frames, encoder), headers, audio_format.media_type)
        parts = []
        while first is not None:
            parts.append(first.samples)
            first = await _audio(frames, verdicts)
        headers = {**headers, **_verdict(verdicts)}
    except BaseException:
        await frames.aclose()
        raise
    samples = np.concatenate(parts)
    body = await asyncio.to_thread(
        encode_whole, audio_format, samples, started.sample_rate_hz, sample_rate_hz=sample_rate_hz
    )
    duration_ms = round(1000 * len(samples) / started.sample_rate_hz)
    headers = {**headers, "X-Audio-Duration-Ms": str(duration_ms)}
    return Response(body, headers=headers, media_type=audio_format.media_type)


def _facts(started: SpeechStarted) -> dict[str, str]:
    return {
        "X-Engine": started.engine,
        "X-Voice-Id": started.voice_id,
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


Frames = AsyncGenerator[SpeechStarted | UtteranceVerified | AudioFrame, None]


async def _audio(frames: Frames, verdicts: list[UtteranceVerified]) -> AudioFrame | None:
    """The next audio, None at the end; verdicts on the way to it are added to ``verdicts``."""
    async for event in frames:
        if isinstance(event, AudioFrame):
            return event
        if isinstance(event, UtteranceVerified):
            verdicts.append(event)
    return None


async def _encode(
    first: AudioFrame | None, frames: Frames, encoder: StreamEncoder
) -> AsyncGenerator[bytes, None]:
    """Encoded bytes as the frames come. Closing it closes the frames, and so the engine."""
    try:
        async with aclosing(frames):
            frame = first
            while frame is not None:
                if part := await asyncio.to_thread(encoder.encode, frame.samples):
                    yield part
                frame = await _audio(frames, [])
        if tail := await asyncio.to_thread(encoder.finish):
            yield tail
    finally:
        encoder.close()
