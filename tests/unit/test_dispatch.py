"""Calls to replicas, against a stand-in for Serve's handle: when a call may be cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.serve.handle import DeploymentHandle

from serve_app.protocol import BatchTerms
from serve_app.router.dispatch import EngineDispatch

TERMS = BatchTerms((), 1, None)


class Stream:
    """What Serve answers a streaming call with: items that come when the test says so."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[list[str] | BaseException | None] = asyncio.Queue()
        self.waits_cancelled = 0
        self.cancels = 0

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[str]:
        try:
            item = await self.items.get()
        except asyncio.CancelledError:
            self.waits_cancelled += 1
            raise
        if isinstance(item, BaseException):
            raise item
        if item is None:
            raise StopAsyncIteration
        return item

    def cancel(self) -> None:
        self.cancels += 1


class Handle:
    """The methods of a handle that the dispatch calls."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.held = 0

    def options(self, **_: object) -> Handle:
        return self

    @asynccontextmanager
    async def choose_replica(self) -> AsyncIterator[SimpleNamespace]:
        self.held += 1
        yield SimpleNamespace(replica_id="r0")
        self.held -= 1

    def dispatch(self, *_: object) -> Stream:
        return self.stream


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def heard(stream: Stream) -> list[Any]:
    return []


async def listen(stream: Stream, heard: list[Any]) -> None:
    hear = heard.append
    dispatch = EngineDispatch(cast("DeploymentHandle[Any]", Handle(stream)))
    async with dispatch.slot() as slot:
        async for item in slot.send([], TERMS, None):
            hear(item)


async def turn() -> None:
    """Let everything that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_items_come_in_order_and_the_call_is_closed(stream: Stream, heard: list[Any]) -> None:
    for item in (["a"], [], ["b"], None):
        stream.items.put_nowait(item)
    await listen(stream, heard)
    assert heard == [["a"], [], ["b"]]
    assert stream.cancels == 1


async def test_call_is_not_cancelled_before_the_replica_has_begun_it(
    stream: Stream, heard: list[Any]
) -> None:
    """Ray would keep its place on the replica for ever."""
    task = asyncio.create_task(listen(stream, heard))
    await turn()
    task.cancel()
    await asyncio.wait([task])
    await turn()
    assert task.cancelled()
    assert stream.cancels == 0
    assert not stream.waits_cancelled
    stream.items.put_nowait([])
    await turn()
    assert stream.cancels == 1
    assert not heard


async def test_call_that_has_begun_is_cancelled_at_once(stream: Stream, heard: list[Any]) -> None:
    stream.items.put_nowait(["a"])
    task = asyncio.create_task(listen(stream, heard))
    await turn()
    task.cancel()
    await asyncio.wait([task])
    await turn()
    assert heard == [["a"]]
    assert stream.cancels == 1


async def test_left_call_that_fails_is_only_logged(
    stream: Stream, heard: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ray.serve")
    task = asyncio.create_task(listen(stream, heard))
    await turn()
    task.cancel()
    await asyncio.wait([task])
    stream.items.put_nowait(ConnectionError("gone"))
    await turn()
    assert stream.cancels == 1
    assert "ConnectionError" in caplog.text


async def test_error_before_the_first_item_reaches_the_caller(stream: Stream, heard: list[Any]) -> None:
    stream.items.put_nowait(ConnectionError("gone"))
    with pytest.raises(ConnectionError):
        await listen(stream, heard)
