"""The one place that knows how Ray Serve hands a batch to a replica.

``choose_replica``/``dispatch`` reserve a slot on a replica first and send the batch afterwards. They are
young in Ray (2.56 and later) and may change: nothing outside this file names them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from engines.contract import Conditioning, EngineError, Reference
from serve_app.errors import EngineUnavailable
from serve_app.protocol import EngineFacts, RowAudio, UtteranceCall

#: What a dead, unreachable or removed replica looks like to its caller.
REPLICA_LOST = (RayError, RayServeException)

#: Longest wait for the replicas to say who they are.
_ROLL_CALL_TIMEOUT_S = 2.0
#: Replicas a call without slot is made to before it fails.
_TRIES = 3

BatchCall = Callable[[list[UtteranceCall]], AsyncGenerator[list[RowAudio], None]]


@dataclass(frozen=True, slots=True)
class Slot:
    """A reserved place for one batch on one replica. ``send`` it, or leave to give it back."""

    replica: str
    send: BatchCall


class EngineDispatch:
    """Calls to the replicas of one engine deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._batches = handle.options(method_name="synthesize", stream=True)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """Wait for a free replica and hold it."""
        async with self._batches.choose_replica() as selection:

            async def send(batch: list[UtteranceCall]) -> AsyncGenerator[list[RowAudio], None]:
                stream = cast(
                    DeploymentResponseGenerator[list[RowAudio]], self._batches.dispatch(selection, batch)
                )
                try:
                    async for rows in stream:
                        yield rows
                finally:
                    # Leaving cancellation to garbage collection leaks a running engine now and then.
                    stream.cancel()  # type: ignore[no-untyped-call]

            yield Slot(selection.replica_id, send)

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
