"""``WS /v1/audio/speech/stream``: text in while it is written, audio out while it is spoken.

For an agent whose words come from a language model: the first sentence is heard while the next is written.
The messages are those of vLLM-Omni, and three more (``input.flush``, ``input.interrupt``,
``session.interrupted``). Text frames hold JSON objects with a ``type``; binary frames, only from the server,
hold audio.

From the client:

=====================  ====================================================================================
``session.config``     first of all, and again between turns: the fields of ``SpeechOptions`` and
                       ``split_granularity`` (``sentence``, ``clause``, ``none``); ``response_format``
                       is ``pcm`` if left out
``input.text``         ``text``: the next piece of the turn, of any size; an empty one keeps the session open
``input.flush``        speak what is written so far, though the sentence may not be finished
``input.done``         the turn is written; the next ``input.text`` begins another
``input.interrupt``    be silent: drop the audio and the text not spoken yet, of this turn and of those that
                       wait; the next ``input.text`` begins another
``session.close``      the end, at once
=====================  ====================================================================================

From the server:

=======================  ==================================================================================
``audio.start``          audio follows: ``utterance_index`` (of the turn), ``sentence_index`` (of the stretch
                         of text within it), ``sentence_text``, ``format``, ``sample_rate``, ``channels``,
                         ``engine``, ``voice_id``, ``language``, ``seed``
binary frames            one encoded file in slices; ``pcm`` of one turn is one sound without seams
``audio.done``           the end of that file: both indices, ``duration_ms``
``session.done``         the turn is spoken: ``utterance_index``, ``total_sentences``, and ``failed`` if an
                         ``error`` ended it
``session.interrupted``  nothing that was written before is heard any more: ``utterance_index``, and
                         ``sent_ms`` of the turn that was being spoken
``error``                ``message``, ``error`` as over HTTP, and ``utterance_index`` if it ended that turn
=======================  ==================================================================================

A stretch of text is whatever has been completed since the last one was taken, at the beginning of a turn
mostly its first sentence. Each is a request to the router like any other, counted by the limits, and two are
under way at a time. All of a turn is spoken by one engine in one language. An error in a turn ends the turn,
an unreadable message nothing; the session goes on. Whatever ends the session ends the speeches behind it,
down to the engine.

What is read is bounded by ``live.max_pending_chars``; what is sent, by the look-ahead of the router, which
waits for the socket. Code of the close frame: 1000 as asked, 1008 no configuration in time or idle, 1009 a
frame too large or too much text, 1011 a defect of ours, 1012 the server stops, 1013 too many sessions.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import Field, ValidationError
from ulid import ULID

from serve_app.audio.encode import AudioFormat
from serve_app.config import Settings
from serve_app.errors import (
    BodyTooLarge,
    InputTooLong,
    InternalError,
    InvalidJson,
    InvalidRequest,
    InvalidValue,
    MissingField,
    Overloaded,
    ShuttingDown,
    VoiceCloneError,
)
from serve_app.handle import RouterHandle
from serve_app.ingress.callers import Callers
from serve_app.ingress.data_url import encoded_length
from serve_app.ingress.live_socket import LiveSocket
from serve_app.ingress.live_turn import Stretches, Turn
from serve_app.ingress.problems import from_validation
from serve_app.ingress.speech_body import SpeechOptions, well_formed
from serve_app.ingress.written_text import Granularity
from serve_app.protocol import OneShotReference, SpeechRequest

logger = logging.getLogger("ray.serve")

_MAX_INPUT_FRAME_CHARS = 128 << 10
#: Turns that may wait behind the one that is spoken.
_MAX_WAITING_TURNS = 64


class LiveConfig(SpeechOptions):
    """What ``session.config`` says."""

    response_format: AudioFormat = Field(default=AudioFormat.PCM, description="Container of the audio.")
    split_granularity: Granularity = Field(
        default=Granularity.SENTENCE, description="How much text has to be complete before it is spoken."
    )


class _SessionEnds(Exception):
    """The server ends the session, with this error and this code of the close frame."""

    def __init__(self, error: VoiceCloneError, code: int) -> None:
        super().__init__(error.message)
        self.error = error
        self.code = code


def routes(router: RouterHandle, callers: Callers, settings: Settings) -> APIRouter:
    """The live dialect over ``router``."""
    api = APIRouter()
    open_sessions: set[_Live] = set()

    @api.websocket("/v1/audio/speech/stream")
    async def stream(socket: WebSocket) -> None:
        await socket.accept()
        live = _Live(socket, router, callers, settings)
        # Who has left is told nothing.
        with suppress(WebSocketDisconnect):
            if len(open_sessions) >= settings.live.max_sessions:
                await live.refuse(
                    Overloaded("Too many live sessions are open. Try again later.", retry_after_s=5.0)
                )
                return
            open_sessions.add(live)
            try:
                await live.run()
            finally:
                open_sessions.discard(live)

    return api


class _Live:
    """One session: a reader that takes messages in, and a speaker that speaks the turns they make."""

    def __init__(self, socket: WebSocket, router: RouterHandle, callers: Callers, settings: Settings) -> None:
        self._socket = LiveSocket(socket)
        self._scope = socket.scope
        self._router = router
        self._callers = callers
        self._limits = settings.limits
        self._live = settings.live
        self._max_upload_bytes = settings.voices.reference.max_upload_bytes
        self._id = f"live_{ULID()}"
        self._config: LiveConfig | None = None
        self._reference: OneShotReference | None = None
        #: The turn that is being written, if one is, and all that are not spoken to their end.
        self._writing: Turn | None = None
        self._turns: list[Turn] = []
        self._turn_came = asyncio.Event()
        self._speaking: asyncio.Task[int] | None = None
        self._sounding = False
        self._next_index = 0

    async def run(self) -> None:
        """Serve the session to its end."""
        speaker = asyncio.create_task(self._speak())
        try:
            asked_to_close = await self._read(speaker)
            await self._end(speaker)
            if asked_to_close:
                await self._socket.close(1000)
        except WebSocketDisconnect:
            return
        except _SessionEnds as end:
            await self._end(speaker)
            await self.refuse(end.error, end.code)
        except Exception:
            # A defect: logged, and told without its details.
            logger.exception("Defect in a live session")
            await self._end(speaker)
            await self.refuse(
                InternalError("Something went wrong on our side. The log has the details."), 1011
            )
        finally:
            await self._end(speaker)

    async def refuse(self, error: VoiceCloneError, code: int = 1013) -> None:
        """Say why, and close."""
        await self._socket.tell_error(error)
        await self._socket.close(code)

    @staticmethod
    async def _end(speaker: asyncio.Task[None]) -> None:
        """Stop speaking, down to the engine."""
        speaker.cancel()
        await asyncio.wait({speaker})

    # --- what comes in ---

    async def _read(self, speaker: asyncio.Task[None]) -> bool:
        """Take messages until the client has left (False) or wants to (True), or the speaker has failed."""
        while True:
            receiving = asyncio.create_task(self._socket.receive())
            try:
                message = await self._message(receiving, speaker)
            finally:
                receiving.cancel()
            if message["type"] == "websocket.disconnect":
                return False
            if not await self._take(message.get("text")):
                return True

    async def _message(self, receiving: asyncio.Task[Any], speaker: asyncio.Task[None]) -> dict[str, Any]:
        """The next message. Raises ``_SessionEnds`` if it takes too long, and what the speaker has raised."""
        wait_s = self._live.config_timeout_s if self._config is None else self._live.idle_timeout_s
        while True:
            await asyncio.wait({receiving, speaker}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if speaker.done():
                speaker.result()
            if receiving.done():
                message: dict[str, Any] = receiving.result()
                return message
            if self._config is None:
                raise _SessionEnds(
                    InvalidRequest(f"No session.config came within {wait_s:g} s. Send it first."), 1008
                )
            # Whoever listens, or waits for what was asked for, is not idle.
            if not self._sounding and not any(turn.ended for turn in self._turns):
                raise _SessionEnds(
                    InvalidRequest(
                        f"Nothing was said for {wait_s:g} s. Open a new session, and keep it with an empty "
                        "input.text."
                    ),
                    1008,
                )

    async def _take(self, raw: str | None) -> bool:
        """Act on one message; False if it is the last. An unreadable one is answered and changes nothing."""
        try:
            return await self._act(self._parse(raw))
        except VoiceCloneError as error:
            await self._socket.tell_error(error)
            return True

    def _parse(self, raw: str | None) -> dict[str, Any]:
        largest = self._limits.max_body_bytes + encoded_length(self._max_upload_bytes)
        if raw is not None and len(raw) > largest:
            raise _SessionEnds(BodyTooLarge(f"A frame has at most {largest} characters. Send less."), 1009)
        try:
            message = json.loads(raw or "")
        except ValueError as error:
            raise InvalidJson("This is not JSON. Send text frames with one JSON object each.") from error
        if not isinstance(message, dict):
            raise InvalidJson("This is not a JSON object. Send text frames with one JSON object each.")
        if message.get("type") != "session.config" and len(raw or "") > _MAX_INPUT_FRAME_CHARS:
            raise _SessionEnds(
                BodyTooLarge(
                    f"A frame has at most {_MAX_INPUT_FRAME_CHARS} characters. Send smaller pieces."
                ),
                1009,
            )
        return message

    async def _act(self, message: dict[str, Any]) -> bool:
        kind = message.pop("type", None)
        if kind == "session.config":
            self._configure(message)
        elif kind == "session.close":
            return False
        elif self._config is None:
            raise InvalidRequest("The session is not configured. Send session.config first.")
        elif kind == "input.text":
            self._write(message, self._config)
        elif kind == "input.flush":
            if self._writing is not None:
                self._writing.flush()
        elif kind == "input.done":
            # A turn without a word is a turn: whoever waits for its end gets it.
            self._turn(self._config).end()
            self._writing = None
        elif kind == "input.interrupt":
            await self._interrupt()
        else:
            raise InvalidValue(
                "Unknown type of message. Send session.config, input.text, input.flush, input.done, "
                "input.interrupt or session.close.",
                param="type",
            )
        return True

    def _configure(self, fields: dict[str, Any]) -> None:
        if self._writing is not None:
            raise InvalidRequest("A turn is being written. Send input.done before another session.config.")
        try:
            config = LiveConfig.model_validate(fields)
        except ValidationError as error:
            raise from_validation(error.errors(include_url=False, include_input=False)) from error
        config.check()
        reference = config.reference(self._max_upload_bytes)
        if (
            config.sample_rate is not None
            and config.sample_rate not in config.response_format.sample_rates_hz
        ):
            rates = ", ".join(map(str, config.response_format.sample_rates_hz))
            raise InvalidValue(
                f"'{config.response_format}' cannot have this sample rate. Choose one of {rates}.",
                param="sample_rate",
            )
        self._config, self._reference = config, reference

    def _write(self, message: dict[str, Any], config: LiveConfig) -> None:
        text = message.get("text")
        if text is None:
            raise MissingField("'text' is missing. Add it to input.text.", param="text")
        if not isinstance(text, str):
            raise InvalidValue("'text' is not a string. Send input.text with text.", param="text")
        if not text:
            return
        text = well_formed(text)
        turn = self._turn(config)
        limit = self._live.max_pending_chars
        if sum(waiting.pending for waiting in self._turns) + len(text) > limit:
            raise _SessionEnds(
                InputTooLong(f"More than {limit} characters wait to be spoken. Send them as they are heard."),
                1009,
            )
        turn.write(text)

    def _turn(self, config: LiveConfig) -> Turn:
        """The turn that is being written; a new one if none is."""
        if self._writing is None:
            if len(self._turns) > _MAX_WAITING_TURNS:
                raise _SessionEnds(
                    InputTooLong("Too many turns wait to be spoken. Wait for session.done."), 1009
                )
            self._writing = Turn(self._next_index, config, self._reference, config.split_granularity)
            self._next_index += 1
            self._turns.append(self._writing)
            self._turn_came.set()
        return self._writing

    async def _interrupt(self) -> None:
        """Drop everything that was written and is not heard yet."""
        spoken, self._turns, self._writing = self._turns[:1], [], None
        if self._speaking is not None:
            self._speaking.cancel()
            # Its frames are closed, and with them the engine's work, before the client is told.
            await asyncio.wait({self._speaking})
        await self._socket.tell(
            "session.interrupted",
            utterance_index=self._next_index - 1,
            sent_ms=round(spoken[0].sent_ms) if spoken else 0,
        )

    # --- what goes out ---

    async def _speak(self) -> None:
        """Speak turn after turn."""
        while True:
            while not self._turns:
                self._turn_came.clear()
                await self._turn_came.wait()
            turn = self._turns[0]
            self._speaking = asyncio.create_task(self._speak_turn(turn))
            try:
                await asyncio.wait({self._speaking})
            finally:
                self._speaking.cancel()
                await asyncio.wait({self._speaking})
            if self._speaking.cancelled():
                continue  # interrupted
            stretches = self._speaking.result()
            if turn not in self._turns:
                continue  # interrupted when it had just ended
            self._turns.remove(turn)
            done = {"utterance_index": turn.index, "total_sentences": stretches}
            await self._socket.tell("session.done", **done, **({"failed": True} if turn.failed else {}))

    async def _speak_turn(self, turn: Turn) -> int:
        """Speak a turn while it is written; says in how many stretches. An error ends it and is told."""
        stretches = Stretches(self._router, turn, self._request(turn), self._limits.max_input_chars)
        spoken = 0
        try:
            while (stretch := await stretches.next()) is not None:
                self._sounding = True
                try:
                    await self._socket.play(turn, spoken, stretch)
                finally:
                    self._sounding = False
                spoken += 1
        except ShuttingDown as error:
            raise _SessionEnds(error, 1012) from error
        except VoiceCloneError as error:
            turn.fail()
            await self._socket.tell_error(error, utterance_index=turn.index)
        finally:
            await stretches.close()
        return spoken

    def _request(self, turn: Turn) -> SpeechRequest:
        caller = self._callers.caller(self._scope)
        priority = self._callers.priority(caller, turn.config.priority)
        return turn.config.request("", f"{self._id}-{turn.index}", caller, priority, turn.reference)
