"""A server that behaves as GPT-SoVITS's ``api_v2.py`` does (commit 48b1a01), with tones in place of speech.

What is reproduced, failures included; the pipeline's part is marked *:

1.  ``POST /tts`` takes JSON whose fields all have defaults; ``GET /tts`` takes ``text_lang`` and fails with
    500 where it is missing. ``/control`` and the weight routes are GET only (a POST is 405). ``/`` is 404.
2.  Checks in this order, each 400 ``{"message"}``: ``ref_audio_path``, ``text``, ``text_lang`` and
    ``prompt_lang`` present and of this version (compared in lower case), ``media_type``,
    ``text_split_method``, ``streaming_mode``.
3.  * The pipeline compares languages as they are: a POST with "EN" passes the checks and fails an assertion,
    400 ``{"message": "tts failed", "Exception": ""}``.
4.  * A reference that does not exist, or is not 48 000 to 160 000 samples at 16 kHz, is 400 "tts failed" with
    the reason; streamed, the same is a 200 whose body drops at once. v3 and v4 refuse an empty
    ``prompt_text`` so too.
5.  * The reference is remembered by its path alone: another recording under the same path is not read.
6.  * A failure while inferring yields one second of zeros at 16 000 Hz before it raises. Without streaming
    that is the whole answer, 200 and complete. Streamed, the connection drops after it.
7.  * A text with nothing to say gives the same second, without a drop; streamed, no bytes at all.
8.  * Where nothing was made, or the pipeline was stopped, there is one second of zeros at its own rate.
9.  Without streaming the event loop is blocked: nobody else is answered meanwhile. Streams run in threads and
    overlap.
10. A streamed WAV is a header of 44 bytes with size 0, then bare samples. Its rate is the first chunk's.
11. ``streaming_mode`` 1 yields fragments with ``fragment_interval`` of silence after each, 2 and 3 chunks; v3
    and v4 take 2 and 3 for 1.
12. Weights are global, set by ``GET /set_gpt_weights`` and ``/set_sovits_weights``; 400 with the reason if
    the file is not there. A restarted process has the weights of its configuration.
13. Rates: 32 kHz, v3 24 kHz, v4 48 kHz; int16 mono. Seeds of 2**32 and more fail in numpy *before* inference:
    400.

Texts choose faults: ``[none]`` makes nothing, ``[fail]`` fails at once, ``[late]`` after the first chunk,
``[slow]`` takes ``slow_s`` before each part.
"""

from __future__ import annotations

import hashlib
import io
import socket
import threading
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

_SPLIT_METHODS = ("cut0", "cut1", "cut2", "cut3", "cut4", "cut5")
_LANGUAGES = ("auto", "auto_yue", "en", "zh", "ja", "yue", "ko", "all_zh", "all_ja", "all_yue", "all_ko")
_V1_LANGUAGES = ("auto", "en", "zh", "ja", "all_zh", "all_ja")
_RATES_HZ = {"v3": 24_000, "v4": 48_000}
#: Sound of one letter.
_LETTER_S = 0.02


class TtsRequest(BaseModel):
    """The body of ``POST /tts``, as upstream declares it."""

    text: str | None = None
    text_lang: str | None = None
    ref_audio_path: str | None = None
    aux_ref_audio_paths: list[str] | None = None
    prompt_lang: str | None = None
    prompt_text: str = ""
    top_k: int = 15
    top_p: float = 1
    temperature: float = 1
    text_split_method: str = "cut5"
    batch_size: int = 1
    batch_threshold: float = 0.75
    split_bucket: bool = True
    speed_factor: float = 1.0
    fragment_interval: float = 0.3
    seed: int = -1
    media_type: str = "wav"
    streaming_mode: bool | int = False
    parallel_infer: bool = True
    repetition_penalty: float = 1.35
    sample_steps: int = 32
    super_sampling: bool = False
    overlap_length: int = 2
    min_chunk_length: int = 16


