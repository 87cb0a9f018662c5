"""What clients of the OpenAI family say about a speech: one set of fields for single, batched and live use.

OpenAI's fields, those that vLLM-Omni added and its clients know (``stream``, ``language``, ``ref_audio``,
``ref_text``, ``sample_rate``, ``seed``, ``speaker`` for ``voice``), and a few of ours. Fields we do not know
are ignored, as OpenAI's servers do, and named to the client.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StrictBool, StrictInt

from serve_app.audio.encode import AudioFormat
from serve_app.errors import ConflictingFields, MissingField
from serve_app.ingress.data_url import audio_of
from serve_app.ingress.timestamps import Timestamps
from serve_app.protocol import Caller, OneShotReference, Priority, SpeechRequest

_NAME = re.compile(r"[A-Za-z_][\w.]{,39}", re.ASCII)
_MOST_NAMES = 20


def printable(names: Iterable[str]) -> list[str]:
    """Of names that a client made up, those that fit into a header."""
    return sorted(name for name in names if _NAME.fullmatch(name))[:_MOST_NAMES]


def well_formed(text: str) -> str:
    """``text`` without halves of characters, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class VoiceReference(BaseModel):
    """OpenAI's object form of ``voice``."""

    id: str = Field(min_length=1, max_length=200)


class SpeechOptions(BaseModel):
    """Everything about a speech but its text."""

    model_config = ConfigDict(extra="allow")

    voice: Annotated[str, Field(min_length=1, max_length=200)] | VoiceReference | None = Field(
        default=None,
        validation_alias=AliasChoices("voice", "speaker"),
        description="Id, name or alias of an enrolled voice; required unless there is 'ref_audio'.",
    )
    model: str | None = Field(default=None, description="Engine; the default engine if left out.")
    response_format: AudioFormat = Field(default=AudioFormat.MP3, description="Container of the audio.")
    speed: float = Field(default=1.0, ge=0.25, le=4.0, allow_inf_nan=False, description="Speaking rate.")
    instructions: str | None = Field(default=None, description="Ignored: no served engine takes any.")
    language: str | None = Field(
        default=None, min_length=2, max_length=35, description="BCP-47; found from the text if left out."
    )
    ref_audio: str | None = Field(
        default=None,
        description="Speak like this recording, for this request only: a data: URL with base64. 'voice' is "
        "then ignored.",
    )
    ref_text: str | None = Field(
        default=None, max_length=2000, description="What is said in 'ref_audio'; some engines need it."
    )
    consent: str = Field(
        default="",
        max_length=2000,
        description="For 'ref_audio': the speaker's consent statement, or the id of a recorded consent.",
    )
    sample_rate: StrictInt | None = Field(
        default=None, ge=8_000, le=48_000, description="Rate of the answer in Hz."
    )
    seed: StrictInt | None = Field(default=None, ge=0, lt=2**63, description="Same seed, same samples.")
    fallback_engines: Annotated[list[str], Field(max_length=8)] | None = Field(
        default=None, description="Engines to try in order if the chosen one cannot begin."
    )
    priority: Priority = Field(
        default=Priority.INTERACTIVE, description="'bulk' lets everything interactive go first."
    )
    engine_options: dict[str, Any] = Field(default_factory=dict, description="The engine's own options.")

    @property
    def ignored_fields(self) -> list[str]:
        """Names of fields that change nothing."""
        known = {
            "instructions": bool(self.instructions),
            "voice": self.ref_audio is not None and self.voice is not None,
        }
        return [
            *printable(self.model_extra or {}),
            *(name for name, ignored in known.items() if ignored),
        ]

    def check(self) -> None:
        """Raise ``MissingField`` or ``ConflictingFields`` for what the fields say together."""
        if self.voice is None and self.ref_audio is None:
            raise MissingField(
                "'voice' is missing. Name an enrolled voice (GET /v1/audio/voices) or send 'ref_audio'.",
                param="voice",
            )
        if self.ref_text and self.ref_audio is None:
            raise ConflictingFields(
                "'ref_text' says what is spoken in 'ref_audio'. Send both or neither.", param="ref_text"
            )

    def reference(self, max_bytes: int) -> OneShotReference | None:
        """The recording to speak like, of at most ``max_bytes``; None if an enrolled voice is named."""
        if self.ref_audio is None:
            return None
        audio = audio_of(self.ref_audio, max_bytes, param="ref_audio")
        return OneShotReference(audio, self.ref_text or "", self.consent)

    def request(
        self,
        text: str,
        request_id: str,
        caller: Caller,
        priority: Priority,
        reference: OneShotReference | None,
    ) -> SpeechRequest:
        """What the router is asked for."""
        voice = self.voice.id if isinstance(self.voice, VoiceReference) else self.voice
        return SpeechRequest(
            text=text,
            voice=voice or "",
            model=self.model,
            language=self.language,
            speed=self.speed,
            seed=self.seed,
            options=self.engine_options,
            fallback_engines=None if self.fallback_engines is None else tuple(self.fallback_engines),
            request_id=request_id,
            caller=caller,
            priority=priority,
            reference=reference,
        )


class SpeechBody(SpeechOptions):
    """Body of ``POST /v1/audio/speech``."""

    input: str = Field(description="The text to speak.")
    stream: StrictBool = Field(
        default=True, description="Send audio while it is spoken; false sends it whole, with its length."
    )
    stream_format: Literal["audio", "sse"] = Field(
        default="audio", description="'sse' sends the audio as server-sent events with base64."
    )
    timestamps: Timestamps | None = Field(
        default=None,
        description="Say when each sentence is heard. The answer is then JSON with the whole audio in it, or "
        "there is an event for each sentence.",
    )

    def check(self) -> None:
        """Also raise ``ConflictingFields`` for events that are not streamed, or that cannot carry a file."""
        super().check()
        if self.stream_format == "sse" and self.timestamps not in (None, Timestamps.JSON):
            raise ConflictingFields(
                "Subtitles are a whole file, which events do not carry. Ask for timestamps 'json', or for "
                "stream_format 'audio'.",
                param="timestamps",
            )
        if self.stream_format == "sse" and not self.stream:
            raise ConflictingFields(
                "stream_format 'sse' is a stream. Leave out 'stream', or ask for stream_format 'audio'.",
                param="stream_format",
            )
