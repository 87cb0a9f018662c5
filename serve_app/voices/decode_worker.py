"""Decodes one untrusted recording in a process of its own. Run by ``reference``, never imported by it.

The codecs are native code that meets bytes from strangers. Here they can crash, loop or swell without anyone
else noticing: the process limits its own memory and CPU time before it reads a byte of input, and knows
nothing worth stealing.

Protocol::

    argv[1]   JSON: container, max_seconds, on_too_long, max_channels, min_rate_hz, max_rate_hz,
              max_decoded_bytes, memory_bytes, cpu_seconds
    stdin     the recording
    stdout    one line of JSON, then for {"ok": true} the samples: mono float32 little endian
              {"ok": true, "sample_rate_hz", "frames", "channels", "peak", "lossless", "bits", "trimmed",
               "declared_seconds", "one_channel"}
              {"ok": false, "reason", ...facts}

An exit status other than 0, or no output, means that the decoder died.
"""

from __future__ import annotations

import io
import json
import math
import resource
import sys
from typing import Any

#: Codecs that may be decoded, by FFmpeg's names. The containers could carry hundreds of others.
CODECS = frozenset(
    {
        "flac", "mp3", "mp3float", "opus", "libopus", "vorbis", "libvorbis", "aac", "alac",
        "pcm_u8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_s32be",
        "pcm_f32le", "pcm_f32be", "pcm_f64le", "pcm_f64be", "pcm_alaw", "pcm_mulaw",
    }
)  # fmt: skip

#: Codecs round up to whole frames: this much over the longest recording accepted is not called too long.
GRACE_S = 0.1

#: Decoders drop a damaged packet and go on; beyond this many the recording is called broken.
MAX_DAMAGED_PACKETS = 8


class Refused(Exception):
    """The recording is not decoded. ``reason`` is a word of the protocol."""

    def __init__(self, reason: str, **facts: object) -> None:
        super().__init__(reason)
        self.reason = reason
        self.facts = facts


def main() -> None:
    """Decode stdin to stdout as the module's docstring says."""
    order = json.loads(sys.argv[1])
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_FSIZE", 0)
    _limit("RLIMIT_CPU", order["cpu_seconds"])
    _limit("RLIMIT_AS", order["memory_bytes"])
    import av

    av.logging.set_level(None)
    data = sys.stdin.buffer.read()
    try:
        header, samples = decode(data, order)
    except Refused as refusal:
        header, samples = {"ok": False, "reason": refusal.reason, **refusal.facts}, b""
    except MemoryError:
        header, samples = {"ok": False, "reason": "limit"}, b""
    except Exception:  # noqa: BLE001 - whatever a damaged file makes PyAV raise, the file is damaged
        header, samples = {"ok": False, "reason": "undecodable"}, b""
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + samples)
    sys.stdout.buffer.flush()


def _limit(name: str, value: int) -> None:
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (wanted, hard if name == "RLIMIT_CPU" else wanted))
    except (OSError, ValueError):  # not every platform has every limit; the wall clock still ends it
        return


def decode(data: bytes, order: dict[str, Any]) -> tuple[dict[str, object], bytes]:
    """Decode the audio track of ``data``, no further than ``max_seconds``; facts and float32 bytes."""
    import av

    # The container is named, so that FFmpeg does not try its 400 others.
    with av.open(io.BytesIO(data), "r", format=order["container"], metadata_errors="ignore") as container:
        if not container.streams.audio:
            raise Refused("no_audio")
        stream = container.streams.audio[0]
        codec = stream.codec_context
        if codec.name not in CODECS:
            raise Refused("codec")
        codec.thread_count = 1
        declared = _declared_seconds(stream)
        _check_shape(codec.sample_rate, codec.channels, order)
        _check_length(declared, codec.sample_rate, codec.channels, order)
        return _decode_stream(container, stream, declared, order)


def _declared_seconds(stream: Any) -> float | None:
    if stream.duration is None or stream.time_base is None:
        return None
    seconds = float(stream.duration * stream.time_base)
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _check_shape(rate_hz: int, channels: int, order: dict[str, Any]) -> None:
    if rate_hz and not order["min_rate_hz"] <= rate_hz <= order["max_rate_hz"]:
        raise Refused("sample_rate", sample_rate_hz=rate_hz)
    if channels > order["max_channels"]:
        raise Refused("channels", channels=channels)


