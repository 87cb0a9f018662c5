"""Text to the source-filter parts of the base voice (hibari-tts 0.2.1, voice "heart", American English)."""

from __future__ import annotations

import re

import numpy as np
from hibari import Hibari
from numpy.typing import NDArray

from engines.contract import UtteranceError
from engines.mosaic.source_filter import Parts, joined
from engines.mosaic.spectrum import F32, FRAMES_PER_S, log_energy, log_power
from engines.mosaic.weight_files import BASE_MODEL

#: The base model keeps its pace up to here; the rest of a speed is done by leaving out or repeating frames.
_SLOWEST_NATIVE, _FASTEST_NATIVE = 0.5, 2.0
#: Longest input of one model run in phonemes, about ten seconds of speech.
_MAX_PHONEMES = 160
#: The very first run is kept shorter if punctuation allows: it is what a listener waits for.
_MAX_OPENING_PHONEMES = 60
_MIN_OPENING_PHONEMES = 12
_CLAUSE_ENDS = frozenset(",;:—…")
#: The base voice's number reader ends at trillions; longer numbers are read digit by digit.
_LONG_NUMBER = re.compile(r"\d{13,}")
_NOT_SPOKEN = re.compile(r"[\s.,;:!?…—\"“”()ˈˌː]+")

#: A frame counts as silent this far below the loudest frame of its run.
_SILENCE_DB = -45.0
_LEAD_IN_S = 0.04
#: Silence after a sentence, and after a run that was cut inside a sentence.
_SENTENCE_PAUSE_S = 0.22
_CLAUSE_PAUSE_S = 0.1


class BaseSpeech:
    """The base voice. ``phoneme_runs`` then ``speak`` each run; not for two threads at once."""

    def __init__(self, threads: int) -> None:
        self._model = Hibari(model=str(BASE_MODEL.path), threads=threads)
        self._vocabulary = frozenset(self._model.vocab)

    def phoneme_runs(self, text: str) -> list[str]:
        """Phonemes of ``text`` in runs for the model; empty if nothing in it can be spoken.

        Raises ``UtteranceError`` if the text cannot be read.
        """
        readable = _LONG_NUMBER.sub(lambda number: " ".join(number.group()), text)
        try:
            phonemes = self._model.phonemize(readable)
        except Exception as error:
            raise UtteranceError(
                "The text cannot be read aloud.", next_step="Write unusual numbers and symbols as words."
            ) from error
        sentences = [self._known(sentence) for sentence in phonemes]
        sentences = [sentence for sentence in sentences if _NOT_SPOKEN.sub("", sentence)]
        if not sentences:
            return []
        runs = _opening_split(sentences[0])
        runs.extend(sentences[1:])
        return [part for run in runs for part in _limited(run)]

    def speak(self, phonemes: str, speed: float) -> Parts:
        """Parts of one run at ``speed``, silences at both ends cut to natural pauses."""
        native = min(max(speed, _SLOWEST_NATIVE), _FASTEST_NATIVE)
        outputs = self._model.sess.run(
            None,
            {
                "ids": np.asarray([self._model.ids(phonemes)], np.int64),
                "speed": np.asarray([native], np.float32),
            },
        )
        pause_s = _SENTENCE_PAUSE_S if phonemes.rstrip('"”)')[-1:] in ".!?" else _CLAUSE_PAUSE_S
        return _trimmed(parts_from_outputs(outputs), pause_s).at_rate(speed / native)

    def speak_all(self, text: str) -> Parts:
        """Parts of the whole ``text`` at normal speed."""
        return joined([self.speak(run, 1.0) for run in self.phoneme_runs(text)])

    def _known(self, phonemes: str) -> str:
        return "".join(symbol for symbol in phonemes if symbol in self._vocabulary)


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


def _opening_split(phonemes: str) -> list[str]:
    """A long first sentence in two at its first clause end, so that its beginning is ready early."""
    if len(phonemes) <= _MAX_OPENING_PHONEMES:
        return [phonemes]
    for index in range(_MIN_OPENING_PHONEMES, len(phonemes) - _MIN_OPENING_PHONEMES):
        if phonemes[index] in _CLAUSE_ENDS and phonemes[index + 1] == " ":
            return [phonemes[: index + 1], phonemes[index + 2 :]]
    return [phonemes]


def _limited(phonemes: str) -> list[str]:
    """``phonemes`` in pieces the model can take, cut after a clause if possible, else between words."""
    pieces = []
    while len(phonemes) > _MAX_PHONEMES:
        cut = _last_cut(phonemes[:_MAX_PHONEMES])
        pieces.append(phonemes[:cut].rstrip())
        phonemes = phonemes[cut:].lstrip()
    pieces.append(phonemes)
    return [piece for piece in pieces if _NOT_SPOKEN.sub("", piece)]


def _last_cut(phonemes: str) -> int:
    """Where to end a piece at most this long: behind a clause, else a word, else anywhere."""
    clause_end = max(phonemes.rfind(symbol + " ") for symbol in _CLAUSE_ENDS)
    if clause_end > len(phonemes) // 3:
        return clause_end + 1
    word_end = phonemes.rfind(" ")
    return word_end if word_end > 0 else len(phonemes)
