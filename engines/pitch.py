"""F0 of a recording: normalised cross-correlation candidates, joined by a shortest path.

The method is that of RAPT (D. Talkin, "A Robust Algorithm for Pitch Tracking", 1995) with one analysis
rate instead of two: correlation peaks per frame are candidates, one more candidate says "unvoiced", and
dynamic programming picks the cheapest path through them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Int = NDArray[np.intp]

#: Frames are 12.5 ms apart.
FRAMES_PER_S = 80.0
_RATE_HZ = 8000
_HOP = int(_RATE_HZ / FRAMES_PER_S)
_CORRELATION_WINDOW = 400
_LOWEST_HZ = 60.0
_HIGHEST_HZ = 420.0
_CANDIDATES = 8
#: Cost of calling a frame unvoiced; a voiced candidate costs one minus its correlation.
_UNVOICED_COST = 0.55
_VOICING_CHANGE_COST = 0.14
#: Cost of moving by one in log-F0 between neighbouring frames.
_JUMP_COST = 1.2
#: Cost per sample of lag: of two equal peaks the shorter lag is the fundamental.
_LAG_COST = 0.00012
#: Frames this far below the loudest (natural log of power) are not voiced: noise correlates by chance.
_QUIET = 9.0
_QUIET_COST = 1.0


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Per frame: ``f0_hz`` [frames, K] and the cost of each, [frames, K + 1]; the last is "unvoiced"."""

    f0_hz: F64
    costs: F64


def track_f0(samples: F32, sample_rate_hz: int) -> F32:
    """F0 in Hz per 12.5 ms frame, 0 where unvoiced, shape [frames]; searched from 60 to 420 Hz."""
    narrow: F64 = soxr.resample(samples, sample_rate_hz, _RATE_HZ).astype(np.float64)
    candidates = _find_candidates(narrow - narrow.mean())
    path = _cheapest_path(candidates)
    padded = np.pad(candidates.f0_hz, ((0, 0), (0, 1)))
    return padded[np.arange(len(path)), path].astype(np.float32)


def _find_candidates(samples: F64) -> _Candidates:
    lags = np.arange(int(_RATE_HZ / _HIGHEST_HZ), int(_RATE_HZ / _LOWEST_HZ) + 1)
    correlation, log_power = _correlate(samples, int(lags[-1]))
    correlation = correlation[:, lags]
    inner = correlation[:, 1:-1]
    is_peak = (inner > correlation[:, :-2]) & (inner >= correlation[:, 2:])
    score = np.where(is_peak, inner, -1.0) - _LAG_COST * lags[None, 1:-1]
    best: Int = np.argpartition(-score, _CANDIDATES, axis=1)[:, :_CANDIDATES]
    f0_hz = _RATE_HZ / (lags[1:-1][best] + _peak_offset(correlation, best + 1))
    voiced_costs = 1.0 - np.take_along_axis(score, best, axis=1)
    voiced_costs[log_power < log_power.max() - _QUIET] += _QUIET_COST
    unvoiced_costs = np.full((len(best), 1), _UNVOICED_COST)
    return _Candidates(f0_hz, np.concatenate([voiced_costs, unvoiced_costs], axis=1))


def _correlate(samples: F64, longest_lag: int) -> tuple[F64, F64]:
    """Correlation [frames, longest_lag + 1] of each frame with what follows; log power [frames]."""
    window = _CORRELATION_WINDOW
    frames = len(samples) // _HOP + 1
    padded = np.pad(samples, (window // 2, 2 * window))
    spans = np.lib.stride_tricks.sliding_window_view(padded, window + longest_lag)[::_HOP][:frames]
    size = 1024
    spectrum = np.fft.rfft(spans, size) * np.conj(np.fft.rfft(spans[:, :window], size))
    products = np.fft.irfft(spectrum, size)[:, : longest_lag + 1]
    running = np.cumsum(np.pad(spans**2, ((0, 0), (1, 0))), axis=1)
    power = running[:, window:] - running[:, :-window]
    # The constant keeps near-silence from correlating perfectly with itself.
    floor = 1e-6 * float(np.median(power[:, 0])) ** 2 + 1e-12
    return products / np.sqrt(power * power[:, :1] + floor), np.log(power[:, 0] + 1e-12)


def _peak_offset(correlation: F64, peaks: Int) -> F64:
    """Where between samples the peak lies: vertex of the parabola through it and its neighbours."""
    left, top, right = (np.take_along_axis(correlation, peaks + step, axis=1) for step in (-1, 0, 1))
    curvature = left - 2 * top + right
    flat = np.abs(curvature) < 1e-6
    offset = np.where(flat, 0.0, 0.5 * (left - right) / np.where(flat, 1.0, curvature))
    return np.clip(offset, -0.5, 0.5)


def _cheapest_path(candidates: _Candidates) -> Int:
    """Index of the chosen candidate per frame, [frames]; ``_CANDIDATES`` is "unvoiced"."""
    log_f0 = np.log(candidates.f0_hz)
    frames = len(log_f0)
    came_from = np.zeros((frames, _CANDIDATES + 1), np.intp)
    step = np.full((_CANDIDATES + 1, _CANDIDATES + 1), _VOICING_CHANGE_COST)
    step[-1, -1] = 0.0
    total = candidates.costs[0]
    for frame in range(1, frames):
        step[:-1, :-1] = _JUMP_COST * np.abs(log_f0[frame - 1][:, None] - log_f0[frame][None])
        arriving = total[:, None] + step
        came_from[frame] = arriving.argmin(axis=0)
        total = arriving.min(axis=0) + candidates.costs[frame]
    path = np.empty(frames, np.intp)
    path[-1] = total.argmin()
    for frame in range(frames - 1, 0, -1):
        path[frame - 1] = came_from[frame, path[frame]]
    return path
