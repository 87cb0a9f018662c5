"""The door to the OpenVoice engine: the contract of ``engines.contract`` over the modules beside this file.

torch is imported by ``load``: the class alone is enough to read a configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from engines.contract import (
    Chunk,
    Conditioning,
    Engine,
    EngineCard,
    EngineConfig,
    ModelError,
    Reference,
    UnsupportedOption,
    Utterance,
)
from engines.coqui import prepare_coqui
from engines.openvoice.settings import OpenVoiceConfig
from engines.weights import weights_dir

if TYPE_CHECKING:
    from engines.openvoice.speech import OpenVoiceSpeech

NAME = "openvoice"
#: The converter's rate; ``checkpoint`` refuses weights with another.
_SAMPLE_RATE_HZ = 22_050
_DEFAULT_TAU = 0.3


class OpenVoiceEngine(Engine):
    """OpenVoice v2: what the base voice says, in the tone colour of the enrolled speaker."""

    card: ClassVar[EngineCard] = EngineCard(
        name=NAME,
        summary="OpenVoice v2: a base voice speaks, its tone colour becomes the enrolled speaker's.",
        languages=("en",),
        languages_hint="Base voices add languages: pip install 'voice-clone-tts[piper]' (GPL) and name Piper "
        "voices, or VITS models of coqui-tts, in engines.openvoice.config.base_voices (docs/openvoice.md).",
        sample_rate_hz=_SAMPLE_RATE_HZ,
        max_utterance_chars={"*": 400},
        streams=True,
        needs_transcript=False,
        code_licence="MPL-2.0",
        weights_licence="MIT",
        hardware="1 GPU, or 2 CPU cores; 131 MB of weights",
        min_reference_s=1.5,
        max_reference_s=30.0,
        options=("tau",),
    )
    Config: ClassVar[type[EngineConfig]] = OpenVoiceConfig

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._settings = (
            config if isinstance(config, OpenVoiceConfig) else OpenVoiceConfig(**config.model_dump())
        )
        self._loaded: OpenVoiceSpeech | None = None

    @property
    def weights_fingerprint(self) -> str:
        """Hash of the converter's two files and of the algorithm's version."""
        return self._require_loaded().fingerprint

    @property
    def languages(self) -> tuple[str, ...]:
        """Whatever the configured base voices speak."""
        return self._require_loaded().base_voices.languages

    def load(self) -> None:
        """Read the converter, load the base voices, know their colours, and speak once."""
        prepare_coqui(NAME)
        from engines.openvoice.speech import OpenVoiceSpeech

        self._loaded = OpenVoiceSpeech.load(
            self._settings, self.card, self._settings.model_dir or weights_dir(NAME)
        )

    def unload(self) -> None:
        """Forget the weights and close the base voices."""
        if self._loaded is not None:
            self._loaded.base_voices.close()
        self._loaded = None

    def extract_voice(self, reference: Reference) -> Conditioning:
        """Tone colour [256] and median pitch of ``reference``. Raises ``ReferenceUnusable``."""
        voice = self._require_loaded().enrol(
            reference, min_speech_s=self.card.min_reference_s, max_speech_s=self.card.max_reference_s
        )
        return Conditioning(self.card.name, self.weights_fingerprint, voice.to_arrays())

    def synthesize(self, batch: Sequence[Utterance]) -> Iterator[Chunk]:
        """Speak ``batch``: the next window of each utterance in turn, or of several in one pass on a GPU."""
        return self._require_loaded().speak(batch, self._checked_tau)

    def _checked_tau(self, utterance: Utterance) -> float:
        """The utterance's tau, after everything else about it was checked."""
        self.check_utterance(utterance)
        tau = utterance.options.get("tau", _DEFAULT_TAU)
        if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 <= tau <= 1:
            raise UnsupportedOption("'tau' is a number from 0 to 1.", next_step="Leave it out for 0.3.")
        return float(tau)

    def _require_loaded(self) -> OpenVoiceSpeech:
        if self._loaded is None:
            raise ModelError("The OpenVoice engine is not loaded.", next_step="Call load() first.")
        return self._loaded
