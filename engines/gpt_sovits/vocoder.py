"""From semantic tokens to samples, a window at a time, with a state for every utterance.

The arithmetic is that of gsv-tts-lite's ``SynthesizerTrn.decode`` and ``TTS.infer_stream``: the encoder
hears all tokens so far, the flow and the HiFi-GAN only new frames and the ``OVERLAP_FRAMES`` before.
Neighbouring windows are faded into each other twice there, as encoder states and as samples, where the
waveforms fit best (SOLA). The package keeps the encoder states of the last window in the model, where an
abandoned stream leaves them to the next one; here every utterance has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

#: Frames (20 ms) that a window shares with the one before.
OVERLAP_FRAMES = 5
FRAMES_PER_TOKEN = 2
#: How far, in samples, the best fit is looked for: half a frame.
_SEARCH_SAMPLES = 320
#: Spread of the noise the latents are drawn with; upstream's.
_NOISE_SCALE = 0.5


@dataclass(slots=True)
class Voicing:
    """An utterance on its way through SoVITS."""

    #: Encoded text [1, channels, n] and its mask, and the colour [1, width, 1] as decoder and encoder want
    #: it.
    text: Tensor
    text_mask: Tensor
    colour: Tensor
    encoder_colour: Tensor
    speed: float
    generator: torch.Generator
    #: Encoder states and samples of the last window that go into the next, and its first frame.
    states: Tensor | None = None
    samples: Tensor | None = None
    first_frame: int = 0


class Vocoder:
    """SoVITS of a loaded model. One thread at a time."""

    def __init__(self, sovits: Any, device: torch.device) -> None:
        """``sovits``: gsv-tts-lite's ``SynthesizerTrn`` on ``device``, weight norm folded."""
        self._sovits, self._encoder, self._device = sovits, sovits.enc_p, device
        self._samples_per_frame: int = sovits.samples_per_frame

    def begin(self, phones: list[int], colour: Tensor, speed: float, generator: torch.Generator) -> Voicing:
        """An utterance of ``phones`` in the ``colour`` [1, width, 1] of its voice."""
        encoder = self._encoder
        text = encoder.text_embedding(torch.tensor(phones, device=self._device)[None]).transpose(1, 2)
        mask = torch.ones(1, 1, len(phones), device=self._device)
        text = encoder.encoder_text(text * mask, mask)
        encoder_colour = colour
        if self._sovits.is_v2pro:
            encoder_colour = self._sovits.ge_to512(colour.transpose(2, 1)).transpose(2, 1)
        return Voicing(text, mask, colour, encoder_colour, speed, generator)

    def window(self, voicing: Voicing, tokens: list[int], *, last: bool) -> Tensor:
        """Samples [n] that follow those of the windows before; ``tokens`` are all of the utterance so far."""
        states, mask = self._encoded(voicing, tokens)
        overlap = max(1, round(OVERLAP_FRAMES / voicing.speed)) * self._samples_per_frame
        if voicing.speed != 1:
            states = functional.interpolate(
                states, size=int(states.shape[-1] / voicing.speed) + 1, mode="linear"
            )
            mask = torch.ones(1, 1, states.shape[-1], device=self._device)
        sound = self._sound(voicing, states, mask)
        if voicing.samples is not None:
            sound = _joined(voicing.samples, sound, overlap)
        voicing.samples = sound[-overlap:].clone()
        return sound if last else sound[:-overlap]

    def _encoded(self, voicing: Voicing, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Encoder states [1, channels, frames] of the frames from the overlap on, and their mask."""
        encoder = self._encoder
        codes = torch.tensor(tokens, device=self._device)[None, None]
        content = functional.interpolate(
            self._sovits.quantizer.decode(codes), size=len(tokens) * FRAMES_PER_TOKEN, mode="nearest"
        )
        mask = torch.ones(1, 1, content.shape[-1], device=self._device)
        states = encoder.encoder_ssl(encoder.ssl_proj(content), mask)
        states = encoder.mrte(states, mask, voicing.text, voicing.text_mask, voicing.encoder_colour)
        states = encoder.encoder2(states * mask, mask)[..., voicing.first_frame :]
        if voicing.states is not None:
            rise = torch.linspace(0, 1, OVERLAP_FRAMES, device=self._device)
            shared = voicing.states * (1 - rise) + states[..., :OVERLAP_FRAMES] * rise
            states = torch.cat([shared, states[..., OVERLAP_FRAMES:]], -1)
        voicing.states = states[..., -OVERLAP_FRAMES:]
        voicing.first_frame = content.shape[-1] - OVERLAP_FRAMES
        return states, mask[..., : states.shape[-1]]

    def _sound(self, voicing: Voicing, states: Tensor, mask: Tensor) -> Tensor:
        """Samples [frames * samples per frame]."""
        mean, spread = torch.split(self._encoder.proj(states) * mask, self._encoder.out_channels, dim=1)
        noise = torch.randn(mean.shape, generator=voicing.generator).to(self._device)
        latents = mean + noise * torch.exp(spread) * _NOISE_SCALE
        sound: Tensor = self._sovits.flow_dec(latents, mask, voicing.colour)
        return sound[0, 0]


def noise_seed(seed: int) -> int:
    """What the noise of an utterance begins with, far from the ``seed`` of any other."""
    return (seed * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407) % 2**63


def _joined(before: Tensor, after: Tensor, overlap: int) -> Tensor:
    """``after`` from where it fits best to ``before`` [overlap], and faded into it (SOLA)."""
    searched = after[None, None, : overlap + _SEARCH_SAMPLES]
    likeness = functional.conv1d(searched, before[None, None])
    energy = functional.conv1d(searched**2, torch.ones(1, 1, overlap, device=after.device)) + 1e-8
    after = after[int((likeness / torch.sqrt(energy)).argmax()) :]
    rise = torch.linspace(0, 1, overlap, device=after.device)
    return torch.cat([before * (1 - rise) + after[:overlap] * rise, after[overlap:]])
