"""A loaded OpenVoice: converter, base voices, and the loop in which a batch is spoken."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engines.contract import (
    Chunk,
    ConditioningMismatch,
    EngineCard,
    EngineError,
    ModelError,
    OutOfMemory,
    Reference,
    Samples,
    SynthesisFailed,
    Utterance,
)
from engines.openvoice.base_speaker import BaseSpeaker
from engines.openvoice.base_voices import BaseColours, BaseVoice, BaseVoices, at_rate
from engines.openvoice.checkpoint import Checkpoint
from engines.openvoice.converter import LATER_WINDOWS, STREAM_WINDOWS, Conversion, Converter
from engines.openvoice.hibari_speaker import HibariSpeaker
from engines.openvoice.piper_speaker import PiperSpeaker
from engines.openvoice.settings import BaseVoiceSettings, OpenVoiceConfig, PiperSettings, VitsSettings
from engines.openvoice.tone_colour import VoiceColour, enrol
from engines.openvoice.vits_speaker import VitsSpeaker

_SEEDS = 2**64


@dataclass(frozen=True, slots=True)
class OpenVoiceSpeech:
    """Everything ``OpenVoiceEngine.load`` makes."""

    converter: Converter
    base_voices: BaseVoices
    fingerprint: str
    rows_per_pass: int

    @classmethod
    def load(cls, settings: OpenVoiceConfig, card: EngineCard, model_dir: Path) -> OpenVoiceSpeech:
        """``prepare_coqui`` was called before. Raises ``ModelError``."""
        device = _device(settings)
        torch.set_num_threads(settings.threads)
        model, fingerprint = Checkpoint(card, model_dir).load()
        converter = Converter(model, device, getattr(torch, settings.precision))
        folder = (
            settings.cache_dir
            or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "voice-clone/openvoice"
        )
        colours = BaseColours(converter, fingerprint, folder.expanduser())
        voices = BaseVoices([colours.of(_speaker(one, settings.threads)) for one in settings.base_voices])
        rows = settings.rows_per_pass or (1 if device.type == "cpu" else settings.slots)
        return cls(converter, voices, fingerprint, rows)

    def enrol(self, reference: Reference, *, min_speech_s: float, max_speech_s: float) -> VoiceColour:
        """See ``tone_colour.enrol``."""
        return enrol(self.converter, reference, min_speech_s=min_speech_s, max_speech_s=max_speech_s)

    def speak(self, batch: Sequence[Utterance], checked_tau: Callable[[Utterance], float]) -> Iterator[Chunk]:
        """Chunks of ``batch``; ``checked_tau`` gives an utterance's tau or raises what is wrong with it."""
        waiting = [_Row(index, utterance) for index, utterance in enumerate(batch)]
        while waiting:
            ready: list[_Row] = []
            while waiting and len(ready) < self.rows_per_pass:
                row = waiting.pop(0)
                if row.utterance.abandoned.is_set():
                    continue
                try:
                    self._prepare(row, checked_tau)
                    ready.append(row)
                except Exception as error:  # noqa: BLE001 - whatever it is, the other rows go on
                    yield Chunk.failure(row.index, _as_engine_error(error))
            for row, outcome in zip(ready, self._step(ready), strict=True):
                if isinstance(outcome, EngineError):
                    yield Chunk.failure(row.index, outcome)
                    continue
                if not row.ended:
                    waiting.append(row)
                yield Chunk(row.index, outcome, last=row.ended)

    def _prepare(self, row: _Row, checked_tau: Callable[[Utterance], float]) -> None:
        """Make sure that ``row`` has a sentence in conversion."""
        if row.sentences is None:
            tau = checked_tau(row.utterance)
            row.sentences = self._sentences(row.utterance, tau)
            row.current = next(row.sentences, None)
        if row.current is None:
            raise SynthesisFailed("The base voice said nothing.", next_step="Try another wording.")

    def _step(self, rows: Sequence[_Row]) -> list[Samples | EngineError]:
        """The next samples of each row, or why there are none."""
        conversions = [row.current.conversion for row in rows if row.current is not None]
        if not conversions:
            return []
        try:
            spoken = self.converter.step(conversions)
        except Exception as error:  # noqa: BLE001 - one by one, so that the others go on
            if len(rows) == 1:
                return [_as_engine_error(error)]
            return [outcome for row in rows for outcome in self._step([row])]
        outcomes: list[Samples | EngineError] = list(spoken)
        for index, row in enumerate(rows):
            try:
                pause = np.zeros(row.move_on(), np.float32)
            except Exception as error:  # noqa: BLE001 - the base voice of one row
                outcomes[index] = _as_engine_error(error)
            else:
                outcomes[index] = np.concatenate([spoken[index], pause])
        return outcomes

    def _sentences(self, utterance: Utterance, tau: float) -> Iterator[_Converting]:
        """What the base voice says, sentence by sentence, ready for the converter."""
        target = _voice(utterance)
        base = self.base_voices.nearest(utterance.language, target.pitch_hz)
        slowest, fastest = base.speaker.speeds
        pace = min(max(utterance.speed, slowest), fastest)
        seed = utterance.seed % _SEEDS
        number = 0
        for sentence in base.speaker.speak(utterance.text, utterance.language, pace, seed):
            if len(sentence.samples):
                faster = utterance.speed / pace
                yield _Converting(
                    self._begin(sentence.samples, base, target, tau, (seed, number), faster),
                    round(sentence.pause_s / utterance.speed * self.converter.sample_rate_hz),
                )
                number += 1

    def _begin(
        self,
        samples: Samples,
        base: BaseVoice,
        target: VoiceColour,
        tau: float,
        seed: tuple[int, int],
        faster: float,
    ) -> Conversion:
        converter = self.converter
        speech = at_rate(samples, base.speaker.sample_rate_hz, converter.sample_rate_hz)
        whole = max(-(-len(speech) // converter.hop) * converter.hop, 2 * converter.fewest_samples)
        speech = np.pad(speech, (0, whole - len(speech)))
        return converter.begin(
            speech,
            base.own.embedding,
            target.embedding,
            tau=tau,
            seed=seed,
            faster=faster,
            # Only the first sentence is waited for, and small windows cost more.
            windows=LATER_WINDOWS if seed[1] else STREAM_WINDOWS,
        )


@dataclass(frozen=True, slots=True)
class _Converting:
    """A sentence in conversion, and the silent samples behind it: silence is not worth converting."""

    conversion: Conversion
    pause_samples: int


@dataclass(slots=True)
class _Row:
    """One utterance of a batch: the sentence in conversion, and those still to be said."""

    index: int
    utterance: Utterance
    sentences: Iterator[_Converting] | None = None
    current: _Converting | None = None
    ended: bool = False

    def move_on(self) -> int:
        """To the next sentence if this one is finished, or to the end: silent samples in between."""
        current = self.current
        if current is None or not current.conversion.finished or self.sentences is None:
            return 0
        self.current = next(self.sentences, None)
        self.ended = self.current is None
        return current.pause_samples


def _speaker(settings: BaseVoiceSettings, threads: int) -> BaseSpeaker:
    """The base speaker that ``settings`` describe. Raises ``ModelError``."""
    match settings:
        case PiperSettings():
            return PiperSpeaker(settings, threads)
        case VitsSettings():
            return VitsSpeaker(settings)
        case _:
            return HibariSpeaker(threads)


def _voice(utterance: Utterance) -> VoiceColour:
    try:
        return VoiceColour.from_arrays(utterance.conditioning.arrays)
    except (KeyError, ValueError) as error:
        raise ConditioningMismatch(
            "The conditioning of this voice holds no tone colour.",
            next_step="Extract it again from the reference recording.",
        ) from error


def _device(settings: OpenVoiceConfig) -> torch.device:
    """The device that ``settings`` mean. Raises ``ModelError`` if it is not there or cannot do it."""
    wanted = settings.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"There is no GPU {device} here: torch {torch.__version__} sees {torch.cuda.device_count()}.",
            next_step="Reserve one (engines.openvoice.replicas.num_gpus: 1) or set device: cpu.",
        )
    if device.type == "cpu" and settings.precision != "float32":
        raise ModelError(
            f"precision: {settings.precision} needs a GPU.", next_step="Leave precision at float32."
        )
    return device


def _as_engine_error(error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return OutOfMemory("Not enough memory for this utterance.", next_step="Use fewer slots.")
    return SynthesisFailed(f"Synthesis failed: {error}", next_step="Try again; report it if it stays.")
