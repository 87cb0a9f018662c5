"""Who speaks: the GE2E speaker encoder in numpy, forwards and backwards.

The network is that of L. Wan et al., "Generalized End-to-End Loss for Speaker Verification", ICASSP 2018,
as trained for Resemblyzer 0.1.4 (``resemblyzer/voice_encoder.py``): 40 mel bands (linear power, not log),
three LSTM layers of 256, one linear layer, ReLU, unit length. The backward pass gives the gradient of a
cosine with respect to the mel input; enrolment climbs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.mosaic.spectrum import F32

ENCODER_RATE_HZ = 16_000
ENCODER_HOP = 160
_FFT = 400
ENCODER_BINS = _FFT // 2 + 1
ENCODER_BANDS = 40
#: Frames in one window of the encoder: 1.6 s.
WINDOW_FRAMES = 160
EMBEDDING_SIZE = 256
_HIDDEN = 256
_LAYERS = 3
#: Recordings are brought to this level before the encoder: mean square of -30 dBFS.
_MEAN_SQUARE = 1e-3
#: Energy of the Hann window; relates a mean power spectrum to the mean square of the samples.
_HANN_ENERGY = _FFT * 3 / 8

# One tanh serves all four gates (input, forget, cell, output): sigmoid(x) = tanh(x / 2) / 2 + 1 / 2.
_CELL = slice(2 * _HIDDEN, 3 * _HIDDEN)
_GATE_SCALE = np.full(4 * _HIDDEN, 0.5, np.float32)
_GATE_SCALE[_CELL] = 1.0
_GATE_SHIFT = np.full(4 * _HIDDEN, 0.5, np.float32)
_GATE_SHIFT[_CELL] = 0.0


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one LSTM layer, inputs first: [inputs, 4 * 256], [256, 4 * 256], [4 * 256]."""

    from_input: F32
    from_hidden: F32
    bias: F32


@dataclass(frozen=True, slots=True)
class _Trace:
    """What one layer's forward pass leaves for the backward pass, time first: [time, batch, ...]."""

    gates: F32
    cells: F32


