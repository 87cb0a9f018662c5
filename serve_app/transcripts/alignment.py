"""Lays the times of heard words under a text that says nearly the same, as a person wrote it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

from engines.contract import Word

#: Share of the text, in letters, that must have been heard; with less the times would be guesses.
MIN_AGREEMENT = 0.5

#: Scripts without spaces between words: Thai to Burmese, Khmer, kana, Chinese characters. Each is a piece of
#: its own.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_PIECE = re.compile(rf"\s*(?:[{_UNSPACED}]|[^\s{_UNSPACED}]+)")


def align(text: str, heard: Sequence[Word]) -> tuple[Word, ...]:
    """``text`` in timed pieces that joined are ``text``; empty if too little of it was heard.

    Words found in both, in order, keep the times they were heard at. Of what differs between two of them the
    pieces share the time there, by their letters.
    """
    pieces = pieces_of(text)
    known = [piece for word in heard for piece in _timed(pieces_of(word.text), word.start_s, word.end_s)]
    keys = [letters_of(piece) for piece in pieces]
    # autojunk would ignore the words that are frequent in a long text, which are most of any text.
    matcher = SequenceMatcher(None, keys, [letters_of(piece.text) for piece in known], autojunk=False)
    agreed = sum(
        len(key) for block in matcher.get_matching_blocks() for key in keys[block.a : block.a + block.size]
    )
    if not pieces or agreed < MIN_AGREEMENT * sum(map(len, keys)):
        return ()
    words: list[Word] = []
    for change, first, end, heard_first, heard_end in matcher.get_opcodes():
        if change == "equal":
            times = known[heard_first:heard_end]
            words += [
                Word(text, at.start_s, at.end_s) for text, at in zip(pieces[first:end], times, strict=True)
            ]
        elif end > first:
            start_s = (
                known[heard_first].start_s if heard_end > heard_first else _end_before(known, heard_first)
            )
            end_s = (
                known[heard_end - 1].end_s
                if heard_end > heard_first
                else _start_after(known, heard_end, start_s)
            )
            words += _timed(pieces[first:end], start_s, end_s)
    return tuple(words)


def pieces_of(text: str) -> list[str]:
    """``text`` cut before its words; signs without a letter stay with the word before them."""
    pieces: list[str] = []
    pending = ""
    for found in _PIECE.findall(text):
        if letters_of(found):
            pieces.append(pending + found)
            pending = ""
        elif pieces:
            pieces[-1] += found
        else:
            pending += found
    if pieces:
        pieces[-1] += text[len("".join(pieces)) :]
    return pieces


def letters_of(piece: str) -> str:
    """What two ways of writing one word have in common."""
    return "".join(char for char in piece.casefold() if unicodedata.category(char)[0] in "LMN")


def _timed(pieces: Iterable[str], start_s: float, end_s: float) -> list[Word]:
    """``pieces`` one after the other from ``start_s`` to ``end_s``, as long as they have letters."""
    pieces = list(pieces)
    letters = [max(1, len(letters_of(piece))) for piece in pieces]
    per_letter_s = (end_s - start_s) / max(1, sum(letters))
    words = []
    for piece, count in zip(pieces, letters, strict=True):
        # Rounding must not carry a word past the end.
        until_s = min(end_s, start_s + count * per_letter_s)
        words.append(Word(piece, start_s, until_s))
        start_s = until_s
    return words


def _end_before(known: Sequence[Word], index: int) -> float:
    return known[index - 1].end_s if index else 0.0


def _start_after(known: Sequence[Word], index: int, at_least_s: float) -> float:
    return max(at_least_s, known[index].start_s) if index < len(known) else at_least_s
