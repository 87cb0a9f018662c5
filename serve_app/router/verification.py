"""Verified speech: each utterance is heard again before it is sent, and redone if words are missing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engines.contract import Samples
from serve_app.errors import EngineFailed, InternalError, NoSpeechDetected, VoiceCloneError
from serve_app.metrics import VERIFIED, Metrics
from serve_app.protocol import UtteranceVerified
from serve_app.router.detached import start_detached
from serve_app.router.rows import Listener, Recording
from serve_app.router.transcription import Transcription
from serve_app.transcripts.agreement import VerifyTerms, word_error_rate

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request wants verified, and how it hears of it."""

    terms: VerifyTerms
    engine: str
    language: str
    sample_rate_hz: int
    report: Callable[[UtteranceVerified], None]


class Verification:
    """Speaks utterances until their words are there, a bounded number of times, and hands out the best."""

    def __init__(self, transcription: Transcription, metrics: Metrics) -> None:
        self._transcription = transcription
        self._metrics = metrics
        self._running: set[asyncio.Task[None]] = set()

    def listen(self, index: int, text: str, speak: Callable[[int], Listener], demand: Demand) -> Listener:
        """Listen to utterance ``index`` of a request. ``speak(attempt)``: it, each time otherwise."""
        recording = Recording()
        task = start_detached(self._prove(recording, index, text, speak, demand))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

        def done() -> None:
            if not recording.ended:  # the last listener has left
                task.cancel()

        recording.when_done(done)
        return recording.join()

    async def _prove(
        self, recording: Recording, index: int, text: str, speak: Callable[[int], Listener], demand: Demand
    ) -> None:
        try:
            samples, verdict = await self._best(index, text, speak, demand)
        except VoiceCloneError as error:
            recording.end(error)
            return
        except Exception:
            logger.exception("Defect while an utterance was verified")
            recording.end(InternalError("Something went wrong on our side. The log has the details."))
            return
        outcome = "failed" if not verdict.passed else "redone" if verdict.tries > 1 else "passed"
        self._metrics.count(VERIFIED, engine=demand.engine, outcome=outcome)
        demand.report(verdict)
        recording.add(samples)
        recording.end()

    async def _best(
        self, index: int, text: str, speak: Callable[[int], Listener], demand: Demand
    ) -> tuple[Samples, UtteranceVerified]:
        terms = demand.terms
        best: tuple[float, Samples] | None = None
        for attempt in range(terms.tries):
            samples = await _all_of(speak(attempt))
            rate = word_error_rate(text, await self._heard(samples, demand))
            if best is None or rate < best[0]:
                best = rate, samples
            if rate <= terms.max_wer:
                break
        if best is None:
            raise AssertionError("unreachable: there is at least one try")
        return best[1], UtteranceVerified(index, attempt + 1, best[0], passed=best[0] <= terms.max_wer)

    async def _heard(self, samples: Samples, demand: Demand) -> str:
        try:
            return (await self._transcription.hear(samples, demand.sample_rate_hz, demand.language)).text
        except NoSpeechDetected:
            return ""


async def _all_of(listener: Listener) -> Samples:
    try:
        parts = [samples async for samples in listener]
    finally:
        listener.leave()
    if not parts:
        raise EngineFailed("The engine spoke nothing for this text.")
    return np.concatenate(parts)
