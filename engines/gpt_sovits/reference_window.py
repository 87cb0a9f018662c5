"""The 3 to 10 s of a recording that GPT-SoVITS is prompted with, and what is said in them.

The model was trained on prompts of 3 to 10 s and its servers refuse any other; a longer one would cost words
and quality (GPT-SoVITS issues #386, #1529, #1795). People enrol what they have. So of a longer recording the
best window is taken: much speech, little silence, cut in pauses and if possible between sentences, its
transcript cut with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.contract import Reference, ReferenceUnusable, Samples, Word

#: What the model takes, in seconds.
SHORTEST_S = 3.0
LONGEST_S = 10.0
#: More speech than this makes a prompt longer, slower and no better.
_ENOUGH_SPEECH_S = 8.0

#: Cuts keep this clear of both ends of what the model takes: it counts after it has resampled.
_CLEARANCE_S = 0.05
_FRAME_S = 0.01
_SMOOTH_FRAMES = 3
#: Silence left at the ends of a window, so that no onset or ending is lost. The pause may have less.
_LEAD_S, _TAIL_S = 0.08, 0.15
#: A gap this long is a pause between words, not a stop within one. Shorter ones are tried if these do not do.
_PAUSES_S = (0.18, 0.1, 0.05)
#: Without any pause, the quietest moments this far apart are cut at.
_MOMENT_EVERY_S = 0.4
_FADE_S = 0.005

#: What a cut costs, in seconds of speech that another window may have less and still be better.
_MID_SENTENCE_COST, _MID_CLAUSE_COST = 2.5, 1.0
_SILENCE_COST = 0.5

_SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？", "।", "؟")
_CLAUSE_ENDS = (",", ";", ":", "—", "、", "，", "；", "：", "،")
_AFTER_ENDS = "\"'”’»)]」』"


@dataclass(frozen=True, slots=True)
class ReferenceWindow:
    """A part of a recording.

    ``samples``: mono float32 [n] at the recording's own rate, 3 to 10 s. ``transcript``: exactly what is
    said in them, closed by a full stop; empty if that is not known. ``start_s``, ``end_s``: where they lie
    in the recording.
    """

    samples: Samples
    transcript: str
    start_s: float
    end_s: float


def reference_window(reference: Reference) -> ReferenceWindow:
    """The best window of ``reference``; all of it if it has no more than 10 s.

    A transcript is cut by ``reference.words``. Without them only a whole recording has a transcript: half a
    one, or one for other sounds, would be spoken into what is to be said. Raises ``ReferenceUnusable`` below
    3 s.
    """
    duration_s = reference.duration_s
    if duration_s < SHORTEST_S:
        raise ReferenceUnusable(
            f"The recording has {duration_s:.1f} s; this engine needs {SHORTEST_S:g} s.",
            next_step="Enrol a longer one; 5 to 10 s are best.",
        )
    if duration_s <= LONGEST_S:
        return ReferenceWindow(reference.samples, _closed(reference.transcript), 0.0, duration_s)
    level_db = _level_db(reference)
    spoken = level_db > _threshold_db(level_db)
    window = _best(level_db, spoken, reference)
    first, end = (round(edge_s * reference.sample_rate_hz) for edge_s in (window.start_s, window.end_s))
    samples = _faded(reference.samples[first:end], reference.sample_rate_hz)
    said = "".join(word.text for word in reference.words[window.first_word : window.end_word])
    return ReferenceWindow(samples, _closed(said), window.start_s, window.end_s)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A place to cut at: where a window that ends here ends, and where one that begins here begins."""

    ends_s: float
    begins_s: float
    #: Words before it.
    words: int
    #: What it costs to tear apart what stands here.
    cost: float


@dataclass(frozen=True, slots=True)
class _Window:
    start_s: float
    end_s: float
    first_word: int
    end_word: int
    score: float


def _best(level_db: NDArray[np.float64], spoken: NDArray[np.bool_], reference: Reference) -> _Window:
    words, duration_s = reference.words, reference.duration_s
    edges = (_Cut(0.0, 0.0, 0, 0.0), _Cut(duration_s, duration_s, len(words), 0.0))
    for shortest_pause_s in _PAUSES_S:
        gaps = _pauses(spoken, shortest_pause_s)
        cuts = [edges[0], *(_cut(first, end, words) for first, end in gaps), edges[1]]
        if windows := list(_windows(cuts, spoken)):
            return max(windows, key=lambda window: window.score)
    # Speech without a breath, or music: the quietest moments are the least bad places.
    cuts = [edges[0], *(_cut(moment, moment, words) for moment in _quiet_moments(level_db)), edges[1]]
    return max(_windows(cuts, spoken), key=lambda window: window.score)


