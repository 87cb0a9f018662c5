"""The plain values that cross handle calls between ingress, router and replicas.

Everything here pickles cheaply and means the same in every process. Audio travels as float32 arrays at the
engine's own rate; encoding for a client happens in the ingress.

A call to the router never raises what the caller did wrong: it answers ``Failure``, so that a bad request
is not logged as a crash of the router, and the error arrives as itself and not wrapped by the transport.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from engines.contract import Conditioning, EngineCard, EngineError, Samples
from serve_app.errors import VoiceCloneError

#: Address of a call by handle, which has none.
LOCAL_ADDRESS = "local"
#: Address of a client behind a proxy that hides it.
UNKNOWN_ADDRESS = "unknown"


class Priority(StrEnum):
    """How soon a request wants to be heard. Bulk work waits for everything interactive."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: what limits and fair shares are counted by."""

    #: IP address of the client, of an IPv6 one its /64 network; or one of the two constants above.
    address: str = LOCAL_ADDRESS
    #: Name of the configured API key; empty for a caller without one.
    key: str = ""

    @property
    def client(self) -> str:
        """The one name fair shares go by: the key's, else the address."""
        return f"key:{self.key}" if self.key else f"ip:{self.address}"

    @property
    def kind(self) -> str:
        """What metrics count it as: "key" or "ip"."""
        return "key" if self.key else "ip"


@dataclass(frozen=True, slots=True)
class OneShotReference:
    """A recording to speak like, for one request: never enrolled. ``audio`` is unchecked."""

    audio: bytes
    transcript: str = ""
    #: A statement, or the id of a recorded consent.
    consent: str = ""


@dataclass(frozen=True, slots=True)
class SpeechRequest:
    """One text to speak in one voice, whatever dialect it came in."""

    text: str
    #: Id, name or alias of the voice; means nothing if there is a ``reference``.
    voice: str
    #: Served engine or alias; None is the default engine.
    model: str | None = None
    #: BCP-47 primary subtag; None lets the router find out.
    language: str | None = None
    speed: float = 1.0
    #: None draws one; the answer says which.
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    owner: str = "public"
    request_id: str = ""
    caller: Caller = field(default_factory=Caller)
    priority: Priority = Priority.INTERACTIVE
    #: Served engines to try in order if the chosen one cannot begin; None takes the configured ones.
    fallback_engines: tuple[str, ...] | None = None
    #: Unique name of this speech if its reader reports what it has taken; empty if it does not.
    speech_id: str = ""
    #: Speak like this recording instead of an enrolled voice.
    reference: OneShotReference | None = None


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    """First answer of a speech: what is speaking. Sent together with the first audio."""

    engine: str
    #: Empty for a one-shot reference.
    voice_id: str
    language: str
    sample_rate_hz: int
    seed: int
    utterances: int
    #: What each utterance says; joined, what is spoken of the text.
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AudioFrame:
    """The next samples of a speech, mono float32."""

    samples: Samples
    #: Index of the utterance they belong to.
    utterance: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """The call ended with this error; nothing follows."""

    error: VoiceCloneError


SpeechEvent = SpeechStarted | AudioFrame | Failure


@dataclass(frozen=True, slots=True)
class EnrolRequest:
    """A recording to make a voice of. ``audio`` is the upload as it came, unchecked."""

    name: str
    audio: bytes
    #: A statement, or the id of a recorded consent.
    consent: str = ""
    transcript: str = ""
    language: str = ""
    description: str = ""
    #: Engine whose conditioning is computed at once; None is the default engine.
    model: str | None = None
    #: Replace a voice of this name instead of refusing.
    replace: bool = False
    owner: str = "public"
    request_id: str = ""
    caller: Caller = field(default_factory=Caller)


@dataclass(frozen=True, slots=True)
class ConsentRequest:
    """A recording in which a speaker consents. ``audio`` is the upload as it came, unchecked."""

    name: str
    language: str
    audio: bytes
    owner: str = "public"
    request_id: str = ""
    caller: Caller = field(default_factory=Caller)


@dataclass(frozen=True, slots=True)
class UtteranceCall:
    """One row of a batch on its way to a replica."""

    #: Unique among all calls in flight: what ``abandon`` names.
    call_id: str
    text: str
    language: str
    conditioning: Conditioning
    seed: int
    speed: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BatchTerms:
    """What a replica may make one batch of: rows with equal terms, and of those so many."""

    #: What must be equal in one batch, as the engine's card says.
    group: tuple[object, ...]
    max_rows: int
    #: Characters of one batch; None is unbounded. A single row always fits.
    max_chars: int | None


@dataclass(frozen=True, slots=True)
class RowAudio:
    """Samples of one row of a batch on their way back; ``error`` ends the row."""

    row: int
    samples: Samples
    last: bool
    error: EngineError | None = None


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the router plans with: the card, and what only a loaded replica knows."""

    card: EngineCard
    #: What it speaks, optional extras included.
    languages: tuple[str, ...]
    slots: int
    weights_fingerprint: str
    #: Names of the voices that come with the weights.
    built_in_voices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ProcessActivity:
    """What is alive in a process. Neither number grows with what it has served."""

    process_id: int
    #: Tasks of the event loop that asks.
    tasks: int
    #: Python objects that the garbage collector knows.
    objects: int


@dataclass(frozen=True, slots=True)
class ReplicaActivity:
    """Counters of one replica since it started, and the rows it works on now."""

    process: ProcessActivity
    rows_open: int
    batches: int
    largest_batch: int
    chunks: int


@dataclass(frozen=True, slots=True)
class RouterActivity:
    """What one router holds now."""

    process: ProcessActivity
    #: Speeches and enrolments in the router, waiting ones included.
    requests: int
    #: Utterances in queues, and on replicas.
    waiting: int
    speaking: int
    #: Recordings that are being made, and readers that report what they take.
    recordings: int
    readers: int
