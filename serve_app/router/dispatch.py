"""The one place that knows how Ray Serve hands a batch to a replica.

``choose_replica``/``dispatch`` reserve a slot on a replica first and send the batch afterwards. They are
young in Ray (2.56 and later) and may change: nothing outside this file names them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from engines.contract import Conditioning, EngineError, Reference
from serve_app.protocol import EngineFacts, RowAudio, UtteranceCall

#: What a dead, unreachable or removed replica looks like to its caller.
REPLICA_LOST = (RayError, RayServeException)

BatchCall = Callable[[list[UtteranceCall]], AsyncGenerator[list[RowAudio], None]]


class EngineDispatch:
    """Calls to the replicas of one engine deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._batches = handle.options(method_name="synthesize", stream=True)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[BatchCall]:
        """Wait for a free replica and hold it; the value sends one batch to it.

        Leaving without sending gives the slot back.
        """
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

            yield send

    async def abandon(self, call_ids: list[str]) -> None:
        """Tell every replica that nobody waits for these rows."""
        await self._handle.broadcast("abandon", call_ids).results_async()

    async def describe(self) -> EngineFacts:
        """Facts of the loaded engine; waits until a replica is up."""
        facts: EngineFacts = await self._handle.describe.remote()
        return facts

    async def extract_voice(self, reference: Reference) -> Conditioning:
        """Conditioning of a reference. Raises what the engine refused."""
        answer: Conditioning | EngineError = await self._handle.extract_voice.remote(reference)
        if isinstance(answer, EngineError):
            raise answer
        return answer

    async def refine_voice(self, reference: Reference, conditioning: Conditioning) -> Conditioning | None:
        """A better conditioning, or None if there is nothing to refine. Raises what the engine refused."""
        answer: Conditioning | EngineError | None = await self._handle.refine_voice.remote(
            reference, conditioning
        )
        if isinstance(answer, EngineError):
            raise answer
        return answer
