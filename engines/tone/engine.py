"""Tones whose pitch comes from the voice and whose length comes from the text.

Nothing is learned and nothing is loaded, so what a test sees is the server's doing. The configuration makes
the engine as slow, as big or as faulty as a test needs: a step may take time, a batch may cost more than one
row, and marked texts fail, hang, go silent or kill the process.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from engines.contract import (
    Chunk,
    Conditioning,
    Engine,
    EngineCard,
    EngineConfig,
    EngineError,
    NothingToSpeak,
    Reference,
    ReferenceUnusable,
    Samples,
    SynthesisFailed,
    UnsupportedOption,
    Utterance,
)

SAMPLE_RATE_HZ = 24_000
#: Each character sounds this long at speed 1.
CHARACTER_S = 0.06
#: Amplitude of the tone; the quiet seed-dependent part stays below it.
LEVEL = 0.25
_WEIGHTS = "tone-1"
_FADE_FRAMES = 120


class ToneConfig(EngineConfig):
    """How slow, big and faulty the engine is."""

    slots: int = Field(default=8, ge=1, le=1024, description="Utterances one replica works on at once.")
    load_s: float = Field(default=0.0, ge=0, description="Time load() takes.")
    step_s: float = Field(default=0.0, ge=0, description="Time one step of the whole batch takes.")
    batches: int = Field(default=1, ge=1, description="Batches it takes at the same time.")
    silent_steps: int = Field(
        default=0, ge=0, description="Steps of an utterance before its first sound, in which it only works."
    )
    row_s: float = Field(default=0.0, ge=0, description="Time each row adds to a step.")
    chunk_s: float = Field(default=0.2, gt=0, le=10, description="Audio in one chunk.")
    memory_mb: int = Field(default=0, ge=0, description="Memory held after load().")
    fail_text: str = Field(default="[fail]", description="An utterance holding this fails.")
    hang_text: str = Field(default="[hang]", description="An utterance holding this never ends.")
    crash_text: str = Field(default="[crash]", description="An utterance holding this kills the process.")
    nan_text: str = Field(default="[nan]", description="An utterance holding this yields NaN.")
    silent_text: str = Field(default="[silent]", description="An utterance holding this yields no sound.")
    fault_after_chunks: int = Field(default=0, ge=0, description="Good chunks before any of these faults.")
    fault_ticket: Path | None = Field(
        default=None,
        description="A file that one fault uses up; without it marked texts are spoken.",
    )


@dataclass(slots=True)
class _Row:
    index: int
    utterance: Utterance
    samples: Samples
    sent: int = 0
    chunks: int = 0
    silent_steps: int = 0
    #: True if it has used up the ticket.
    faulty: bool = False


class ToneEngine(Engine):
    """See the module. One step makes the next chunk of every live row."""

    card: ClassVar[EngineCard] = EngineCard(
        name="tone",
        summary="Deterministic tones for tests and tutorials; not speech.",
        languages=("en", "de", "es", "fr", "ja", "zh"),
        sample_rate_hz=SAMPLE_RATE_HZ,
        max_utterance_chars={"*": 300},
        streams=True,
        needs_transcript=False,
        code_licence="Apache-2.0",
        weights_licence="none",
        hardware="anything",
        min_reference_s=0.5,
        options=("harmonics",),
    )
    Config: ClassVar[type[EngineConfig]] = ToneConfig

    def __init__(self, config: ToneConfig) -> None:
        super().__init__(config)
        self.settings = config
        self._memory: NDArray[np.uint8] | None = None

    @property
    def concurrent_batches(self) -> int:
        """As configured."""
        return self.settings.batches

    @property
    def weights_fingerprint(self) -> str:
        """Constant: there are no weights."""
        return _WEIGHTS

    def load(self) -> None:
        """Wait and hold memory as configured."""
        time.sleep(self.settings.load_s)
        self._memory = np.ones(self.settings.memory_mb << 20, np.uint8)

    def unload(self) -> None:
        """Give the memory back."""
        self._memory = None

    def extract_voice(self, reference: Reference) -> Conditioning:
        """Choose a pitch, 110 to 440 Hz, from the content of the recording."""
        if not np.any(np.abs(reference.samples) > 1e-4):
            raise ReferenceUnusable(
                "The recording is silent.", next_step="Record the speaker again, closer to the microphone."
            )
        if reference.duration_s < self.card.min_reference_s:
            raise ReferenceUnusable(
                f"The recording has {reference.duration_s:.1f} s; {self.card.min_reference_s} s are needed.",
                next_step="Send a longer one.",
            )
        digest = hashlib.sha256(np.ascontiguousarray(reference.samples).tobytes()).digest()
        octave = int.from_bytes(digest[:4], "little") / 2**32 * 2
        pitch_hz = np.asarray([110.0 * 2.0**octave], np.float32)
        return Conditioning(self.card.name, _WEIGHTS, {"pitch_hz": pitch_hz})

    def synthesize(self, batch: Sequence[Utterance]) -> Iterator[Chunk]:
        """One chunk of ``chunk_s`` per live row and step, rows in order."""
        live: list[_Row] = []
        for index, utterance in enumerate(batch):
            try:
                self.check_utterance(utterance)
                live.append(_Row(index, utterance, render(utterance)))
            except EngineError as error:
                yield Chunk.failure(index, error)
        chunk_frames = max(1, round(self.settings.chunk_s * SAMPLE_RATE_HZ))
        while live:
            live = [row for row in live if not row.utterance.abandoned.is_set()]
            time.sleep(self.settings.step_s + self.settings.row_s * len(live))
            for row in live:
                yield self._next_chunk(row, chunk_frames)
            live = [row for row in live if row.sent < len(row.samples)]

    def _next_chunk(self, row: _Row, chunk_frames: int) -> Chunk:
        if row.silent_steps < self.settings.silent_steps:
            row.silent_steps += 1
            return Chunk(row.index, row.samples[:0], last=False)
        samples = row.samples[row.sent : row.sent + chunk_frames]
        if self._faulty(row):
            settings, text = self.settings, row.utterance.text
            if settings.fail_text in text:
                row.sent = len(row.samples)
                return Chunk.failure(row.index, SynthesisFailed("The text asked for a failure."))
            if settings.crash_text in text:
                os.kill(os.getpid(), signal.SIGKILL)
            if settings.hang_text in text:
                while not row.utterance.abandoned.wait(0.02):
                    pass
            if settings.nan_text in text:
                samples = np.full_like(samples, np.nan)
            if settings.silent_text in text:
                samples = np.zeros_like(samples)
        row.sent += len(samples)
        row.chunks += 1
        return Chunk(row.index, samples, last=row.sent >= len(row.samples))

    def _faulty(self, row: _Row) -> bool:
        """True if the text of ``row`` is marked and its fault is due."""
        settings, text = self.settings, row.utterance.text
        marks = (
            settings.fail_text,
            settings.crash_text,
            settings.hang_text,
            settings.nan_text,
            settings.silent_text,
        )
        if row.chunks < settings.fault_after_chunks or not any(mark in text for mark in marks):
            return False
        if settings.fault_ticket is not None and not row.faulty:
            try:
                settings.fault_ticket.unlink()
            except FileNotFoundError:
                return False
            row.faulty = True
        return True


def render(utterance: Utterance) -> Samples:
    """The whole tone sequence of an utterance: one note per character, with the seed in the phase."""
    speakable = [character for character in utterance.text if character.isalnum()]
    if not speakable:
        raise NothingToSpeak(
            "The text has no letter or digit.", next_step="Send text with at least one letter or digit."
        )
    harmonics = _harmonics(utterance)
    pitch_hz = float(utterance.conditioning.arrays["pitch_hz"][0])
    frames_per_note = max(1, round(CHARACTER_S * SAMPLE_RATE_HZ / utterance.speed))
    notes_hz = [pitch_hz * 2.0 ** ((ord(character) % 12) / 12) for character in speakable]
    frequency_hz = np.repeat(np.asarray(notes_hz, np.float64), frames_per_note)
    start = np.random.default_rng(utterance.seed).uniform(0, 2 * np.pi)
    phase = start + np.cumsum(2 * np.pi * frequency_hz / SAMPLE_RATE_HZ)
    tone = sum(np.sin(phase * (order + 1)) / (order + 1) for order in range(harmonics))
    samples = (LEVEL * np.asarray(tone)).astype(np.float32)
    fade = np.linspace(0, 1, min(_FADE_FRAMES, len(samples)), dtype=np.float32)
    samples[: len(fade)] *= fade
    samples[len(samples) - len(fade) :] *= fade[::-1]
    return samples


def _harmonics(utterance: Utterance) -> int:
    value = utterance.options.get("harmonics", 1)
    if not isinstance(value, int) or not 1 <= value <= 8:
        raise UnsupportedOption("'harmonics' is a whole number from 1 to 8.", next_step="Send 1 to 8.")
    return value
