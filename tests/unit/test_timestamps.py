"""When each sentence is heard, and how subtitle files say it."""

from __future__ import annotations

import numpy as np
import pytest

from serve_app.ingress.timestamps import SentenceClock, TimedText, Timestamps, subtitles
from serve_app.protocol import AudioFrame, SpeechStarted

STARTED = SpeechStarted("tone", "v", "en", 1000, 1, 3, ("First one. ", "Second\n one. ", "Third."))


def frame(utterance: int, samples: int) -> AudioFrame:
    """Some audio of an utterance."""
    return AudioFrame(np.zeros(samples, np.float32), utterance)


def test_sentences_follow_each_other_without_gaps() -> None:
    clock = SentenceClock(STARTED)
    heard = [list(clock.heard(frame(*part))) for part in ((0, 700), (0, 300), (1, 50), (2, 5000))]
    first, second = TimedText("First one.", 0, 1000), TimedText("Second one.", 1000, 1050)
    assert heard == [[], [], [first], [second]]
    assert list(clock.finish()) == [TimedText("Third.", 1050, 6050)]


def test_a_sentence_without_sound_has_its_place() -> None:
    clock = SentenceClock(STARTED)
    assert list(clock.heard(frame(0, 10))) == []
    assert [(timed.start_ms, timed.end_ms) for timed in clock.heard(frame(2, 10))] == [(0, 10), (10, 10)]


def test_the_clock_is_that_of_the_engine() -> None:
    clock = SentenceClock(SpeechStarted("tone", "v", "en", 22_050, 1, 1, ("Hi.",)))
    list(clock.heard(frame(0, 22_050 * 2)))
    assert list(clock.finish()) == [TimedText("Hi.", 0, 2000)]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (
            Timestamps.SRT,
            "1\n00:00:00,000 --> 00:00:01,234\nOne.\n\n2\n00:00:01,234 --> 01:01:01,001\nTwo -> 2.\n",
        ),
        (
            Timestamps.VTT,
            "WEBVTT\n\n1\n00:00:00.000 --> 00:00:01.234\nOne.\n\n"
            "2\n00:00:01.234 --> 01:01:01.001\nTwo -> 2.\n",
        ),
        (Timestamps.JSON, None),
    ],
)
def test_subtitle_files(form: Timestamps, expected: str | None) -> None:
    sentences = [TimedText("One.", 0, 1234), TimedText("Two --> 2.", 1234, 3_661_001)]
    assert subtitles(sentences, form) == expected
