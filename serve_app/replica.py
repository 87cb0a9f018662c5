"""EngineReplica: puts any engine into a Serve replica.

The event loop of the replica only hands values over; the model runs in threads. One call of ``synthesize``
is one batch and one stream of row chunks.
"""

# No postponed annotations: Serve inspects this class when it is deployed.
import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from ray import serve

from engines.contract import (
    Abandon,
    Chunk,
    Conditioning,
    Engine,
    EngineError,
    Reference,
    SynthesisFailed,
    Utterance,
)
from engines.registry import make_engine
from serve_app.metrics import BATCH_ROWS, Metrics
from serve_app.process import process_activity
from serve_app.protocol import BatchTerms, EngineFacts, ReplicaActivity, RowAudio, UtteranceCall
from serve_app.row_batcher import RowBatcher
from serve_app.soundness import SoundCheck

logger = logging.getLogger("ray.serve")

#: Chunks a model thread may be ahead of the socket that carries them away.
MAX_CHUNKS_AHEAD = 8
#: How often a batch that waits for its turn says so.
_BEAT_S = 1.0
#: A step that takes this many times its timeout will never end.
_STUCK_AFTER_TIMEOUTS = 3
#: Failed rows in a row after which the engine has to prove itself.
_SUSPICIOUS_FAILURES = 3

T = TypeVar("T")


class EngineReplica:
    """One loaded engine, its slots, and the rows it works on."""

    def __init__(
        self,
        engine_name: str,
        engine_config: dict[str, Any],
        step_timeout_s: float = 30.0,
        served_as: str | None = None,
    ) -> None:
        self._engine: Engine = make_engine(engine_name, engine_config)
        # Serve runs this constructor in a thread of its own: loading blocks no event loop.
        self._engine.load()
        self._step_timeout_s = step_timeout_s
        self._served_as = served_as or engine_name
        self._metrics = Metrics()
        self._batcher = RowBatcher(self._speak, self._engine.concurrent_batches)
        self._rows: dict[str, Abandon] = {}
        self._running: dict[int, float] = {}
        self._proven: Utterance | None = None
        self._failures = 0
        self._batches = self._largest_batch = self._chunks = 0
        self._threads = ThreadPoolExecutor(self._engine.concurrent_batches, thread_name_prefix="synthesize")
        self._enrolment = ThreadPoolExecutor(1, thread_name_prefix="extract_voice")

    async def identify(self) -> str:
        """The id by which Serve and the router know this replica."""
        return serve.get_replica_context().replica_id.unique_id

    async def describe(self) -> EngineFacts:
        """The engine's card and what only the loaded engine knows."""
        engine = self._engine
        return EngineFacts(
            engine.card,
            engine.languages,
            engine.config.slots,
            engine.weights_fingerprint,
            tuple(sorted(engine.built_in_voices)),
        )

    async def built_in_voice(self, name: str) -> Conditioning:
        """Conditioning of a voice that comes with the weights. ``name`` is one that ``describe`` gave."""
        return self._engine.built_in_voices[name]

    async def synthesize(
        self, calls: list[UtteranceCall], terms: BatchTerms
    ) -> AsyncGenerator[list[RowAudio], None]:
        """Speak ``calls``; each answer is the list of chunks that were ready. Closing it stops their rows.

        Rows of several calls may be one batch. While some only wait for their turn, and the engine makes
        progress, empty answers say that they do not wait in vain.
        """
        utterances = [
            Utterance(
                call.text,
                call.language,
                call.conditioning,
                seed=call.seed,
                speed=call.speed,
                options=call.options,
            )
            for call in calls
        ]
        for call, utterance in zip(calls, utterances, strict=True):
            self._rows[call.call_id] = utterance.abandoned
        try:
            # At once: only a call that has begun can be cancelled, and an engine may hang in its first step.
            yield []
            async with aclosing(self._batcher.answers(utterances, terms, _BEAT_S)) as answers:
                async for answer in answers:
                    if answer or not self._stuck(self._step_timeout_s):
                        yield answer
        finally:
            for call in calls:
                self._rows.pop(call.call_id, None)

    async def accept(
        self, calls: list[UtteranceCall], terms: BatchTerms, avoid: str | None
    ) -> AsyncGenerator[str | list[RowAudio], None]:
        """As ``synthesize`` for a router that has reserved nothing: the first answer says who speaks.

        It is the only one if that is the replica to ``avoid``.
        """
        name = await self.identify()
        yield name
        if name != avoid:
            async with aclosing(self.synthesize(calls, terms)) as answers:
                async for answer in answers:
                    yield answer

    async def _speak(self, utterances: list[Utterance]) -> AsyncGenerator[list[RowAudio], None]:
        """The checked chunks of a batch. Rows that fail end with their error, the others go on."""
        stream = ThreadStream(lambda: self._engine.synthesize(utterances), self._threads, MAX_CHUNKS_AHEAD)
        self._metrics.observe(BATCH_ROWS, len(utterances), engine=self._served_as)
        self._batches += 1
        self._largest_batch = max(self._largest_batch, len(utterances))
        self._running[id(stream)] = time.monotonic()
        rows = {row: SoundCheck(self._engine.card.sample_rate_hz) for row in range(len(utterances))}
        try:
            async for chunks in stream:
                self._running[id(stream)] = time.monotonic()
                self._chunks += len(chunks)
                if answer := [audio for chunk in chunks for audio in self._checked(chunk, utterances, rows)]:
                    yield answer
        except EngineError as error:
            yield [self._failure(row, error) for row in rows]
        except Exception:
            logger.exception("The engine failed on a batch of %d.", len(utterances))
            yield [self._failure(row, SynthesisFailed("The engine failed.")) for row in rows]
        finally:
            # An engine that waits inside a step sees the flags; one that yields sees the close.
            for utterance in utterances:
                utterance.abandoned.set()
            await stream.aclose()
            del self._running[id(stream)]

    def _checked(
        self, chunk: Chunk, utterances: list[Utterance], rows: dict[int, SoundCheck]
    ) -> Iterator[RowAudio]:
        """What may be heard of ``chunk``; a row that ends, well or badly, leaves ``rows``."""
        check = rows.get(chunk.row)
        if check is None:
            return
        if chunk.error is not None:
            del rows[chunk.row]
            yield self._failure(chunk.row, chunk.error)
            return
        try:
            samples = check.passed(chunk.samples)
            if chunk.last:
                samples = np.concatenate([samples, check.finish()])
        except SynthesisFailed as error:
            del rows[chunk.row]
            utterances[chunk.row].abandoned.set()
            yield self._failure(chunk.row, error)
            return
        if chunk.last:
            del rows[chunk.row]
            self._failures = 0
            self._proven = utterances[chunk.row]
        # Even without samples: it says that the engine works, to a router that would give it up.
        yield RowAudio(chunk.row, samples, chunk.last)

    def _failure(self, row: int, error: EngineError) -> RowAudio:
        if isinstance(error, SynthesisFailed):
            self._failures += 1
        closing = Chunk.failure(row, error)
        return RowAudio(row, closing.samples, closing.last, closing.error)

    def _stuck(self, for_s: float) -> bool:
        """True if a batch runs that has made no progress ``for_s``."""
        return any(since_s < time.monotonic() - for_s for since_s in self._running.values())

    async def check_health(self) -> None:
        """Called by Serve now and then; what is raised lets Serve replace this replica.

        A text can make a healthy engine fail. After some failures in a row the engine has to repeat what it
        was last able to say; only if it cannot do that either it is broken.
        """
        if self._stuck(_STUCK_AFTER_TIMEOUTS * self._step_timeout_s):
            raise RuntimeError("The engine has not returned from a step.")
        if self._failures < _SUSPICIOUS_FAILURES or self._batcher.turns.locked():
            return
        if self._proven is None:
            raise RuntimeError(f"The engine has failed {self._failures} times and never spoken.")
        async with self._batcher.turns:
            self._failures = 0
            async with aclosing(self._speak([replace(self._proven, abandoned=Abandon())])) as answers:
                rows = [audio async for answer in answers for audio in answer]
        if not rows or rows[-1].error is not None:
            raise RuntimeError("The engine can no longer say what it could say before.")

    async def activity(self) -> ReplicaActivity:
        """What this replica does and has done."""
        return ReplicaActivity(
            process=process_activity(),
            rows_open=self._batcher.rows,
            batches=self._batches,
            largest_batch=self._largest_batch,
            chunks=self._chunks,
        )

    async def abandon(self, call_ids: list[str]) -> None:
        """Stop these rows before their next chunk; unknown ids are rows that have ended already."""
        for call_id in call_ids:
            if (flag := self._rows.get(call_id)) is not None:
                flag.set()

    async def extract_voice(self, reference: Reference) -> Conditioning | EngineError:
        """Conditioning of a reference, or why there is none."""
        return await self._in_thread(lambda: self._engine.extract_voice(reference))

    async def refine_voice(
        self, reference: Reference, conditioning: Conditioning
    ) -> Conditioning | EngineError | None:
        """A better conditioning, or None if there is nothing to refine."""
        return await self._in_thread(lambda: self._engine.refine_voice(reference, conditioning))

    async def _in_thread(self, work: Callable[[], T]) -> T | EngineError:
        # Errors of the engine are answers, not crashes: they are returned so that nothing logs a traceback.
        try:
            return await asyncio.get_running_loop().run_in_executor(self._enrolment, work)
        except EngineError as error:
            return error


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


