"""What a live session sends: messages, and the audio of a stretch between two of them."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any

from fastapi import WebSocket

from serve_app.audio.encode import StreamEncoder
from serve_app.errors import VoiceCloneError
from serve_app.ingress.live_turn import Stretch, Turn
from serve_app.ingress.problems import error_member
from serve_app.protocol import AudioFrame


class LiveSocket:
    """An accepted socket. Sending raises ``WebSocketDisconnect`` once the client has left."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def receive(self) -> dict[str, Any]:
        """The next message as ASGI has it; "websocket.disconnect" once the client has left."""
        return dict(await self._socket.receive())

    async def close(self, code: int) -> None:
        """The end."""
        await self._socket.close(code)

    async def tell(self, kind: str, **fields: Any) -> None:
        """Send a message."""
        await self._socket.send_text(json.dumps({"type": kind, **fields}))

    async def tell_error(self, error: VoiceCloneError, **fields: Any) -> None:
        """Send an error, with the member that HTTP clients know, and the message where vLLM-Omni's look."""
        await self.tell("error", message=error.message, error=error_member(error), **fields)

    async def play(self, turn: Turn, index: int, stretch: Stretch) -> None:
        """Send stretch number ``index`` of ``turn`` as it is spoken."""
        started, config = stretch.started, turn.config
        place = {"utterance_index": turn.index, "sentence_index": index}
        async with aclosing(stretch.frames) as frames:
            encoder = StreamEncoder(
                config.response_format, started.sample_rate_hz, sample_rate_hz=config.sample_rate
            )
            try:
                await self.tell(
                    "audio.start",
                    **place,
                    sentence_text=stretch.text,
                    format=config.response_format.value,
                    sample_rate=encoder.sample_rate_hz,
                    channels=1,
                    engine=started.engine,
                    voice_id=started.voice_id or None,
                    language=started.language,
                    seed=started.seed,
                )
                async for frame in frames:
                    if not isinstance(frame, AudioFrame):
                        continue
                    await self._sound(await asyncio.to_thread(encoder.encode, frame.samples))
                    turn.sent_ms += 1000 * len(frame.samples) / started.sample_rate_hz
                await self._sound(await asyncio.to_thread(encoder.finish))
            finally:
                encoder.close()
        duration_ms = round(1000 * encoder.frames / encoder.sample_rate_hz)
        await self.tell("audio.done", **place, duration_ms=duration_ms)

    async def _sound(self, data: bytes) -> None:
        if data:
            await self._socket.send_bytes(data)
