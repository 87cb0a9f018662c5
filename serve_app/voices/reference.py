"""From uploaded bytes to a recording that a voice can be made of.

The guards, in the order in which they act:

1. size: the ingress stops reading a body over its limit, ``ReferenceReader.read`` looks again
2. container: magic bytes against a short list; names and headers sent by the client decide nothing
3. header: sample rate, channels, declared length
4. bounded decode: one block beyond the longest recording accepted, then it stops
5. process: the decoder runs in a short-lived one with its own memory, CPU and wall-clock limits
6. content: finite numbers, some speech, enough of it; what is poor but usable becomes a warning

All errors are those of ``serve_app.errors``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import numpy as np
import soundfile
import soxr
from pydantic import BaseModel, ConfigDict, Field

from engines.contract import Reference, Samples
from serve_app.errors import (
    AudioDecodeLimit,
    AudioTooLong,
    AudioTooShort,
    AudioUndecodable,
    BodyTooLarge,
    InternalError,
    NoSpeechDetected,
    UnsupportedAudio,
    VoiceCloneError,
)

__all__ = [
    "CheckedReference",
    "Container",
    "ReferenceLimits",
    "ReferenceReader",
    "decode_flac",
    "fingerprint_of",
    "sniff_container",
]

_log = logging.getLogger(__name__)

_ACCEPTED: Final = "Send WAV, FLAC, MP3, OGG (Opus or Vorbis), M4A or WebM."
#: Stored references go no higher: no engine here hears more, and it bounds their size.
_MAX_STORED_RATE_HZ: Final = 48_000
_FRAME_S: Final = 0.02
#: Silence kept around the speech, so that no breath or plosive is cut.
_MARGIN_S: Final = 0.1


class ReferenceLimits(BaseModel):
    """What is accepted as a reference recording, and what decoding it may cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_upload_bytes: int = Field(
        default=10 * 1024 * 1024, ge=1024, description="Largest upload in bytes, as sent."
    )
    min_reference_s: float = Field(
        default=1.0, gt=0, le=60, description="Least speech, after silence at both ends is cut."
    )
    max_reference_s: float = Field(default=30.0, gt=1, le=600, description="Longest recording.")
    max_recordings: int = Field(default=5, ge=1, le=50, description="Recordings of one voice.")
    max_total_s: float = Field(default=60.0, gt=1, le=600, description="Longest sum of all its recordings.")
    on_too_long: Literal["refuse", "trim"] = Field(
        default="refuse", description="A longer recording is refused, or its beginning is used."
    )
    max_decoded_bytes: int = Field(
        default=256 * 1024 * 1024, ge=1024 * 1024, description="Decoded size over all channels, float32."
    )
    decode_memory_bytes: int = Field(
        default=1024 * 1024 * 1024, ge=256 * 1024 * 1024, description="Address space of the decoder process."
    )
    decode_cpu_s: int = Field(default=20, ge=1, le=600, description="CPU seconds of the decoder process.")
    decode_timeout_s: float = Field(default=30.0, gt=0, le=600, description="Wall-clock limit of a decode.")
    max_concurrent_decodes: int = Field(
        default=2, ge=1, le=64, description="Decoder processes at a time; more uploads wait."
    )


class Container(StrEnum):
    """Audio containers that are accepted. The value is FFmpeg's name of the demuxer."""

    WAV = "wav"
    FLAC = "flac"
    MP3 = "mp3"
    OGG = "ogg"
    MP4 = "mp4"
    WEBM = "webm"


@dataclass(frozen=True, slots=True)
class CheckedReference:
    """A recording that passed all checks.

    ``samples``: mono float32, shape [n], exactly what ``flac`` decodes to. ``sample_rate_hz``: 8 000 to
    48 000. ``duration_s``: length in seconds. ``warnings``: sentences about what makes it a poor reference.
    ``fingerprint``: see ``fingerprint_of``. ``cuts``: see ``engines.contract.Reference``.
    """

    samples: Samples
    sample_rate_hz: int
    duration_s: float
    warnings: tuple[str, ...]
    flac: bytes
    fingerprint: str
    cuts: tuple[int, ...] = ()

    def as_reference(self, *, transcript: str = "", language: str = "") -> Reference:
        """What an engine takes."""
        return Reference(self.samples, self.sample_rate_hz, transcript, language, cuts=self.cuts)


