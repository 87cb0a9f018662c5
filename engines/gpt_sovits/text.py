"""From a sentence to phones, with gsv-tts-lite's front end: English, Chinese, Japanese, and mixtures.

Its dictionaries lie in ``g2p`` of the model folder. Pickles among the published ones are not read: the merged
English dictionary is made from its sources, the names come from ``namedict.json`` (see ``convert``).
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engines.contract import ModelCorrupt, ModelError, NothingToSpeak, UtteranceError
from engines.gpt_sovits.package import undisturbed

_ENGLISH = "g2p/en/"
_TAGGER = f"{_ENGLISH}nltk/taggers/averaged_perceptron_tagger_eng/averaged_perceptron_tagger_eng"
NAMES = f"{_ENGLISH}namedict.json"
#: Files of each language under the model folder. What Japanese needs comes with pyopenjtalk.
FILES: dict[str, tuple[str, ...]] = {
    "en": (
        *(f"{_ENGLISH}{name}" for name in ("cmudict.rep", "cmudict-fast.rep", "engdict-hot.rep")),
        *(f"{_ENGLISH}g2p_en/{name}" for name in ("homographs.en", "checkpoint20.npz")),
        *(f"{_TAGGER}.{part}.json" for part in ("weights", "tagdict", "classes")),
    ),
    "zh": ("g2p/zh/opencpop-strict.txt",),
    "ja": (),
}
BERT = "chinese-roberta-wwm-ext-large"
BERT_FILES = tuple(f"{BERT}/{name}" for name in ("config.json", "tokenizer.json", "model.safetensors"))
#: What has to be in a text for it to be speakable; other letters are left out by the front end.
_SPEAKABLE = {
    "en": re.compile(r"[A-Za-z0-9]"),
    "zh": re.compile(r"[A-Za-z0-9\u4e00-\u9fff]"),
    "ja": re.compile(r"[A-Za-z0-9\u3040-\u30ff\u4e00-\u9fff\uff66-\uff9d]"),
}
#: Width of the features of ``BERT``, which are 0 for other languages and without it.
_BERT_WIDTH = 1024
#: The dictionaries and their analysers are global in the package, and not for several threads.
_FRONT_END = threading.Lock()


@dataclass(frozen=True, slots=True)
class _FrontEndConfig:
    """What ``get_phones_and_bert`` reads of gsv-tts-lite's ``Config``."""

    cnroberta: Any
    device: torch.device
    dtype: torch.dtype = torch.float32


class Phones(NamedTuple):
    """``ids`` [n] and what BERT says of each, float32 [n, 1024], or None if that is 0."""

    ids: list[int]
    bert: Tensor | None

    @property
    def features(self) -> Tensor:
        """``bert``, zeros if there is none."""
        return torch.zeros(len(self.ids), _BERT_WIDTH) if self.bert is None else self.bert


