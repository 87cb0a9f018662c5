"""What happens to audio that strangers send: decoded within bounds, checked, or refused with a reason."""

from __future__ import annotations

import asyncio
import functools
import io
import os
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from engines.contract import Samples
from serve_app.audio.encode import AudioFormat, StreamEncoder, encode_whole
from serve_app.errors import (
    AudioDecodeLimit,
    AudioTooLong,
    AudioTooShort,
    AudioUndecodable,
    BodyTooLarge,
    InternalError,
    NoSpeechDetected,
    UnsupportedAudio,
    UnusableAudio,
    VoiceCloneError,
)
from serve_app.voices.reference import (
    CheckedReference,
    Container,
    ReferenceLimits,
    ReferenceReader,
    decode_flac,
    fingerprint_of,
    sniff_container,
)

RATE_HZ = 24_000
F0_HZ = 130.0


def speech(seconds: float = 3.0, rate_hz: int = RATE_HZ, *, level: float = 0.2) -> Samples:
    """Syllables of a buzzing voice with pauses between them."""
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    harmonics = range(1, min(24, int(rate_hz / 2 / F0_HZ)))
    buzz = sum(np.sin(2 * np.pi * F0_HZ * k * time_s) / k for k in harmonics)
    room = np.random.default_rng(3).standard_normal(len(time_s)) * 1e-4
    syllables = np.clip(np.sin(2 * np.pi * 2.0 * time_s + 0.3), 0, None)
    voiced: Samples = (level * buzz * syllables + room).astype(np.float32)
    return voiced


def as_file(
    samples: NDArray[np.floating], rate_hz: int = RATE_HZ, kind: str = "WAV", subtype: str = "PCM_16"
) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate_hz, format=kind, subtype=subtype)
    return out.getvalue()


