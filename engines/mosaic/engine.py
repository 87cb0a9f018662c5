"""The door to the mosaic engine: the contract of ``engines.contract`` over the modules beside this file."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

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
from engines.hibari_voice import HIBARI_MODEL
from engines.mosaic.base_speech import BaseSpeech
from engines.mosaic.conversion import Conversion, Frames
from engines.mosaic.enrolment import Calibration, Enrolment
from engines.mosaic.espeak_speech import EXTRA, LANGUAGES, EspeakSpeech
from engines.mosaic.other_languages import ForeignVoice, OtherLanguages
from engines.mosaic.phone_features import PhoneFeatures
from engines.mosaic.profile import VoiceProfile
from engines.mosaic.renderer import Renderer
from engines.mosaic.speaker_encoder import SpeakerEncoder
from engines.mosaic.spectrum import F32, SAMPLE_RATE_HZ
from engines.mosaic.voice_map import PreparedVoice
from engines.mosaic.waveform import WaveformRenderer
from engines.mosaic.weight_files import PHONE_PROJECTION, SPEAKER_ENCODER

#: Changes whenever the same recording would give another conditioning or the same conditioning other speech.
_ALGORITHM_VERSION = "3"
#: Frames in the first block of an utterance, which a listener waits for, and in those after it.
_FIRST_BLOCK_FRAMES = 12
_BLOCK_FRAMES = 40

_ENGLISH = "en"

Ready = TypeVar("Ready")
#: Contravariant, because a renderer only takes frames.
Rendered = TypeVar("Rendered", bound=Frames, contravariant=True)
Spoken = TypeVar("Spoken", bound=Frames)


class FrameRenderer(Protocol[Rendered]):
    """Frames and gains to samples: ``Renderer`` or ``WaveformRenderer``."""

    def push(self, frames: Rendered, log_gain: F32, /) -> F32:
        """Samples complete once ``frames``, the next ones, are in."""

    def finish(self) -> F32:
        """The samples still held back."""


class MosaicConfig(EngineConfig):
    """Settings of the mosaic engine."""

    slots: int = Field(default=4, ge=1, le=1024, description="Utterances one replica works on at once.")
    threads: int = Field(default=1, ge=1, le=64, description="Threads of the base speech model.")
    cached_voices: int = Field(
        default=64,
        ge=1,
        le=65536,
        description="Voices kept ready for English, and as many for other languages; about 0.5 MB each.",
    )


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Everything ``load`` makes."""

    base: BaseSpeech
    features: PhoneFeatures
    enrolment: Enrolment
    fingerprint: str
    #: None if the extra is not installed.
    others: OtherLanguages | None


