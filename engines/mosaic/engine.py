"""The door to the mosaic engine: the contract of ``engines.contract`` over the modules beside this file."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from engines.contract import (
    Chunk,
    Conditioning,
    Engine,
    EngineCard,
    EngineConfig,
    EngineError,
    ModelError,
    NothingToSpeak,
    OutOfMemory,
    Reference,
    Samples,
    SynthesisFailed,
    Utterance,
)
from engines.mosaic.base_speech import BaseSpeech
from engines.mosaic.conversion import Conversion
from engines.mosaic.enrolment import Calibration, Enrolment
from engines.mosaic.phone_features import PhoneFeatures
from engines.mosaic.profile import VoiceProfile
from engines.mosaic.renderer import Renderer
from engines.mosaic.speaker_encoder import SpeakerEncoder
from engines.mosaic.spectrum import SAMPLE_RATE_HZ
from engines.mosaic.voice_map import PreparedVoice
from engines.mosaic.weight_files import BASE_MODEL, PHONE_PROJECTION, SPEAKER_ENCODER

#: Changes whenever the same recording would give another conditioning or the same conditioning other speech.
_ALGORITHM_VERSION = "2"
#: Frames in the first block of an utterance, which a listener waits for, and in those after it.
_FIRST_BLOCK_FRAMES = 12
_BLOCK_FRAMES = 40


class MosaicConfig(EngineConfig):
    """Settings of the mosaic engine."""

    slots: int = Field(default=4, ge=1, le=1024, description="Utterances one replica works on at once.")
    threads: int = Field(default=1, ge=1, le=64, description="Threads of the base speech model.")
    cached_voices: int = Field(
        default=64, ge=1, le=65536, description="Voices kept ready for synthesis, about 0.5 MB each."
    )


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Everything ``load`` makes."""

    base: BaseSpeech
    features: PhoneFeatures
    enrolment: Enrolment
    fingerprint: str


