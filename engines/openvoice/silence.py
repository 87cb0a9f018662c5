"""Silence around and inside speech: cut from recordings and from what base voices say."""

from __future__ import annotations

import numpy as np

from engines.contract import Samples

#: A block of 10 ms is silent this far below the loudest one: in recordings, and in speech of base voices.
_RECORDING_DB = -35.0
_BASE_DB = -40.0
#: Below this it is silent whatever the rest is.
_INAUDIBLE = 1e-4
_LONGEST_PAUSE_S = 0.3
_MARGIN_S = 0.04


def without_silence(samples: Samples, sample_rate_hz: int) -> Samples:
    """``samples`` [n] without silence at the ends, and with no pause longer than 0.3 s."""
    first, last = _audible_span(samples, sample_rate_hz, _RECORDING_DB)
    kept = samples[first:last]
    block = sample_rate_hz // 100
    blocks = kept[: len(kept) // block * block].reshape(-1, block)
    level = np.abs(blocks).max(axis=1, initial=0.0)
    quiet = level <= 10 ** (_RECORDING_DB / 20) * level.max(initial=0.0)
    # How many quiet blocks in a row end at each block.
    ends = np.arange(1, len(quiet) + 1)
    run = ends - np.maximum.accumulate(np.where(quiet, 0, ends))
    return blocks[run <= _LONGEST_PAUSE_S * sample_rate_hz / block].reshape(-1)


def without_pauses(samples: Samples, sample_rate_hz: int) -> Samples:
    """``samples`` [n] of a base voice with no more than a breath of silence at either end; [0] if silent."""
    first, last = _audible_span(samples, sample_rate_hz, _BASE_DB)
    if first == last:
        return samples[:0]
    margin = round(_MARGIN_S * sample_rate_hz)
    return samples[max(first - margin, 0) : last + margin]


def _audible_span(samples: Samples, sample_rate_hz: int, silence_db: float) -> tuple[int, int]:
    """Where the first audible block of ``samples`` begins and the last one ends; (0, 0) if there is none."""
    block = sample_rate_hz // 100
    level = np.abs(samples[: len(samples) // block * block]).reshape(-1, block).max(axis=1)
    loudest = level.max(initial=0.0)
    audible = np.flatnonzero(level > max(10 ** (silence_db / 20) * loudest, _INAUDIBLE))
    return (int(audible[0]) * block, (int(audible[-1]) + 1) * block) if len(audible) else (0, 0)
