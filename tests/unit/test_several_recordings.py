"""Several recordings of a speaker as one reference."""

from __future__ import annotations

import numpy as np
import pytest

from engines.contract import Reference
from serve_app.errors import AudioTooLong, AudioUndecodable, InvalidValue, NoSpeechDetected
from serve_app.voices.reference import ReferenceLimits, ReferenceReader, decode_flac
from serve_app.voices.several_recordings import read_recordings
from tests.speech import noisy_tone, wav_bytes

LOW = wav_bytes(noisy_tone(120.0, 2.0, rate_hz=16_000), rate_hz=16_000)
HIGH = wav_bytes(noisy_tone(240.0, 3.0, rate_hz=24_000), rate_hz=24_000)


async def test_recordings_follow_each_other_at_the_highest_rate() -> None:
    reader = ReferenceReader()
    low, high = await reader.read(LOW), await reader.read(HIGH)
    both = await read_recordings(reader, [LOW, HIGH])
    assert both.sample_rate_hz == 24_000
    assert both.duration_s == pytest.approx(low.duration_s + high.duration_s, abs=1e-3)
    first, second = both.as_reference().recordings
    assert len(first) / 24_000 == pytest.approx(low.duration_s, abs=1e-3)
    np.testing.assert_allclose(second, high.samples, atol=1e-4)
    stored, rate = decode_flac(both.flac)
    assert rate == 24_000
    np.testing.assert_array_equal(stored, both.samples)


async def test_one_recording_is_what_it_is() -> None:
    reader = ReferenceReader()
    assert (await read_recordings(reader, [HIGH])).fingerprint == (await reader.read(HIGH)).fingerprint
    assert (await read_recordings(reader, [HIGH])).cuts == ()


@pytest.mark.parametrize(
    ("bad", "error"),
    [(b"RIFF....WAVE", AudioUndecodable), (wav_bytes(np.zeros(48_000, np.float32)), NoSpeechDetected)],
)
async def test_each_has_to_be_a_reference_itself(bad: bytes, error: type[Exception]) -> None:
    with pytest.raises(error, match="Recording 2 of 3: "):
        await read_recordings(ReferenceReader(), [HIGH, bad, LOW])


async def test_too_many_and_too_much() -> None:
    with pytest.raises(InvalidValue, match="3 recordings; 2 are accepted"):
        await read_recordings(ReferenceReader(ReferenceLimits(max_recordings=2)), [LOW, LOW, LOW])
    with pytest.raises(AudioTooLong, match=r"in all; 4 s are accepted"):
        await read_recordings(ReferenceReader(ReferenceLimits(max_total_s=4)), [LOW, HIGH])


def test_a_reference_without_cuts_is_one_recording() -> None:
    samples = np.ones(10, np.float32)
    (only,) = Reference(samples, 8_000).recordings
    np.testing.assert_array_equal(only, samples)
    first, second = Reference(samples, 8_000, cuts=(4,)).recordings
    assert (len(first), len(second)) == (4, 6)
