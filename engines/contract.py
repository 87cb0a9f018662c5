"""What every speech engine does, and the values that pass in and out of it.

An engine turns text into speech in an enrolled voice. It is used in three steps::

    engine = SomeEngine(SomeEngine.Config())     # cheap: no model is touched
    engine.load()                                # weights into memory, warm-up included
    conditioning = engine.extract_voice(Reference(samples, sample_rate_hz))
    for chunk in engine.synthesize([Utterance("Hello.", "en", conditioning, seed=7)]):
        play(chunk.samples)

Audio is mono float32 in [-1, 1] at ``EngineCard.sample_rate_hz`` everywhere in this package.

Errors an engine may raise (each carries ``next_step``, a sentence for the person who has to act)::

    EngineError
    + ModelError                  load() could not give a working model
      - ModelMissing              a weight file is not there
      - ModelCorrupt              a weight file is not what it should be
      - LicenceNotAccepted        the weights need a licence the operator has not accepted
    + UtteranceError              this input cannot be spoken; another can
      - UnsupportedLanguage
      - UtteranceTooLong
      - NothingToSpeak            the text has no speakable character for this engine
      - UnsupportedOption         the engine does not know this option or value
    + ReferenceUnusable           no voice can be taken from this recording
    + ConditioningMismatch        conditioning of another engine or of other weights
    + SynthesisFailed             the model failed; the same input may work again
    + OutOfMemory                 the batch does not fit; a smaller one may
"""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError

Samples = NDArray[np.float32]
"""Mono PCM, shape [n], float32 in [-1, 1]."""


class EngineError(Exception):
    """Base of everything an engine raises on purpose. ``next_step`` says what to do about it."""

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message} {self.next_step}".strip()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_error, (type(self), self.message, self.next_step))


def _rebuild_error(kind: type[EngineError], message: str, next_step: str) -> EngineError:
    return kind(message, next_step=next_step)


class ModelError(EngineError):
    """``load()`` could not give a working model."""


class ModelMissing(ModelError):
    """A weight file is not there."""


class ModelCorrupt(ModelError):
    """A weight file is there but is not what it should be."""


class LicenceNotAccepted(ModelError):
    """The weights need a licence that the operator has not accepted."""


class UtteranceError(EngineError):
    """This input cannot be spoken by this engine; another input can."""


class UnsupportedLanguage(UtteranceError):
    """The engine does not speak this language."""


class UtteranceTooLong(UtteranceError):
    """The text is longer than ``EngineCard.max_utterance_chars`` allows."""


class NothingToSpeak(UtteranceError):
    """The text holds no character this engine can pronounce."""


class UnsupportedOption(UtteranceError):
    """The engine does not know this option, or not this value of it."""


class ReferenceUnusable(EngineError):
    """No voice can be taken from this recording (too short, silent, no speech)."""


class ConditioningMismatch(EngineError):
    """The conditioning belongs to another engine or to other weights: extract it again."""


class SynthesisFailed(EngineError):
    """The model failed on this utterance; the same input may succeed elsewhere or again."""


class OutOfMemory(EngineError):
    """The batch does not fit into memory; a smaller one may."""


@dataclass(frozen=True, slots=True)
class EngineCard:
    """The facts about an engine that others plan with. One per engine class, never changed."""

    #: Registry name, lower case: what a client writes in ``model``.
    name: str
    #: One sentence for a list of engines.
    summary: str
    #: BCP-47 primary subtags the engine speaks after ``load()`` with nothing optional installed.
    languages: tuple[str, ...]
    #: Rate of every sample the engine yields.
    sample_rate_hz: int
    #: Longest text of one utterance in characters, by language; ``"*"`` is the rest.
    max_utterance_chars: Mapping[str, int]
    #: True if the first chunk of an utterance exists before the utterance is finished.
    streams: bool
    #: True if ``extract_voice`` needs ``Reference.transcript``: the server sees to it that there is one.
    needs_transcript: bool
    #: Licence of the code and of the weights, as SPDX expressions or the licence's own name.
    code_licence: str
    weights_licence: str
    #: What it runs on, in words for a table ("1 CPU core", "GPU, 4 GB").
    hardware: str
    #: Shortest speech ``extract_voice`` accepts, after trimming.
    min_reference_s: float = 1.0
    #: More than this much of a reference is not used.
    max_reference_s: float = 30.0
    #: Request options the engine reads from ``Utterance.options``.
    options: tuple[str, ...] = ()
    #: Fields that all utterances of one batch must have in common, for a model that cannot mix them.
    batch_by: tuple[Literal["language", "speed", "conditioning", "options"], ...] = ()
    #: Languages that something optional adds, by what ``pip install`` takes to get it.
    optional_languages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: For whoever asks for a language it does not speak: how else one is added, in a sentence.
    languages_hint: str = ""
    #: With ``needs_transcript``: True if a voice without one is still spoken, less like the recording, where
    #: nobody can say what is said in it; False if it is refused.
    transcript_optional: bool = False

    def max_chars(self, language: str) -> int:
        """Longest utterance in characters for ``language``."""
        return self.max_utterance_chars.get(language, self.max_utterance_chars["*"])

    def about_languages(self, spoken: Sequence[str]) -> str:
        """For whoever asked for another language: what is ``spoken``, and what would have to be installed."""
        sentences = [f"It speaks: {', '.join(spoken)}."]
        for requirement, added in self.optional_languages.items():
            if not set(added) <= set(spoken):
                sentences.append(f"pip install '{requirement}' where it runs would add: {', '.join(added)}.")
        if self.languages_hint:
            sentences.append(self.languages_hint)
        return " ".join(sentences)


