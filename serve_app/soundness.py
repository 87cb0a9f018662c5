"""Whether what an engine yields is speech at all, before anybody hears it.

A broken model does not always raise: it yields NaN, or silence, or nothing. Silence is held back until sound
follows, so that an utterance that went dead can be spoken again elsewhere without a trace; a natural pause is
passed on with the sound behind it.
"""

from __future__ import annotations

import numpy as np

from engines.contract import Samples, SynthesisFailed

#: Peaks below this are silence (-80 dBFS).
SILENCE_LEVEL = 1e-4
#: Longer silence inside an utterance is no pause.
MAX_PAUSE_S = 3.0
_NOTHING: Samples = np.zeros(0, np.float32)


class SoundCheck:
    """Checks one utterance; give it every chunk in order, then ``finish``."""

    def __init__(self, sample_rate_hz: int) -> None:
        self._max_pause = round(MAX_PAUSE_S * sample_rate_hz)
        self._held: list[Samples] = []
        self._held_samples = 0
        self._heard = False

    def passed(self, samples: Samples) -> Samples:
        """What may be heard now, [n] float32: ``samples`` and the pause before them, or nothing yet.

        Raises ``SynthesisFailed`` if ``samples`` are not finite, or the silence is longer than a pause.
        """
        if not len(samples):
            return _NOTHING
        peak = float(np.abs(samples).max())
        if not np.isfinite(peak):
            raise SynthesisFailed("The engine yielded samples that are not numbers.")
        if peak < SILENCE_LEVEL:
            self._held.append(samples)
            self._held_samples += len(samples)
            if self._held_samples > self._max_pause:
                raise SynthesisFailed(f"The engine fell silent for more than {MAX_PAUSE_S:.0f} s.")
            return _NOTHING
        self._heard = True
        return self._released(samples)

    def finish(self) -> Samples:
        """The pause at the end. Raises ``SynthesisFailed`` if no sound was heard at all."""
        if not self._heard:
            raise SynthesisFailed("The engine yielded no sound for this text.")
        return self._released()

    def _released(self, *more: Samples) -> Samples:
        pieces = [*self._held, *more]
        self._held, self._held_samples = [], 0
        return pieces[0] if len(pieces) == 1 else np.concatenate([_NOTHING, *pieces])
