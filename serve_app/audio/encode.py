"""From engine samples to the bytes of one response.

One ``StreamEncoder`` per response makes exactly one container, however many chunks go in. Nothing here
touches a file or blocks on anything but the CPU; from an event loop, call it through a thread.

=====  ===========  =====================  ==========================================
name   media type   default sample rate    what it is
=====  ===========  =====================  ==========================================
wav    audio/wav    the engine's           RIFF, s16le
flac   audio/flac   the engine's           16 bit
mp3    audio/mpeg   48 000 Hz              MPEG layer III, 96 kbit/s
aac    audio/aac    48 000 Hz              AAC-LC in ADTS, 96 kbit/s
opus   audio/ogg    48 000 Hz              Opus in Ogg, 48 kbit/s
pcm    audio/pcm    24 000 Hz              s16le without a header
=====  ===========  =====================  ==========================================

MP3 and AAC pad both ends of the sound to whole frames and a stream cannot say by how much. At 48 000 Hz that
is below 50 ms; at 24 000 Hz it would be up to twice that, which is why they run at the higher rate.
"""

from __future__ import annotations

import io
import struct
import threading
from enum import StrEnum
from types import TracebackType
from typing import Final, NamedTuple, Self

import av
import av.container
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from engines.contract import Samples
from serve_app.errors import EngineFailed, InvalidValue

__all__ = ["AudioFormat", "StreamEncoder", "encode_whole", "to_int16"]

#: A WAV header has 32 bits for the length; this value in a stream means "until it ends".
_UNKNOWN_SIZE: Final = 0xFFFF_FFFF
_WAV_HEADER_BYTES: Final = 44
_FLAC_MAX_FRAMES: Final = (1 << 36) - 1


class AudioFormat(StrEnum):
    """What ``response_format`` can be."""

    WAV = "wav"
    MP3 = "mp3"
    OPUS = "opus"
    FLAC = "flac"
    AAC = "aac"
    PCM = "pcm"

    @property
    def media_type(self) -> str:
        """The ``Content-Type`` of a response in this format."""
        return _MEDIA_TYPES[self]

    @property
    def sample_rates_hz(self) -> tuple[int, ...]:
        """The rates this format can carry here, ascending."""
        return _SAMPLE_RATES_HZ[self]


_MEDIA_TYPES: Final = {
    AudioFormat.WAV: "audio/wav",
    AudioFormat.MP3: "audio/mpeg",
    AudioFormat.OPUS: "audio/ogg",
    AudioFormat.FLAC: "audio/flac",
    AudioFormat.AAC: "audio/aac",
    AudioFormat.PCM: "audio/pcm",
}
_MP3_RATES_HZ: Final = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_LINEAR_RATES_HZ: Final = (*_MP3_RATES_HZ, 88200, 96000)
_SAMPLE_RATES_HZ: Final = {
    AudioFormat.WAV: _LINEAR_RATES_HZ,
    AudioFormat.MP3: _MP3_RATES_HZ,
    AudioFormat.OPUS: (8000, 12000, 16000, 24000, 48000),
    AudioFormat.FLAC: _LINEAR_RATES_HZ,
    AudioFormat.AAC: (*_MP3_RATES_HZ, 88200, 96000),
    AudioFormat.PCM: _LINEAR_RATES_HZ,
}
#: Rate when the client names none; a format not listed keeps the engine's.
_DEFAULT_RATE_HZ: Final = {
    AudioFormat.MP3: 48000,
    AudioFormat.AAC: 48000,
    AudioFormat.OPUS: 48000,
    AudioFormat.PCM: 24000,
}


class _Codec(NamedTuple):
    """How PyAV makes one format. ``bits_per_second`` 0 is lossless."""

    muxer: str
    encoder: str
    bits_per_second: int
    muxer_options: dict[str, str]
    encoder_options: dict[str, str]


_CODECS: Final = {
    AudioFormat.MP3: _Codec("mp3", "libmp3lame", 96_000, {"id3v2_version": "0"}, {}),
    # The default coder ("twoloop") pops at onsets: a faded-in tone of 0.5 came back with a peak of 0.95, and
    # noise bursts with 10 dB more error than from this one.
    AudioFormat.AAC: _Codec("adts", "aac", 96_000, {}, {"aac_coder": "fast"}),
    # Without a page length the first second of Opus stays in the muxer.
    AudioFormat.OPUS: _Codec("ogg", "libopus", 48_000, {"page_duration": "20000"}, {}),
    AudioFormat.FLAC: _Codec("flac", "flac", 0, {"metadata_header_padding": "0"}, {}),
}


def to_int16(samples: Samples) -> NDArray[np.int16]:
    """Round ``samples`` (float32 [n], -1 to 1) to 16 bit; what lies outside is clipped.

    Raises ``EngineFailed`` if a sample is not a finite number.
    """
    if not np.isfinite(samples).all():
        raise EngineFailed("The engine produced sound that is not a number. Send the request again.")
    scaled = np.rint(samples * np.float32(32768.0))
    clipped: NDArray[np.int16] = np.clip(scaled, -32768, 32767).astype("<i2")
    return clipped


