"""A Python client with the same methods over a Ray handle and over HTTP.

::

    with HandleClient() as tts:                       # a graph that runs on the connected Ray cluster
    with HttpClient("http://localhost:8000") as tts:  # or any server
        voice = tts.enrol("anna", "anna.wav", consent="I agree to the cloning of my voice.")
        tts.speak("Hello there.", voice=voice.id).save("hello.wav")

Methods block and may be called from any thread, a notebook's included. Each raises ``VoiceCloneError``.
"""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack
from urllib.parse import quote

import httpx
import numpy as np
import soundfile
from anyio.from_thread import start_blocking_portal

from engines.contract import Samples
from serve_app.errors import EngineFailed, Unavailable, from_wire
from serve_app.protocol import AudioFrame, EnrolRequest, SpeechRequest, SpeechStarted

#: Suffixes of the files that ``Speech.save`` writes.
SAVED_AS = (".wav", ".flac", ".mp3", ".ogg")

Recording = str | Path | bytes
"""A path to an audio file, or the bytes of one."""


@dataclass(frozen=True, slots=True)
class VoiceInfo:
    """A voice."""

    id: str
    name: str
    #: Empty if unknown.
    language: str
    #: Of its recording; 0 for a voice that comes with an engine.
    duration_s: float
    warnings: tuple[str, ...]
    #: The only engine that speaks with it; empty for an enrolled voice.
    engine: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served engine."""

    name: str
    ready: bool
    languages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Speech:
    """Spoken audio: mono float32 ``samples`` at ``sample_rate_hz``, and what spoke them."""

    samples: Samples
    sample_rate_hz: int
    engine: str
    voice_id: str
    seed: int

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.sample_rate_hz

    def save(self, path: str | Path) -> Path:
        """Write a file; the suffix, one of ``SAVED_AS``, chooses the format."""
        soundfile.write(path, self.samples, self.sample_rate_hz)
        return Path(path)

    def _repr_html_(self) -> str:
        """A player, where a notebook shows the value."""
        wav = io.BytesIO()
        soundfile.write(wav, self.samples, self.sample_rate_hz, format="WAV")
        source = base64.b64encode(wav.getvalue()).decode()
        return f'<audio controls src="data:audio/wav;base64,{source}"></audio>'


class SpeechStream:
    """Audio while it is spoken: iterate it for float32 samples. ``started`` says what speaks."""

    def __init__(self, started: SpeechStarted, chunks: Iterator[Samples]) -> None:
        self.started = started
        self._chunks = chunks

    def __iter__(self) -> Iterator[Samples]:
        return self._chunks


class SpeechOptions(TypedDict, total=False):
    """What may be said about a speech."""

    #: Served engine; default the server's.
    engine: str | None
    #: BCP-47; default found from the text.
    language: str | None
    #: 0.25 to 4, default 1.
    speed: float
    #: The same seed gives the same samples; default drawn.
    seed: int | None
    #: The engine's own options.
    engine_options: Mapping[str, Any]


class Client(ABC):
    """What both clients can do."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Let go of connections and threads."""

    def enrol(
        self,
        name: str,
        recording: Recording,
        *,
        consent: str = "",
        transcript: str = "",
        language: str = "",
        replace: bool = False,
    ) -> VoiceInfo:
        """Make a voice of a recording of one speaker."""
        audio = recording if isinstance(recording, bytes) else Path(recording).read_bytes()
        return self._enrol(
            EnrolRequest(
                name,
                audio,
                consent=consent,
                transcript=transcript,
                language=language,
                replace=replace,
            )
        )

    @abstractmethod
    def _enrol(self, request: EnrolRequest) -> VoiceInfo:
        """Send an enrolment."""

    @abstractmethod
    def voices(self) -> list[VoiceInfo]:
        """All voices in order of enrolment, and behind them those that come with an engine."""

    @abstractmethod
    def delete_voice(self, voice: str) -> None:
        """Remove a voice by id or name."""

    @abstractmethod
    def models(self) -> list[ModelInfo]:
        """The served engines."""

    @abstractmethod
    def ready(self) -> None:
        """Return if speech can be asked for, raise if not."""

    @abstractmethod
    def _open(self, request: SpeechRequest) -> AbstractContextManager[SpeechStream]:
        """Start a speech; leaving the context ends it."""

    def stream(
        self, text: str, voice: str, **options: Unpack[SpeechOptions]
    ) -> AbstractContextManager[SpeechStream]:
        """Speak, handing out audio as it comes; leaving the context stops the engine."""
        return self._open(
            SpeechRequest(
                text,
                voice,
                model=options.get("engine"),
                language=options.get("language"),
                speed=options.get("speed", 1.0),
                seed=options.get("seed"),
                options=options.get("engine_options", {}),
            )
        )

    def speak(self, text: str, voice: str, **options: Unpack[SpeechOptions]) -> Speech:
        """Speak ``text`` in ``voice`` (id, name or alias) and wait for all of it."""
        with self.stream(text, voice, **options) as stream:
            samples = np.concatenate(list(stream))
        started = stream.started
        return Speech(samples, started.sample_rate_hz, started.engine, started.voice_id, started.seed)