class ThreadStream(Generic[T]):
    """Iterate a blocking iterator in a thread and its items here, in lists of what is ready.

    The thread makes, advances and closes the iterator, so a generator is never touched by two threads. It
    runs at most ``max_ahead`` items ahead of the reader. ``aclose`` returns when the thread has let go.
    """

    def __init__(self, make: Callable[[], Iterator[T]], executor: ThreadPoolExecutor, max_ahead: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[T | _End] = asyncio.Queue()
        self._permits = threading.Semaphore(max_ahead)
        self._stop = threading.Event()
        self._thread = self._loop.run_in_executor(executor, self._produce, make)

    def _produce(self, make: Callable[[], Iterator[T]]) -> None:
        error: BaseException | None = None
        try:
            iterator = make()
            try:
                for item in iterator:
                    self._permits.acquire()
                    if self._stop.is_set():
                        break
                    self._loop.call_soon_threadsafe(self._items.put_nowait, item)
            finally:
                if (close := getattr(iterator, "close", None)) is not None:
                    close()
        except BaseException as caught:  # noqa: BLE001 - raised again in the reader
            error = caught
        self._loop.call_soon_threadsafe(self._items.put_nowait, _End(error))

    async def __aiter__(self) -> AsyncIterator[list[T]]:
        end: _End | None = None
        while end is None:
            item = await self._items.get()
            ready: list[T] = []
            while True:
                if isinstance(item, _End):
                    end = item
                    break
                ready.append(item)
                self._permits.release()
                if self._items.empty():
                    break
                item = self._items.get_nowait()
            if ready:
                yield ready
        if end.error is not None:
            raise end.error

    async def aclose(self) -> None:
        """Stop the thread after its current step and wait for it."""
        self._stop.set()
        self._permits.release()
        await asyncio.shield(self._thread)
