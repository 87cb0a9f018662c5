"""The voice inside hibari-tts 0.2.1 ("heart", American English): text to phonemes, phonemes to its parts.

Shared by the engines that speak with it. What they make of the parts is their own affair.
"""

from __future__ import annotations

import re
from pathlib import Path

import hibari.tts
import numpy as np
from hibari import Hibari
from numpy.typing import NDArray

from engines.contract import UtteranceError
from engines.weight_file import WeightFile

HIBARI_MODEL = WeightFile(
    Path(hibari.tts.ASSETS) / "hibari.onnx",
    "5f70741d4e900f4e85d0037498736cc1b3e1b9a63a13546a5da1e63abf4fccd8",
    "the package hibari-tts==0.2.1",
)

#: The model keeps its pace up to here.
SLOWEST, FASTEST = 0.5, 2.0
#: Longest input of one model run in phonemes, about ten seconds of speech.
_MAX_PHONEMES = 160
#: The very first run is kept shorter if punctuation allows: it is what a listener waits for.
_MAX_OPENING_PHONEMES = 60
_MIN_OPENING_PHONEMES = 12
_CLAUSE_ENDS = frozenset(",;:—…")
#: The base voice's number reader ends at trillions; longer numbers are read digit by digit.
_LONG_NUMBER = re.compile(r"\d{13,}")
_NOT_SPOKEN = re.compile(r"[\s.,;:!?…—\"“”()ˈˌː]+")

#: Silence after a sentence, and after a run that was cut inside a sentence.
_SENTENCE_PAUSE_S = 0.22
_CLAUSE_PAUSE_S = 0.1


class HibariVoice:
    """The loaded voice. ``phoneme_runs``, then ``outputs`` of each run; not for two threads at once."""

    def __init__(self, threads: int) -> None:
        self._model = Hibari(model=str(HIBARI_MODEL.path), threads=threads)
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

    def outputs(self, phonemes: str, speed: float) -> list[NDArray[np.float32]]:
        """What the model says to one run: six arrays [1, …], in the order ``hibari.dsp.synth`` takes them.

        ``speed`` from ``SLOWEST`` to ``FASTEST``.
        """
        outputs: list[NDArray[np.float32]] = self._model.sess.run(
            None,
            {
                "ids": np.asarray([self._model.ids(phonemes)], np.int64),
                "speed": np.asarray([speed], np.float32),
            },
        )
        return outputs

    def _known(self, phonemes: str) -> str:
        return "".join(symbol for symbol in phonemes if symbol in self._vocabulary)


def pause_after_s(phonemes: str) -> float:
    """Silence that belongs behind a run of phonemes: longer if a sentence ends with it."""
    return _SENTENCE_PAUSE_S if phonemes.rstrip('"”)')[-1:] in ".!?" else _CLAUSE_PAUSE_S


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
