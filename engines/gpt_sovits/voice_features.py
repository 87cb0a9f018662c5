"""What the model needs of a voice: its reference as semantic tokens, their phones, and the speaker's colour.

Computed as gsv-tts-lite does (``TTS._get_prompt``, ``TTS._get_spec``, ``TTS.cache_spk_audio``), from the
samples of a conditioning, once for each voice: what a voice is, and not how a file is called, is the key.
The least lately used are forgotten.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torchaudio
from torch import Tensor

from engines.contract import UtteranceError
from engines.gpt_sovits.checkpoint import Checkpoint
from engines.gpt_sovits.text import Phones, TextFrontEnd
from engines.gpt_sovits.voice import RATE_HZ, Voice

_HEARD_RATE_HZ = 16_000
#: Silence after the reference, so that its last sound is not at an edge.
_SILENCE_S = 0.3
#: Magnitudes the speaker's colour is computed from.
_SPECTRUM_BINS = 704
#: Languages of a transcript that the text front end works out by itself.
_UNKNOWN = ("", "auto", "und")


class VoiceFeatures(NamedTuple):
    """``tokens`` [n] of the reference and its ``phones``, both empty without a transcript the model reads.

    ``colour``: [1, width, 1].
    """

    tokens: Tensor
    phones: Phones
    colour: Tensor


class VoiceReader:
    """Computes the features of voices and keeps ``most`` of them. Safe for any number of threads."""

    def __init__(
        self, checkpoint: Checkpoint, text: TextFrontEnd, device: torch.device, *, most: int
    ) -> None:
        """The modules of ``checkpoint`` are on ``device``."""
        self._checkpoint, self._text, self._device, self._most = checkpoint, text, device, most
        self._kept: OrderedDict[bytes, VoiceFeatures] = OrderedDict()
        self._lock = threading.Lock()
        self._resample = torchaudio.transforms.Resample(RATE_HZ, _HEARD_RATE_HZ).to(device)
        audio: Mapping[str, Any] = checkpoint.audio
        self._spectrum = torchaudio.transforms.Spectrogram(
            n_fft=audio["filter_length"],
            win_length=audio["win_length"],
            hop_length=audio["hop_length"],
            power=1.0,
        ).to(device)

    def __len__(self) -> int:
        return len(self._kept)

    def features(self, voice: Voice) -> VoiceFeatures:
        """Of ``voice``, from memory or computed now. One is computed at a time."""
        key = _content_hash(voice)
        with self._lock:
            known = self._kept.pop(key, None)
            if known is None:
                known = self._compute(voice)
            self._kept[key] = known
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return known

    @torch.inference_mode()
    def _compute(self, voice: Voice) -> VoiceFeatures:
        samples = torch.from_numpy(voice.samples.copy())[None].to(self._device)
        heard = self._resample(samples)
        phones = self._phones(voice)
        tokens = self._tokens(heard) if phones.ids else torch.zeros(0, dtype=torch.long)
        return VoiceFeatures(tokens, phones, self._colour(samples, heard))

    def _phones(self, voice: Voice) -> Phones:
        """Of the transcript; none if it is in a language that is not read here, which would lead astray."""
        language = "auto" if voice.language in _UNKNOWN else voice.language
        if not voice.transcript or language not in (*self._text.languages, "auto"):
            return Phones([], None)
        try:
            return self._text.phones(voice.transcript, language)
        except UtteranceError:
            # A transcript of nothing but "♪" says as much as none.
            return Phones([], None)

    def _tokens(self, heard: Tensor) -> Tensor:
        silence = torch.zeros(1, int(_HEARD_RATE_HZ * _SILENCE_S), device=self._device)
        hidden = self._checkpoint.hubert(torch.cat([heard, silence], 1))["last_hidden_state"]
        codes: Tensor = self._checkpoint.sovits.extract_latent(hidden.transpose(1, 2))
        return codes[0, 0].cpu()

    def _colour(self, samples: Tensor, heard: Tensor) -> Tensor:
        spectrum = self._spectrum(samples)
        encoder, embedding = self._checkpoint.speaker_encoder, None
        if encoder is not None:
            bands = torchaudio.compliance.kaldi.fbank(
                heard.cpu(), num_mel_bins=80, sample_frequency=_HEARD_RATE_HZ, dither=0
            )
            embedding = encoder.forward3(bands[None].to(self._device))
        colour: Tensor = self._checkpoint.sovits.get_ge(spectrum[:, :_SPECTRUM_BINS], embedding)
        return colour


def _content_hash(voice: Voice) -> bytes:
    digest = hashlib.sha256(voice.samples.tobytes())
    digest.update(f"\0{voice.language}\0{voice.transcript}".encode())
    return digest.digest()
