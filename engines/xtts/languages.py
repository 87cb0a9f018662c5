"""Which languages XTTS-v2 speaks, and how long a sentence may be. Known without anything installed."""

from __future__ import annotations

#: Spoken with the extra `xtts` alone.
LANGUAGES = ("en", "es", "fr", "de", "it", "pt", "pl", "tr", "ru", "nl", "cs", "ar", "hu", "ko", "hi")

EXTRA = "voice-clone-tts[xtts-cjk]"
#: Modules that turn the text of a language into Latin letters, which the model reads.
REQUIRED_PACKAGES = {"zh": ("pypinyin",), "ja": ("cutlet", "fugashi", "unidic_lite")}

#: Longest sentence in characters, coqui-tts's ``VoiceBpeTokenizer.char_limits``: beyond, speech is cut off.
MAX_CHARS = {
    "en": 250,
    "de": 253,
    "fr": 273,
    "es": 239,
    "it": 213,
    "pt": 203,
    "pl": 224,
    "zh": 82,
    "ar": 166,
    "cs": 186,
    "ru": 182,
    "nl": 251,
    "tr": 226,
    "ja": 71,
    "hu": 224,
    "ko": 95,
    "hi": 150,
    "*": 71,
}