def _windows(cuts: Sequence[_Cut], spoken: NDArray[np.bool_]) -> Iterator[_Window]:
    """All windows between two of ``cuts`` that have a length the model takes."""
    until = np.concatenate([[0], np.cumsum(spoken)]) * _FRAME_S
    for index, first in enumerate(cuts):
        for last in cuts[index + 1 :]:
            start_s, end_s = first.begins_s, last.ends_s
            if end_s - start_s > LONGEST_S - _CLEARANCE_S:
                break
            if end_s - start_s < SHORTEST_S + _CLEARANCE_S:
                continue
            speech_s = float(until[_frame(end_s, len(spoken))] - until[_frame(start_s, len(spoken))])
            silence_s = end_s - start_s - speech_s
            score = min(speech_s, _ENOUGH_SPEECH_S) - first.cost - last.cost - _SILENCE_COST * silence_s
            yield _Window(start_s, end_s, first.words, last.words, score)


def _cut(pause_start_s: float, pause_end_s: float, words: Sequence[Word]) -> _Cut:
    """A cut in a pause. Recognisers are some 0.1 s off at the edges of words: the middles decide."""
    middle_s = (pause_start_s + pause_end_s) / 2
    before = sum((word.start_s + word.end_s) / 2 < middle_s for word in words)
    return _Cut(
        ends_s=min(pause_start_s + _TAIL_S, middle_s),
        begins_s=max(pause_end_s - _LEAD_S, middle_s),
        words=before,
        cost=_cost_after(words[before - 1].text) if before else 0.0,
    )


def _cost_after(text: str) -> float:
    said = text.rstrip().rstrip(_AFTER_ENDS)
    if said.endswith(_SENTENCE_ENDS):
        return 0.0
    return _MID_CLAUSE_COST if said.endswith(_CLAUSE_ENDS) else _MID_SENTENCE_COST


def _pauses(spoken: NDArray[np.bool_], shortest_s: float) -> list[tuple[float, float]]:
    """Where nothing is said for at least ``shortest_s`` between speech: start and end in seconds."""
    steps = np.diff(spoken.astype(np.int8))
    starts, ends = np.flatnonzero(steps < 0) + 1, np.flatnonzero(steps > 0) + 1
    # A pause has speech on both sides: what is before the first word or after the last is none.
    ends = ends[ends > starts[0]] if len(starts) else ends[:0]
    return [
        (float(start) * _FRAME_S, float(end) * _FRAME_S)
        for start, end in zip(starts, ends, strict=False)
        if (end - start) * _FRAME_S >= shortest_s - 1e-9
    ]


def _quiet_moments(level_db: NDArray[np.float64]) -> list[float]:
    size = round(_MOMENT_EVERY_S / _FRAME_S)
    count = len(level_db) // size
    quietest = np.argmin(level_db[: count * size].reshape(count, size), axis=1)
    return [float(moment) for moment in (np.arange(count) * size + quietest + 0.5) * _FRAME_S]


def _level_db(reference: Reference) -> NDArray[np.float64]:
    """Level of each 10 ms, smoothed over three of them."""
    edges = np.arange(0, reference.duration_s, _FRAME_S) * reference.sample_rate_hz
    power = np.add.reduceat(np.square(reference.samples, dtype=np.float64), edges.astype(np.int64))
    power = np.convolve(power, np.full(_SMOOTH_FRAMES, 1 / _SMOOTH_FRAMES), "same")
    level_db: NDArray[np.float64] = 10 * np.log10(power / (_FRAME_S * reference.sample_rate_hz) + 1e-12)
    return level_db


def _threshold_db(level_db: NDArray[np.float64]) -> float:
    """Speech is above it: well under the loud parts, and above the room where that is noisy."""
    loud_db, room_db = np.percentile(level_db, 95), np.percentile(level_db, 5)
    return float(max(loud_db - 35, min(room_db + 8, loud_db - 15)))


def _frame(at_s: float, count: int) -> int:
    return min(count, max(0, round(at_s / _FRAME_S)))


def _faded(samples: Samples, sample_rate_hz: int) -> Samples:
    """A cut in a room that is not silent would click."""
    ramp = np.linspace(0, 1, max(1, round(_FADE_S * sample_rate_hz)), dtype=np.float32)
    faded = samples.copy()
    faded[: len(ramp)] *= ramp
    faded[len(faded) - len(ramp) :] *= ramp[::-1]
    return faded


def _closed(transcript: str) -> str:
    """``transcript`` with a full stop: after an open end the model goes on with the prompt (issue #1588)."""
    said = transcript.strip()
    if not said or said.rstrip(_AFTER_ENDS).endswith(_SENTENCE_ENDS):
        return said
    said = said.rstrip("".join(_CLAUSE_ENDS) + "-–").rstrip()
    wide = bool(said) and "\u3040" <= said[-1] <= "\u9fff"
    return said + ("。" if wide else ".")
