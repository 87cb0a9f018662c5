"""The words of a recording, and where they come from.

A person may say them at enrolment (``given``) or later (``edited``); a recogniser may hear them (``heard``).
What a person says counts, the latest first; without any, what was heard does. When each word is said only
hearing tells: its times are laid under whatever text counts (``alignment``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from engines.contract import Reference, Word
from serve_app.transcripts.alignment import align

Source = Literal["given", "edited", "heard"]

#: Mean probability of its words below which a hearing is worth a look by a person.
UNSURE_BELOW = 0.6


class HeardWord(BaseModel):
    """One word of a hearing. ``text`` keeps its spaces and punctuation: joined, they are the text."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    text: str
    start_s: float = Field(ge=0)
    end_s: float = Field(ge=0)
    probability: float = Field(ge=0, le=1)


class Hearing(BaseModel):
    """What a recogniser heard in a recording. Made once for a recording and never changed."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    language: str = Field(
        description="As the recogniser names it: a BCP-47 primary subtag, or one of Whisper's own."
    )
    words: tuple[HeardWord, ...] = Field(min_length=1)

    @property
    def text(self) -> str:
        """All that was heard."""
        return "".join(word.text for word in self.words)

    @property
    def confidence(self) -> float:
        """Mean probability of the words, 0 to 1, as the recogniser rates itself."""
        return sum(word.probability for word in self.words) / len(self.words)


class Correction(BaseModel):
    """What a person says is said. An empty text takes an earlier correction back."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    text: str = Field(max_length=5_000)
    language: str = ""


@dataclass(frozen=True, slots=True)
class Transcript:
    """The words that count.

    ``language``: BCP-47, empty if nobody said or heard it. ``confidence``: of the hearing, None without one.
    ``words``: when each piece of ``text`` is said; empty without a hearing, or if it has little in common
    with the text.
    """

    text: str
    source: Source
    language: str
    confidence: float | None
    words: tuple[Word, ...]

    @property
    def digest(self) -> str:
        """Stands for everything an engine may use of it."""
        content = [self.text, self.language, [(word.text, word.start_s, word.end_s) for word in self.words]]
        return blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    @property
    def is_unsure(self) -> bool:
        """True if nobody but an unsure recogniser vouches for the text."""
        return self.source == "heard" and self.confidence is not None and self.confidence < UNSURE_BELOW

    def completes(self, reference: Reference) -> Reference:
        """``reference`` with these words."""
        return replace(
            reference,
            transcript=self.text,
            language=self.language or reference.language,
            words=self.words,
        )


def transcript_of(
    given: str, language: str, hearing: Hearing | None, correction: Correction | None = None
) -> Transcript | None:
    """The words that count, None if nobody knows any. ``given`` and ``language``: those of enrolment."""
    source: Source
    if correction is not None and correction.text.strip():
        text, source, language = correction.text.strip(), "edited", correction.language or language
    elif given.strip():
        text, source = given.strip(), "given"
    elif hearing is not None:
        text, source = hearing.text, "heard"
    else:
        return None
    if hearing is None:
        return Transcript(text, source, language, None, ())
    times = [Word(word.text, word.start_s, word.end_s) for word in hearing.words]
    return Transcript(text, source, language or hearing.language, hearing.confidence, align(text, times))