def fingerprint_of(samples: Samples, sample_rate_hz: int) -> str:
    """SHA-256, in hex, of ``samples`` (float32 [n]) and their rate."""
    digest = hashlib.sha256(f"{sample_rate_hz}\n".encode())
    digest.update(np.ascontiguousarray(samples, dtype="<f4").data)
    return digest.hexdigest()


def decode_flac(flac: bytes) -> tuple[Samples, int]:
    """Decode a FLAC written here: float32 [n] and its rate. Raises ``AudioUndecodable``."""
    try:
        samples, sample_rate_hz = soundfile.read(io.BytesIO(flac), dtype="float32")
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        raise AudioUndecodable("The recording is damaged. Enrol the voice again.") from error
    if samples.ndim != 1 or not len(samples):
        raise AudioUndecodable("The recording is damaged. Enrol the voice again.")
    return samples, int(sample_rate_hz)


def sniff_container(data: bytes) -> Container:
    """Tell the container from its first bytes. Raises ``UnsupportedAudio`` for anything not accepted."""
    if data[:4] in {b"RIFF", b"RF64"} and data[8:12] == b"WAVE":
        return Container.WAV
    if data[:4] == b"fLaC":
        return Container.FLAC
    if data[:4] == b"OggS":
        return Container.OGG
    if data[4:8] == b"ftyp":
        return Container.MP4
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return Container.WEBM
    if data[:3] == b"ID3" or _is_mp3_frame(data[:4]):
        return Container.MP3
    raise UnsupportedAudio(f"This is not an audio file of an accepted kind. {_ACCEPTED}")


def _is_mp3_frame(head: bytes) -> bool:
    """An MPEG audio frame header of layer III with a valid bit rate and sample rate."""
    return (
        len(head) == 4
        and head[0] == 0xFF
        and head[1] & 0xE6 == 0xE2  # sync and layer III
        and head[1] & 0x18 != 0x08  # the reserved version
        and head[2] & 0xF0 != 0xF0
        and head[2] & 0x0C != 0x0C
    )


class ReferenceReader:
    """Turns uploads into checked references. One per process; ``read`` may run many times at once."""

    #: The decoder process.
    WORKER: ClassVar[tuple[str, ...]] = (
        sys.executable,
        "-P",
        str(Path(__file__).with_name("decode_worker.py")),
    )

    def __init__(
        self, limits: ReferenceLimits | None = None, *, worker_command: Sequence[str] = WORKER
    ) -> None:
        """Use ``limits``; ``worker_command`` is the decoder process, in other words its argv."""
        self.limits = limits or ReferenceLimits()
        self._worker_command = tuple(worker_command)
        self._turn = asyncio.Semaphore(self.limits.max_concurrent_decodes)

    async def read(self, data: bytes) -> CheckedReference:
        """Decode and check ``data``.

        Raises:
            BodyTooLarge: More bytes than accepted.
            UnsupportedAudio: Not one of the accepted containers or codecs.
            AudioUndecodable: Broken, or the decoder died over it.
            AudioTooLong: Longer than ``max_reference_s``.
            AudioDecodeLimit: Decoding needs more memory or time than allowed, or odd rates or channels.
            NoSpeechDetected: Silence, or nothing but noise.
            AudioTooShort: Less speech than ``min_reference_s``.
            InternalError: The decoder process could not be started.
        """
        if len(data) > self.limits.max_upload_bytes:
            raise _body_too_large(self.limits.max_upload_bytes)
        if not data:
            raise UnsupportedAudio(f"The file is empty. {_ACCEPTED}")
        container = sniff_container(data)
        async with self._turn:
            decoded = await self._decode(data, container)
        return await asyncio.to_thread(_check, decoded, self.limits)

    async def _decode(self, data: bytes, container: Container) -> _Decoded:
        worker = _Worker(self._worker_command, self.limits)
        try:
            return await asyncio.to_thread(worker.run, data, container)
        except asyncio.CancelledError:
            worker.kill()  # the thread sees its pipes close and ends
            raise


