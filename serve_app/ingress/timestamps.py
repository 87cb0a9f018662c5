"""When each sentence is heard: as JSON, and as subtitles in SRT and WebVTT.

An utterance, mostly a sentence, is the unit of synthesis, so its place in the audio is known to the sample
and nothing has to be aligned. Pauses that the engine makes belong to the utterance they follow or precede.
Words are not timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from serve_app.protocol import AudioFrame, SpeechStarted


class Timestamps(StrEnum):
    """What ``timestamps`` can be."""

    JSON = "json"
    SRT = "srt"
    VTT = "vtt"


@dataclass(frozen=True, slots=True)
class TimedText:
    """A sentence and where it is in the audio."""

    text: str
    start_ms: int
    end_ms: int

    def as_dict(self) -> dict[str, Any]:
        """As clients read it."""
        return {"text": self.text, "start_ms": self.start_ms, "end_ms": self.end_ms}


class SentenceClock:
    """Counts the samples of one speech."""

    def __init__(self, started: SpeechStarted) -> None:
        self._started = started
        self._utterance = 0
        self._begun = 0
        self._samples = 0

    def heard(self, frame: AudioFrame) -> Iterator[TimedText]:
        """Count a frame; gives the sentences that have ended before it."""
        while self._utterance < frame.utterance:
            yield self._end()
        self._samples += len(frame.samples)

    def finish(self) -> Iterator[TimedText]:
        """The speech has ended; gives the sentences not given yet."""
        while self._utterance < len(self._started.texts):
            yield self._end()

    def _end(self) -> TimedText:
        timed = TimedText(
            # Spaces between sentences belong to the text, not to what is read.
            " ".join(self._started.texts[self._utterance].split()),
            self._ms(self._begun),
            self._ms(self._samples),
        )
        self._utterance += 1
        self._begun = self._samples
        return timed

    def _ms(self, samples: int) -> int:
        return round(1000 * samples / self._started.sample_rate_hz)


def subtitles(sentences: Sequence[TimedText], form: Timestamps) -> str | None:
    """``sentences`` as the text of a subtitle file; None where none is asked for."""
    if form is Timestamps.JSON:
        return None
    point = "," if form is Timestamps.SRT else "."
    cues = [
        f"{number}\n{_clock(sentence.start_ms, point)} --> {_clock(sentence.end_ms, point)}\n"
        # A cue ends at an empty line, and its times are told by this arrow.
        f"{sentence.text.replace('-->', '->')}\n"
        for number, sentence in enumerate(sentences, 1)
    ]
    return "\n".join(cues if form is Timestamps.SRT else ["WEBVTT\n", *cues])


def _clock(ms: int, point: str) -> str:
    seconds, ms = divmod(ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{ms:03}"