class EngineConfig(BaseModel):
    """Settings of one engine. Subclasses add their own fields; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    slots: int = Field(default=1, ge=1, le=1024, description="Utterances one replica works on at once.")


@dataclass(frozen=True, slots=True)
class Word:
    """A piece of a transcript, mostly a word, and when it is said, in seconds from the recording's start.

    ``text`` keeps the spaces and signs around it: joined, the pieces of a transcript are the transcript.
    """

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Reference:
    """One or several checked recordings of the speaker to clone, one after the other.

    ``samples``: mono float32 in [-1, 1], shape [n]; ``sample_rate_hz``: 8 000 to 192 000;
    ``transcript``: what is said, empty if unknown; ``language``: BCP-47 or empty if unknown;
    ``words``: ``transcript`` in timed pieces, in order, empty if the times are unknown;
    ``cuts``: where in ``samples`` the second recording begins, the third and so on.
    """

    samples: Samples
    sample_rate_hz: int
    transcript: str = ""
    language: str = ""
    words: tuple[Word, ...] = ()
    cuts: tuple[int, ...] = ()

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.sample_rate_hz

    @property
    def recordings(self) -> list[Samples]:
        """``samples``, a recording at a time."""
        return np.split(self.samples, self.cuts)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What one engine computed from a reference and needs to speak in that voice.

    ``engine`` and ``weights_fingerprint`` tie it to the weights it came from: an engine refuses any other
    with ``ConditioningMismatch``. ``arrays`` holds the named tensors.
    """

    engine: str
    weights_fingerprint: str
    arrays: Mapping[str, NDArray[Any]]

    def to_bytes(self) -> bytes:
        """As one safetensors blob; the identity travels in its metadata."""
        # safetensors writes strides as they are: a transposed view would come back scrambled.
        tensors = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        return safetensors.numpy.save(
            tensors,
            # One entry: safetensors writes several in an order that changes from process to process.
            metadata={"identity": json.dumps([self.engine, self.weights_fingerprint])},
        )

    @classmethod
    def from_bytes(cls, blob: bytes) -> Conditioning:
        """Read what ``to_bytes`` wrote. Raises ``ConditioningMismatch`` if it is anything else."""
        try:
            arrays = safetensors.numpy.load(blob)
            engine, weights_fingerprint = json.loads(_safetensors_metadata(blob)["identity"])
            return cls(engine, weights_fingerprint, arrays)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ConditioningMismatch(
                "The stored conditioning of this voice cannot be read.",
                next_step="It is computed again from the reference recording.",
            ) from error

    @property
    def size_bytes(self) -> int:
        """Memory the arrays take."""
        return sum(array.nbytes for array in self.arrays.values())


def _safetensors_metadata(blob: bytes) -> dict[str, str]:

    header_bytes = int.from_bytes(blob[:8], "little")
    metadata: dict[str, str] = json.loads(blob[8 : 8 + header_bytes])["__metadata__"]
    return metadata


