"""Utterances are heard again before anybody else hears them, and redone while words are missing."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from engines.contract import Samples
from serve_app.errors import EngineFailed, NoSpeechDetected, TranscriberUnavailable, VoiceCloneError
from serve_app.metrics import VERIFIED
from serve_app.protocol import UtteranceVerified
from serve_app.router.rows import Listener, Recording
from serve_app.router.verification import Demand, Verification
from serve_app.transcripts.agreement import VerifyTerms, word_error_rate
from serve_app.transcripts.transcript import Hearing
from tests.unit.test_transcripts import hearing

TEXT = "One two three four."


class Ears:
    """In place of the transcriber: hears attempt n as the n-th of its answers. Samples name the attempt."""

    def __init__(self, *answers: str | VoiceCloneError) -> None:
        self._answers = answers
        self.languages: list[str] = []

    async def hear(self, samples: Samples, sample_rate_hz: int, language: str) -> Hearing:
        await asyncio.sleep(0)
        self.languages.append(language)
        answer = self._answers[int(samples[0])]
        if isinstance(answer, VoiceCloneError):
            raise answer
        return hearing(answer)


class Counted:
    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def count(self, series: object, amount: float = 1, **tags: str) -> None:
        assert series is VERIFIED
        self.outcomes.append(tags["outcome"])


class Case:
    """One utterance through a verification."""

    def __init__(self, *answers: str | VoiceCloneError, tries: int = 3, max_wer: float = 0.2) -> None:
        self.ears, self.metrics = Ears(*answers), Counted()
        self.verdicts: list[UtteranceVerified] = []
        self.attempts: list[int] = []
        self.recordings: list[Recording] = []
        self._verification = Verification(self.ears, self.metrics)  # type: ignore[arg-type]
        self._demand = Demand(
            VerifyTerms(tries=tries, max_wer=max_wer), "tone", "en", 24_000, self.verdicts.append
        )

    def speak(self, attempt: int) -> Listener:
        self.attempts.append(attempt)
        recording = Recording.of(np.full(8, attempt, np.float32))
        self.recordings.append(recording)
        return recording.join()

    def listen(self) -> Listener:
        return self._verification.listen(4, TEXT, self.speak, self._demand)

    async def heard(self) -> int:
        """The attempt that is heard."""
        listener = self.listen()
        try:
            (samples,) = [samples async for samples in listener]
        finally:
            listener.leave()
        return int(samples[0])


async def test_an_utterance_that_is_all_there_is_spoken_once() -> None:
    case = Case("one, TWO three: four")
    assert await case.heard() == 0
    assert case.verdicts == [UtteranceVerified(4, 1, 0.0, passed=True)]
    assert (case.attempts, case.metrics.outcomes, case.ears.languages) == ([0], ["passed"], ["en"])


async def test_it_is_redone_until_its_words_are_there() -> None:
    case = Case("One two", NoSpeechDetected("Nothing."), "One two three four.", "never")
    assert await case.heard() == 2
    assert case.verdicts == [UtteranceVerified(4, 3, 0.0, passed=True)]
    assert case.metrics.outcomes == ["redone"]
    assert all(recording.left for recording in case.recordings)


async def test_the_best_try_is_heard_if_none_passes() -> None:
    case = Case("One", "One two three", "One two", tries=3)
    assert await case.heard() == 1
    assert case.verdicts == [UtteranceVerified(4, 3, 0.25, passed=False)]
    assert case.metrics.outcomes == ["failed"]


async def test_what_goes_wrong_ends_the_utterance_with_its_error() -> None:
    with pytest.raises(TranscriberUnavailable):
        await Case(TranscriberUnavailable("No.")).heard()
    case = Case("One")

    def broken(_: int) -> Listener:
        recording = Recording()
        recording.end(EngineFailed("No."))
        return recording.join()

    case.speak = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(EngineFailed):
        await case.heard()
    assert not case.verdicts


async def test_a_listener_that_leaves_ends_the_work() -> None:
    case = Case("One")
    endless = Recording()
    case.speak = lambda _: endless.join()  # type: ignore[method-assign, assignment]
    listener = case.listen()
    await asyncio.sleep(0.01)
    assert not endless.left
    listener.leave()
    await asyncio.sleep(0.01)
    assert endless.left


@pytest.mark.parametrize(
    ("text", "heard", "rate"),
    [
        ("One two three four.", "one two three four", 0.0),
        ("One two three four.", "one three four", 0.25),
        ("One two three four.", "one two two three four", 0.25),
        ("One two three four.", "one two tree four", 0.25),
        ("Sixteen men.", "16 men", 0.0),
        ("Don't!", "don’t", 0.0),
        ("你好，世界。", "你好世界", 0.0),
        ("你好，世界。", "你好世", 0.25),
        ("One.", "", 1.0),
        ("One.", "one one one", 2.0),
    ],
)
def test_words_are_counted(text: str, heard: str, rate: float) -> None:
    assert word_error_rate(text, heard) == rate
