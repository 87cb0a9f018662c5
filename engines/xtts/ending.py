"""Where an utterance ends to the ear.

XTTS does not always stop when the text is spoken: silence, breath or noise may follow, up to the longest
speech it can make. Silence is therefore held back until sound follows. What is left of it at the end is cut,
and more of it than a pause ends the utterance.
"""

from __future__ import annotations

import numpy as np

from engines.contract import Samples

#: What is this far below the loudest sample so far (-50 dB) is silence.
_SILENCE_RATIO = 10 ** (-50 / 20)
#: And so is anything below this (-80 dBFS).
_SILENCE_LEVEL = 1e-4
#: Silence that is left at the end, and the fade into nothing at its very end.
_REST_S, _FADE_S = 0.1, 0.01
#: A longer silence is no pause.
_MAX_PAUSE_S = 2.0


class Ending:
    """Cuts what follows the last sound. Give it all samples in order, then ``finish``."""

    def __init__(self, sample_rate_hz: int) -> None:
        self._rest, self._fade = round(_REST_S * sample_rate_hz), round(_FADE_S * sample_rate_hz)
        self._max_pause = round(_MAX_PAUSE_S * sample_rate_hz)
        self._peak = 0.0
        self._held: Samples = np.zeros(0, np.float32)

    @property
    def passed(self) -> bool:
        """True once silence has lasted longer than any pause: the speech is over."""
        return len(self._held) > self._max_pause

    def push(self, samples: Samples) -> Samples:
        """What of ``samples`` [n], and of silence held back, may be heard."""
        magnitude = np.abs(samples)
        self._peak = max(self._peak, float(magnitude.max(initial=0.0)))
        loud = np.flatnonzero(magnitude > max(_SILENCE_LEVEL, self._peak * _SILENCE_RATIO))
        if not len(loud):
            self._held = np.concatenate([self._held, samples])
            return samples[:0]
        end = int(loud[-1]) + 1
        heard = np.concatenate([self._held, samples[:end]])
        self._held = samples[end:]
        return heard

    def finish(self) -> Samples:
        """A short rest, faded out."""
        rest = self._held[: self._rest].copy()
        fade = min(self._fade, len(rest))
        if fade:
            rest[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
        return rest
