"""Ten thousand requests, good, bad and cut off, from many clients at once. And it still answers."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.ports import free_port
from tests.cluster.conftest import BIN, Program, haproxy_environment, look_inside, raw_speech_request
from tests.cluster.test_command_line import wait_ready
from tests.cluster.test_nodes import title
from tests.speech import noisy_tone, wav_bytes

pytestmark = pytest.mark.timeout(900)

#: Requests by transport mode, ten thousand in all.
REQUESTS = {"default": 3_000, "throughput": 7_000}
CLIENTS = 24
#: The memory of a process may grow by this much over the last two thirds of the requests.
MAX_GROWTH_BYTES = 48 << 20
#: Serve's own tasks come and go.
MAX_MORE_TASKS = 8
MAX_INPUT_CHARS = 2_000
#: What a router or a replica may hold, and must not once nobody asks for anything.
HELD = ("requests", "waiting", "speaking", "recordings", "readers", "rows_open")

SETTINGS = {
    "engines": {
        "tone": {
            "config": {"slots": 8, "step_s": 0.002},
            "replicas": {"num_cpus": 0.1, "min_replicas": 2, "max_replicas": 2},
        }
    },
    "limits": {
        "max_input_chars": MAX_INPUT_CHARS,
        "total": {"requests_per_minute": None},
        "per_ip": {"requests_per_minute": None},
    },
}


@dataclass(frozen=True)
class Inside:
    """What routers and engine replicas say of themselves."""

    #: Tasks and Python objects by process.
    alive: dict[int, tuple[int, int]]
    #: Requests, rows, recordings and readers in hand.
    holding: int
    #: Speeches by the way they ended.
    ended: Counter[str]


@dataclass(frozen=True)
class Server:
    """A running server and how to look inside it."""

    url: str
    program: Program
    environment: dict[str, str]
    requests: int

    def inside(self) -> Inside:
        """What routers and engine replicas hold and have counted."""
        found = look_inside(self.environment)
        replicas = [replica for replicas in found["held"].values() for replica in replicas]
        return Inside(
            alive={
                held["process"]["process_id"]: (held["process"]["tasks"], held["process"]["objects"])
                for held in replicas
            },
            holding=sum(replica.get(what, 0) for replica in replicas for what in HELD),
            ended=Counter(found["ended"]),
        )

    def memory_bytes(self) -> dict[str, int]:
        """Resident memory of every replica, by its name and process."""
        children = psutil.Process(self.program.process.pid).children(recursive=True)
        return {
            f"{title(process)} {process.pid}": process.memory_info().rss
            for process in children
            if "ServeReplica" in title(process)
        }


@pytest.fixture(scope="module", params=REQUESTS)
def server(
    request: pytest.FixtureRequest, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server in one transport mode, with a voice called ``anna``."""
    config = tmp_path_factory.mktemp("chaos") / "settings.yaml"
    # JSON is YAML too.
    config.write_text(json.dumps(SETTINGS))
    port = free_port()
    environment = {
        **environment,
        "VOICE_CLONE__VOICES__STORE": str(config.parent / "voices"),
        **(haproxy_environment(Path(environment["RAY_TMPDIR"])) if request.param == "throughput" else {}),
    }
    program = Program(
        *(BIN / "voice-clone", "serve", "--config", config, "--port", str(port)), environment=environment
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(url, program)
        sample = {"audio_sample": ("anna.wav", wav_bytes(noisy_tone(180.0)))}
        httpx.post(
            f"{url}/v1/audio/voices", data={"name": "anna"}, files=sample, timeout=60
        ).raise_for_status()
        yield Server(url, program, environment, REQUESTS[request.param])
    finally:
        program.stop()
        program.kill_all()


def body(text: str, **fields: object) -> dict[str, object]:
    return {"model": "tone", "voice": "anna", "input": text, "response_format": "pcm", **fields}


class Crowd:
    """Clients that each send one request after the other, chosen by chance."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self._host, self._port = url.removeprefix("http://").split(":")
        self._http = http
        self._chance = random.Random(11)  # noqa: S311 - only has to be the same every time
        self.outcomes: Counter[str] = Counter()
        self.surprises: Counter[str] = Counter()

    async def send(self, requests: int) -> None:
        """Send so many requests."""
        numbers = iter(range(requests))

        async def client() -> None:
            for number in numbers:
                kind = self._chance.choices(KINDS, [8, 4, 1, 1, 1, 1, 1, 1, 3, 2, 1])[0]
                try:
                    self.outcomes[await kind(self, number)] += 1
                except (httpx.HTTPError, OSError, AssertionError) as error:
                    self.surprises[f"{kind.__name__}: {error!r}"[:300]] += 1

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def whole(self, number: int) -> str:
        """A short text, heard to its end."""
        text = f"This is request number {number}."
        answer = await self._post(body(text))
        assert answer.status_code == 200, answer.text
        characters = sum(character.isalnum() for character in text)
        assert len(answer.content) == 2 * round(0.06 * 24_000) * characters
        return "whole"

    async def encoded(self, number: int) -> str:
        """As MP3, whose end is the encoder's."""
        answer = await self._post(body(f"Request number {number}.", response_format="mp3"))
        assert answer.status_code == 200, answer.text
        assert answer.content[:3] == b"ID3" or answer.content[0] == 0xFF
        return "whole"

    async def no_such_voice(self, number: int) -> str:
        return self._refused(await self._post(body("Hello.", voice=f"nobody{number}")), 404)

    async def no_text(self, _: int) -> str:
        return self._refused(await self._post(body("  ")), 400)

    async def too_much_text(self, _: int) -> str:
        return self._refused(await self._post(body("long " * MAX_INPUT_CHARS)), 400)

    async def no_json(self, number: int) -> str:
        answer = await self._http.post(
            "/v1/audio/speech",
            content=b'{"input": ' + b"[" * (number % 500),
            headers={"content-type": "application/json"},
        )
        return self._refused(answer, 400)

    async def wrong_type(self, _: int) -> str:
        return self._refused(await self._post(body("Hello.", speed="fast")), 400)

    async def no_recording(self, number: int) -> str:
        answer = await self._http.post(
            "/v1/audio/voices",
            data={"name": f"voice{number}"},
            files={"audio_sample": ("a.wav", b"RIFF" * 20)},
        )
        return self._refused(answer, 415)

    async def left_while_listening(self, number: int) -> str:
        """A long text, left after its first bytes."""
        long = body(f"Client {number} is soon gone. " + "This goes on. " * 60)
        async with self._http.stream("POST", "/v1/audio/speech", json=long) as answer:
            assert answer.status_code == 200
            async for _ in answer.aiter_raw():
                break
        return "left"

    async def left_while_waiting(self, number: int) -> str:
        """Gone before there is an answer."""
        data = json.dumps(body(f"Client {number} does not wait.")).encode()
        await self._raw(data, len(data))
        return "gone"

    async def left_while_asking(self, number: int) -> str:
        """Gone in the middle of its own request."""
        await self._raw(b'{"input": "Client ' + str(number).encode(), 500)
        return "gone"

    async def _post(self, content: dict[str, object]) -> httpx.Response:
        return await self._http.post("/v1/audio/speech", json=content)

    async def _raw(self, data: bytes, declared: int) -> None:
        _, writer = await asyncio.open_connection(self._host, int(self._port))
        writer.write(raw_speech_request(data, declared))
        await writer.drain()
        await asyncio.sleep(self._chance.random() * 0.02)
        writer.close()
        await writer.wait_closed()

    def _refused(self, answer: httpx.Response, status: int) -> str:
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"], answer.text
        return "refused"


KINDS: list[Callable[[Crowd, int], Awaitable[str]]] = [
    Crowd.whole,
    Crowd.encoded,
    Crowd.no_such_voice,
    Crowd.no_text,
    Crowd.too_much_text,
    Crowd.no_json,
    Crowd.wrong_type,
    Crowd.no_recording,
    Crowd.left_while_listening,
    Crowd.left_while_waiting,
    Crowd.left_while_asking,
]


async def crowd(server: Server, requests: int) -> Crowd:
    """A crowd that has sent so many requests."""
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as http:
        clients = Crowd(server.url, http)
        await clients.send(requests)
    assert not clients.surprises, clients.surprises
    assert sum(clients.outcomes.values()) == requests
    return clients


def idle(server: Server) -> Inside:
    """Look inside once nothing is in hand any more."""
    deadline_s = time.monotonic() + 60
    while (inside := server.inside()).holding:
        assert time.monotonic() < deadline_s, inside
    return inside


def test_it_still_answers(server: Server) -> None:
    first = asyncio.run(crowd(server, server.requests // 3)).outcomes
    before, memory_before = idle(server), server.memory_bytes()
    requests = server.requests - server.requests // 3
    clients = asyncio.run(crowd(server, requests))
    after, memory_after = idle(server), server.memory_bytes()

    # Nobody has died, nobody grows with the number of requests, and no task is left over.
    assert set(memory_after) == set(memory_before)
    for name, then in memory_before.items():
        assert memory_after[name] - then < MAX_GROWTH_BYTES, (name, then, memory_after[name])
    for process, (tasks, objects) in before.alive.items():
        tasks_after, objects_after = after.alive[process]
        assert tasks_after <= tasks + MAX_MORE_TASKS, process
        # Serve keeps up to 1 000 lines of its log in memory; what is left of a request is many objects.
        assert objects_after - objects < requests, process

    # Every speech ended in one way. Of those who left before an answer some had been heard, some had not.
    outcomes = clients.outcomes + first
    deadline_s = time.monotonic() + 60
    while (ended := server.inside().ended)["complete"] < outcomes["whole"] or ended.total() < (
        outcomes["whole"] + outcomes["left"]
    ):
        assert time.monotonic() < deadline_s, (ended, outcomes)
    assert not ended["failed"]
    assert ended.total() <= outcomes["whole"] + outcomes["left"] + outcomes["gone"]

    asyncio.run(crowd(server, 50))
    # Places that were left taken on a replica would hold this up.
    assert server.program.stop() == 0, server.program.output