class Pipeline:
    """The model's part: global state, no locks."""

    def __init__(self, version: str, slow_s: float) -> None:
        self.version = version
        self.languages = _V1_LANGUAGES if version == "v1" else _LANGUAGES
        self.rate_hz = _RATES_HZ.get(version, 32_000)
        self.weights = {"gpt": "configured.ckpt", "sovits": "configured.pth"}
        self.reference_path: str | None = None
        self.reference = b""
        self.slow_s = slow_s
        #: Requests in the middle of a step at the same time, now and at most.
        self.active = self.most_active = 0

    def run(self, request: dict[str, Any]) -> Iterator[tuple[int, np.ndarray]]:
        """Chunks with their rate, as ``TTS.run`` yields them."""
        np.random.seed(request["seed"] if request["seed"] != -1 else 1)
        assert request["text_lang"] in self.languages
        if request["prompt_text"]:
            assert request["prompt_lang"] in self.languages
        elif self.version in ("v3", "v4"):
            raise ValueError("prompt_text cannot be empty when using SoVITS_V3")
        self._set_reference(request["ref_audio_path"])
        text = request["text"]
        mode = int(request["streaming_mode"])
        if not any(char.isalnum() for char in text):
            if not mode:
                yield 16_000, np.zeros(16_000, np.int16)
            return
        steps = self._speak(text, mode, request)
        try:
            while (chunk := self._step(steps)) is not None:
                yield chunk
        except RuntimeError:
            yield 16_000, np.zeros(16_000, np.int16)
            raise

    def _step(self, steps: Iterator[tuple[int, np.ndarray]]) -> tuple[int, np.ndarray] | None:
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            return next(steps, None)
        finally:
            self.active -= 1

    def _speak(self, text: str, mode: int, request: dict[str, Any]) -> Iterator[tuple[int, np.ndarray]]:
        if "[slow]" in text:
            time.sleep(self.slow_s)
        if "[fail]" in text:
            raise RuntimeError("probability tensor contains either inf, nan or element < 0")
        sound = self.tone(request)
        if "[none]" in text:
            yield self.rate_hz, np.zeros(self.rate_hz, np.int16)
            return
        if not mode:
            yield self.rate_hz, sound
            return
        pause = np.zeros(round(request["fragment_interval"] * self.rate_hz), np.int16)
        if mode == 1 or self.version in ("v3", "v4"):
            parts = [sound[: len(sound) // 2], pause, sound[len(sound) // 2 :], pause]
        else:
            # Odd sizes: a chunk of HTTP may end in the middle of a sample.
            parts = [*np.array_split(sound, 4), pause]
        for index, part in enumerate(parts):
            if index and "[late]" in text:
                raise RuntimeError("CUDA error: device-side assert triggered")
            if index and "[slow]" in text:
                time.sleep(self.slow_s)
            yield self.rate_hz, part

    def tone(self, request: dict[str, Any]) -> np.ndarray:
        """What a request sounds like: everything that should change it does."""
        heard = [
            request["text"],
            request["seed"],
            request["prompt_text"],
            request["prompt_lang"],
            request["top_k"],
        ]
        digest = hashlib.sha256(repr([*heard, self.weights, self.reference]).encode()).digest()
        length_s = _LETTER_S * len(request["text"]) / request["speed_factor"]
        time_s = np.arange(round(length_s * self.rate_hz)) / self.rate_hz
        pitch_hz = 150 + 300 * digest[0] / 255 + digest[1]
        return (8000 * np.sin(2 * np.pi * pitch_hz * time_s + 0.1)).astype(np.int16)

    def _set_reference(self, path: str) -> None:
        if path == self.reference_path:
            return
        if not Path(path).exists():
            raise ValueError(f"{path} not exists")
        samples, rate_hz = soundfile.read(path)
        if not 48_000 <= len(samples) * 16_000 / rate_hz <= 160_000:
            raise OSError("参考音频在3~10秒范围外，请更换！")
        self.reference = hashlib.sha256(Path(path).read_bytes()).digest()
        self.reference_path = path

    def set_weights(self, kind: str, path: str) -> None:
        """Load a file; any name that begins with "missing" is not there."""
        if path.startswith("missing"):
            raise FileNotFoundError(f"[Errno 2] No such file or directory: '{path}'")
        self.weights[kind] = path


class ApiV2TestServer:
    """The server on a port of its own. Stopped and started again, it has forgotten what it was told."""

    def __init__(self, version: str = "v2ProPlus", *, slow_s: float = 1.0) -> None:
        self._version = version
        self._slow_s = slow_s
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        #: Bodies of all `POST /tts` that were not probes, and all weight switches, in order.
        self.requests: list[dict[str, Any]] = []
        self.switches: list[tuple[str, str]] = []
        self.probes = 0
        self.pipeline = Pipeline(version, slow_s)
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> ApiV2TestServer:
        """Listen. Returns when it does."""
        self.pipeline = Pipeline(self._version, self._slow_s)
        config = uvicorn.Config(
            self._app(), host="127.0.0.1", port=self.port, log_level="critical", lifespan="off"
        )
        self._server = server = uvicorn.Server(config)
        self._thread = threading.Thread(target=server.run, daemon=True)
        self._thread.start()
        while not server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """As a crash: no answer that is under way is finished."""
        if self._server is None or self._thread is None:
            return
        self._server.force_exit = self._server.should_exit = True
        self._thread.join()
        self._server = self._thread = None

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/tts")
        async def tts_post(request: TtsRequest) -> Response:
            fields = request.model_dump()
            if fields["ref_audio_path"]:
                self.requests.append(fields)
            else:
                self.probes += 1
            return self._tts(fields)

        @app.get("/tts")
        async def tts_get(text_lang: str | None = None, prompt_lang: str | None = None) -> Response:
            text_lang, prompt_lang = text_lang.lower(), prompt_lang.lower()  # type: ignore[union-attr]
            return self._tts(TtsRequest(text_lang=text_lang, prompt_lang=prompt_lang).model_dump())

        @app.get("/set_gpt_weights")
        async def gpt(weights_path: str | None = None) -> Response:
            return self._switch("gpt", weights_path)

        @app.get("/set_sovits_weights")
        async def sovits(weights_path: str | None = None) -> Response:
            return self._switch("sovits", weights_path)

        @app.get("/control")
        async def control(command: str | None = None) -> Response:
            return JSONResponse({"message": "command is required"}, 400)

        return app

    def _switch(self, kind: str, path: str | None) -> Response:
        if not path:
            return JSONResponse({"message": f"{kind} weight path is required"}, 400)
        self.switches.append((kind, path))
        try:
            self.pipeline.set_weights(kind, path)
        except OSError as error:
            return JSONResponse({"message": f"change {kind} weight failed", "Exception": str(error)}, 400)
        return JSONResponse({"message": "success"})

    def _tts(self, fields: dict[str, Any]) -> Response:
        if (refused := self._check(fields)) is not None:
            return JSONResponse({"message": refused}, 400)
        mode = fields["streaming_mode"]
        if mode not in (0, 1, 2, 3):
            return JSONResponse({"message": "the value of streaming_mode must be 0, 1, 2, 3(int)"}, 400)
        try:
            chunks = self.pipeline.run(fields)
            if mode:
                return StreamingResponse(_streamed(chunks), media_type="audio/wav")
            # On the event loop, as upstream does.
            rate_hz, sound = next(chunks)
            return Response(_wav(sound, rate_hz), media_type="audio/wav")
        except Exception as error:  # noqa: BLE001 - as upstream
            return JSONResponse({"message": "tts failed", "Exception": str(error)}, 400)

    def _check(self, fields: dict[str, Any]) -> str | None:
        for name in ("ref_audio_path", "text"):
            if not fields[name]:
                return f"{name} is required"
        for name in ("text_lang", "prompt_lang"):
            language = fields[name]
            if not language:
                return f"{name} is required"
            if language.lower() not in self.pipeline.languages:
                return f"{name}: {language} is not supported in version {self._version}"
        if fields["media_type"] not in ("wav", "raw", "ogg", "aac"):
            return f"media_type: {fields['media_type']} is not supported"
        if fields["text_split_method"] not in _SPLIT_METHODS:
            return f"text_split_method:{fields['text_split_method']} is not supported"
        return None


def _streamed(chunks: Iterator[tuple[int, np.ndarray]]) -> Iterator[bytes]:
    first = True
    for rate_hz, chunk in chunks:
        if first:
            first = False
            header = io.BytesIO()
            with wave.open(header, "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(rate_hz)
                file.writeframes(b"")
            yield header.getvalue()
        data = chunk.tobytes()
        # Sockets cut where they like: here in the middle of a sample.
        yield data[:333]
        yield data[333:]


def _wav(sound: np.ndarray, rate_hz: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, rate_hz, format="wav")
    return file.getvalue()