@dataclass(frozen=True, slots=True)
class _Decoded:
    samples: Samples
    sample_rate_hz: int
    channels: int
    peak: float | None
    bits: int
    trimmed: bool
    declared_s: float | None
    one_channel: bool


class _Worker:
    """One run of the decoder process.

    It is driven from a thread: replicas own event loops of several kinds, and not all of them can watch a
    child process.
    """

    def __init__(self, command: tuple[str, ...], limits: ReferenceLimits) -> None:
        self._command = command
        self._limits = limits
        self._guard = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._timed_out = False

    def kill(self) -> None:
        with self._guard:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def run(self, data: bytes, container: Container) -> _Decoded:
        with self._guard:
            if self._killed:
                raise AudioUndecodable("The upload was abandoned.")
            self._process = self._start(container)
        process = self._process
        alarm = threading.Timer(self._limits.decode_timeout_s, self._time_out)
        alarm.daemon = True
        alarm.start()
        try:
            output, errors = self._exchange(process, data)
        finally:
            alarm.cancel()
            process.kill()
            process.wait()
        return self._interpret(process.returncode, output, errors)

    def _time_out(self) -> None:
        self._timed_out = True
        self.kill()

    def _start(self, container: Container) -> subprocess.Popen[bytes]:
        limits = self._limits
        order = {
            "container": container.value,
            "max_seconds": limits.max_reference_s,
            "on_too_long": limits.on_too_long,
            "max_channels": 8,
            "min_rate_hz": 8_000,
            "max_rate_hz": 192_000,
            "max_decoded_bytes": limits.max_decoded_bytes,
            "memory_bytes": limits.decode_memory_bytes,
            "cpu_seconds": limits.decode_cpu_s,
        }
        # Only what Python needs to find its packages: keys and tokens of the server stay out of reach.
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        try:
            return subprocess.Popen(  # noqa: S603 - our own interpreter and our own file
                [*self._command, json.dumps(order)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
            )
        except OSError as error:
            _log.exception("the audio decoder process could not be started")
            raise _decoder_broken() from error

    def _exchange(self, process: subprocess.Popen[bytes], data: bytes) -> tuple[bytes, bytes]:
        assert process.stdin is not None  # noqa: S101 - all three are pipes
        assert process.stdout is not None  # noqa: S101
        assert process.stderr is not None  # noqa: S101
        feeder = threading.Thread(target=_feed, args=(process.stdin, data), daemon=True)
        errors: list[bytes] = []
        listener = threading.Thread(target=_listen, args=(process.stderr, errors), daemon=True)
        feeder.start()
        listener.start()
        # A worker gone wrong may write for ever: no more is read than an honest one can have to say.
        most = int(self._limits.max_reference_s * 192_000 + 192_000) * 4 + 65_536
        with process.stdout:
            output = process.stdout.read(most)
        process.wait()
        feeder.join()
        listener.join()
        return output, b"".join(errors)

    def _interpret(self, status: int, output: bytes, errors: bytes) -> _Decoded:
        if self._timed_out:
            raise AudioDecodeLimit(
                "Decoding this recording takes too long. Send a shorter one, as WAV or FLAC."
            )
        head, _, body = output.partition(b"\n")
        if status > 0:
            _log.error("the audio decoder process ended with status %d: %s", status, errors[-2000:])
            raise _decoder_broken()
        if status == -signal.SIGXCPU:
            raise AudioDecodeLimit(
                "Decoding this recording takes too much computing. Send it as WAV or FLAC."
            )
        if status < 0:
            _log.warning("the audio decoder process was ended by signal %d", -status)
            raise AudioUndecodable("This recording cannot be decoded. Send it as WAV or FLAC.")
        try:
            facts = json.loads(head)
            if not facts["ok"]:
                raise _refusal(facts, self._limits)
            samples: Samples = np.frombuffer(body, "<f4").astype(np.float32)
            if len(samples) != facts["frames"] or not 8_000 <= facts["sample_rate_hz"] <= 192_000:
                raise ValueError("the samples are not those announced")
            return _Decoded(
                samples=samples,
                sample_rate_hz=facts["sample_rate_hz"],
                channels=facts["channels"],
                peak=facts["peak"],
                bits=facts["bits"] if facts["lossless"] else 16,
                trimmed=facts["trimmed"],
                declared_s=facts["declared_seconds"],
                one_channel=facts["one_channel"],
            )
        except (ValueError, KeyError, TypeError) as error:
            _log.exception("the audio decoder process gave an unreadable answer")
            raise AudioUndecodable("This recording cannot be decoded. Send it as WAV or FLAC.") from error


def _feed(pipe: Any, data: bytes) -> None:
    with contextlib.suppress(OSError), pipe:  # a worker that refuses early closes its end
        pipe.write(data)


def _listen(pipe: Any, into: list[bytes]) -> None:
    with contextlib.suppress(OSError, ValueError), pipe:
        while block := pipe.read(4096):
            into[:] = [*into[-1:], block]


def _decoder_broken() -> InternalError:
    return InternalError(
        "The server could not start its audio decoder. Ask the operator to look into the log."
    )


def _body_too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The recording is larger than {max_bytes / 1024 / 1024:.4g} MiB. "
        "Send a shorter one, or as MP3 or FLAC."
    )