def as_container(kind: str, codec: str, samples: Samples, *, video: str = "") -> bytes:
    """``samples`` at 48 000 Hz through FFmpeg, with a few frames of video beside them if wanted."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        picture = container.add_stream(video, rate=10) if video else None
        sound = container.add_stream(codec, rate=48_000, layout="mono")
        assert isinstance(sound, av.AudioStream)
        if isinstance(picture, av.VideoStream):
            picture.width = picture.height = 64
            picture.pix_fmt = "yuv420p"
            for index in range(20):
                image = av.VideoFrame.from_ndarray(np.full((64, 64, 3), index * 10, np.uint8), format="rgb24")
                image.pts = index
                container.mux(picture.encode(image))
            container.mux(picture.encode(None))
        frame = av.AudioFrame.from_ndarray(samples[np.newaxis, :], format="flt", layout="mono")
        frame.sample_rate = 48_000
        frame.pts = 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return out.getvalue()


def loudest_hz(checked: CheckedReference) -> float:
    spectrum = np.abs(np.fft.rfft(checked.samples * np.hanning(len(checked.samples))))
    return float(np.argmax(spectrum)) * checked.sample_rate_hz / len(checked.samples)


@pytest.fixture
def reader() -> ReferenceReader:
    return ReferenceReader()


def flac_header(rate_hz: int, channels: int, bits: int, frames: int) -> bytes:
    packed = (rate_hz << 44) | ((channels - 1) << 41) | ((bits - 1) << 36) | frames
    info = struct.pack(">HH", 4096, 4096) + bytes(6) + packed.to_bytes(8, "big") + bytes(16)
    return b"fLaC\x80" + len(info).to_bytes(3, "big") + info


# --- accepted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "FLOAT"),
        ("WAV", "PCM_U8"),
        ("WAV", "ULAW"),
        ("RF64", "PCM_16"),
        ("FLAC", "PCM_24"),
        ("MP3", "MPEG_LAYER_III"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
    ],
)
async def test_every_accepted_kind(reader: ReferenceReader, kind: str, subtype: str) -> None:
    checked = await reader.read(as_file(speech(), kind=kind, subtype=subtype))
    assert checked.duration_s == pytest.approx(3.0, abs=0.3)
    assert loudest_hz(checked) == pytest.approx(F0_HZ, abs=3)
    assert checked.samples.dtype == np.float32
    assert checked.samples.ndim == 1


@pytest.mark.parametrize(
    ("kind", "codec", "video"),
    [("mp4", "aac", ""), ("webm", "libopus", ""), ("mp4", "aac", "mpeg4"), ("webm", "libopus", "libvpx")],
)
async def test_m4a_webm_and_the_sound_of_a_video(
    reader: ReferenceReader, kind: str, codec: str, video: str
) -> None:
    checked = await reader.read(as_container(kind, codec, speech(3.0, 48_000), video=video))
    assert checked.duration_s == pytest.approx(3.0, abs=0.3)
    assert loudest_hz(checked) == pytest.approx(F0_HZ, abs=3)


async def test_a_wav_that_was_streamed_is_read_to_its_end(reader: ReferenceReader) -> None:
    with StreamEncoder(AudioFormat.WAV, RATE_HZ) as encoder:
        blob = encoder.encode(speech()) + encoder.finish()
    assert (await reader.read(blob)).duration_s == pytest.approx(3.0, abs=0.3)


@pytest.mark.parametrize(
    ("rate_hz", "kept_hz"),
    [(8_000, 8_000), (22_050, 22_050), (44_100, 44_100), (96_000, 48_000), (192_000, 48_000)],
)
async def test_sample_rate_is_kept_up_to_48_khz(reader: ReferenceReader, rate_hz: int, kept_hz: int) -> None:
    checked = await reader.read(as_file(speech(3.0, rate_hz), rate_hz))
    assert checked.sample_rate_hz == kept_hz
    assert checked.duration_s == pytest.approx(3.0, abs=0.3)
    assert loudest_hz(checked) == pytest.approx(F0_HZ, abs=3)
    assert any("8000 Hz" in warning for warning in checked.warnings) == (rate_hz == 8_000)


@pytest.mark.parametrize("layout", ["stereo", "left only", "opposite phase", "centre of six"])
async def test_downmix_keeps_the_voice_and_its_level(reader: ReferenceReader, layout: str) -> None:
    voice = speech()
    silent = np.zeros_like(voice)
    channels = {
        "stereo": [voice, voice],
        "left only": [voice, silent],
        "opposite phase": [voice, -voice],
        "centre of six": [silent, silent, voice, silent, silent, silent],
    }[layout]
    checked = await reader.read(as_file(np.stack(channels, axis=1)))
    assert loudest_hz(checked) == pytest.approx(F0_HZ, abs=3)
    assert np.abs(checked.samples).max() == pytest.approx(np.abs(voice).max(), rel=0.05)


async def test_the_result_is_what_the_flac_holds(reader: ReferenceReader) -> None:
    checked = await reader.read(as_file(speech(), subtype="PCM_24"))
    samples, rate_hz = decode_flac(checked.flac)
    np.testing.assert_array_equal(samples, checked.samples)
    assert rate_hz == checked.sample_rate_hz
    assert checked.fingerprint == fingerprint_of(samples, rate_hz)
    assert soundfile.info(io.BytesIO(checked.flac)).subtype == "PCM_24"
    again = await reader.read(as_file(speech(), subtype="PCM_24"))
    assert again.fingerprint == checked.fingerprint
    reference = checked.as_reference(transcript="Hello.", language="en")
    assert (reference.transcript, reference.language, reference.sample_rate_hz) == ("Hello.", "en", rate_hz)


async def test_silence_at_both_ends_goes_and_the_speech_stays(reader: ReferenceReader) -> None:
    pause = np.zeros(2 * RATE_HZ, np.float32)
    checked = await reader.read(as_file(np.concatenate([pause, speech(), pause])))
    assert 2.5 < checked.duration_s < 3.3


async def test_overdriven_float_is_scaled_not_cut(reader: ReferenceReader) -> None:
    checked = await reader.read(as_file(speech(level=2.0), subtype="FLOAT"))
    assert 0.99 < np.abs(checked.samples).max() <= 1.0
    assert not checked.warnings


# --- decided by content ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blob",
    [
        b"<!DOCTYPE html><html><body>hello</body></html>",
        b"\x7fELF" + bytes(200),
        b"GIF89a" + bytes(50),
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        pickle.dumps({"a": 1}),
        b"RIFF\x00\x00\x00\x00AVI " + bytes(100),
        b"\x00",
        b"",
        b"\xff\xf1" + bytes(100),
    ],
)
async def test_what_is_no_audio_is_refused_by_its_first_bytes(reader: ReferenceReader, blob: bytes) -> None:
    with pytest.raises(UnsupportedAudio, match="Send WAV"):
        await reader.read(blob)


async def test_a_zip_is_refused_whatever_it_holds(reader: ReferenceReader) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("voice.wav", as_file(speech()))
    with pytest.raises(UnsupportedAudio):
        await reader.read(out.getvalue())


async def test_of_a_wav_with_a_zip_behind_it_only_the_sound_is_kept(reader: ReferenceReader) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("payload.txt", "PAYLOAD-MARK" * 100)
    checked = await reader.read(as_file(speech()) + out.getvalue())
    assert checked.fingerprint == (await reader.read(as_file(speech()))).fingerprint
    assert b"PAYLOAD-MARK" not in checked.flac


async def test_a_container_with_an_unknown_codec_is_refused(reader: ReferenceReader) -> None:
    with pytest.raises(UnsupportedAudio):
        await reader.read(as_file(speech(), subtype="GSM610", rate_hz=RATE_HZ))


async def test_a_video_without_sound_is_refused(reader: ReferenceReader) -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        image = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    with pytest.raises(UnsupportedAudio, match="no audio track"):
        await reader.read(out.getvalue())


def test_sniffing_names_the_container() -> None:
    voice = speech()
    assert sniff_container(encode_whole(AudioFormat.WAV, voice, RATE_HZ)) is Container.WAV
    assert sniff_container(encode_whole(AudioFormat.FLAC, voice, RATE_HZ)) is Container.FLAC
    assert sniff_container(encode_whole(AudioFormat.MP3, voice, RATE_HZ)) is Container.MP3
    assert sniff_container(encode_whole(AudioFormat.OPUS, voice, RATE_HZ)) is Container.OGG
    assert sniff_container(b"ID3\x04" + bytes(20)) is Container.MP3


# --- bombs and forgeries --------------------------------------------------------------------------------


@functools.cache
def long_silence(kind: str) -> bytes:
    if kind == "flac":
        out = io.BytesIO()
        block = np.zeros(48_000 * 60, np.int16)
        with soundfile.SoundFile(out, "w", 48_000, 1, "PCM_16", format="FLAC") as file:
            for _ in range(120):
                file.write(block)
        return out.getvalue()
    if kind == "vorbis":
        out = io.BytesIO()
        with soundfile.SoundFile(out, "w", 8_000, 1, "VORBIS", format="OGG") as file:
            for _ in range(10):
                file.write(np.zeros(8_000 * 60, np.float32))
        return out.getvalue()
    # Opus takes longer to make, and eight minutes of it are as endless to a decoder with 30 s to give.
    with StreamEncoder(AudioFormat.OPUS, 48_000) as encoder:
        minute = np.zeros(48_000 * 60, np.float32)
        return b"".join(encoder.encode(minute) for _ in range(8)) + encoder.finish()


#: Runs the decoder and writes what it used; our own children are too many to tell apart.
METER = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[2:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
open(sys.argv[1], "w").write(f"{used.ru_maxrss} {used.ru_utime}")
sys.exit(status)
"""


