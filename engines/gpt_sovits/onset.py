"""Where an utterance begins to the ear: what is silent before its first sound is cut to a tenth of a second.

As gsv-tts-lite (``TTS._find_head_threshold_offsets``), which looks at the first window only.
"""

from __future__ import annotations

import numpy as np

from engines.contract import Samples

#: A block is silent up to this root mean square; the numbers are samples of 32 kHz.
_SILENT_LEVEL = 0.02
_BLOCK, _HOP = 512, 256
_LEFT = 3_200


class Onset:
    """Cuts what precedes the first sound. Give it all samples in order."""

    def __init__(self) -> None:
        self._begun = False
        self._held: Samples = np.zeros(0, np.float32)

    def push(self, samples: Samples) -> Samples:
        """What of ``samples`` [n], and of silence held back, may be heard."""
        if self._begun:
            return samples
        joined = np.concatenate([self._held, samples])
        if len(joined) >= _BLOCK:
            blocks = np.lib.stride_tricks.sliding_window_view(joined, _BLOCK)[::_HOP]
            loud = np.flatnonzero(np.sqrt(np.mean(blocks**2, axis=1)) > _SILENT_LEVEL)
            if len(loud):
                self._begun = True
                return joined[max(0, int(loud[0]) * _HOP - _LEFT) :]
        self._held = joined[-_LEFT:]
        return samples[:0]