def _refusal(facts: dict[str, Any], limits: ReferenceLimits) -> VoiceCloneError:
    reason = facts.get("reason")
    longest = f"{limits.max_reference_s:g} s"
    if reason == "too_long":
        seconds = facts.get("seconds")
        length = f"{_above(float(seconds), limits.max_reference_s)} s" if seconds else f"more than {longest}"
        return AudioTooLong(f"The recording has {length}; {longest} are accepted. Send the best part of it.")
    if reason == "sample_rate":
        return AudioDecodeLimit(
            f"The sample rate of {int(facts['sample_rate_hz'])} Hz is not accepted. "
            "Send 8 000 to 192 000 Hz, best 24 000 or more."
        )
    if reason == "channels":
        return AudioDecodeLimit("The recording has more than 8 channels. Send it in mono or stereo.")
    if reason == "limit":
        return AudioDecodeLimit(
            "The recording is too large when decoded. Send it in mono at 48 000 Hz or less."
        )
    if reason == "no_audio":
        return UnsupportedAudio(f"The file holds no audio track. {_ACCEPTED}")
    if reason == "codec":
        return UnsupportedAudio(f"The audio in this file is of a kind that is not accepted. {_ACCEPTED}")
    return AudioUndecodable("The recording is damaged or cut off. Send it again, best as WAV or FLAC.")


def _above(seconds: float, limit: float) -> str:
    """``seconds`` for a sentence that calls them too many: never rounded down to the limit."""
    rounded = f"{seconds:.0f}"
    return rounded if float(rounded) > limit else f"{seconds:.2f}"


def _check(decoded: _Decoded, limits: ReferenceLimits) -> CheckedReference:
    warnings: list[str] = []
    samples, rate = decoded.samples, decoded.sample_rate_hz
    if decoded.peak is None or not np.isfinite(samples).all():
        raise AudioUndecodable("The recording holds values that are not numbers. Export it again.")
    if decoded.trimmed:
        warnings.append(f"Only the first {limits.max_reference_s:g} s of the recording are used.")
    elif decoded.declared_s is not None and len(samples) / rate < 0.9 * decoded.declared_s - 0.1:
        warnings.append("The file ends before the length it states; the part that is there is used.")
    if decoded.one_channel:
        warnings.append("The channels cancel each other out; only the first one is used.")
    samples = _restore_level(samples, decoded, warnings)
    if rate > _MAX_STORED_RATE_HZ:
        samples = soxr.resample(samples, rate, _MAX_STORED_RATE_HZ)
        rate = _MAX_STORED_RATE_HZ
    if rate < 16_000:
        warnings.append(f"The recording has only {rate} Hz; 24 000 Hz or more give a better voice.")
    samples = _without_offset(samples, warnings)
    samples = _speech_of(samples, rate, limits, warnings)
    samples = samples / max(1.0, float(np.abs(samples).max()))
    flac = io.BytesIO()
    soundfile.write(flac, samples, rate, format="FLAC", subtype=f"PCM_{decoded.bits}")
    # What an engine hears today is what it will hear from the store: the samples as FLAC keeps them.
    stored, _ = decode_flac(flac.getvalue())
    return CheckedReference(
        samples=stored,
        sample_rate_hz=rate,
        duration_s=len(stored) / rate,
        warnings=tuple(warnings),
        flac=flac.getvalue(),
        fingerprint=fingerprint_of(stored, rate),
    )