class _Sink:
    """What the muxer writes to: bytes come out once and there is no way back."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def write(self, data: bytes) -> int:
        self._pending += data
        return len(data)

    def take(self) -> bytes:
        taken = bytes(self._pending)
        self._pending.clear()
        return taken


class StreamEncoder:
    """Encodes one response. ``encode`` each chunk, then ``finish``; ``close`` whatever happens.

    Usable as a context manager, which closes it. One thread may close it while another still encodes, as
    happens when the client of a response leaves.
    """

    def __init__(
        self,
        audio_format: AudioFormat,
        source_rate_hz: int,
        *,
        sample_rate_hz: int | None = None,
        known_frames: int | None = None,
        bits_per_second: int | None = None,
    ) -> None:
        """Prepare a response in ``audio_format``.

        Args:
            audio_format: What to make.
            source_rate_hz: Rate of the samples that will be given to ``encode``.
            sample_rate_hz: Rate of the response; None takes the default of the format.
            known_frames: Number of samples, at ``source_rate_hz``, that will be given in all, if that is
                known. WAV and FLAC headers then state the exact length, and the response is cut or filled
                with silence to keep that promise.
            bits_per_second: Of a lossy format; None takes the one in the table above.

        Raises:
            InvalidValue: The format cannot carry ``sample_rate_hz``.
        """
        self._turn = threading.RLock()
        self.audio_format = audio_format
        self.sample_rate_hz = _choose_rate(audio_format, source_rate_hz, sample_rate_hz)
        self._resampler = (
            None
            if self.sample_rate_hz == source_rate_hz
            else soxr.ResampleStream(source_rate_hz, self.sample_rate_hz, 1, dtype="float32")
        )
        self._frames_owed = (
            None if known_frames is None else round(known_frames * self.sample_rate_hz / source_rate_hz)
        )
        self._frames = 0
        self._finished = False
        self._header_due = audio_format is AudioFormat.WAV
        self._sink = _Sink()
        self._muxer = (
            _Muxer(audio_format, self.sample_rate_hz, self._sink, bits_per_second)
            if audio_format in _CODECS
            else None
        )
        self._flac_header_due = audio_format is AudioFormat.FLAC and self._frames_owed is not None

    @property
    def media_type(self) -> str:
        """The ``Content-Type`` of the response."""
        return self.audio_format.media_type

    @property
    def frames(self) -> int:
        """Samples written so far, at ``sample_rate_hz``."""
        return self._frames

    def encode(self, samples: Samples) -> bytes:
        """Encode float32 ``samples`` of shape [n]; gives the bytes that are ready, maybe none.

        Raises ``EngineFailed`` if a sample is not a finite number, ``ValueError`` after ``finish``.
        """
        with self._turn:
            if self._finished:
                raise ValueError("The response is finished: nothing can be added to it.")
            if len(samples) == 0:
                return self._take()
            if not np.isfinite(samples).all():
                # Looked at before the resampler, whose memory would spread it over what follows.
                raise EngineFailed("The engine produced sound that is not a number. Send the request again.")
            return self._write(self._resample(samples, last=False))

    def finish(self) -> bytes:
        """End the container; gives the last bytes. A second call gives none."""
        with self._turn:
            if self._finished:
                return b""
            tail = self._write(self._resample(np.zeros(0, np.float32), last=True))
            if self._frames_owed is not None and self._frames < self._frames_owed:
                tail += self._write(np.zeros(self._frames_owed - self._frames, np.float32))
            self.close()
            return tail + self._take()

    def close(self) -> None:
        """Give the codec back. May be called at any time and more than once; ends ``encode``."""
        with self._turn:
            self._finished = True
            if self._muxer is not None:
                self._muxer.close()
                self._muxer = None
            self._resampler = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _resample(self, samples: Samples, *, last: bool) -> Samples:
        if self._resampler is None:
            return samples
        resampled: Samples = self._resampler.resample_chunk(
            np.ascontiguousarray(samples, dtype=np.float32), last=last
        )
        return resampled

    def _write(self, samples: Samples) -> bytes:
        if self._frames_owed is not None:
            samples = samples[: self._frames_owed - self._frames]
        if len(samples):
            self._frames += len(samples)
            pcm = to_int16(samples)
            if self._muxer is None:
                self._put_wav_header()
                self._sink.write(pcm.tobytes())
            else:
                self._muxer.write(pcm)
        return self._take()

    def _put_wav_header(self) -> None:
        if self._header_due:
            self._header_due = False
            self._sink.write(_wav_header(self.sample_rate_hz, self._frames_owed))

    def _take(self) -> bytes:
        if self._finished:
            self._put_wav_header()  # a response without a sample is still a WAV file
        ready = self._sink.take()
        if self._flac_header_due and ready:
            self._flac_header_due = False
            ready = _with_flac_length(ready, self._frames_owed or 0)
        return ready


class _Muxer:
    """One PyAV encoder writing one container into a sink."""

    def __init__(
        self,
        audio_format: AudioFormat,
        sample_rate_hz: int,
        sink: _Sink | io.BytesIO,
        bits_per_second: int | None,
    ) -> None:
        codec = _CODECS[audio_format]
        self._rate = sample_rate_hz
        self._written = 0
        # flush_packets: without it up to 32 KiB wait in the muxer, seconds of speech.
        self._container = av.open(
            sink, "w", format=codec.muxer, container_options={"flush_packets": "1", **codec.muxer_options}
        )
        stream = self._container.add_stream(
            codec.encoder, rate=sample_rate_hz, options=codec.encoder_options, layout="mono"
        )
        assert isinstance(stream, av.AudioStream)  # noqa: S101 - every codec in the table is audio
        self._stream = stream
        if codec.bits_per_second:
            self._stream.bit_rate = bits_per_second or codec.bits_per_second
        self._container.start_encoding()

    def write(self, pcm: NDArray[np.int16]) -> None:
        frame = av.AudioFrame.from_ndarray(pcm[np.newaxis, :], format="s16", layout="mono")
        frame.sample_rate = self._rate
        frame.pts = self._written
        self._written += len(pcm)
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        try:
            if self._written:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()


def encode_whole(
    audio_format: AudioFormat,
    samples: Samples,
    source_rate_hz: int,
    sample_rate_hz: int | None = None,
    bits_per_second: int | None = None,
) -> bytes:
    """Encode float32 ``samples`` of shape [n] as one complete file.

    Unlike a stream, the file states its length: exact sizes in WAV and FLAC, a Xing header in MP3.
    Raises ``InvalidValue`` for a rate the format cannot carry, ``EngineFailed`` for samples that are not
    finite numbers.
    """
    if audio_format is AudioFormat.FLAC or audio_format is AudioFormat.MP3:
        rate = _choose_rate(audio_format, source_rate_hz, sample_rate_hz)
        pcm = to_int16(samples)
        if rate != source_rate_hz:
            pcm = to_int16(soxr.resample(samples, source_rate_hz, rate))
        # Both want to go back to their header at the end, which only a whole file allows.
        whole = io.BytesIO()
        if audio_format is AudioFormat.FLAC:
            soundfile.write(whole, pcm, rate, format="FLAC", subtype="PCM_16")
        else:
            muxer = _Muxer(audio_format, rate, whole, bits_per_second)
            try:
                if len(pcm):
                    muxer.write(pcm)
            finally:
                muxer.close()
        return whole.getvalue()
    with StreamEncoder(
        audio_format,
        source_rate_hz,
        sample_rate_hz=sample_rate_hz,
        known_frames=len(samples),
        bits_per_second=bits_per_second,
    ) as encoder:
        return encoder.encode(samples) + encoder.finish()


def _choose_rate(audio_format: AudioFormat, source_rate_hz: int, wanted_hz: int | None) -> int:
    allowed = audio_format.sample_rates_hz
    if wanted_hz is not None:
        if wanted_hz not in allowed:
            listed = ", ".join(str(rate) for rate in allowed)
            raise InvalidValue(
                f"{audio_format.value} cannot have that sample rate. Choose one of: {listed}.",
                param="sample_rate",
            )
        return wanted_hz
    default = _DEFAULT_RATE_HZ.get(audio_format, source_rate_hz)
    if default in allowed:
        return default
    return next((rate for rate in allowed if rate >= default), allowed[-1])


def _wav_header(sample_rate_hz: int, frames: int | None) -> bytes:
    data_bytes = _UNKNOWN_SIZE if frames is None else frames * 2
    riff_bytes = min(data_bytes + _WAV_HEADER_BYTES - 8, _UNKNOWN_SIZE)
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        riff_bytes,
        b"WAVE",
        b"fmt ",
        16,
        1,  # linear PCM
        1,  # mono
        sample_rate_hz,
        sample_rate_hz * 2,
        2,
        16,
        b"data",
        min(data_bytes, _UNKNOWN_SIZE),
    )


def _with_flac_length(start: bytes, frames: int) -> bytes:
    """Write the number of samples into STREAMINFO, which FFmpeg leaves at "unknown" in a stream.

    It takes the low 36 bits of the 8 bytes at offset 18, after rate, channels and bits per sample.
    """
    if frames > _FLAC_MAX_FRAMES or start[:4] != b"fLaC" or len(start) < 26:
        return start
    packed = int.from_bytes(start[18:26], "big") & ~_FLAC_MAX_FRAMES | frames
    return start[:18] + packed.to_bytes(8, "big") + start[26:]