class TextFrontEnd:
    """Reads texts. Safe for any number of threads."""

    def __init__(self, folder: Path, languages: Sequence[str], *, bert: bool) -> None:
        """``prepare_package`` was called. Raises ``ModelCorrupt``, naming the file."""
        self.languages = tuple(languages)
        with _FRONT_END, undisturbed():
            from gsv_tts.Config import Config, global_config
            from gsv_tts.GPT_SoVITS.Featurizer import CNRoberta
            from gsv_tts.GPT_SoVITS.G2P import Symbols
            from gsv_tts.TextProcessor import get_phones_and_bert

            self._global, self._read = global_config, get_phones_and_bert
            self._pauses = {
                number for number, symbol in enumerate(Symbols.symbols) if symbol in Symbols.punctuation
            }
            self._analysers = {
                f"{name}_g2p": _analyser(language, folder) if language in languages else None
                for language, name in (("en", "english"), ("zh", "chinese"), ("ja", "japanese"))
            }
            reader = None
            if bert:
                config = Config()
                config.device, config.dtype = torch.device("cpu"), torch.float32
                reader = CNRoberta(folder / BERT, config)
            self._config = _FrontEndConfig(reader, torch.device("cpu"))
        for language in languages:
            # Everything that is set up at first use, so that no request waits for it.
            try:
                with undisturbed():
                    self.phones({"en": "a", "zh": "一", "ja": "あ"}[language], language)
            except (UtteranceError, ModelError) as error:
                raise ModelCorrupt(
                    f"The text data in {folder / 'g2p'} cannot be used for '{language}': {error.message}",
                    next_step="Get it again (docs/gpt_sovits.md), or take the language out of `languages`.",
                ) from error

    def phones(self, text: str, language: str) -> Phones:
        """Phones of ``text``, which ends with a pause: without one the model runs on.

        ``language`` is one of ``languages`` or ``auto``. Raises ``NothingToSpeak``, or ``UtteranceError`` for
        a text the front end cannot read.
        """
        text = text.strip()
        speakable = _SPEAKABLE.get(language)
        if speakable is not None and not speakable.search(text):
            raise NothingToSpeak(
                f"The text has no letter or digit of '{language}'.",
                next_step="Send text with letters or digits, in the language the request names.",
            )
        if not text.endswith(
            ("!", "！", "?", "？", "…", "~", ".", "。", ",", "，", ":", "：", ";", "；", "、", "・")
        ):
            text += "."
        try:
            with _FRONT_END:
                for name, analyser in self._analysers.items():
                    setattr(self._global, name, analyser)
                ids, _, bert, _ = self._read(text, self._config, language)
        # It has no errors of its own: what it cannot read is an IndexError, a KeyError or a failed assert.
        except Exception as error:
            raise UtteranceError(
                f"The text cannot be read as '{language}': {type(error).__name__} {error}".strip(),
                next_step="Write it with plain words and numbers, in the language the request names.",
            ) from error
        if all(phone in self._pauses for phone in ids):
            raise NothingToSpeak(
                f"Nothing in the text can be pronounced in '{language}'.",
                next_step="Send text with letters or digits, in the language the request names.",
            )
        return Phones(list(ids), bert if self._config.cnroberta is not None else None)


def _analyser(language: str, folder: Path) -> Any:
    """The package's analyser of ``language``."""
    try:
        if language == "zh":
            from gsv_tts.GPT_SoVITS.G2P.Chinese import ChineseG2P

            return ChineseG2P(folder)
        if language == "ja":
            from gsv_tts.GPT_SoVITS.G2P.Japanese import japanese

            # Its own asks sys.stderr for a descriptor, which in a notebook has none.
            japanese.suppress_c_stderr = _silent_descriptor
            return japanese.JapaneseG2P()
        return _english(folder)
    # A damaged file may fail in any way.
    except Exception as error:
        raise ModelCorrupt(
            f"The text data for '{language}' in {folder / 'g2p'} cannot be read: {error!r}.",
            next_step="Get it again (docs/gpt_sovits.md), or take the language out of `languages`.",
        ) from error


@contextmanager
def _silent_descriptor() -> Iterator[None]:
    """Inside, what libraries in C write to the standard error is lost."""
    nothing, kept = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _english(folder: Path) -> Any:
    from gsv_tts.GPT_SoVITS.G2P.English import EnglishG2P

    class English(EnglishG2P):  # type: ignore[misc]
        """Without the pickles: the package's own reads two, and writes one into the model folder."""

        def get_dict(self) -> dict[str, list[list[str]]]:
            merged: dict[str, list[list[str]]] = self.hot_reload_hot(self.read_dict_new())
            return merged

        def get_namedict(self) -> dict[str, list[list[str]]]:
            names = folder / NAMES
            if not names.is_file():
                return {}
            read: dict[str, list[list[str]]] = json.loads(names.read_text(encoding="utf-8"))
            return read

    return English(folder)