class HandleClient(Client):
    """Talks to the router of a running graph over its Ray handle; needs a process connected to that Ray."""

    def __init__(self, app_name: str | None = None) -> None:
        # Ray is imported here so that the HTTP client works where Ray is not installed.
        from serve_app.app import APP_NAME, router_handle
        from serve_app.handle import RouterHandle

        self._closing = ExitStack()
        # Handles refuse to block inside a running event loop, and a notebook has one: a loop of our own.
        self._portal = self._closing.enter_context(start_blocking_portal())
        self._router = RouterHandle(router_handle(app_name or APP_NAME))

    def close(self) -> None:
        """End the thread that talks to Ray."""
        self._closing.close()

    def _enrol(self, request: EnrolRequest) -> VoiceInfo:
        return _voice_info(self._portal.call(self._router.enrol, request).model_dump())

    def voices(self) -> list[VoiceInfo]:
        """All voices in order of enrolment, and behind them those that come with an engine."""
        found: list[VoiceInfo] = []
        while True:
            after = found[-1].id if found else None
            page = self._portal.call(self._router.voices, "public", 1000, after)
            found.extend(_voice_info(voice.model_dump()) for voice in page.voices)
            found.extend(
                VoiceInfo(voice.id, voice.name, "", 0.0, (), voice.engine) for voice in page.built_in
            )
            if not page.has_more:
                return found

    def delete_voice(self, voice: str) -> None:
        """Remove a voice by id or name."""
        self._portal.call(self._router.delete_voice, voice)

    def models(self) -> list[ModelInfo]:
        """The served engines."""
        models = self._portal.call(self._router.models)
        return [
            ModelInfo(name, facts is not None, facts.languages if facts else ())
            for name, facts in models.items()
        ]

    def ready(self) -> None:
        """Return if speech can be asked for, raise if not."""
        self._portal.call(self._router.ready)

    @contextmanager
    def _open(self, request: SpeechRequest) -> Iterator[SpeechStream]:
        events = self._router.speak(request)
        try:
            started = self._portal.call(anext, events)
            if not isinstance(started, SpeechStarted):
                raise EngineFailed("The router sent audio before it said whose.")
            yield SpeechStream(started, self._frames(events))
        finally:
            self._portal.call(events.aclose)

    def _frames(self, events: AsyncGenerator[SpeechStarted | AudioFrame, None]) -> Iterator[Samples]:
        while True:
            try:
                event = self._portal.call(anext, events)
            except StopAsyncIteration:
                return
            if isinstance(event, AudioFrame):
                yield event.samples