class MosaicEngine(Engine):
    """English speech on one CPU core in any enrolled voice; more languages with the espeak extra."""

    card: ClassVar[EngineCard] = EngineCard(
        name="mosaic",
        summary="English on one CPU core: a base voice, moved frame by frame towards the enrolled speaker.",
        languages=(_ENGLISH,),
        optional_languages={EXTRA: LANGUAGES},
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
        self._voices = VoiceCache[PreparedVoice](settings.cached_voices)
        self._foreign_voices = VoiceCache[ForeignVoice](settings.cached_voices)
        self._loaded: _Loaded | None = None

    @property
    def weights_fingerprint(self) -> str:
        """Hash of the three model files and of the algorithm's version."""
        return self._require_loaded().fingerprint

    @property
    def languages(self) -> tuple[str, ...]:
        """English, and with the espeak extra the languages it adds."""
        return self.card.languages + (LANGUAGES if self._require_loaded().others else ())

    def load(self) -> None:
        """Check the model files, read them, and let the base voice speak once; and espeak-ng if installed."""
        HIBARI_MODEL.verified()
        encoder = SpeakerEncoder(SPEAKER_ENCODER.tensors())
        features = PhoneFeatures(PHONE_PROJECTION.tensors()["projection"])
        base = BaseSpeech(self._threads)
        calibration = Calibration.of(base)
        enrolment = Enrolment(
            calibration,
            features,
            encoder,
            min_speech_s=self.card.min_reference_s,
            max_speech_s=self.card.max_reference_s,
        )
        identity = [HIBARI_MODEL.sha256, SPEAKER_ENCODER.sha256, PHONE_PROJECTION.sha256, _ALGORITHM_VERSION]
        fingerprint = hashlib.sha256(" ".join(identity).encode()).hexdigest()[:16]
        espeak = EspeakSpeech.installed()
        others = OtherLanguages(espeak, calibration, features) if espeak else None
        self._loaded = _Loaded(base, features, enrolment, fingerprint, others)

    def unload(self) -> None:
        """Forget weights and voices."""
        self._loaded = None
        self._voices.clear()
        self._foreign_voices.clear()

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
        if utterance.language == _ENGLISH or loaded.others is None:
            yield from self._speak_english(utterance, loaded)
        else:
            yield from self._speak_other(utterance, loaded.features, loaded.others)

    def _speak_english(self, utterance: Utterance, loaded: _Loaded) -> Iterator[tuple[Samples, bool]]:
        voice = self._voices.get(
            utterance.conditioning, _ENGLISH, lambda profile: PreparedVoice.of(profile, loaded.features)
        )
        runs = loaded.base.phoneme_runs(utterance.text)
        if not runs:
            raise NothingToSpeak(
                "The text holds nothing that can be pronounced in English.",
                next_step="Give words or numbers.",
            )
        noise = np.random.default_rng(utterance.seed % 2**64)
        for number, run in enumerate(runs, start=1):
            parts = voice.shaped(loaded.base.speak(run, utterance.speed))
            renderer = Renderer(parts.f0_hz, noise)
            first = _FIRST_BLOCK_FRAMES if number == 1 else _BLOCK_FRAMES
            for block in _blocks(parts, Conversion(parts, voice, loaded.features), renderer, first):
                yield block, False
            yield renderer.finish(), number == len(runs)

    def _speak_other(
        self, utterance: Utterance, features: PhoneFeatures, others: OtherLanguages
    ) -> Iterator[tuple[Samples, bool]]:
        ready = self._foreign_voices.get(
            utterance.conditioning,
            utterance.language,
            lambda profile: others.prepare(profile, utterance.language),
        )
        speech = others.speak(utterance.text, utterance.language, ready.manner, utterance.speed)
        renderer = WaveformRenderer()
        conversion = Conversion(speech, ready.voice, features)
        for block in _blocks(speech, conversion, renderer, _FIRST_BLOCK_FRAMES):
            yield block, False
        yield renderer.finish(), True

    def _conditioning(self, profile: VoiceProfile) -> Conditioning:
        return Conditioning(self.card.name, self.weights_fingerprint, profile.to_arrays())

    def _require_loaded(self) -> _Loaded:
        if self._loaded is None:
            raise ModelError("The mosaic engine is not loaded.", next_step="Call load() first.")
        return self._loaded


class VoiceCache(Generic[Ready]):
    """The voices used last, each ready for synthesis in one language. Safe for any number of threads."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._voices: OrderedDict[tuple[str, str], Ready] = OrderedDict()

    def __len__(self) -> int:
        return len(self._voices)

    def get(
        self, conditioning: Conditioning, language: str, prepare: Callable[[VoiceProfile], Ready]
    ) -> Ready:
        """The voice of ``conditioning``, prepared if it is not here yet. Raises ``ConditioningMismatch``."""
        key = _digest(conditioning), language
        with self._lock:
            voice = self._voices.get(key)
            if voice is not None:
                self._voices.move_to_end(key)
                return voice
        voice = prepare(VoiceProfile.from_arrays(conditioning.arrays))
        with self._lock:
            self._voices[key] = voice
            while len(self._voices) > self._capacity:
                self._voices.popitem(last=False)
        return voice

    def clear(self) -> None:
        """Forget all voices."""
        with self._lock:
            self._voices.clear()


def _blocks(
    frames: Spoken, conversion: Conversion, renderer: FrameRenderer[Spoken], first_block_frames: int
) -> Iterator[Samples]:
    """Samples of ``frames``, converted and rendered only as far as they are asked for."""
    start, block_frames = 0, first_block_frames
    while start < len(frames):
        stop = min(start + block_frames, len(frames))
        yield renderer.push(frames.between(start, stop), conversion.gain(start, stop))
        start, block_frames = stop, _BLOCK_FRAMES


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