class Abandon:
    """A flag that says nobody waits for an utterance any more. Set once, from any thread."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Ask the engine to stop this utterance before its next chunk."""
        self._event.set()

    def is_set(self) -> bool:
        """True once ``set`` was called."""
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s`` for ``set``; True if it was called."""
        return self._event.wait(timeout_s)


@dataclass(frozen=True, slots=True)
class Utterance:
    """One sentence-sized text to speak.

    The same text, language, conditioning, ``seed``, ``speed`` and options give the same samples, alone or
    in any batch: that is what lets another replica finish an utterance unheard.
    """

    text: str
    language: str
    conditioning: Conditioning
    seed: int
    #: Speaking rate, 0.25 to 4.0, 1.0 is the engine's own.
    speed: float = 1.0
    #: Engine-specific sampling options; ``EngineCard.options`` lists the names.
    options: Mapping[str, Any] = field(default_factory=dict)
    #: Set by whoever asked when they stop waiting. The engine looks before every chunk.
    abandoned: Abandon = field(default_factory=Abandon, compare=False)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some audio of one utterance of a batch, in order within that utterance.

    Exactly one chunk per utterance has ``last`` set. A failed utterance ends with ``error`` set, ``last``
    set and no samples. An abandoned utterance just stops: no last chunk is owed. A chunk without samples that
    is not the last says that the engine still works: one that yields nothing for longer than the server's
    ``chunk_timeout_s`` is taken for dead. Only real progress may be said so.
    """

    #: Index of the utterance in the batch given to ``synthesize``.
    row: int
    samples: Samples
    last: bool
    error: EngineError | None = None

    @classmethod
    def failure(cls, row: int, error: EngineError) -> Chunk:
        """The closing chunk of an utterance that failed."""
        return cls(row, np.zeros(0, np.float32), last=True, error=error)


class Engine(ABC):
    """One speech model family.

    ``load`` is called once before anything else, from any thread. ``synthesize`` may be called again
    while an earlier call still runs only if ``concurrent_batches`` is above 1; ``extract_voice`` and
    ``refine_voice`` may run beside ``synthesize`` in any case.
    """

    card: ClassVar[EngineCard]
    Config: ClassVar[type[EngineConfig]] = EngineConfig

    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    @property
    def concurrent_batches(self) -> int:
        """How many ``synthesize`` calls may run at the same time. Valid before ``load``."""
        return 1

    @property
    @abstractmethod
    def weights_fingerprint(self) -> str:
        """Short hash of everything conditioning depends on. Valid after ``load``."""

    @property
    def languages(self) -> tuple[str, ...]:
        """What this instance speaks, optional extras included. Valid after ``load``."""
        return self.card.languages

    @property
    def built_in_voices(self) -> Mapping[str, Conditioning]:
        """Voices that come with the weights, by name. Valid after ``load``."""
        return {}

    @abstractmethod
    def load(self) -> None:
        """Put the weights into memory and warm up. Raises ``ModelError``."""

    def unload(self) -> None:  # noqa: B027 - an engine without weights has nothing to give back
        """Give the memory back. ``load`` may be called again."""

    @abstractmethod
    def extract_voice(self, reference: Reference) -> Conditioning:
        """Compute what is needed to speak like ``reference``. Raises ``ReferenceUnusable``."""

    def refine_voice(self, reference: Reference, conditioning: Conditioning) -> Conditioning | None:
        """Compute a better conditioning at leisure, or None if ``extract_voice`` is all there is.

        Enrolment answers with what ``extract_voice`` gave; this runs afterwards, in the background.
        """
        return None

    @abstractmethod
    def synthesize(self, batch: Sequence[Utterance]) -> Iterator[Chunk]:
        """Speak ``batch``: chunks as soon as each exists, rows interleaved as the engine likes.

        ``batch`` holds 1 to ``config.slots`` utterances. One that fails ends with ``Chunk.failure``; the
        others go on. Closing the iterator stops all work within one chunk.
        """

    def check_conditioning(self, conditioning: Conditioning) -> None:
        """Raise ``ConditioningMismatch`` unless ``conditioning`` came from these weights."""
        mine = (self.card.name, self.weights_fingerprint)
        if (conditioning.engine, conditioning.weights_fingerprint) != mine:
            raise ConditioningMismatch(
                f"Conditioning of engine '{conditioning.engine}' with weights "
                f"{conditioning.weights_fingerprint} was given to '{mine[0]}' with weights {mine[1]}.",
                next_step="Extract it again from the reference recording.",
            )

    def check_utterance(self, utterance: Utterance) -> None:
        """Raise what every engine refuses: wrong conditioning, language, length or option."""
        self.check_conditioning(utterance.conditioning)
        if utterance.language not in self.languages:
            raise UnsupportedLanguage(
                f"Engine '{self.card.name}' does not speak '{utterance.language}'.",
                next_step=self.card.about_languages(self.languages),
            )
        limit = self.card.max_chars(utterance.language)
        if len(utterance.text) > limit:
            raise UtteranceTooLong(
                f"The utterance has {len(utterance.text)} characters; '{self.card.name}' takes {limit}.",
                next_step="Split the text into shorter utterances.",
            )
        unknown = sorted(set(utterance.options) - set(self.card.options))
        if unknown:
            known = ", ".join(self.card.options) or "none"
            raise UnsupportedOption(
                f"Engine '{self.card.name}' has no option '{unknown[0]}'.",
                next_step=f"Its options: {known}.",
            )
