"""Audio mosaicing: the gain that moves each frame of the base voice towards the speaker's own frames.

``voice_map`` says where a frame has to move; here the moves of neighbouring frames are smoothed into gains.
The spectral envelope moves; pitch, timing and fine structure stay the base voice's.
"""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np

from engines.mosaic.phone_features import CONTEXT_FRAMES, PhoneFeatures
from engines.mosaic.spectrum import CEPSTRA, F32, MEL_BANDS, Bool, cepstra, log_energy
from engines.mosaic.voice_map import SMOOTHING_REACH, PreparedVoice, shape_of, smoothed


class Frames(Protocol):
    """Speech of a base voice, as much of it as gains depend on: ``Parts`` or a ``Waveform``."""

    def __len__(self) -> int: ...

    @property
    def voiced(self) -> Bool:
        """Which frames sound voiced, [frames]."""

    def between(self, start: int, stop: int) -> Self:
        """Frames ``start`` to ``stop``."""

    def power(self) -> F32:
        """Power spectra without harmonics, [frames, BINS]."""


class Conversion:
    """The gains of one piece of speech. Frames are analysed only as far as a caller has asked for gains."""

    def __init__(self, parts: Frames, voice: PreparedVoice, features: PhoneFeatures) -> None:
        """``parts``: speech of the base voice, already ``PreparedVoice.shaped`` or in the voice's pitch."""
        frames = len(parts)
        self._parts, self._voice, self._features = parts, voice, features
        self._shapes = np.empty((frames, MEL_BANDS), np.float32)
        self._normalised = np.empty((frames, CEPSTRA), np.float32)
        self._moves = np.empty((frames, MEL_BANDS), np.float32)
        self._speech = np.empty(frames, np.bool_)
        self._voiced = np.empty(frames, np.bool_)
        self._analysed = 0
        self._matched = 0
        profile = voice.profile
        self._fixed_gain: F32 = profile.equaliser + profile.closing_equaliser + np.float32(profile.level)

    def gain(self, start: int, stop: int) -> F32:
        """Log amplitude gain [stop - start, BINS] of frames ``start`` to ``stop``; ask in order."""
        frames = len(self._parts)
        self._match(min(stop + SMOOTHING_REACH, frames))
        reach = np.arange(start - SMOOTHING_REACH, stop + SMOOTHING_REACH).clip(0, frames - 1)
        # Moves are log power, gains log amplitude.
        moves = smoothed(self._moves[reach])
        moves *= np.float32(0.5)
        return moves @ self._voice.bank.synthesis + self._fixed_gain

    def _match(self, stop: int) -> None:
        """Compute the moves of all frames before ``stop``. All silence moves alike."""
        if stop <= self._matched:
            return
        frames = len(self._parts)
        self._analyse(min(stop + CONTEXT_FRAMES, frames))
        start, self._matched = self._matched, stop
        reach = np.arange(start - CONTEXT_FRAMES, stop + CONTEXT_FRAMES).clip(0, frames - 1)
        vectors = self._features(self._normalised[reach])
        shapes = self._shapes[start:stop]
        voiced = self._voiced[start:stop] & self._speech[start:stop]
        unvoiced = ~voiced & self._speech[start:stop]
        moves = self._moves[start:stop]
        moves[...] = self._voice.silence_move
        moves[voiced] = self._voice.voiced.moves(vectors[voiced], shapes[voiced])
        moves[unvoiced] = self._voice.unvoiced.moves(vectors[unvoiced], shapes[unvoiced])

    def _analyse(self, stop: int) -> None:
        """Measure the frames before ``stop``, equalised."""
        if stop <= self._analysed:
            return
        start, self._analysed = self._analysed, stop
        profile = self._voice.profile
        frames = self._parts.between(start, stop)
        power = frames.power()
        self._voiced[start:stop] = frames.voiced
        self._speech[start:stop] = log_energy(power) > profile.speech_floor
        log_mel = self._voice.bank.log_mel(power * np.exp(2 * profile.equaliser))
        self._shapes[start:stop] = shape_of(log_mel)
        self._normalised[start:stop] = self._voice.base_norm(cepstra(log_mel))
