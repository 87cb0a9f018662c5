"""From latents to samples, a window at a time, with no seam between windows.

The HiFi-GAN of XTTS hears ``CONTEXT_FRAMES`` on each side of a frame. A window is run over its frames and
that much around them, and only its own samples are kept: what is streamed is what one run over the whole
utterance gives. Before it, latents are stretched twice by linear interpolation (to 256 samples of 22.05 kHz a
frame, then to as many of 24 kHz), and first of all by ``1 / speed``; all on the grid of the whole utterance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Receptive field of the HiFi-GAN, whose layers coqui-tts fixes: 12.2 frames on each side.
CONTEXT_FRAMES = 13
#: Samples of a frame.
FRAME_SAMPLES = 256
#: coqui-tts's lower bound of speed.
_MIN_SPEED = 0.05


@dataclass(frozen=True, slots=True)
class Window:
    """Frames ``first`` to ``last`` of an utterance, and their input with context around them."""

    first: int
    last: int
    #: Frames of context before ``first``.
    before: int
    #: [width, frames]
    features: Tensor


class Stretch:
    """Linear interpolations one after the other, as ``torch.nn.functional.interpolate(scale_factor=...)``."""

    def __init__(self, factors: Sequence[float]) -> None:
        self._factors = tuple(factors)

    def length(self, inputs: int) -> int:
        """Outputs of a whole sequence of ``inputs``."""
        return self._lengths(inputs)[-1]

    def settled(self, inputs: int) -> int:
        """Outputs that stay as they are when more than ``inputs`` follow."""
        for factor in self._factors:
            inputs = max(0, math.floor((inputs - 0.5) * factor - 0.5))
        return inputs

    def between(self, values: Tensor, first: int, last: int) -> Tensor:
        """Outputs ``first`` to ``last`` of ``values`` [n, width]: [last - first, width]."""
        lengths = self._lengths(len(values))[:-1]
        spans = [(first, last)]
        for factor, length in zip(reversed(self._factors), reversed(lengths), strict=True):
            start, stop = spans[-1]
            # One more on each side: float32 below may round the other way.
            low = math.floor((start + 0.5) / factor - 0.5) - 1
            high = math.floor((stop - 0.5) / factor - 0.5) + 3
            spans.append((min(max(0, low), length - 1), min(high, length)))
        offset, stop = spans.pop()
        block = values[offset:stop]
        for factor, length in zip(self._factors, lengths, strict=True):
            start, stop = spans.pop()
            place = torch.arange(start, stop, device=block.device, dtype=torch.float32)
            # float32 and this order of operations, as torch has it.
            source = ((place + 0.5) * (1.0 / factor) - 0.5).clamp(min=0)
            left = source.long()
            right = (left + 1).clamp(max=length - 1)
            share = (source - left)[:, None]
            block = block[left - offset] * (1 - share) + block[right - offset] * share
            offset = start
        return block

    def _lengths(self, inputs: int) -> list[int]:
        lengths = [inputs]
        for factor in self._factors:
            lengths.append(math.floor(lengths[-1] * factor))
        return lengths


class Vocoder:
    """The HiFi-GAN of a loaded model."""

    def __init__(self, hifigan_decoder: Any, kind: torch.dtype = torch.float32) -> None:
        """``hifigan_decoder``: coqui-tts's ``HifiDecoder`` with weight norm folded, on its device.

        ``kind``: type of its arithmetic. Latents are stretched in float32 all the same; samples are float32.
        """
        self._network = hifigan_decoder.waveform_decoder.to(kind)
        self._type = kind
        self._factors = (
            hifigan_decoder.ar_mel_length_compression / hifigan_decoder.output_hop_length,
            hifigan_decoder.output_sample_rate / hifigan_decoder.input_sample_rate,
        )

    def stretch(self, speed: float) -> Stretch:
        """The interpolations for speech at ``speed``."""
        scale = 1.0 / max(speed, _MIN_SPEED)
        return Stretch(self._factors if scale == 1.0 else (scale, *self._factors))

    @staticmethod
    def window(stretch: Stretch, latents: Tensor, done: int, ended: bool) -> Window | None:
        """The frames after the first ``done`` that ``latents`` [n, width] determine, or None if none."""
        known = stretch.length(len(latents)) if ended else stretch.settled(len(latents))
        last = known if ended else known - CONTEXT_FRAMES
        if last <= done:
            return None
        start = max(0, done - CONTEXT_FRAMES)
        features = stretch.between(latents, start, min(known, last + CONTEXT_FRAMES))
        return Window(done, last, done - start, features.t())

    def samples(self, windows: Sequence[Window], embeddings: Sequence[Tensor]) -> list[Tensor]:
        """Samples [frames * 256] of each of ``windows``, which are of equal size, in the voices [512]."""
        features = torch.stack([window.features for window in windows]).to(self._type)
        voices = torch.stack(list(embeddings))[:, :, None].to(self._type)
        waves = self._network(features, g=voices)[:, 0].float()
        return [
            wave[window.before * FRAME_SAMPLES : (window.before + window.last - window.first) * FRAME_SAMPLES]
            for window, wave in zip(windows, waves, strict=True)
        ]