class SpeakerEncoder:
    """The encoder. Stateless after construction, so any thread may use it."""

    def __init__(self, weights: Mapping[str, NDArray[np.float16]]) -> None:
        """``weights``: tensors as ``weights/derive_speaker_encoder.py`` writes them."""
        tensors = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in weights.items()}
        self._layers = [
            _Layer(
                tensors[f"lstm{layer}.from_input"],
                tensors[f"lstm{layer}.from_hidden"],
                tensors[f"lstm{layer}.bias"],
            )
            for layer in range(_LAYERS)
        ]
        self._linear, self._linear_bias = tensors["linear.weight"], tensors["linear.bias"]
        #: Mel bands as a matrix [ENCODER_BINS, ENCODER_BANDS].
        self.mel_basis = slaney_mel_basis(ENCODER_RATE_HZ, _FFT, ENCODER_BANDS)
        self._window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)).astype(np.float32)

    def power(self, samples: F32) -> F32:
        """Power spectra [frames, ENCODER_BINS] of ``samples`` at 16 kHz, one frame each 10 ms."""
        padded = np.pad(samples, _FFT // 2)
        frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::ENCODER_HOP] * self._window
        spectra = np.fft.rfft(frames, axis=1)
        power: F32 = (spectra.real**2 + spectra.imag**2).astype(np.float32)
        return power

    def windows(self, samples: F32, hop_frames: int) -> F32:
        """Levelled mel input [windows, WINDOW_FRAMES, ENCODER_BANDS] of ``samples`` at 16 kHz."""
        power = self.power(samples)
        levelled: F32 = power * np.float32(level_factor(power))
        return cut_windows(levelled @ self.mel_basis, hop_frames)

    def embed(self, samples: F32, hop_frames: int = WINDOW_FRAMES // 2) -> F32:
        """Unit vector [EMBEDDING_SIZE] of the speaker of ``samples`` (16 kHz, silences removed)."""
        return _unit(self.embed_windows(self.windows(samples, hop_frames)).mean(axis=0))

    def embed_windows(self, mel: F32) -> F32:
        """Unit vectors [windows, EMBEDDING_SIZE] from ``mel`` [windows, time, ENCODER_BANDS]."""
        hidden = np.ascontiguousarray(mel.transpose(1, 0, 2))
        for layer in self._layers:
            hidden, _ = _run_layer(layer, hidden, keep=False)
        return _unit(np.maximum(hidden[-1] @ self._linear.T + self._linear_bias, 0.0))

    def cosine_and_gradient(self, mel: F32, target: F32) -> tuple[float, F32]:
        """Cosine between ``target`` (unit vector) and the mean embedding of ``mel``, and its gradient.

        ``mel`` and the gradient have shape [windows, time, ENCODER_BANDS].
        """
        hidden = np.ascontiguousarray(mel.transpose(1, 0, 2))
        traces: list[_Trace] = []
        for layer in self._layers:
            hidden, trace = _run_layer(layer, hidden, keep=True)
            if trace is not None:
                traces.append(trace)
        projected = hidden[-1] @ self._linear.T + self._linear_bias
        cosine, at_projected = _cosine_head(projected, target)
        at_hidden = np.zeros_like(hidden)
        at_hidden[-1] = at_projected @ self._linear
        for layer, trace in zip(reversed(self._layers), reversed(traces), strict=True):
            at_hidden = _run_layer_backwards(layer, trace, at_hidden)
        return cosine, np.ascontiguousarray(at_hidden.transpose(1, 0, 2))


def level_factor(power: F32) -> float:
    """Factor on power spectra [frames, ENCODER_BINS] that brings their recording to -30 dBFS."""
    mean_square = float(power.mean(axis=0).sum()) * 2.0 / (_FFT * _HANN_ENERGY)
    return _MEAN_SQUARE / max(1e-12, mean_square)


def cut_windows(frames: F32, hop_frames: int) -> F32:
    """Windows [count, WINDOW_FRAMES, n] every ``hop_frames`` of ``frames`` [time, n]; zeros fill up."""
    missing = WINDOW_FRAMES - len(frames)
    if missing > 0:
        frames = np.pad(frames, ((0, missing), (0, 0)))
    starts = range(0, len(frames) - WINDOW_FRAMES + 1, hop_frames)
    return np.stack([frames[start : start + WINDOW_FRAMES] for start in starts])


def without_silence(samples: F32, sample_rate_hz: int = ENCODER_RATE_HZ) -> F32:
    """``samples`` without pauses longer than about 0.2 s; the encoder was trained on such speech."""
    block = sample_rate_hz // 100
    blocks = samples[: len(samples) // block * block].reshape(-1, block)
    level = np.sqrt((blocks.astype(np.float64) ** 2).mean(axis=1))
    loud = (level > level.max(initial=0.0) * 0.02).astype(np.float64)
    near_speech = np.convolve(loud, np.ones(21), "same")[: len(blocks)] > 0 if len(blocks) >= 21 else loud > 0
    speech: F32 = blocks[near_speech].reshape(-1)
    return speech


def _run_layer(layer: _Layer, inputs: F32, *, keep: bool) -> tuple[F32, _Trace | None]:
    """Hidden states [time, batch, 256] of ``inputs`` [time, batch, n]; with ``keep`` also the trace."""
    steps, batch, _ = inputs.shape
    driven = inputs.reshape(steps * batch, -1) @ layer.from_input + layer.bias
    driven = driven.reshape(steps, batch, 4 * _HIDDEN)
    hidden = np.zeros((batch, _HIDDEN), np.float32)
    cell = np.zeros((batch, _HIDDEN), np.float32)
    states = np.empty((steps, batch, _HIDDEN), np.float32)
    trace = _Trace(driven, np.empty_like(states)) if keep else None
    for step in range(steps):
        gates = driven[step]
        gates += hidden @ layer.from_hidden
        gates *= _GATE_SCALE
        np.tanh(gates, out=gates)
        gates *= _GATE_SCALE
        gates += _GATE_SHIFT
        take_in, keep_old, new, give_out = np.split(gates, 4, axis=1)
        cell = keep_old * cell + take_in * new
        hidden = give_out * np.tanh(cell)
        states[step] = hidden
        if trace is not None:
            trace.cells[step] = cell
    return states, trace


def _run_layer_backwards(layer: _Layer, trace: _Trace, at_states: F32) -> F32:
    """Gradient at the layer's inputs [time, batch, n] from that at its hidden states [time, batch, 256]."""
    steps, batch, _ = at_states.shape
    at_driven = np.empty((steps, batch, 4 * _HIDDEN), np.float32)
    to_hidden = np.ascontiguousarray(layer.from_hidden.T)
    at_hidden = np.zeros((batch, _HIDDEN), np.float32)
    at_cell = np.zeros((batch, _HIDDEN), np.float32)
    start = np.zeros((batch, _HIDDEN), np.float32)
    for step in range(steps - 1, -1, -1):
        take_in, keep_old, new, give_out = np.split(trace.gates[step], 4, axis=1)
        squashed = np.tanh(trace.cells[step])
        before = trace.cells[step - 1] if step else start
        at_hidden = at_hidden + at_states[step]
        at_cell = at_cell + at_hidden * give_out * (1.0 - squashed * squashed)
        parts = np.split(at_driven[step], 4, axis=1)
        parts[0][...] = at_cell * new * take_in * (1.0 - take_in)
        parts[1][...] = at_cell * before * keep_old * (1.0 - keep_old)
        parts[2][...] = at_cell * take_in * (1.0 - new * new)
        parts[3][...] = at_hidden * squashed * give_out * (1.0 - give_out)
        at_cell = at_cell * keep_old
        at_hidden = at_driven[step] @ to_hidden
    at_inputs = at_driven.reshape(steps * batch, -1) @ layer.from_input.T
    return at_inputs.reshape(steps, batch, -1)


def _cosine_head(projected: F32, target: F32) -> tuple[float, F32]:
    """ReLU, unit length, mean over windows, cosine with ``target``; and the gradient at ``projected``."""
    positive = np.maximum(projected, 0.0)
    lengths = np.linalg.norm(positive, axis=1, keepdims=True) + 1e-9
    units = positive / lengths
    mean = units.mean(axis=0)
    mean_length = float(np.linalg.norm(mean))
    direction = mean / mean_length
    cosine = float(direction @ target)
    at_unit = (target - direction * cosine) / (mean_length * len(units))
    at_positive = (at_unit - units * (units @ at_unit)[:, None]) / lengths
    gradient: F32 = at_positive * (projected > 0)
    return cosine, gradient


def _unit(vectors: F32) -> F32:
    """``vectors`` [..., n] at unit length."""
    unit: F32 = vectors / (np.linalg.norm(vectors, axis=-1, keepdims=True) + 1e-9)
    return unit


def slaney_mel_basis(sample_rate_hz: int, fft_size: int, bands: int) -> F32:
    """Mel bands [bins, bands] up to half the sample rate, as ``librosa.filters.mel`` has them."""

    def from_mel(mel: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * 6.4 ** ((mel - 15.0) / 27.0))

    highest_mel = 15.0 + 27.0 * np.log(sample_rate_hz / 2 / 1000.0) / np.log(6.4)
    edges_hz = from_mel(np.linspace(0.0, highest_mel, bands + 2))
    low_hz, centre_hz, high_hz = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    bins_hz = (np.arange(fft_size // 2 + 1) * sample_rate_hz / fft_size)[:, None]
    rising = (bins_hz - low_hz) / (centre_hz - low_hz)
    falling = (high_hz - bins_hz) / (high_hz - centre_hz)
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return (triangles * 2.0 / (high_hz - low_hz)).astype(np.float32)
