"""What a client gets: one container, playable, of the right length and the right sound."""

from __future__ import annotations

import io
import struct

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from engines.contract import Samples
from serve_app.audio.encode import AudioFormat, StreamEncoder, encode_whole, to_int16
from serve_app.errors import EngineFailed, InvalidValue

SOURCE_RATE_HZ = 22_050
TONE_HZ = 523.0
MAGIC = {
    AudioFormat.WAV: (b"RIFF",),
    AudioFormat.FLAC: (b"fLaC",),
    AudioFormat.OPUS: (b"OggS",),
    AudioFormat.MP3: (b"\xff\xfb", b"\xff\xf3"),
    AudioFormat.AAC: (b"\xff\xf1",),
}
CONTAINERS = [item for item in AudioFormat if item is not AudioFormat.PCM]
#: libsndfile has no AAC.
BY_SOUNDFILE = [item for item in CONTAINERS if item is not AudioFormat.AAC]


def tone(seconds: float = 2.3, rate_hz: int = SOURCE_RATE_HZ) -> Samples:
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    fade_in = np.minimum(time_s / 0.005, 1.0)
    wave: Samples = (0.5 * fade_in * np.sin(2 * np.pi * TONE_HZ * time_s)).astype(np.float32)
    return wave


def stream(
    audio_format: AudioFormat,
    samples: Samples,
    rate_hz: int = SOURCE_RATE_HZ,
    *,
    chunk: int = 441,
    sample_rate_hz: int | None = None,
    known_frames: int | None = None,
) -> list[bytes]:
    with StreamEncoder(
        audio_format, rate_hz, sample_rate_hz=sample_rate_hz, known_frames=known_frames
    ) as encoder:
        parts = [encoder.encode(samples[at : at + chunk]) for at in range(0, len(samples), chunk)]
        return [*parts, encoder.finish()]


def decode_av(blob: bytes) -> tuple[NDArray[np.float64], int]:
    with av.open(io.BytesIO(blob), "r") as container:
        frames = list(container.decode(audio=0))
    rate = frames[0].sample_rate
    samples = np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames]).astype(np.float64)
    return (samples / 32768 if frames[0].format.name.startswith("s16") else samples), rate


def decode_soundfile(blob: bytes, frames: int = -1) -> tuple[NDArray[np.float64], int]:
    """A FLAC that does not state its length needs ``frames``: soundfile looks for the end to read "all"."""
    with soundfile.SoundFile(io.BytesIO(blob)) as file:
        return file.read(frames), file.samplerate


