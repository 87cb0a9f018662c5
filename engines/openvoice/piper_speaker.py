"""Base voices of Piper, many languages, if the optional extra is installed.

Piper is GPL-3.0-or-later and never part of the default installation; this module starts it as a program of
its own (``piper_process`` says why) and takes samples from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engines.contract import ModelCorrupt, ModelError, ModelMissing, NothingToSpeak, Samples, SynthesisFailed
from engines.openvoice import piper_process
from engines.openvoice.base_speaker import Sentence
from engines.openvoice.settings import PiperSettings
from engines.openvoice.silence import without_pauses

#: What pip installs to get Piper.
EXTRA = "voice-clone-tts[piper]"
_SENTENCE_PAUSE_S = 0.22
#: Far more than the longest sentence takes; a program that hangs must not take its slot for ever.
_TIMEOUT_S = 60.0
_LOADING_TIMEOUT_S = 120.0


class PiperSpeaker:
    """A ``BaseSpeaker`` in a process of its own, which is started again if it dies."""

    speeds = (0.5, 2.0)

    def __init__(self, settings: PiperSettings, threads: int) -> None:
        """Start the voice. Raises ``ModelMissing`` or ``ModelCorrupt``."""
        model = settings.model.expanduser()
        if importlib.util.find_spec("piper") is None:
            raise ModelMissing(
                f"The base voice {model} needs Piper, which is not installed.",
                next_step=f"pip install '{EXTRA}' (GPL-3.0-or-later) where the engine runs.",
            )
        described = _described(model)
        self.name = f"piper {model.stem}"
        self.sample_rate_hz: int = described["audio"]["sample_rate"]
        self.languages: tuple[str, ...] = (_language(described, model),)
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
        self.identity = f"piper {digest} {settings.speaker}"
        speaker = "" if settings.speaker is None else str(settings.speaker)
        self._command = [sys.executable, "-I", piper_process.__file__, str(model), str(threads), speaker]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._ask("", 1.0, 0)
        except SynthesisFailed as error:
            raise ModelCorrupt(
                f"The Piper voice {model} does not work: {error.message}", next_step=_fetch(model)
            ) from error

    def speak(self, text: str, language: str, speed: float, seed: int) -> Iterator[Sentence]:
        """See ``BaseSpeaker``; the seed changes nothing."""
        sentence, sentences, spoken = 0, 1, 0
        while sentence < sentences:
            sentences, samples = self._ask(text, speed, sentence)
            sentence += 1
            speech = without_pauses(samples, self.sample_rate_hz)
            if len(speech):
                spoken += 1
                yield Sentence(speech, _SENTENCE_PAUSE_S)
        if not spoken:
            raise NothingToSpeak(
                f"The text holds nothing that can be pronounced in '{language}'.",
                next_step="Give words or numbers.",
            )

    def close(self) -> None:
        """End the program."""
        with self._lock:
            self._end()

    def _ask(self, text: str, speed: float, sentence: int) -> tuple[int, Samples]:
        """How many sentences ``text`` has, and the samples of one. Raises ``SynthesisFailed``."""
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._process = subprocess.Popen(  # noqa: S603 - our own program; the text goes in as data
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                self._answer(process, _LOADING_TIMEOUT_S)
            request = {"text": text, "speed": speed, "sentence": sentence}
            return self._answer(process, _TIMEOUT_S, json.dumps(request).encode() + b"\n")

    def _answer(
        self, process: subprocess.Popen[bytes], timeout_s: float, request: bytes = b""
    ) -> tuple[int, Samples]:
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - both are pipes
        watch = threading.Timer(timeout_s, process.kill)
        watch.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            header = json.loads(process.stdout.readline())
            if "error" in header:
                raise SynthesisFailed(
                    header["error"], next_step="Try another wording; report it if it stays."
                )
            samples = np.frombuffer(process.stdout.read(4 * header["samples"]), np.float32)
            if len(samples) != header["samples"]:
                raise EOFError("its answer was cut off")
        except (OSError, EOFError, ValueError) as error:
            self._end()
            raise SynthesisFailed(
                f"Piper did not answer: {error}", next_step="Try again; report it if it stays."
            ) from error
        finally:
            watch.cancel()
        return header["sentences"], samples

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        # A program that has died leaves a broken pipe.
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        process.kill()
        process.wait()


def _described(model: Path) -> dict[str, Any]:
    """The voice's configuration. Raises ``ModelMissing`` or ``ModelCorrupt``."""
    config = Path(f"{model}.json")
    for path in (model, config):
        if not path.is_file():
            raise ModelMissing(f"The Piper voice {path} is not there.", next_step=_fetch(model))
    try:
        described: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        if int(described["audio"]["sample_rate"]) <= 0:
            raise ValueError("no sample rate")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelCorrupt(f"{config} does not describe a Piper voice.", next_step=_fetch(model)) from error
    return described


def _language(described: dict[str, Any], model: Path) -> str:
    code = described.get("language", {}).get("code") or described.get("espeak", {}).get("voice")
    if not code:
        raise ModelError(f"{model}.json does not say which language it is.", next_step=_fetch(model))
    # "en_US", "en-us"; Norwegian is written as Bokmål.
    primary = str(code).replace("_", "-").partition("-")[0].lower()
    return {"nb": "no"}.get(primary, primary)


def _fetch(model: Path) -> str:
    return f"Fetch it: python -m piper.download_voices --download-dir {model.parent} {model.stem}"
