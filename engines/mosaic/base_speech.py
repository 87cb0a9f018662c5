"""Text to the source-filter parts of the base voice."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.hibari_voice import FASTEST, SLOWEST, HibariVoice, pause_after_s
from engines.mosaic.source_filter import Parts, joined
from engines.mosaic.spectrum import F32, FRAMES_PER_S, log_energy, log_power

#: A frame counts as silent this far below the loudest frame of its run.
_SILENCE_DB = -45.0
_LEAD_IN_S = 0.04


class BaseSpeech:
    """The base voice. ``phoneme_runs`` then ``speak`` each run; not for two threads at once."""

    def __init__(self, threads: int) -> None:
        self._voice = HibariVoice(threads)

    def phoneme_runs(self, text: str) -> list[str]:
        """Phonemes of ``text`` in runs for the model; empty if nothing in it can be spoken.

        Raises ``UtteranceError`` if the text cannot be read.
        """
        return self._voice.phoneme_runs(text)

    def speak(self, phonemes: str, speed: float) -> Parts:
        """Parts of one run at ``speed``, silences at both ends cut to natural pauses."""
        # What the model cannot do is done by leaving out or repeating frames.
        native = min(max(speed, SLOWEST), FASTEST)
        parts = parts_from_outputs(self._voice.outputs(phonemes, native))
        return _trimmed(parts, pause_after_s(phonemes)).at_rate(speed / native)

    def speak_all(self, text: str) -> Parts:
        """Parts of the whole ``text`` at normal speed."""
        return joined([self.speak(run, 1.0) for run in self.phoneme_runs(text)])


def parts_from_outputs(outputs: list[NDArray[np.float32]]) -> Parts:
    """The graph's outputs, each [1, BINS, frames] or [1, frames], frames first."""
    harmonic, phase_turns, noise, residual, residual_phase = (
        np.ascontiguousarray(output[0].T) for output in outputs[:5]
    )
    harmonic_phase: F32 = np.float32(np.pi) * np.tanh(phase_turns)
    return Parts(harmonic, harmonic_phase, noise, residual, residual_phase, outputs[5][0])


def _trimmed(parts: Parts, pause_s: float) -> Parts:
    """``parts`` with a short lead-in and ``pause_s`` of silence behind."""
    energy = log_energy(parts.power())
    loud = np.flatnonzero(energy > energy.max() + log_power(_SILENCE_DB))
    start = max(0, int(loud[0]) - round(_LEAD_IN_S * FRAMES_PER_S))
    stop = int(loud[-1]) + 1 + round(pause_s * FRAMES_PER_S)
    return parts.between(start, stop)
