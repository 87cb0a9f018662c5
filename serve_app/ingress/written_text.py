"""Text that is still being written: what of it can be spoken already."""

from __future__ import annotations

import re
from enum import StrEnum

import sentencex

#: A clause shorter than this is not worth a pause after it.
_MIN_CLAUSE_CHARS = 12
_CLAUSE_END = re.compile(r"[,;:–—،]\s|[、，；：]")


class Granularity(StrEnum):
    """How much has to be there before it is spoken."""

    #: The whole turn, or what stands before a flush.
    NONE = "none"
    SENTENCE = "sentence"
    CLAUSE = "clause"


class WrittenText:
    """What was written of one turn and not taken yet.

    A sentence counts as complete once something follows it: only then is "3." known not to become "3.5". The
    end of a line completes what stands before it.
    """

    def __init__(self, granularity: Granularity, language: str) -> None:
        """``language`` (BCP-47 primary subtag) tells abbreviations from ends of sentences."""
        self._granularity = granularity
        self._language = language
        self._complete: list[str] = []
        self._open = ""

    @property
    def pending(self) -> int:
        """Characters that are not taken yet."""
        return len(self._open) + sum(map(len, self._complete))

    def add(self, text: str) -> None:
        """Write ``text`` behind what is there."""
        self._open += text
        if self._granularity is Granularity.NONE:
            return
        *lines, rest = self._open.splitlines(keepends=True) or [""]
        if rest.endswith(("\n", "\r")):
            lines, rest = [*lines, rest], ""
        for line in lines:
            self._complete += sentencex.segment(self._language, line)
        *sentences, self._open = sentencex.segment(self._language, rest) or [""]
        self._complete += sentences
        if self._granularity is Granularity.CLAUSE:
            ends = [match.end() for match in _CLAUSE_END.finditer(self._open)]
            if ends and ends[-1] >= _MIN_CLAUSE_CHARS:
                self._complete.append(self._open[: ends[-1]])
                self._open = self._open[ends[-1] :]

    def flush(self) -> None:
        """Let everything count as complete."""
        if self._open:
            self._complete.append(self._open)
            self._open = ""

    def clear(self) -> None:
        """Drop everything."""
        self._complete, self._open = [], ""

    def take(self, max_chars: int) -> str:
        """The next stretch: all that is complete, up to ``max_chars`` characters; empty if nothing is.

        What holds neither a letter nor a digit goes with what follows it. A piece longer than ``max_chars``
        is cut, between words if it has any.
        """
        taken = ""
        while self._complete:
            piece = self._complete.pop(0)
            if len(taken) + len(piece) <= max_chars:
                taken += piece
                continue
            if is_speakable(taken):
                self._complete.insert(0, piece)
                break
            # What came before says nothing, and leaves no room.
            if len(piece) > max_chars:
                cut = piece.rfind(" ", 1, max_chars) + 1 or max_chars
                self._complete.insert(0, piece[cut:])
                piece = piece[:cut]
            taken = piece
        if is_speakable(taken):
            return taken
        if taken:
            self._complete.insert(0, taken)
        return ""


def is_speakable(text: str) -> bool:
    """True if any character is a letter or a digit in any script."""
    return any(character.isalnum() for character in text)