@pytest.mark.parametrize("kind", ["flac", "opus", "vorbis"])
async def test_hours_of_silence_cost_next_to_nothing(tmp_path: Path, kind: str) -> None:
    bomb = long_silence(kind)
    meter = (sys.executable, "-c", METER, str(tmp_path / "used"), *ReferenceReader.WORKER)
    with pytest.raises(AudioTooLong, match="30 s are accepted"):
        await ReferenceReader(worker_command=meter).read(bomb)
    peak_kib, cpu_s = map(float, (tmp_path / "used").read_text().split())
    assert peak_kib < 256 * 1024  # Python, numpy and FFmpeg
    assert cpu_s < 5


async def test_a_bomb_that_hides_its_length_is_stopped_while_decoding(reader: ReferenceReader) -> None:
    bomb = bytearray(long_silence("flac"))
    bomb[21] &= 0xF0
    bomb[22:26] = (10 * 48_000).to_bytes(4, "big")  # "10 s"
    with pytest.raises(AudioTooLong, match="more than 30 s"):
        await reader.read(bytes(bomb))


@pytest.mark.parametrize(("rate_hz", "channels"), [(655_350, 8), (200_000, 1), (4_000, 1)])
async def test_forged_flac_header(reader: ReferenceReader, rate_hz: int, channels: int) -> None:
    with pytest.raises(AudioDecodeLimit, match="8 000 to 192 000"):
        await reader.read(flac_header(rate_hz, channels, 16, 25 * rate_hz) + bytes(140_000))


