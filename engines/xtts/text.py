"""From a sentence to text tokens, with coqui-tts's own cleaning for each language."""

from __future__ import annotations

import threading
from importlib.util import find_spec

from TTS.tts.layers.xtts.tokenizer import VoiceBpeTokenizer

from engines.contract import NothingToSpeak, UtteranceError, UtteranceTooLong
from engines.xtts.languages import LANGUAGES, REQUIRED_PACKAGES

#: Languages whose mark before the text is not their BCP-47 name.
_MARKS = {"zh": "zh-cn"}


def installed_languages() -> tuple[str, ...]:
    """What is spoken here: the optional languages only if their packages are installed."""
    return LANGUAGES + tuple(
        language
        for language, packages in REQUIRED_PACKAGES.items()
        if all(find_spec(package) is not None for package in packages)
    )


class TextFrontEnd:
    """Cleans and tokenises. Safe for any number of threads."""

    def __init__(self, tokenizer: VoiceBpeTokenizer, max_tokens: int) -> None:
        """``max_tokens``: the model has positions for fewer text tokens than this."""
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        # The Japanese analyser is not thread-safe.
        self._lock = threading.Lock()

    def tokens(self, text: str, language: str) -> tuple[list[int], int]:
        """Token ids of ``text``, and how many characters it is read as: numbers spelled out, Latin letters.

        Raises ``NothingToSpeak``, ``UtteranceTooLong`` (in tokens), or ``UtteranceError`` for a number that
        cannot be spelled out in ``language``.
        """
        if not any(character.isalnum() for character in text):
            raise NothingToSpeak(
                "The text has no letter or digit.", next_step="Send text with at least one letter or digit."
            )
        try:
            with self._lock:
                # As VoiceBpeTokenizer.encode, which keeps the cleaned text to itself.
                cleaned: str = self._tokenizer.preprocess_text(text.strip().lower(), language)
        except NotImplementedError as error:
            raise UtteranceError(
                f"The text holds a number that cannot be spelled out in '{language}'.",
                next_step="Write numbers as words.",
            ) from error
        marked = f"[{_MARKS.get(language, language)}]{cleaned}".replace(" ", "[SPACE]")
        tokens: list[int] = self._tokenizer.tokenizer.encode(marked).ids
        if len(tokens) >= self._max_tokens:
            raise UtteranceTooLong(
                f"The text becomes {len(tokens)} tokens; XTTS-v2 takes {self._max_tokens - 1}.",
                next_step="Split the text into shorter utterances.",
            )
        return tokens, len(cleaned)
