"""What is known about an enrolled speaker."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Annotated, Final
from urllib.parse import quote

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from serve_app.transcripts.transcript import Transcript

#: Owner of voices that belong to nobody in particular.
PUBLIC: Final = "public"

_VOICE_ID: Final = re.compile(r"voice_[0-7][0-9A-HJKMNP-TV-Z]{25}", re.ASCII)
_OWNER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
#: BCP-47, or nothing.
LANGUAGE_PATTERN: Final = r"^([A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*)?$"
_MAX_NAME: Final = 100


def is_voice_id(text: str) -> bool:
    """True if ``text`` has the form of an id made here. Nothing else ever becomes part of a path."""
    return _VOICE_ID.fullmatch(text) is not None


def is_owner(text: str) -> bool:
    """True if ``text`` has the form of an owner, which is part of a path in the store."""
    return _OWNER.fullmatch(text) is not None


def checked_name(name: str) -> str:
    """``name`` in NFC and without outer space. Raises ``ValueError`` if it is no name for a voice."""
    name = unicodedata.normalize("NFC", name).strip()
    if not 1 <= len(name) <= _MAX_NAME:
        raise ValueError(f"a name has 1 to {_MAX_NAME} characters")
    # Cs: half a character, which cannot be written as UTF-8; Cf would also forbid emoji sequences.
    if any(unicodedata.category(char) in {"Cc", "Cs", "Zl", "Zp"} for char in name):
        raise ValueError("a name has no control characters")
    if all(unicodedata.category(char)[0] in "CMZ" for char in name):
        raise ValueError("a name has something to see in it")
    if is_voice_id(name):
        raise ValueError("a name cannot look like a voice id")
    return name


@dataclass(frozen=True, slots=True)
class BuiltInVoice:
    """A voice that comes with the weights of an engine and speaks with that engine only."""

    #: Served name of the engine.
    engine: str
    name: str

    @property
    def id(self) -> str:
        """Its id: in ASCII, whatever the name is written in, and never that of an enrolled voice."""
        return f"{self.engine}:{quote(self.name, safe=' ')}"

    @staticmethod
    def engine_in(voice_id: str) -> str | None:
        """The engine that an id names; None for the id of an enrolled voice."""
        engine, colon, _ = voice_id.partition(":")
        return engine if colon else None


Name = Annotated[str, AfterValidator(checked_name)]


class Consent(BaseModel):
    """What the speaker agreed to."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    statement: str = Field(min_length=1, max_length=2_000, description="What was agreed to, in words.")
    recorded_at: int = Field(description="When the statement was given, in seconds since the epoch.")
    who: str | None = Field(default=None, max_length=200, description="Who gave it.")
    id: str | None = Field(default=None, max_length=64, description="The recorded consent it refers to.")


class NewVoice(BaseModel):
    """What is said about a voice at enrolment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name = Field(description="1 to 100 characters, unique for its owner whatever the case.")
    owner: str = Field(
        default=PUBLIC, pattern=f"^{_OWNER.pattern}$", description="Whose voice list it is in."
    )
    language: str = Field(default="", pattern=LANGUAGE_PATTERN, description="BCP-47, empty if unknown.")
    transcript: str = Field(default="", max_length=5_000, description="What is said, empty if unknown.")
    description: str = Field(default="", max_length=1_000, description="Free text.")
    consent: Consent | None = None


class Voice(BaseModel):
    """An enrolled speaker: what the record holds."""

    # Fields that a later version adds do not make its records unreadable here.
    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str = Field(pattern=f"^{_VOICE_ID.pattern}$")
    revision: str = Field(pattern=r"^[0-9A-Z]{26}$", description="Changes with each new recording.")
    name: Name
    owner: str = Field(pattern=f"^{_OWNER.pattern}$")
    language: str = ""
    transcript: str = Field(default="", description="What was said at enrolment to be said; see ``words``.")
    description: str = ""
    consent: Consent | None = None
    created_at: int = Field(description="Seconds since the epoch.")
    duration_s: float = Field(description="Length of the reference recording.")
    sample_rate_hz: int = Field(description="Sample rate of the reference recording.")
    fingerprint: str = Field(description="See ``reference.fingerprint_of``.")
    warnings: tuple[str, ...] = ()
    cuts: tuple[int, ...] = Field(
        default=(), description="Where in the reference, in samples, a further recording begins."
    )
    words: Transcript | None = Field(
        default=None,
        exclude=True,
        description="The words that count, where someone asked the store for them; no part of the record.",
    )