async def test_decoded_size_is_bounded() -> None:
    reader = ReferenceReader(ReferenceLimits(max_decoded_bytes=1024 * 1024))
    with pytest.raises(AudioDecodeLimit, match="too large when decoded"):
        await reader.read(as_file(np.stack([speech(25.0, 48_000)] * 2, axis=1), 48_000, "FLAC"))


async def test_nine_channels_are_refused(reader: ReferenceReader) -> None:
    with pytest.raises(UnusableAudio):
        await reader.read(as_file(np.stack([speech()] * 9, axis=1)))


async def test_upload_size_is_bounded() -> None:
    reader = ReferenceReader(ReferenceLimits(max_upload_bytes=2048))
    with pytest.raises(BodyTooLarge, match="MiB"):
        await reader.read(as_file(speech()))


# --- length, silence, quality ---------------------------------------------------------------------------


async def test_31_seconds_are_too_long_and_30_are_not(reader: ReferenceReader) -> None:
    with pytest.raises(AudioTooLong, match="31 s; 30 s are accepted"):
        await reader.read(as_file(speech(31.0)))
    assert (await reader.read(as_file(speech(30.0)))).duration_s > 29


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3"])
async def test_trimming_instead_of_refusing(kind: str) -> None:
    reader = ReferenceReader(ReferenceLimits(on_too_long="trim", max_reference_s=10))
    subtype = "MPEG_LAYER_III" if kind == "MP3" else "PCM_16"
    checked = await reader.read(as_file(speech(40.0), kind=kind, subtype=subtype))
    assert checked.duration_s == pytest.approx(10, abs=0.5)
    assert any("first 10 s" in warning for warning in checked.warnings)


@pytest.mark.parametrize("seconds", [0.01, 0.2, 0.9])
async def test_too_short(reader: ReferenceReader, seconds: float) -> None:
    with pytest.raises(AudioTooShort, match="at least 1 s"):
        await reader.read(as_file(speech(seconds)))


async def test_a_short_word_in_a_long_pause_is_too_short(reader: ReferenceReader) -> None:
    pause = np.zeros(5 * RATE_HZ, np.float32)
    with pytest.raises(AudioTooShort):
        await reader.read(as_file(np.concatenate([pause, speech(0.5), pause])))


@pytest.mark.parametrize("level", [0.0, 1e-4])
async def test_silence(reader: ReferenceReader, level: float) -> None:
    hush = np.random.default_rng(0).standard_normal(3 * RATE_HZ) * level
    with pytest.raises(NoSpeechDetected, match="silent"):
        await reader.read(as_file(hush))


async def test_a_constant_is_silence(reader: ReferenceReader) -> None:
    with pytest.raises(NoSpeechDetected):
        await reader.read(as_file(np.full(3 * RATE_HZ, 0.5)))


async def test_pure_noise(reader: ReferenceReader) -> None:
    noise = np.random.default_rng(0).standard_normal(3 * RATE_HZ) * 0.1
    with pytest.raises(NoSpeechDetected, match="noise"):
        await reader.read(as_file(noise))


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
async def test_values_that_are_not_numbers(reader: ReferenceReader, subtype: str, bad: float) -> None:
    samples = speech()
    samples[5_000] = bad
    with pytest.raises(AudioUndecodable, match="not numbers"):
        await reader.read(as_file(samples, subtype=subtype))


