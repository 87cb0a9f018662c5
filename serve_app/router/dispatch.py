"""The one place that knows how Ray Serve hands rows to a replica.

``choose_replica``/``dispatch`` reserve a slot on a replica first and send the rows afterwards. They are young
in Ray (2.56 and later) and may change: nothing outside this file names them, and ``UnreservedDispatch`` does
without them.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar, cast

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from engines.contract import Conditioning, EngineError, Reference
from serve_app.errors import EngineUnavailable
from serve_app.protocol import BatchTerms, EngineFacts, RowAudio, UtteranceCall
from serve_app.router.detached import start_detached

logger = logging.getLogger("ray.serve")

#: What a dead, unreachable or removed replica looks like to its caller.
REPLICA_LOST = (RayError, RayServeException)

#: Longest wait for the replicas to say who they are.
_ROLL_CALL_TIMEOUT_S = 2.0
#: Replicas a call without slot is made to before it fails.
_TRIES = 3

#: Calls that fill an engine. More of them let a batch close later, each costs Serve some milliseconds.
_CALLS_PER_ENGINE = 8
#: Calls without slot that no replica has accepted yet. All others wait in our queue, which can be sorted.
_MAX_UNACCEPTED = 8

T = TypeVar("T")

#: Waits for the first items of calls that everybody has left.
_beginning: set[asyncio.Task[Any]] = set()

RowsCall = Callable[[list[UtteranceCall], BatchTerms, str | None], AsyncGenerator[list[RowAudio], None]]


def rows_per_call(slots: int) -> int:
    """Rows sent at once to an engine with so many slots. A replica makes one batch of several calls."""
    return ceil(slots / _CALLS_PER_ENGINE)


def calls_per_replica(slots: int, concurrent_batches: int) -> int:
    """Calls a replica takes: as many as its engine can work on, and those of the next batch."""
    rows = slots + ceil(slots / concurrent_batches)
    return ceil(rows / rows_per_call(slots))


class Declined(Exception):
    """The rows came to the replica that they must not go to. Nothing was done with them."""


@dataclass(slots=True)
class Slot:
    """A place for rows on a replica: ``send`` them, or leave to give it back.

    ``send(calls, terms, avoid)`` raises ``Declined`` if it came to the replica to ``avoid`` after all.
    """

    send: RowsCall
    #: None as long as it is not known which one it will be.
    replica: str | None = None


class EngineDispatch:
    """Calls to the replicas of one engine deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._synthesize = handle.options(method_name="synthesize", stream=True)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """Wait for a free replica and hold it."""
        async with self._synthesize.choose_replica() as selection:

            async def send(
                calls: list[UtteranceCall], terms: BatchTerms, avoid: str | None
            ) -> AsyncGenerator[list[RowAudio], None]:
                stream = cast(
                    DeploymentResponseGenerator[list[RowAudio]],
                    self._synthesize.dispatch(selection, calls, terms),
                )
                async with aclosing(_items(stream)) as answers:
                    async for answer in answers:
                        yield answer

            yield Slot(send, selection.replica_id)

    async def replicas(self) -> frozenset[str] | None:
        """Ids of the replicas that run, or None if not all of them answer at once."""
        try:
            answers = await self._handle.broadcast("identify").results_async(timeout_s=_ROLL_CALL_TIMEOUT_S)
        except (TimeoutError, *REPLICA_LOST):
            return None
        return frozenset(answers)

    async def abandon(self, call_ids: list[str]) -> None:
        """Tell every replica that nobody waits for these rows."""
        await self._handle.broadcast("abandon", call_ids).results_async()

    async def describe(self) -> EngineFacts:
        """Facts of the loaded engine; waits until a replica is up."""
        facts: EngineFacts = await self._handle.describe.remote()
        return facts

    async def extract_voice(self, reference: Reference) -> Conditioning:
        """Conditioning of a reference. Raises what the engine refused, or ``EngineUnavailable``."""
        answer: Conditioning | EngineError = await self._somewhere("extract_voice", reference)
        if isinstance(answer, EngineError):
            raise answer
        return answer

    async def built_in_voice(self, name: str) -> Conditioning:
        """Conditioning of a voice that comes with the weights. Raises ``EngineUnavailable``."""
        conditioning: Conditioning = await self._somewhere("built_in_voice", name)
        return conditioning

    async def refine_voice(self, reference: Reference, conditioning: Conditioning) -> Conditioning | None:
        """A better conditioning, or None if there is nothing to refine. Raises as ``extract_voice``."""
        answer: Conditioning | EngineError | None = await self._somewhere(
            "refine_voice", reference, conditioning
        )
        if isinstance(answer, EngineError):
            raise answer
        return answer

    async def _somewhere(self, method: str, *args: object) -> Any:
        """Call ``method`` on any replica; on another one if it is lost on the way."""
        for tries_left in reversed(range(_TRIES)):
            try:
                return await getattr(self._handle, method).remote(*args)
            except REPLICA_LOST as error:
                if not tries_left:
                    raise EngineUnavailable(
                        "The engine was lost while it worked on this. Try again later.", retry_after_s=5.0
                    ) from error
        raise AssertionError("unreachable")


class UnreservedDispatch(EngineDispatch):
    """Sends rows to a replica of Serve's choice.

    A replica that takes rows says who it is. Only so many calls are on their way to one at the same time.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        super().__init__(handle)
        self._accept = handle.options(method_name="accept", stream=True)
        self._permits = asyncio.Semaphore(_MAX_UNACCEPTED)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """Wait until rows may be sent."""
        async with AsyncExitStack() as permit:
            await permit.enter_async_context(self._permits)

            async def send(
                calls: list[UtteranceCall], terms: BatchTerms, avoid: str | None
            ) -> AsyncGenerator[list[RowAudio], None]:
                stream = cast(
                    DeploymentResponseGenerator[str | list[RowAudio]],
                    self._accept.remote(calls, terms, avoid),
                )
                async with aclosing(_items(stream)) as answers:
                    async for answer in answers:
                        if not isinstance(answer, str):
                            yield answer
                            continue
                        if answer == avoid:
                            raise Declined
                        slot.replica = answer
                        await permit.aclose()
                        yield []

            slot = Slot(send)
            yield slot


async def _items(stream: DeploymentResponseGenerator[T]) -> AsyncGenerator[T, None]:
    """The items of a call. The replica's work is stopped when they are left before their end."""
    # Ray (2.60) keeps a reserved place for ever if its call is cancelled before the replica has begun it, and
    # cancels a call if whoever waits for its first item is cancelled. So nothing cancels that wait.
    first = start_detached(_next(stream))
    try:
        item = await asyncio.shield(first)
    except asyncio.CancelledError:
        _beginning.add(first)
        first.add_done_callback(functools.partial(_stop_begun, stream))
        raise
    try:
        while item is not None:
            yield item
            item = await _next(stream)
    finally:
        # Leaving cancellation to garbage collection leaks a running engine now and then.
        stream.cancel()  # type: ignore[no-untyped-call]


async def _next(stream: AsyncIterator[T]) -> T | None:
    return await anext(stream, None)


def _stop_begun(stream: DeploymentResponseGenerator[T], first: asyncio.Task[T | None]) -> None:
    _beginning.discard(first)
    stream.cancel()  # type: ignore[no-untyped-call]
    if not first.cancelled() and (error := first.exception()) is not None:
        logger.info("A call that nobody waited for has failed: %s", type(error).__name__)
