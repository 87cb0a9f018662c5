"""EngineReplica: puts any engine into a Serve replica.

The event loop of the replica only hands values over; the model runs in threads. One call of ``synthesize``
is one batch and one stream of row chunks.
"""

# No postponed annotations: Serve inspects this class when it is deployed.
import asyncio
import logging
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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
from engines.registry import engine_class
from serve_app.protocol import EngineFacts, ReplicaActivity, RowAudio, UtteranceCall

logger = logging.getLogger("ray.serve")

#: Chunks a model thread may be ahead of the socket that carries them away.
MAX_CHUNKS_AHEAD = 8

T = TypeVar("T")


class EngineReplica:
    """One loaded engine, its slots, and the rows it works on."""

    def __init__(self, engine_name: str, engine_config: dict[str, Any]) -> None:
        kind = engine_class(engine_name)
        self._engine: Engine = kind(kind.Config.model_validate(engine_config))
        # Serve runs this constructor in a thread of its own: loading blocks no event loop.
        self._engine.load()
        self._free = asyncio.Semaphore(kind.concurrent_batches)
        self._rows: dict[str, Abandon] = {}
        self._batches = self._largest_batch = self._chunks = 0
        self._threads = ThreadPoolExecutor(kind.concurrent_batches, thread_name_prefix="synthesize")
        self._enrolment = ThreadPoolExecutor(1, thread_name_prefix="extract_voice")

    async def describe(self) -> EngineFacts:
        """The engine's card and what only the loaded engine knows."""
        engine = self._engine
        return EngineFacts(engine.card, engine.languages, engine.config.slots, engine.weights_fingerprint)

    async def synthesize(self, batch: list[UtteranceCall]) -> AsyncGenerator[list[RowAudio], None]:
        """Speak a batch; each answer is the list of chunks that were ready. Closing it stops the engine."""
        utterances = [
            Utterance(
                call.text,
                call.language,
                call.conditioning,
                seed=call.seed,
                speed=call.speed,
                options=call.options,
            )
            for call in batch
        ]
        for call, utterance in zip(batch, utterances, strict=True):
            self._rows[call.call_id] = utterance.abandoned
        try:
            async with self._free:
                stream = ThreadStream(
                    lambda: self._engine.synthesize(utterances), self._threads, MAX_CHUNKS_AHEAD
                )
                open_rows = set(range(len(batch)))
                self._batches += 1
                self._largest_batch = max(self._largest_batch, len(batch))
                try:
                    async for chunks in stream:
                        self._chunks += len(chunks)
                        open_rows.difference_update(chunk.row for chunk in chunks if chunk.last)
                        yield [RowAudio(c.row, c.samples, c.last, c.error) for c in chunks]
                except EngineError as error:
                    yield [_failed(row, error) for row in open_rows]
                except Exception:
                    logger.exception("The engine failed on a batch of %d.", len(batch))
                    yield [_failed(row, SynthesisFailed("The engine failed.")) for row in open_rows]
                finally:
                    # An engine that waits inside a step sees the flags; one that yields sees the close.
                    for utterance in utterances:
                        utterance.abandoned.set()
                    await stream.aclose()
        finally:
            for call in batch:
                self._rows.pop(call.call_id, None)

    async def activity(self) -> ReplicaActivity:
        """What this replica does and has done."""
        return ReplicaActivity(
            process_id=os.getpid(),
            rows_open=len(self._rows),
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


def _failed(row: int, error: EngineError) -> RowAudio:
    closing = Chunk.failure(row, error)
    return RowAudio(row, closing.samples, closing.last, closing.error)


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