async def test_poor_recordings_are_accepted_with_a_warning(reader: ReferenceReader) -> None:
    voice = speech()
    hiss = np.random.default_rng(0).standard_normal(len(voice)) * 0.1
    poor: dict[str, Samples] = {
        "clipped": np.clip(voice * 8, -1, 0.9999).astype(np.float32),
        "noisy": (voice + hiss).astype(np.float32),
        "offset": voice * 0.5 + 0.2,
        "quiet": voice * 0.03,
    }
    for word, samples in poor.items():
        checked = await reader.read(as_file(samples))
        assert any(word in warning for warning in checked.warnings), (word, checked.warnings)
        assert abs(float(checked.samples.mean())) < 0.01
    assert (await reader.read(as_file(voice))).warnings == ()


# --- damage ---------------------------------------------------------------------------------------------


async def read_or_refuse(reader: ReferenceReader, blob: bytes) -> CheckedReference | VoiceCloneError:
    """What came out; an error must be about the file and in our own words."""
    try:
        return await reader.read(blob)
    except VoiceCloneError as error:
        refusal = error
    assert refusal.status in {415, 422}
    assert "/" not in refusal.message
    return refusal


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")],
)
@pytest.mark.parametrize("kept", [20, 200, 0.5])
async def test_truncated_files(reader: ReferenceReader, kind: str, subtype: str, kept: float) -> None:
    whole = as_file(speech(4.0), kind=kind, subtype=subtype)
    cut = whole[: int(kept * len(whole)) if kept < 1 else int(kept)]
    outcome = await read_or_refuse(reader, cut)
    if isinstance(outcome, CheckedReference):
        assert 1.0 <= outcome.duration_s < 4.0