def loudest_hz(samples: NDArray[np.float64], rate_hz: int) -> float:
    middle = samples[len(samples) // 4 : len(samples) * 3 // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    return float(np.argmax(spectrum)) * rate_hz / len(middle)


def check_sound(samples: NDArray[np.float64], rate_hz: int, expected: Samples) -> None:
    expected_s = len(expected) / SOURCE_RATE_HZ
    assert len(samples) / rate_hz == pytest.approx(expected_s, abs=0.05)
    assert loudest_hz(samples, rate_hz) == pytest.approx(TONE_HZ, abs=3)
    middle = samples[len(samples) // 4 : len(samples) * 3 // 4]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.07)  # LAME scales by 0.95
    # No click where it begins: nothing louder than the tone itself plus the codec's ringing.
    assert np.abs(samples[: rate_hz // 20]).max() < 0.6


@pytest.mark.parametrize("audio_format", CONTAINERS)
@pytest.mark.parametrize("chunk", [97, 4_410, 10**6])
def test_a_stream_is_one_playable_container(audio_format: AudioFormat, chunk: int) -> None:
    samples = tone()
    blob = b"".join(stream(audio_format, samples, chunk=chunk))
    assert blob.startswith(MAGIC[audio_format])
    assert blob.count(b"RIFF") == (audio_format is AudioFormat.WAV)
    assert blob.count(b"fLaC") == (audio_format is AudioFormat.FLAC)
    assert blob.count(b"OpusHead") == (audio_format is AudioFormat.OPUS)
    check_sound(*decode_av(blob), samples)
    if audio_format in BY_SOUNDFILE:
        frames = len(samples) - 1 if audio_format is AudioFormat.FLAC else -1
        check_sound(*decode_soundfile(blob, frames), samples)


@pytest.mark.parametrize("audio_format", CONTAINERS)
def test_a_whole_file_is_playable(audio_format: AudioFormat) -> None:
    samples = tone()
    blob = encode_whole(audio_format, samples, SOURCE_RATE_HZ)
    assert blob.startswith(MAGIC[audio_format])
    check_sound(*decode_av(blob), samples)
    if audio_format in BY_SOUNDFILE:
        check_sound(*decode_soundfile(blob), samples)


@pytest.mark.parametrize("audio_format", [AudioFormat.WAV, AudioFormat.FLAC, AudioFormat.PCM])
def test_chunking_does_not_change_lossless_sound(audio_format: AudioFormat) -> None:
    samples = tone()
    once = b"".join(stream(audio_format, samples, chunk=10**6))
    many = b"".join(stream(audio_format, samples, chunk=131))
    if audio_format is AudioFormat.FLAC:
        np.testing.assert_array_equal(decode_av(once)[0], decode_av(many)[0])
    else:
        assert once == many


@pytest.mark.parametrize("audio_format", list(AudioFormat))
@pytest.mark.parametrize("rate_hz", [16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
def test_bytes_flow_long_before_the_end(audio_format: AudioFormat, rate_hz: int) -> None:
    with StreamEncoder(audio_format, rate_hz) as encoder:
        early = encoder.encode(tone(0.2, rate_hz)) + encoder.encode(tone(0.2, rate_hz))
        rest = b"".join(encoder.encode(tone(0.2, rate_hz)) for _ in range(18)) + encoder.finish()
    assert len(early) > 100
    # A tenth of the sound went in: near half of its share, or more, is out.
    assert len(early) > 0.04 * len(early + rest)


def test_pcm_is_24_khz_s16le_mono() -> None:
    samples = tone()
    pcm = np.frombuffer(b"".join(stream(AudioFormat.PCM, samples)), "<i2").astype(np.float64) / 32768
    check_sound(pcm, 24_000, samples)


def test_pcm_at_a_chosen_rate() -> None:
    samples = tone()
    parts = stream(AudioFormat.PCM, samples, sample_rate_hz=8_000)
    pcm = np.frombuffer(b"".join(parts), "<i2").astype(np.float64) / 32768
    check_sound(pcm, 8_000, samples)


@pytest.mark.parametrize(
    ("audio_format", "asked_hz", "heard_hz"),
    [
        (AudioFormat.WAV, None, 22_050),
        (AudioFormat.WAV, 16_000, 16_000),
        (AudioFormat.FLAC, None, 22_050),
        (AudioFormat.MP3, None, 48_000),
        (AudioFormat.MP3, 24_000, 24_000),
        (AudioFormat.AAC, None, 48_000),
        (AudioFormat.OPUS, None, 48_000),
        (AudioFormat.OPUS, 16_000, 48_000),  # an Opus decoder always runs at 48 kHz
    ],
)
def test_sample_rate_of_the_response(audio_format: AudioFormat, asked_hz: int | None, heard_hz: int) -> None:
    blob = b"".join(stream(audio_format, tone(0.5), sample_rate_hz=asked_hz))
    assert decode_av(blob)[1] == heard_hz


@pytest.mark.parametrize("audio_format", list(AudioFormat))
def test_an_impossible_rate_is_refused_with_the_choices(audio_format: AudioFormat) -> None:
    with pytest.raises(InvalidValue, match="Choose one of") as caught:
        StreamEncoder(audio_format, 24_000, sample_rate_hz=12_345)
    assert caught.value.param == "sample_rate"


@pytest.mark.parametrize("audio_format", list(AudioFormat))
def test_an_engine_with_an_odd_rate_is_heard(audio_format: AudioFormat) -> None:
    with StreamEncoder(audio_format, 23_456) as encoder:
        assert encoder.encode(tone(0.5, 23_456)) + encoder.finish()
        assert encoder.sample_rate_hz in audio_format.sample_rates_hz


def test_wav_stream_says_until_the_end() -> None:
    blob = b"".join(stream(AudioFormat.WAV, tone(0.1)))
    assert struct.unpack("<4sI4s", blob[:12]) == (b"RIFF", 0xFFFF_FFFF, b"WAVE")
    assert struct.unpack("<4sI", blob[36:44]) == (b"data", 0xFFFF_FFFF)


@pytest.mark.parametrize("sample_rate_hz", [None, 16_000, 48_000])
def test_wav_of_known_length_is_exact(sample_rate_hz: int | None) -> None:
    samples = tone(1.0)
    blob = b"".join(
        stream(AudioFormat.WAV, samples, sample_rate_hz=sample_rate_hz, known_frames=len(samples))
    )
    riff, data = struct.unpack("<I", blob[4:8])[0], struct.unpack("<I", blob[40:44])[0]
    assert riff == len(blob) - 8
    assert data == len(blob) - 44 == 2 * (sample_rate_hz or SOURCE_RATE_HZ)


@pytest.mark.parametrize("given", [0, 7_000, 22_050, 30_000])
def test_a_promised_length_is_kept(given: int) -> None:
    blob = b"".join(stream(AudioFormat.WAV, tone(2.0)[:given], known_frames=22_050))
    assert len(blob) == 44 + 2 * 22_050


def test_flac_of_known_length_states_it() -> None:
    samples = tone(1.0)
    blob = b"".join(stream(AudioFormat.FLAC, samples, known_frames=len(samples)))
    assert soundfile.info(io.BytesIO(blob)).frames == len(samples)
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(blob), dtype="int16")[0], to_int16(samples))


def test_whole_mp3_decodes_to_the_exact_length() -> None:
    samples = tone(1.0, 24_000)
    decoded, rate = decode_soundfile(encode_whole(AudioFormat.MP3, samples, 24_000))
    assert len(decoded) / rate == pytest.approx(1.0, abs=0.001)


def test_rounding_and_clipping() -> None:
    values = np.array([0.0, 1.0, -1.0, 2.0, -2.0, 0.4 / 32768, 0.6 / 32768, -0.6 / 32768], np.float32)
    assert to_int16(values).tolist() == [0, 32767, -32768, 32767, -32768, 0, 1, -1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("audio_format", list(AudioFormat))
def test_what_is_not_a_number_is_refused(audio_format: AudioFormat, bad: float) -> None:
    samples = tone(0.1)
    samples[100] = bad
    with StreamEncoder(audio_format, SOURCE_RATE_HZ) as encoder, pytest.raises(EngineFailed):
        encoder.encode(samples)
    with pytest.raises(EngineFailed):
        encode_whole(audio_format, samples, SOURCE_RATE_HZ)


@pytest.mark.parametrize("audio_format", list(AudioFormat))
def test_close_is_for_any_moment(audio_format: AudioFormat) -> None:
    never_used = StreamEncoder(audio_format, SOURCE_RATE_HZ)
    never_used.close()
    never_used.close()
    left_early = StreamEncoder(audio_format, SOURCE_RATE_HZ)
    left_early.encode(tone(0.3))
    left_early.close()
    left_early.close()
    with pytest.raises(ValueError, match="finished"):
        left_early.encode(tone(0.1))
    assert left_early.finish() == b""


@pytest.mark.parametrize("audio_format", list(AudioFormat))
def test_an_empty_response_and_empty_chunks(audio_format: AudioFormat) -> None:
    nothing = np.zeros(0, np.float32)
    with StreamEncoder(audio_format, SOURCE_RATE_HZ) as encoder:
        blob = encoder.encode(nothing) + encoder.finish()
    if audio_format is AudioFormat.WAV:
        assert len(blob) == 44
    with StreamEncoder(audio_format, SOURCE_RATE_HZ) as encoder:
        assert encoder.encode(tone(0.2)) + encoder.encode(nothing) + encoder.finish()


def test_media_types() -> None:
    assert {item.value: item.media_type for item in AudioFormat} == {
        "wav": "audio/wav",
        "mp3": "audio/mpeg",
        "opus": "audio/ogg",
        "flac": "audio/flac",
        "aac": "audio/aac",
        "pcm": "audio/pcm",
    }
