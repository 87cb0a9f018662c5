"""Whisper, through faster-whisper: from a recording to words with times and probabilities. Knows no Ray."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import soxr
from pydantic import BaseModel, ConfigDict, Field, field_validator

from engines.contract import ModelCorrupt, ModelMissing, Samples
from serve_app.errors import LanguageNeeded, NoSpeechDetected, UnsupportedLanguage
from serve_app.transcripts.transcript import HeardWord, Hearing

logger = logging.getLogger(__name__)

_RATE_HZ = 16_000
#: Greedy decoding writes "1-2-345" where five beams write the words, and digits spoil the way to sounds.
_BEAMS = 5
#: Languages that Whisper knows by another subtag.
_WHISPER_SUBTAGS = {"nb": "no", "iw": "he", "jv": "jw", "fil": "tl", "cmn": "zh"}
_BCP47_SUBTAGS = {"jw": "jv"}


class RecogniserConfig(BaseModel):
    """Which Whisper, and what it runs on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        description="Absolute folder of a Whisper model as faster-whisper reads it: "
        "`model.bin`, `config.json`, `tokenizer.json`, a vocabulary. Nothing is downloaded."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto takes a GPU if there is one."
    )
    compute_type: str = Field(
        default="default",
        pattern="^(default|int8|int8_float16|int8_float32|int8_bfloat16|float16|bfloat16|float32)$",
        description="Arithmetic of CTranslate2; default is int8 on a CPU and float16 on a GPU.",
    )
    threads: int = Field(default=1, ge=1, le=64, description="CPU threads.")

    @field_validator("model")
    @classmethod
    def _absolute(cls, model: str) -> str:
        # A relative folder would be another one on every worker, and a bare name would be downloaded.
        if Path(model).expanduser().is_absolute():
            return model
        raise ValueError("must be an absolute path or a path starting with ~")


class Recogniser:
    """One Whisper model. ``load`` first; one call of ``hear`` at a time."""

    def __init__(self, config: RecogniserConfig) -> None:
        """Cheap: no model is touched."""
        self._config = config
        self._whisper: Any = None

    def load(self) -> None:
        """Read the model. Raises ``ModelMissing`` or ``ModelCorrupt``."""
        try:
            import ctranslate2
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise ModelMissing(
                f"Whisper cannot be imported ({error}).",
                next_step="Where the transcriber runs: pip install 'voice-clone-tts[whisper]'.",
            ) from error
        folder = Path(self._config.model).expanduser()
        if not (folder / "model.bin").is_file():
            raise ModelMissing(
                f"There is no Whisper model in {folder}: no model.bin.",
                next_step="Set `transcriber.model` to the folder of one, as docs/transcripts.md says.",
            )
        device = self._config.device
        if device == "auto":
            device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
        compute_type = self._config.compute_type
        if compute_type == "default":
            compute_type = "int8" if device == "cpu" else "float16"
        try:
            self._whisper = WhisperModel(
                str(folder),
                device=device,
                compute_type=compute_type,
                cpu_threads=self._config.threads,
                num_workers=1,
                local_files_only=True,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelCorrupt(
                f"The Whisper model in {folder} cannot be loaded: {error}.",
                next_step="Fetch it again, or choose another `device` or `compute_type`.",
            ) from error

    @property
    def languages(self) -> tuple[str, ...]:
        """What it understands, BCP-47. Only a model with more than one can tell the language itself."""
        return tuple(_BCP47_SUBTAGS.get(code, code) for code in self._whisper.supported_languages)

    def hear(self, samples: Samples, sample_rate_hz: int, language: str = "") -> Hearing:
        """What is said in ``samples``, mono float32 [n]. ``language`` is BCP-47, empty to find it out.

        Raises ``LanguageNeeded`` if it is empty and the model knows one language only,
        ``UnsupportedLanguage``, and ``NoSpeechDetected`` if no word is heard.
        """
        code = self._code(language)
        segments, facts = self._whisper.transcribe(
            soxr.resample(samples, sample_rate_hz, _RATE_HZ),
            language=code,
            beam_size=_BEAMS,
            # Without higher temperatures to fall back to, the same recording gives the same words.
            temperature=0.0,
            # Of a recording that is mostly pause Whisper invents words.
            vad_filter=True,
            word_timestamps=True,
            condition_on_previous_text=False,
        )
        heard = [word for segment in segments for word in segment.words or ()]
        words = [
            HeardWord(
                text=word.word if index else word.word.lstrip(),
                start_s=max(0.0, float(word.start)),
                end_s=max(0.0, float(word.end)),
                probability=min(1.0, max(0.0, float(word.probability))),
            )
            for index, word in enumerate(heard)
        ]
        if not any(char.isalnum() for word in words for char in word.text):
            raise NoSpeechDetected(
                "No words can be heard in the recording. "
                "Send what is said as its transcript, or record it again.",
                param="transcript",
            )
        return Hearing(language=_BCP47_SUBTAGS.get(facts.language, facts.language), words=tuple(words))

    def _code(self, language: str) -> str | None:
        """Whisper's name of ``language``; None lets a multilingual model find it out."""
        known = self.languages
        if not language:
            if len(known) > 1:
                return None
            # It would report English whatever is spoken, and invent English words for it.
            raise LanguageNeeded(
                f"The transcriber knows {known[0]} only and cannot tell whether that is spoken. "
                f"Send the language of the recording (language={known[0]}), or its transcript.",
                param="language",
            )
        subtag = language.replace("_", "-").split("-")[0].lower()
        code = _WHISPER_SUBTAGS.get(subtag, subtag)
        if code not in self._whisper.supported_languages:
            raise UnsupportedLanguage(
                f"The transcriber does not know '{subtag[:20]}'. "
                "Send the transcript of the recording instead. "
                f"It knows: {', '.join(known)}.",
                param="language",
            )
        return code
