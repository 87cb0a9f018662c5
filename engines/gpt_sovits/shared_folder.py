"""Recordings where a GPT-SoVITS server can read them: it takes paths of its own, and no uploads."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from engines.contract import Samples

#: Files kept; above it the least recently used ones go, if nobody has used them for so long.
_MOST_FILES = 2_000
_UNUSED_S = 3_600.0


class SharedFolder:
    """A folder that both sides see, maybe under different paths.

    Files are named by their content: the server remembers recordings by path alone and would go on using an
    old one under the same name. Any number of processes may write here.
    """

    def __init__(self, here: Path, there: str) -> None:
        """``here``: the folder for us; ``there``: the same folder for the server."""
        self._here = here
        self._there = there.rstrip("/\\")

    def put(self, samples: Samples, sample_rate_hz: int) -> str:
        """Write ``samples`` (mono float32 [n]) unless they are there. Returns the path for the server."""
        pcm = np.round(np.clip(samples, -1.0, 1.0) * 32767.0).astype("<i2")
        name = hashlib.sha256(f"{sample_rate_hz}\n".encode() + pcm.tobytes()).hexdigest() + ".wav"
        path = self._here / name
        try:
            os.utime(path)
        except FileNotFoundError:
            self._write(path, pcm, sample_rate_hz)
        return f"{self._there}/{name}"

    def _write(self, path: Path, pcm: np.ndarray, sample_rate_hz: int) -> None:
        self._here.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=self._here, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                soundfile.write(file, pcm, sample_rate_hz, format="WAV", subtype="PCM_16")
            # mkstemp lets only us read it; the server may be another user.
            Path(scratch).chmod(0o644)
            Path(scratch).replace(path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
        self._prune()

    def _prune(self) -> None:
        files = list(self._here.glob("*.wav"))
        if len(files) <= _MOST_FILES:
            return
        used = sorted((file.stat().st_mtime, file) for file in files)
        for used_s, file in used[: len(files) - _MOST_FILES]:
            if used_s < time.time() - _UNUSED_S:
                file.unlink(missing_ok=True)
