"""Streaming clients that go on until they are stopped, and what became of each of their requests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

#: Requests differ, so that nobody rides on another's: some short, some longer than the look-ahead.
TEXTS = [
    " ".join(f"Client {client} says sentence number {number} here." for number in range(1 + client % 4))
    for client in range(8)
]


class Load:
    """Eight clients in a thread of their own. Outcomes:

    - ``whole``: status 200 and sample for sample what an undisturbed run gives
    - ``other``: status 200, ended well, and anything else: the one thing that must never happen
    - ``cut``: the connection broke off after the status, which a client can see
    - ``refused``: an error status, or no connection
    """

    def __init__(self, url: str, model: str = "tone") -> None:
        self._url = url
        self._model = model
        self._expected: dict[int, bytes] = {}
        self._stop = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()

    def learn(self) -> None:
        """Ask for every text once, undisturbed."""
        for client, text in enumerate(TEXTS):
            answer = httpx.post(f"{self._url}/v1/audio/speech", json=self._body(client, text), timeout=60)
            answer.raise_for_status()
            self._expected[client] = answer.content

    @contextmanager
    def running(self) -> Iterator[Load]:
        """Clients run inside and have all come to an end after."""
        self.outcomes.clear()
        self.refusals.clear()
        self._stop.clear()
        thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        thread.start()
        try:
            self.wait_for(len(TEXTS))
            yield self
        finally:
            self._stop.set()
            thread.join()

    def wait_for(self, more: int, timeout_s: float = 120) -> None:
        """Return once ``more`` further requests have come back whole."""
        goal = self.outcomes["whole"] + more
        deadline_s = time.monotonic() + timeout_s
        while self.outcomes["whole"] < goal:
            assert time.monotonic() < deadline_s, f"{self.outcomes} {self.refusals}"
            time.sleep(0.05)

    def _body(self, client: int, text: str) -> dict[str, object]:
        return {
            "model": self._model,
            "voice": "anna",
            "input": text,
            "response_format": "pcm",
            "seed": client,
        }

    async def _run(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as http:
            await asyncio.gather(*(self._client(http, client) for client in range(len(TEXTS))))

    async def _client(self, http: httpx.AsyncClient, client: int) -> None:
        while not self._stop.is_set():
            outcome = await self._request(http, client)
            self.outcomes[outcome] += 1
            if outcome == "refused":
                await asyncio.sleep(0.2)

    async def _request(self, http: httpx.AsyncClient, client: int) -> str:
        body = self._body(client, TEXTS[client])
        begun = False
        try:
            async with http.stream("POST", "/v1/audio/speech", json=body) as answer:
                if answer.status_code != 200:
                    self.refusals[(await answer.aread()).decode()[:200]] += 1
                    return "refused"
                begun = True
                heard = b"".join([part async for part in answer.aiter_raw()])
        except httpx.HTTPError as error:
            self.refusals[repr(error)[:200]] += 1
            return "cut" if begun else "refused"
        return "whole" if heard == self._expected[client] else "other"