class HttpClient(Client):
    """Talks to a server over HTTP. ``base_url`` is the server's root, without ``/v1``."""

    def __init__(self, base_url: str = "http://127.0.0.1:8000", *, timeout_s: float = 60.0) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _enrol(self, request: EnrolRequest) -> VoiceInfo:
        form = {
            "name": request.name,
            "consent": request.consent,
            "ref_text": request.transcript,
            "language": request.language,
            "replace": str(request.replace).lower(),
        }
        sample = {"audio_sample": ("sample", request.audio)}
        return _voice_info(self._json("POST", "/v1/audio/voices", data=form, files=sample))

    def voices(self) -> list[VoiceInfo]:
        """All voices in order of enrolment, and behind them those that come with an engine."""
        found: list[VoiceInfo] = []
        while True:
            query = {"limit": "1000", **({"after": found[-1].id} if found else {})}
            page = self._json("GET", "/v1/audio/voices", params=query)
            found.extend(_voice_info(voice) for voice in page["data"])
            if not page["has_more"]:
                return found

    def delete_voice(self, voice: str) -> None:
        """Remove a voice by id or name."""
        self._json("DELETE", f"/v1/audio/voices/{quote(voice, safe='')}")

    def models(self) -> list[ModelInfo]:
        """The served engines."""
        return [
            ModelInfo(model["id"], model["status"] == "ready", tuple(model.get("languages", ())))
            for model in self._json("GET", "/v1/models")["data"]
        ]

    def ready(self) -> None:
        """Return if speech can be asked for, raise if not."""
        self._json("GET", "/health/ready")

    @contextmanager
    def _open(self, request: SpeechRequest) -> Iterator[SpeechStream]:
        body = {
            "input": request.text,
            "voice": request.voice,
            "model": request.model,
            "language": request.language,
            "speed": request.speed,
            "seed": request.seed,
            "engine_options": dict(request.options),
            # WAV keeps the engine's own rate; bare PCM is always 24 kHz.
            "response_format": "wav",
        }
        with _transport_errors(), self._http.stream("POST", "/v1/audio/speech", json=body) as response:
            if response.is_error:
                response.read()
                raise from_wire(response.status_code, _json_of(response))
            sample_rate_hz, chunks = _read_wav(response.iter_bytes())
            headers = response.headers
            yield SpeechStream(
                SpeechStarted(
                    engine=headers["X-Engine"],
                    voice_id=headers["X-Voice-Id"],
                    language=headers["X-Language"],
                    sample_rate_hz=sample_rate_hz,
                    seed=int(headers["X-Seed"]),
                    utterances=int(headers["X-Utterances"]),
                ),
                chunks,
            )

    def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        with _transport_errors():
            response = self._http.request(method, path, **arguments)
        if response.is_error:
            raise from_wire(response.status_code, _json_of(response))
        answer: dict[str, Any] = response.json()
        return answer


@contextmanager
def _transport_errors() -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        raise Unavailable(
            f"The server did not answer, or broke off ({type(error).__name__}). "
            "Check that it runs: voice-clone doctor."
        ) from error


def _json_of(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _voice_info(fields: Mapping[str, Any]) -> VoiceInfo:
    return VoiceInfo(
        id=fields["id"],
        name=fields["name"],
        language=fields.get("language") or "",
        duration_s=fields.get("duration_s", 0.0),
        warnings=tuple(fields.get("warnings", ())),
        engine=fields.get("model", ""),
    )


_WAV_HEADER_BYTES = 44
_WAV_RATE_OFFSET = 24


def _read_wav(parts: Iterator[bytes]) -> tuple[int, Iterator[Samples]]:
    """Sample rate in Hz, and the samples, of a streamed 16-bit mono WAV."""
    held = b""
    while len(held) < _WAV_HEADER_BYTES:
        held += next(parts)
    sample_rate_hz = int.from_bytes(held[_WAV_RATE_OFFSET : _WAV_RATE_OFFSET + 4], "little")
    return sample_rate_hz, _from_int16(chain([held[_WAV_HEADER_BYTES:]], parts))


def _from_int16(parts: Iterable[bytes]) -> Iterator[Samples]:
    held = b""
    for part in parts:
        held += part
        whole = len(held) // 2 * 2
        if whole:
            yield np.frombuffer(held[:whole], "<i2").astype(np.float32) / 32768.0
            held = held[whole:]