class MosaicEngine(Engine):
    """English speech on one CPU core in any enrolled voice."""

    card: ClassVar[EngineCard] = EngineCard(
        name="mosaic",
        summary="English on one CPU core: a base voice, moved frame by frame towards the enrolled speaker.",
        languages=("en",),
        sample_rate_hz=SAMPLE_RATE_HZ,
        max_utterance_chars={"*": 400},
        streams=True,
        needs_transcript=False,
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0",
        hardware="1 CPU core, no download",
        min_reference_s=1.5,
        max_reference_s=30.0,
    )
    Config: ClassVar[type[EngineConfig]] = MosaicConfig

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        settings = config if isinstance(config, MosaicConfig) else MosaicConfig(**config.model_dump())
        self._threads = settings.threads
        self._voices = VoiceCache(settings.cached_voices)
        self._loaded: _Loaded | None = None

    @property
    def weights_fingerprint(self) -> str:
        """Hash of the three model files and of the algorithm's version."""
        return self._require_loaded().fingerprint

    def load(self) -> None:
        """Check the model files, read them, and let the base voice speak once."""
        BASE_MODEL.verified()
        encoder = SpeakerEncoder(SPEAKER_ENCODER.tensors())
        features = PhoneFeatures(PHONE_PROJECTION.tensors()["projection"])
        base = BaseSpeech(self._threads)
        enrolment = Enrolment(
            Calibration.of(base),
            features,
            encoder,
            min_speech_s=self.card.min_reference_s,
            max_speech_s=self.card.max_reference_s,
        )
        identity = [BASE_MODEL.sha256, SPEAKER_ENCODER.sha256, PHONE_PROJECTION.sha256, _ALGORITHM_VERSION]
        fingerprint = hashlib.sha256(" ".join(identity).encode()).hexdigest()[:16]
        self._loaded = _Loaded(base, features, enrolment, fingerprint)

    def unload(self) -> None:
        """Forget weights and voices."""
        self._loaded = None
        self._voices.clear()

    def extract_voice(self, reference: Reference) -> Conditioning:
        """The quick profile. Raises ``ReferenceUnusable``."""
        return self._conditioning(self._require_loaded().enrolment.quick_profile(reference))

    def refine_voice(self, reference: Reference, conditioning: Conditioning) -> Conditioning:
        """The profile with its closing equaliser; the same again if it already has one."""
        self.check_conditioning(conditioning)
        profile = VoiceProfile.from_arrays(conditioning.arrays)
        return self._conditioning(self._require_loaded().enrolment.refined_profile(profile))

    def synthesize(self, batch: Sequence[Utterance]) -> Iterator[Chunk]:
        """Speak ``batch``: one block of each utterance in turn."""
        rows = deque((row, utterance, self._speak(utterance)) for row, utterance in enumerate(batch))
        while rows:
            row, utterance, blocks = rows.popleft()
            if utterance.abandoned.is_set():
                continue
            chunk = _next_chunk(row, blocks)
            if not chunk.last:
                rows.append((row, utterance, blocks))
            if len(chunk.samples) or chunk.last:
                yield chunk

    def _speak(self, utterance: Utterance) -> Iterator[tuple[Samples, bool]]:
        """Blocks of ``utterance``, and whether each is the last."""
        self.check_utterance(utterance)
        loaded = self._require_loaded()
        voice = self._voices.get(utterance.conditioning, loaded.features)
        runs = loaded.base.phoneme_runs(utterance.text)
        if not runs:
            raise NothingToSpeak(
                "The text holds nothing that can be pronounced in English.",
                next_step="Give words or numbers.",
            )
        noise = np.random.default_rng(utterance.seed % 2**64)
        block_frames = _FIRST_BLOCK_FRAMES
        for number, run in enumerate(runs, start=1):
            parts = voice.shaped(loaded.base.speak(run, utterance.speed))
            conversion = Conversion(parts, voice, loaded.features)
            renderer = Renderer(parts.f0_hz, noise)
            start = 0
            while start < len(parts):
                stop = min(start + block_frames, len(parts))
                yield renderer.push(parts.between(start, stop), conversion.gain(start, stop)), False
                start, block_frames = stop, _BLOCK_FRAMES
            yield renderer.finish(), number == len(runs)

    def _conditioning(self, profile: VoiceProfile) -> Conditioning:
        return Conditioning(self.card.name, self.weights_fingerprint, profile.to_arrays())

    def _require_loaded(self) -> _Loaded:
        if self._loaded is None:
            raise ModelError("The mosaic engine is not loaded.", next_step="Call load() first.")
        return self._loaded


class VoiceCache:
    """The voices used last, ready for synthesis. Safe for any number of threads."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._voices: OrderedDict[str, PreparedVoice] = OrderedDict()

    def __len__(self) -> int:
        return len(self._voices)

    def get(self, conditioning: Conditioning, features: PhoneFeatures) -> PreparedVoice:
        """The voice of ``conditioning``, prepared if it is not here yet. Raises ``ConditioningMismatch``."""
        key = _digest(conditioning)
        with self._lock:
            voice = self._voices.get(key)
            if voice is not None:
                self._voices.move_to_end(key)
                return voice
        voice = PreparedVoice.of(VoiceProfile.from_arrays(conditioning.arrays), features)
        with self._lock:
            self._voices[key] = voice
            while len(self._voices) > self._capacity:
                self._voices.popitem(last=False)
        return voice

    def clear(self) -> None:
        """Forget all voices."""
        with self._lock:
            self._voices.clear()


def _digest(conditioning: Conditioning) -> str:
    """Hash of the arrays of ``conditioning``: equal voices share one entry however they were loaded."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(conditioning.arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(conditioning.arrays[name]).tobytes())
    return digest.hexdigest()


def _next_chunk(row: int, blocks: Iterator[tuple[Samples, bool]]) -> Chunk:
    """The next block as a chunk, or the failure that ended the utterance."""
    try:
        samples, last = next(blocks)
    except EngineError as error:
        return Chunk.failure(row, error)
    except MemoryError:
        return Chunk.failure(
            row, OutOfMemory("Not enough memory for this utterance.", next_step="Use fewer slots.")
        )
    except Exception as error:  # noqa: BLE001 - whatever it is, the other rows go on
        return Chunk.failure(
            row, SynthesisFailed(f"Synthesis failed: {error}", next_step="Try again; report it if it stays.")
        )
    return Chunk(row, samples, last)
