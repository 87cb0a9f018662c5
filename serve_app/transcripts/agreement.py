"""How far what was heard is from what should have been said."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from serve_app.transcripts.alignment import letters_of, pieces_of


class VerifyTerms(BaseModel):
    """When an utterance is spoken again because its words are not all there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_wer: float = Field(
        default=0.2, ge=0, le=1, description="Words lost, changed or added per word of the text that pass."
    )
    tries: int = Field(
        default=3, ge=1, le=8, description="Times an utterance is spoken at most; the best one is heard."
    )


def word_error_rate(text: str, heard: str) -> float:
    """Words lost, changed or added in ``heard``, per word of ``text``.

    Case and signs do not count. A number in digits stands for whatever word is in its place: recognisers
    write "16" where "sixteen" was said. Where words are not spaced, each sign is one.
    """
    expected, found = ([letters_of(piece) for piece in pieces_of(words)] for words in (text, heard))
    row = list(range(len(found) + 1))
    for position, word in enumerate(expected, start=1):
        following = [position]
        for index, other in enumerate(found):
            changed = row[index] + (not _same(word, other))
            following.append(min(changed, row[index + 1] + 1, following[index] + 1))
        row = following
    return row[-1] / max(1, len(expected))


def _same(word: str, other: str) -> bool:
    return word == other or any(char.isdigit() for char in word + other)