async def test_a_file_that_ends_early_says_so(reader: ReferenceReader) -> None:
    whole = as_file(speech(4.0), kind="FLAC")
    checked = await reader.read(whole[: len(whole) * 6 // 10])
    assert any("ends before" in warning for warning in checked.warnings)


async def test_mutated_files_never_surprise(reader: ReferenceReader) -> None:
    """Damaged files give a reference or a refusal in our own words; nothing else, and nothing hangs."""
    chance = random.Random(20)  # noqa: S311 - not a secret
    voice = speech(1.5)
    seeds = [
        as_file(voice),
        as_file(voice, kind="FLAC"),
        as_file(voice, kind="MP3", subtype="MPEG_LAYER_III"),
        as_file(voice, kind="OGG", subtype="OPUS"),
        as_container("mp4", "aac", speech(1.5, 48_000)),
        as_container("webm", "libopus", speech(1.5, 48_000)),
    ]
    for turn in range(36):
        blob = bytearray(seeds[turn % len(seeds)])
        for _ in range(chance.choice([1, 4, 30])):
            place = chance.randrange(12, min(len(blob), chance.choice([80, 400, len(blob)])))
            action = chance.randrange(3)
            if action == 0:
                blob[place] = chance.randrange(256)
            elif action == 1:
                del blob[place : place + chance.randrange(1, 40)]
            else:
                blob[place:place] = chance.randbytes(chance.randrange(1, 40))
        outcome = await read_or_refuse(reader, bytes(blob))
        if isinstance(outcome, CheckedReference):
            assert np.isfinite(outcome.samples).all()
            assert np.abs(outcome.samples).max() <= 1.0


# --- the decoder process --------------------------------------------------------------------------------


def worker_script(tmp_path: Path, body: str) -> tuple[str, ...]:
    script = tmp_path / "worker.py"
    script.write_text(body)
    return (sys.executable, str(script))


@pytest.mark.parametrize("signal_name", ["SIGSEGV", "SIGKILL", "SIGABRT"])
async def test_a_decoder_crash_costs_one_request(
    tmp_path: Path, reader: ReferenceReader, signal_name: str
) -> None:
    body = f"import os, signal, sys\nsys.stdin.buffer.read(10)\nos.kill(os.getpid(), signal.{signal_name})\n"
    broken = ReferenceReader(worker_command=worker_script(tmp_path, body))
    with pytest.raises(AudioUndecodable):
        await broken.read(as_file(speech()))
    assert (await reader.read(as_file(speech()))).duration_s > 2


async def test_a_decoder_that_hangs_is_ended(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    body = f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    reader = ReferenceReader(
        ReferenceLimits(decode_timeout_s=2), worker_command=worker_script(tmp_path, body)
    )
    with pytest.raises(AudioDecodeLimit, match="too long"):
        await reader.read(as_file(speech()))
    assert not is_running(int(pid_file.read_text()))


async def test_a_decoder_that_computes_for_ever_is_ended(tmp_path: Path) -> None:
    body = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 2))\nwhile True: pass\n"
    reader = ReferenceReader(worker_command=worker_script(tmp_path, body))
    with pytest.raises(AudioDecodeLimit, match="computing"):
        await reader.read(as_file(speech()))


async def test_a_decoder_that_cannot_start_is_our_fault_not_the_clients(tmp_path: Path) -> None:
    for command in [worker_script(tmp_path, "raise SystemExit(3)"), (str(tmp_path / "absent"),)]:
        reader = ReferenceReader(worker_command=command)
        with pytest.raises(InternalError, match="operator") as caught:
            await reader.read(as_file(speech()))
        assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize(
    "answer",
    [
        "b''",
        "b'not json\\n'",
        "b'[]\\n'",
        "b'{\"ok\": true}\\n'",
        'b\'{"ok": true, "sample_rate_hz": 24000, "frames": 9, "channels": 1, "peak": 1, "bits": 16,'
        ' "lossless": true, "trimmed": false, "declared_seconds": null, "one_channel": false}\\nabc\'',
    ],
)
async def test_an_unreadable_answer_of_the_decoder_is_a_refusal(tmp_path: Path, answer: str) -> None:
    body = f"import sys\nsys.stdin.buffer.read()\nsys.stdout.buffer.write({answer})\n"
    reader = ReferenceReader(worker_command=worker_script(tmp_path, body))
    with pytest.raises(AudioUndecodable):
        await reader.read(as_file(speech()))


async def test_a_decoder_that_never_stops_talking_is_cut_off(tmp_path: Path) -> None:
    body = "import sys\nwhile True: sys.stdout.buffer.write(bytes(1 << 20))\n"
    reader = ReferenceReader(worker_command=worker_script(tmp_path, body))
    with pytest.raises(VoiceCloneError):
        await reader.read(as_file(speech()))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - another process decides
        await asyncio.sleep(0.02)


async def test_a_client_that_leaves_takes_the_decoder_with_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    body = (
        f"import os, time\nopen({str(pid_file)!r} + '.new', 'w').write(str(os.getpid()))\n"
        f"os.rename({str(pid_file)!r} + '.new', {str(pid_file)!r})\ntime.sleep(600)\n"
    )
    reader = ReferenceReader(worker_command=worker_script(tmp_path, body))
    task = asyncio.create_task(reader.read(as_file(speech())))
    await until(pid_file.exists)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not is_running(int(pid_file.read_text())))


async def test_the_decoder_sees_no_secrets_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOICE_CLONE__API_KEYS", "top-secret")
    seen = tmp_path / "seen"
    body = f"import os\nopen({str(seen)!r}, 'w').write(repr(dict(os.environ)))\n"
    with pytest.raises(AudioUndecodable):
        await ReferenceReader(worker_command=worker_script(tmp_path, body)).read(as_file(speech()))
    assert "top-secret" not in seen.read_text()


async def test_many_uploads_at_once(reader: ReferenceReader) -> None:
    blob = as_file(speech(2.0))
    checked = await asyncio.gather(*(reader.read(blob) for _ in range(6)))
    assert len({item.fingerprint for item in checked}) == 1


def test_a_damaged_flac_is_a_typed_error() -> None:
    flac = as_file(speech(), kind="FLAC")
    for damaged in (b"", b"fLaC", flac[:30], b"garbage" * 10):
        with pytest.raises(AudioUndecodable):
            decode_flac(damaged)
