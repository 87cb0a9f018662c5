"""What ``make demo`` writes: the words that were asked for, in the voice that was enrolled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import soundfile

from benchmarks.demo import TEXT
from benchmarks.judges import second_encoder_embedding, transcribe, word_error_rate
from benchmarks.speakers import DEMO_SPEAKER, enrolment_clip, speaker
from tests.cluster.conftest import BIN, run

#: Other people, from the same package registry.
STRANGERS = ("en_austen", "en_dhd")


@pytest.mark.timeout(600)
def test_demo_speaks_the_text_in_the_voice(environment: dict[str, str], tmp_path: Path) -> None:
    wav = tmp_path / "demo.wav"
    demo = run(BIN / "python", "-m", "benchmarks.demo", "--out", wav, environment=environment, timeout_s=400)
    assert demo.returncode == 0, demo.stdout
    for figure in ("enrolment", "first audio", "real-time factor", "similarity"):
        assert re.search(rf"^{figure} +[\d.]+", demo.stdout, re.MULTILINE), demo.stdout
    assert "Traceback" not in demo.stdout
    assert wav.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    samples, rate_hz = soundfile.read(wav, dtype="float32")
    assert word_error_rate(TEXT, transcribe(samples, rate_hz)) <= 0.15
    spoken = second_encoder_embedding(samples, rate_hz)
    nearness = {}
    for name in (DEMO_SPEAKER, *STRANGERS):
        clip = enrolment_clip(speaker(name))
        nearness[name] = float(spoken @ second_encoder_embedding(clip.samples, clip.sample_rate_hz))
    assert max(nearness, key=nearness.__getitem__) == DEMO_SPEAKER, nearness