def _restore_level(samples: Samples, decoded: _Decoded, warnings: list[str]) -> Samples:
    """Undo what averaging channels takes away, and warn if the recorder was overdriven."""
    peak = decoded.peak or 0.0
    loudest = float(np.abs(samples).max())
    if decoded.channels > 1 and not decoded.one_channel and 0 < loudest < peak:
        samples = samples * np.float32(min(decoded.channels, min(peak, 1.0) / loudest))
        loudest = float(np.abs(samples).max())
    if loudest >= 0.98:
        at_ceiling = np.abs(samples) >= 0.998 * loudest
        flat = at_ceiling[:-2] & at_ceiling[1:-1] & at_ceiling[2:]
        if flat.mean() > 0.0005:
            warnings.append("The recording is clipped; record it again at a lower level.")
    return samples


def _without_offset(samples: Samples, warnings: list[str]) -> Samples:
    offset = float(samples.mean(dtype=np.float64))
    if abs(offset) > 0.01:
        warnings.append("A constant offset was removed from the recording.")
    return samples - np.float32(offset)


def _speech_of(samples: Samples, rate: int, limits: ReferenceLimits, warnings: list[str]) -> Samples:
    """Cut silence at both ends. Raises ``NoSpeechDetected`` or ``AudioTooShort``."""
    size = int(rate * _FRAME_S)
    frames = len(samples) // size
    if frames < 5:
        if not len(samples) or float(np.abs(samples).max()) < 1e-3:
            raise _no_speech()
        raise _too_short(len(samples) / rate, limits)
    power = np.square(samples[: frames * size].reshape(frames, size), dtype=np.float64).mean(axis=1)
    level_db = 10 * np.log10(power + 1e-12)
    loud_db = float(np.percentile(level_db, 95))
    # Of a short word in a long pause, percentiles see only the pause.
    top_db = float(np.sort(level_db)[-5:].mean())
    if top_db < -60:
        raise _no_speech()
    spoken = np.flatnonzero(level_db > max(top_db - 35, -60))
    start = max(0, int(spoken[0]) * size - int(_MARGIN_S * rate))
    stop = min(len(samples), (int(spoken[-1]) + 1) * size + int(_MARGIN_S * rate))
    if loud_db - float(np.percentile(level_db, 10)) < 6 and _is_flat(samples, rate):
        raise NoSpeechDetected(
            "There is only noise in the recording. Record someone speaking in a quiet room."
        )
    spoken_s = (int(spoken[-1]) + 1 - int(spoken[0])) * size / rate
    if spoken_s < limits.min_reference_s:
        raise _too_short(spoken_s, limits)
    inside = level_db[int(spoken[0]) : int(spoken[-1]) + 1]
    room_db = float(np.percentile(level_db, 5))
    if float(np.percentile(inside, 90)) - room_db < 15:
        warnings.append("The recording is noisy; a quieter room gives a better voice.")
    if top_db < -40:
        warnings.append("The recording is very quiet; record it closer to the microphone.")
    return samples[start:stop]


def _is_flat(samples: Samples, rate: int) -> bool:
    """True if the spectrum between 100 Hz and 3.5 kHz is that of noise: no voice has one so even."""
    size = 1024
    count = len(samples) // size
    spectrum = np.abs(np.fft.rfft(samples[: count * size].reshape(count, size) * np.hanning(size))) ** 2
    mean = spectrum.mean(axis=0)[int(100 * size / rate) + 1 : int(3_500 * size / rate)] + 1e-20
    return float(np.exp(np.log(mean).mean()) / mean.mean()) > 0.6


def _no_speech() -> NoSpeechDetected:
    return NoSpeechDetected("The recording is silent. Check the microphone and record again.")


def _too_short(seconds: float, limits: ReferenceLimits) -> AudioTooShort:
    return AudioTooShort(
        f"There are {seconds:.1f} s of speech in the recording; at least {limits.min_reference_s:g} s "
        "are needed. Record a longer sentence."
    )
