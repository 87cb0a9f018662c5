"""Who of several api_v2 servers does the next piece of work: a free one that lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

from engines.contract import EngineError, SynthesisFailed
from engines.gpt_sovits.api_v2 import ApiV2Server, State, WeightPair

#: First and longest wait before a dead server is looked for again.
_RETRY_S, _LONGEST_RETRY_S = 1.0, 30.0
#: An utterance waits this long for a lost server if there is no other.
_PATIENCE_S = 3.0
#: A server that is left in the middle of a stream finishes its step, and nothing says when it has.
_SETTLE_S, _SETTLE_STEPS = 0.5, 1.5


class ServerPool:
    """One slot per server. Used on one event loop only.

    A server that is lost is skipped, and probed before it gets work again.
    """

    def __init__(self, servers: Sequence[ApiV2Server]) -> None:
        self._servers = servers
        self._taken: set[ApiV2Server] = set()
        #: When a lost server is looked for again, and how long it was waited for the last time.
        self._lost: dict[ApiV2Server, tuple[float, float]] = {}
        self._changed = asyncio.Condition()
        self._settling: set[asyncio.Task[None]] = set()

    def lost(self, server: ApiV2Server) -> None:
        """Skip ``server`` for a while, longer each time."""
        waited_s = self._lost.get(server, (0.0, 0.0))[1]
        wait_s = min(_LONGEST_RETRY_S, 2 * waited_s or _RETRY_S)
        self._lost[server] = (time.monotonic() + wait_s, wait_s)
        # It may come back with the weights it starts with.
        server.weights = None

    @asynccontextmanager
    async def slot(
        self, weights: WeightPair | None, avoid: Collection[ApiV2Server]
    ) -> AsyncIterator[ApiV2Server]:
        """Hold a free server, best one with ``weights`` loaded. Raises ``SynthesisFailed`` if none lives."""
        server = await self._take(weights, avoid)
        left = True
        try:
            yield server
            left = False
        except EngineError:
            left = False
            raise
        finally:
            if left and server not in self._lost:
                # It was left in the middle of its work and goes on with it. Whoever came next would wait
                # there, or have its voice mixed with this one, while another server is free.
                task = asyncio.create_task(self._settle(server))
                self._settling.add(task)
                task.add_done_callback(self._settling.discard)
            else:
                await self._free(server)

    async def close(self) -> None:
        """Stop waiting for servers that were left."""
        for task in list(self._settling):
            task.cancel()

    async def _take(self, weights: WeightPair | None, avoid: Collection[ApiV2Server]) -> ApiV2Server:
        while True:
            server = await self._choose(weights, avoid)
            if server not in self._lost:
                return server
            state = await server.probe()
            if state is State.READY:
                del self._lost[server]
                return server
            self.lost(server)
            await self._free(server)

    async def _choose(self, weights: WeightPair | None, avoid: Collection[ApiV2Server]) -> ApiV2Server:
        async with self._changed:
            while True:
                now_s = time.monotonic()
                usable = [
                    server
                    for server in self._servers
                    if server not in avoid and self._lost.get(server, (0.0, 0.0))[0] <= now_s
                ]
                if not usable and (wait_s := self._until_one_is_due(avoid)) is not None:
                    await self._changes(wait_s)
                    continue
                if not usable:
                    raise SynthesisFailed(
                        "No GPT-SoVITS server answers.",
                        next_step="Try again later; the operator sees to it that they run.",
                    )
                free = [server for server in usable if server not in self._taken]
                if free:
                    others = {server: weights is not None and server.weights != weights for server in free}
                    chosen = min(free, key=lambda server: (server in self._lost, others[server]))
                    self._taken.add(chosen)
                    return chosen
                await self._changes(None)

    async def _changes(self, at_most_s: float | None) -> None:
        try:
            async with asyncio.timeout(at_most_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def _until_one_is_due(self, avoid: Collection[ApiV2Server]) -> float | None:
        """Seconds until a lost server is looked for again, if that is soon."""
        due = [
            until_s - time.monotonic() for server, (until_s, _) in self._lost.items() if server not in avoid
        ]
        return max(0.0, min(due)) if due and min(due) <= _PATIENCE_S else None

    async def _free(self, server: ApiV2Server) -> None:
        async with self._changed:
            self._taken.discard(server)
            self._changed.notify_all()

    async def _settle(self, server: ApiV2Server) -> None:
        try:
            await asyncio.sleep(max(_SETTLE_S, _SETTLE_STEPS * server.longest_step_s))
            while (state := await server.probe()) is State.BUSY:
                pass
            if state is not State.READY:
                self.lost(server)
        finally:
            await self._free(server)
