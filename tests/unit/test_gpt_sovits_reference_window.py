"""Any recording of 3 s or more gives a prompt of 3 to 10 s, with exactly the words that are said in it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.judges import transcribe, word_error_rate
from benchmarks.speakers import DEMO_SPEAKER, enrolment_clip, judge_clip, speaker
from engines.contract import Reference, ReferenceUnusable, Samples, Word
from engines.gpt_sovits.reference_window import LONGEST_S, SHORTEST_S, reference_window
from serve_app.transcripts.recogniser import Recogniser, RecogniserConfig
from serve_app.transcripts.transcript import transcript_of
from tests.whisper import whisper_folder

RATE_HZ = 16_000


def speech(*seconds: float, pause_s: float = 0.3, level: float = 0.2) -> Samples:
    """Stretches of noise with pauses between them."""
    noise = np.random.default_rng(0)
    pause = np.zeros(round(pause_s * RATE_HZ), np.float32)
    parts: list[Samples] = []
    for length_s in seconds:
        parts += [noise.normal(0, level, round(length_s * RATE_HZ)).astype(np.float32), pause]
    return np.concatenate(parts[:-1])


def words(*seconds: float, pause_s: float = 0.3, end: str = ".") -> tuple[Word, ...]:
    """One word for each stretch of ``speech``."""
    found, at_s = [], 0.0
    for index, length_s in enumerate(seconds):
        found.append(Word(f"{' ' if index else ''}w{index}{end}", at_s, at_s + length_s))
        at_s += length_s + pause_s
    return tuple(found)


def reference(samples: Samples, *timed: Word) -> Reference:
    return Reference(samples, RATE_HZ, "".join(word.text for word in timed), "en", timed)


def test_a_short_recording_is_taken_whole() -> None:
    for seconds in (3.0, 7.0, 10.0):
        window = reference_window(Reference(speech(seconds), RATE_HZ, "Words without times,"))
        assert len(window.samples) == round(seconds * RATE_HZ)
        assert window.transcript == "Words without times."


def test_less_than_three_seconds_is_too_short() -> None:
    with pytest.raises(ReferenceUnusable, match=r"2\.9 s.*Enrol a longer one"):
        reference_window(Reference(speech(2.9), RATE_HZ))


def test_the_words_are_those_between_the_cuts() -> None:
    lengths = (4.0, 4.0, 4.0, 4.0)
    window = reference_window(reference(speech(*lengths), *words(*lengths)))
    assert window.transcript in ("w0. w1.", "w1. w2.", "w2. w3.")
    first = int(window.transcript[1])
    assert abs(window.start_s - first * 4.3) < 0.12
    assert abs(window.end_s - (first * 4.3 + 8.3)) < 0.2
    assert len(window.samples) == round(window.end_s * RATE_HZ) - round(window.start_s * RATE_HZ)


def test_times_that_are_a_little_off_move_no_word_across_a_cut() -> None:
    lengths = (2.5,) * 6
    shifted = [Word(word.text, word.start_s + 0.25, word.end_s + 0.25) for word in words(*lengths)]
    window = reference_window(reference(speech(*lengths), *shifted))
    first, last = (round(edge_s / 2.8) for edge_s in (window.start_s, window.end_s))
    assert window.transcript == " ".join(f"w{index}." for index in range(first, last))


def test_sentences_are_kept_whole_where_that_is_possible() -> None:
    lengths = (2.0,) * 8
    timed = [
        Word(word.text.replace(".", "." if index in (1, 4, 7) else ""), word.start_s, word.end_s)
        for index, word in enumerate(words(*lengths))
    ]
    window = reference_window(reference(speech(*lengths), *timed))
    assert window.transcript in ("w2 w3 w4.", "w5 w6 w7.")


def test_speech_is_chosen_and_not_silence() -> None:
    samples = np.concatenate([speech(*[0.5] * 6, pause_s=1.5), speech(2.0, 2.0, 2.0, 2.0, pause_s=0.2)])
    window = reference_window(Reference(samples, RATE_HZ))
    assert window.start_s > 9
    assert window.end_s - window.start_s > 8


def test_without_times_a_part_has_no_transcript() -> None:
    window = reference_window(Reference(speech(4, 4, 4, 4), RATE_HZ, "w0. w1. w2. w3."))
    assert window.transcript == ""


def test_cuts_do_not_click() -> None:
    samples = speech(4, 4, 4, 4) + np.float32(0.1)
    window = reference_window(Reference(samples, RATE_HZ))
    assert window.samples[0] == window.samples[-1] == 0
    assert samples[round(window.start_s * RATE_HZ)] != 0  # the recording itself is not touched


@pytest.mark.parametrize(
    "samples",
    [
        speech(25.0),
        np.full(25 * RATE_HZ, 0.3, np.float32),
        np.zeros(25 * RATE_HZ, np.float32),
        np.sin(np.arange(12 * RATE_HZ) / 20).astype(np.float32),
        speech(11.0, 0.2, pause_s=12.0),
        speech(*[0.3] * 40, pause_s=0.06),
    ],
    ids=["no pause", "constant", "silence", "tone", "pause too long", "stutter"],
)
def test_nothing_is_too_long_or_too_odd(samples: Samples) -> None:
    window = reference_window(Reference(samples, RATE_HZ))
    assert SHORTEST_S * RATE_HZ <= len(window.samples) <= LONGEST_S * RATE_HZ


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.2, 6.0), min_size=1, max_size=14).filter(lambda lengths: sum(lengths) > 11),
    st.floats(0.03, 2.0),
)
def test_every_window_is_a_whole_number_of_words(lengths: list[float], pause_s: float) -> None:
    window = reference_window(reference(speech(*lengths, pause_s=pause_s), *words(*lengths, pause_s=pause_s)))
    assert SHORTEST_S <= window.end_s - window.start_s <= LONGEST_S
    numbers = [int(word[1:-1]) for word in window.transcript.split()]
    assert all(after == before + 1 for before, after in pairwise(numbers))


def test_a_reader_of_25_seconds_gives_a_window_with_its_words() -> None:
    """Words by the recogniser of the server, judged by hearing the window anew."""
    one = speaker(DEMO_SPEAKER)
    sonnet, more = enrolment_clip(one), judge_clip(one)
    assert sonnet.transcript is not None
    rate_hz = sonnet.sample_rate_hz
    samples = np.concatenate([sonnet.samples, np.zeros(rate_hz // 2, np.float32), more.samples])[
        : 25 * rate_hz
    ]
    recogniser = Recogniser(RecogniserConfig(model=str(whisper_folder())))
    recogniser.load()
    heard = recogniser.hear(samples, rate_hz, "en")
    known = transcript_of("", "en", heard)
    assert known is not None
    window = reference_window(known.completes(Reference(samples, rate_hz)))
    assert SHORTEST_S <= len(window.samples) / rate_hz <= LONGEST_S
    assert word_error_rate(window.transcript, transcribe(window.samples, rate_hz)) <= 0.1
    # The sonnet as a person wrote it, timed by what was heard: exactly its own words, and none else.
    written = transcript_of(sonnet.transcript, "en", recogniser.hear(sonnet.samples, rate_hz, "en"))
    assert written is not None
    window = reference_window(written.completes(Reference(sonnet.samples, rate_hz)))
    assert len(window.transcript.split()) >= 8
    assert window.transcript.rstrip(".") in sonnet.transcript
    assert word_error_rate(window.transcript, transcribe(window.samples, rate_hz)) <= 0.15