def _check_length(declared: float | None, rate_hz: int, channels: int, order: dict[str, Any]) -> None:
    if declared is None or order["container"] == "mp3":  # an MP3 need not say; FFmpeg guesses from its size
        return
    if order["on_too_long"] == "trim":
        declared = min(declared, order["max_seconds"])
    # A header may understate the length, which the decode loop finds out; it has no reason to overstate it.
    if declared > order["max_seconds"] + GRACE_S:
        raise Refused("too_long", seconds=declared)
    if declared * rate_hz * channels * 4 > order["max_decoded_bytes"]:
        raise Refused("limit")


def _decode_stream(
    container: Any, stream: Any, declared: float | None, order: dict[str, Any]
) -> tuple[dict[str, object], bytes]:
    import av
    import numpy as np

    mixed: list[Any] = []
    first_channel: list[Any] = []
    rate_hz = channels = frames = damaged = 0
    peak = mixed_energy = first_energy = 0.0
    sample_format = ""
    trimmed = False
    for packet in container.demux(stream):
        try:
            decoded = packet.decode()
        except av.InvalidDataError:
            damaged += 1
            if damaged > MAX_DAMAGED_PACKETS:
                raise Refused("undecodable") from None
            continue
        for frame in decoded:
            if not frame.samples:
                continue
            if not rate_hz:
                rate_hz, sample_format = frame.sample_rate, frame.format.name
            elif frame.sample_rate != rate_hz:
                raise Refused("undecodable")
            channels = max(channels, frame.layout.nb_channels)
            _check_shape(rate_hz, channels, order)
            block = _to_float(frame)
            frames += block.shape[1]
            if frames * channels * 4 > order["max_decoded_bytes"]:
                raise Refused("limit")
            mono = block.mean(axis=0, dtype=np.float32)
            peak = max(peak, float(np.abs(block).max()))
            mixed.append(mono)
            mixed_energy += float(np.square(mono, dtype=np.float64).sum())
            if channels > 1:
                first_channel.append(block[0])
                first_energy += float(np.square(block[0], dtype=np.float64).sum())
        if rate_hz and frames > (order["max_seconds"] + GRACE_S) * rate_hz:
            if order["on_too_long"] == "refuse":
                raise Refused("too_long", seconds=None)
            trimmed = True
            break
    if not frames:
        raise Refused("undecodable")
    # Two channels in opposite phase cancel out in the mix: then one of them alone is the recording.
    one_channel = channels > 1 and len(first_channel) == len(mixed) and mixed_energy < 0.01 * first_energy
    samples = np.concatenate(first_channel if one_channel else mixed)
    if trimmed:
        samples = samples[: int(order["max_seconds"] * rate_hz)]
    header: dict[str, object] = {
        "ok": True,
        "sample_rate_hz": rate_hz,
        "frames": len(samples),
        "channels": channels,
        "peak": peak if math.isfinite(peak) else None,
        "lossless": stream.codec_context.name in {"flac", "alac"}
        or stream.codec_context.name.startswith("pcm_"),
        "bits": 16 if sample_format.startswith(("u8", "s16")) else 24,
        "trimmed": trimmed,
        "declared_seconds": declared,
        "one_channel": one_channel,
    }
    return header, samples.astype("<f4").tobytes()


def _to_float(frame: Any) -> Any:
    """One frame as float32 [channels, n] in [-1, 1]."""
    import numpy as np

    name = frame.format.name
    block = frame.to_ndarray()
    if not frame.format.is_planar:
        block = block.reshape(-1, frame.layout.nb_channels).T
    if name.startswith("u8"):
        return (block.astype(np.float32) - 128.0) / 128.0
    if name.startswith("s16"):
        return block.astype(np.float32) / np.float32(32768.0)
    if name.startswith("s32"):
        return (block / 2147483648.0).astype(np.float32)
    return block.astype(np.float32)


if __name__ == "__main__":
    main()
