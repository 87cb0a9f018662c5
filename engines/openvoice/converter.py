"""The tone-colour converter: speech of one voice in, the same speech in the colour of another voice out.

Paper: Qin et al., "OpenVoice: Versatile Instant Voice Cloning" (arXiv 2312.01479). The layers are those of
coqui-tts's port; what is new here is the order in which they run. Speech passes two stages:

1. *latents*, one vector for each spectral frame (11.6 ms): the posterior encoder and the flow, forward with
   the colour of the source and backward with that of the target. 7 % of the arithmetic.
2. *samples*: the HiFi-GAN decoder, 256 samples from each latent vector. 93 % of the arithmetic.

No layer looks further than its kernel, so both stages can run in windows that overlap by what the layers
can see: 96 and 14 frames to each side in the published model. Then windows are not an approximation: they
give the samples of the whole up to the rounding of float32 (docs/openvoice.md has the measurement). Between
the layers of the decoder, each of which sees less than those before it, the overlap is cut down to what is
still needed; at its full rate only 63 samples of it are left.

Rows of a batch may be of different length and voice. Padding is masked in every layer, so a row comes out as
it does alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from TTS.utils.audio.torch_transforms import wav_to_spec
from TTS.vc.models.openvoice import OpenVoice

from engines.contract import Samples

#: Decoder windows of a stream, in frames; the last one repeats. A listener waits for the first: 0.28 s of
#: sound. Each costs as much as 6 frames more than its own.
STREAM_WINDOWS = (24, 96, 384)
#: And of what follows while the listener hears the first sentence.
LATER_WINDOWS = (192, 384)
#: Latents computed at a time once the first window has its own.
_LATENT_BLOCK = 480
_LEAKY_SLOPE = 0.1


@dataclass(slots=True)
class Conversion:
    """One sentence on its way through the converter.

    ``spectrum`` [bins, frames] of the source speech; ``noise`` [channels, frames], what the posterior is
    drawn with, by frame, so that it does not matter in which windows the sentence runs; ``source`` and
    ``target`` tone colours [colours]; ``tau``, 0 and up, scales the noise. ``windows``: frames decoded at a
    time.
    """

    spectrum: torch.Tensor
    noise: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    tau: float
    windows: tuple[int, ...] = STREAM_WINDOWS
    #: Frames decoded, and latents [channels, known] as far as they are computed.
    done: int = 0
    latents: list[torch.Tensor] = field(default_factory=list)
    known: int = 0
    _steps: int = 0

    @property
    def frames(self) -> int:
        """Length of the sentence."""
        return self.spectrum.shape[1]

    @property
    def finished(self) -> bool:
        """True once every frame is decoded."""
        return self.done >= self.frames

    @property
    def next_stop(self) -> int:
        """Where the next window ends; a rest of less than half a window is taken along."""
        window = self.windows[min(self._steps, len(self.windows) - 1)]
        stop = self.done + window
        return self.frames if self.frames - stop < window // 2 else stop

    def advance(self) -> None:
        """The next window is decoded."""
        self.done, self._steps = self.next_stop, self._steps + 1


@dataclass(frozen=True, slots=True)
class _Stage:
    """An upsampling stage of the decoder: its rate, and inputs and outputs needed beyond what is wanted."""

    factor: int
    inputs: int
    outputs: int


class Converter:
    """A loaded model. Not for two threads at once, except ``tone_colour``."""

    def __init__(self, model: OpenVoice, device: torch.device, dtype: torch.dtype) -> None:
        self._model = model.to(device)
        self._device, self._dtype = device, dtype
        _lay_out(model.dec)
        for part in (model.enc_q, model.flow, model.dec):
            part.to(dtype)
        audio = model.config.audio
        self.sample_rate_hz = int(audio.output_sample_rate)
        self.hop = int(audio.hop_length)
        #: Shorter sounds have no spectrum: their ends could not be mirrored.
        self.fewest_samples = (int(audio.fft_size) - self.hop) // 2 + 1
        self.latent_channels = int(model.inter_channels)
        self._stages = _stages(model.dec)
        #: Frames to each side that reach a latent vector, and latent vectors that reach a sample.
        couplings: list[Any] = [layer for layer in model.flow.flows if hasattr(layer, "enc")]
        self.latent_reach = _wavenet_reach(model.enc_q.enc) + 2 * sum(
            _wavenet_reach(coupling.enc) for coupling in couplings
        )
        self.decoder_reach = self._stages[0].inputs + _reach(model.dec.conv_pre)

    def spectrum(self, samples: Samples) -> torch.Tensor:
        """Magnitudes [bins, frames] of ``samples`` [n], a frame for each ``hop``; n >= ``fewest_samples``."""
        audio = self._model.config.audio
        signal = torch.from_numpy(np.ascontiguousarray(samples, np.float32)).to(self._device)
        with torch.inference_mode():
            spectrum: torch.Tensor = wav_to_spec(
                signal[None, None],
                n_fft=audio.fft_size,
                hop_length=audio.hop_length,
                win_length=audio.win_length,
                center=False,
            )[0]
        return spectrum

    def tone_colour(self, pieces: Sequence[Samples]) -> NDArray[np.float32]:
        """Mean tone colour [colours] of ``pieces`` of one voice, each at least ``fewest_samples`` long."""
        with torch.inference_mode():
            colours = [self._model.ref_enc(self.spectrum(piece).T[None])[0] for piece in pieces]
            mean: NDArray[np.float32] = torch.stack(colours).mean(dim=0).float().cpu().numpy()
        return mean

    def begin(
        self,
        samples: Samples,
        source: NDArray[np.float32],
        target: NDArray[np.float32],
        *,
        tau: float,
        seed: Sequence[int],
        faster: float = 1.0,
        windows: tuple[int, ...] = STREAM_WINDOWS,
    ) -> Conversion:
        """Prepare the conversion of ``samples`` [n]; what is left of the last hop is dropped.

        ``seed`` fixes the noise of the posterior; with ``tau`` 0 there is none. ``faster`` changes the pace
        and not the pitch: the converter reads magnitudes only, so frames are interpolated in time.
        """
        spectrum = self.spectrum(samples)
        if faster != 1.0:
            frames = max(1, round(spectrum.shape[1] / faster))
            spectrum = functional.interpolate(spectrum[None], size=frames, mode="linear")[0]
        shape = (spectrum.shape[1], self.latent_channels)
        # Drawn by numpy: the same on every device.
        noise = (
            np.random.default_rng(list(seed)).standard_normal(shape, np.float32) if tau else np.zeros(shape)
        )
        return Conversion(
            spectrum.to(self._dtype),
            self._tensor(noise).T,
            self._tensor(source),
            self._tensor(target),
            tau,
            windows,
        )

    def step(self, rows: Sequence[Conversion]) -> list[Samples]:
        """The next samples of each of ``rows``, none of which is finished, in one pass of the model."""
        with torch.inference_mode():
            lacking = [row for row in rows if row.known < self._latents_needed(row)]
            if lacking:
                self._extend_latents(lacking)
            decoded = self._decode(rows)
        for row in rows:
            row.advance()
        return decoded

    def convert(self, rows: Sequence[Conversion]) -> list[Samples]:
        """All samples of each of ``rows``."""
        parts: list[list[Samples]] = [[] for _ in rows]
        while live := [index for index, row in enumerate(rows) if not row.finished]:
            for index, samples in zip(live, self.step([rows[index] for index in live]), strict=True):
                parts[index].append(samples)
        return [np.concatenate(part) for part in parts]

    def _tensor(self, array: NDArray[np.floating]) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array, np.float32)).to(self._device, self._dtype)

    def _latents_needed(self, row: Conversion) -> int:
        return min(row.next_stop + self.decoder_reach, row.frames)

    def _latent_stop(self, row: Conversion) -> int:
        """How far to compute the latents of ``row`` now: as far as the next window needs, and a block ahead.

        The first time only as far as needed, unless its overlap is already half of the sentence.
        """
        stop = max(self._latents_needed(row), row.known + _LATENT_BLOCK if row.known else 0)
        overlapping = stop + self.latent_reach
        return row.frames if overlapping >= (row.frames if row.known else row.frames // 2) else stop

    def _extend_latents(self, rows: Sequence[Conversion]) -> None:
        """Compute what the next windows of ``rows`` lack."""
        spans = [(row.known, self._latent_stop(row)) for row in rows]
        begins = [max(start - self.latent_reach, 0) for start, _ in spans]
        ends = [min(stop + self.latent_reach, row.frames) for row, (_, stop) in zip(rows, spans, strict=True)]
        lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
        longest = max(lengths)
        mask = self._mask(lengths, longest)
        if mask is None:
            mask = torch.ones(1, 1, 1, device=self._device, dtype=self._dtype)
        slices = list(zip(rows, begins, ends, strict=True))
        spectra = _padded([row.spectrum[:, begin:end] for row, begin, end in slices], longest)
        noise = _padded([row.noise[:, begin:end] * row.tau for row, begin, end in slices], longest)
        source = torch.stack([row.source for row in rows])[..., None]
        target = torch.stack([row.target for row in rows])[..., None]
        latents = self._latents(spectra, noise, source, target, mask)
        for index, (row, (start, stop)) in enumerate(zip(rows, spans, strict=True)):
            begin = begins[index]
            # Kept with what the next window looks back at, not from the beginning of the sentence.
            row.latents.append(latents[index, :, start - begin : stop - begin].clone())
            row.known = stop

    def _latents(
        self,
        spectra: torch.Tensor,
        noise: torch.Tensor,
        source: torch.Tensor,
        target: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """As ``OpenVoice.inference`` up to the decoder, the noise given: [rows, channels, frames]."""
        encoder, flow = self._model.enc_q, self._model.flow
        hidden = encoder.pre(spectra) * mask
        hidden = encoder.enc(hidden, mask, g=torch.zeros_like(source) if self._model.zero_g else source)
        mean, log_scale = (encoder.proj(hidden) * mask).chunk(2, dim=1)
        drawn = (mean + noise * torch.exp(log_scale)) * mask
        neutral = flow(drawn, mask, g=source)
        latents: torch.Tensor = flow(neutral, mask, g=target, reverse=True) * mask
        return latents

    def _decode(self, rows: Sequence[Conversion]) -> list[Samples]:
        """Samples of the next window of each row."""
        decoder = self._model.dec
        begins = [max(row.done - self.decoder_reach, 0) for row in rows]
        ends = [self._latents_needed(row) for row in rows]
        lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
        wanted = [row.next_stop - row.done for row in rows]
        window = _Window(
            torch.zeros(0),
            lengths,
            [row.done - begin for row, begin in zip(rows, begins, strict=True)],
            wanted,
        )
        pieces = [_known_latents(row, begin, end) for row, begin, end in zip(rows, begins, ends, strict=True)]
        latents = _padded(pieces, max(lengths))[:, :, None].contiguous(memory_format=torch.channels_last)
        window.signal = decoder.conv_pre(latents)
        target = torch.stack([row.target for row in rows])[..., None, None]
        window.signal = window.signal + decoder.cond(
            torch.zeros_like(target) if self._model.zero_g else target
        )
        window.cut(self._stages[0].inputs)
        kernels = decoder.num_kernels
        for index, stage in enumerate(self._stages):
            mask = self._mask(window.lengths, window.signal.shape[-1], dimensions=4)
            signal = functional.leaky_relu(window.signal, _LEAKY_SLOPE)
            window.signal = decoder.ups[index](signal if mask is None else signal * mask)
            window.upsampled(stage.factor)
            window.cut(stage.outputs)
            mask = self._mask(window.lengths, window.signal.shape[-1], dimensions=4)
            blocks = decoder.resblocks[index * kernels : (index + 1) * kernels]
            total = blocks[0](window.signal, mask)
            for block in blocks[1:]:
                total += block(window.signal, mask)
            window.signal = total / kernels
            window.cut(
                self._stages[index + 1].inputs if index + 1 < len(self._stages) else _reach(decoder.conv_post)
            )
        mask = self._mask(window.lengths, window.signal.shape[-1], dimensions=4)
        signal = functional.leaky_relu(window.signal)
        sound = torch.tanh(decoder.conv_post(signal if mask is None else signal * mask)).float().cpu().numpy()
        return [
            np.ascontiguousarray(sound[row, 0, 0, offset : offset + length])
            for row, (offset, length) in enumerate(zip(window.offsets, window.wanted, strict=True))
        ]

    def _mask(self, lengths: Sequence[int], longest: int, dimensions: int = 3) -> torch.Tensor | None:
        """[rows, 1, …, longest], 1 where a row has its own signal; None if all have it everywhere."""
        if all(length >= longest for length in lengths):
            return None
        positions = torch.arange(longest, device=self._device)
        own = positions[None] < torch.tensor(lengths, device=self._device)[:, None]
        return own.view(len(lengths), *[1] * (dimensions - 2), longest).to(self._dtype)


@dataclass(slots=True)
class _Window:
    """A signal [rows, channels, 1, length] inside the decoder, and where in it what is wanted lies."""

    signal: torch.Tensor
    #: Positions of each row that are its own; what follows is padding.
    lengths: list[int]
    offsets: list[int]
    wanted: list[int]

    def upsampled(self, factor: int) -> None:
        """``signal`` has become ``factor`` times as long."""
        self.lengths, self.offsets, self.wanted = (
            [factor * value for value in values] for values in (self.lengths, self.offsets, self.wanted)
        )

    def cut(self, context: int) -> None:
        """Drop what lies further than ``context`` from the wanted part of every row."""
        first = max(min(self.offsets) - context, 0)
        last = max(
            min(offset + wanted + context, length)
            for offset, wanted, length in zip(self.offsets, self.wanted, self.lengths, strict=True)
        )
        self.signal = self.signal[..., first:last]
        self.lengths = [min(length, last) - first for length in self.lengths]
        self.offsets = [offset - first for offset in self.offsets]


def _known_latents(row: Conversion, begin: int, end: int) -> torch.Tensor:
    """Latents [channels, end - begin] of ``row``; forgets those before ``begin``."""
    joined = row.latents[0] if len(row.latents) == 1 else torch.cat(row.latents, dim=1)
    joined = joined[:, joined.shape[1] - (row.known - begin) :]
    row.latents = [joined]
    return joined[:, : end - begin]


def _padded(pieces: Sequence[torch.Tensor], longest: int) -> torch.Tensor:
    """``pieces`` [channels, length] as one batch [rows, channels, longest], zeros behind the shorter ones."""
    if len(pieces) == 1:
        return pieces[0][None]
    return torch.stack([functional.pad(piece, (0, longest - piece.shape[1])) for piece in pieces])


def _reach(layer: Any) -> int:
    """Positions to each side that a convolution sees."""
    reach: int = (layer.kernel_size[-1] - 1) * layer.dilation[-1] // 2
    return reach


def _wavenet_reach(wavenet: Any) -> int:
    return sum(_reach(layer) for layer in wavenet.in_layers)


def _block_reach(block: torch.nn.Module) -> int:
    """Positions to each side that reach the output of a residual block."""
    return sum(_reach(layer) for layer in block.modules() if isinstance(layer, torch.nn.Conv2d))


def _lay_out(module: torch.nn.Module) -> None:
    """Replace one-dimensional convolutions by two-dimensional ones of height one, channels last in memory.

    In that layout a convolution need not rearrange what it reads and writes: 4 to 10 % of the time on a CPU.
    """
    for name, layer in list(module.named_children()):
        if not isinstance(layer, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            _lay_out(layer)
            continue
        kind = torch.nn.Conv2d if isinstance(layer, torch.nn.Conv1d) else torch.nn.ConvTranspose2d
        flat = kind(
            layer.in_channels,
            layer.out_channels,
            (1, layer.kernel_size[0]),
            stride=(1, layer.stride[0]),
            padding=(0, int(layer.padding[0])),
            dilation=(1, layer.dilation[0]),
            bias=layer.bias is not None,
            device="meta",
        )
        weight = layer.weight.detach()[:, :, None].contiguous(memory_format=torch.channels_last)
        flat.weight = torch.nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            flat.bias = torch.nn.Parameter(layer.bias.detach(), requires_grad=False)
        setattr(module, name, flat.eval())


def _stages(decoder: Any) -> list[_Stage]:
    """What each upsampling stage needs, worked out from the last to the first."""
    stages = []
    context = _reach(decoder.conv_post)
    for index in reversed(range(decoder.num_upsamples)):
        blocks = decoder.resblocks[index * decoder.num_kernels : (index + 1) * decoder.num_kernels]
        outputs = context + max(_block_reach(block) for block in blocks)
        layer = decoder.ups[index]
        kernel, factor, padding = layer.kernel_size[-1], layer.stride[-1], layer.padding[-1]
        # Output n is made of inputs from (n + padding - kernel + 1) / factor to (n + padding) / factor.
        context = (outputs + max(kernel - 1 - padding, padding)) // factor + 1
        stages.append(_Stage(factor, context, outputs))
    return stages[::-1]
