"""The base voice that is always there: hibari's "heart", American English, a woman reading calmly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hibari import dsp

from engines.contract import NothingToSpeak
from engines.hibari_voice import FASTEST, HIBARI_MODEL, SLOWEST, HibariVoice, pause_after_s
from engines.openvoice.base_speaker import Sentence
from engines.openvoice.silence import without_pauses


class HibariSpeaker:
    """A ``BaseSpeaker`` on one CPU core, from the package hibari-tts; nothing is downloaded."""

    name = "hibari heart"
    identity = f"hibari {HIBARI_MODEL.sha256}"
    languages = ("en",)
    sample_rate_hz = dsp.SR
    speeds = (SLOWEST, FASTEST)

    def __init__(self, threads: int) -> None:
        """Load the model. Raises ``ModelMissing`` or ``ModelCorrupt``."""
        HIBARI_MODEL.verified()
        self._voice = HibariVoice(threads)

    def speak(self, text: str, language: str, speed: float, seed: int) -> Iterator[Sentence]:
        """See ``BaseSpeaker``; a long first sentence comes in two parts."""
        runs = self._voice.phoneme_runs(text)
        if not runs:
            raise NothingToSpeak(
                "The text holds nothing that can be pronounced in English.",
                next_step="Give words or numbers.",
            )
        noise = np.random.default_rng(seed)
        for run in runs:
            parts = [array[0] for array in self._voice.outputs(run, speed)]
            samples = without_pauses(dsp.synth(*parts, noise), self.sample_rate_hz)
            yield Sentence(samples, pause_after_s(run))

    def close(self) -> None:
        """Nothing to give back."""
