"""Where a batch may be formed, under the same open load: our two settings beside the usual two ways.

All speak with the same engine, whose one step costs 0.30 s and 0.03 s more for each row, one batch at a time,
on two replicas:

- ``router``: the served graph as it is by default; the router reserves a place, then takes what waits;
- ``replica``: the same graph with ``batching.form_in: replica``; rows wait in the replica until it is free;
- ``decorator``: ``@serve.batch`` around the engine, behind a router that only passes calls on;
- ``timer``: a router that collects for 20 ms and sends.

Requests come as a Poisson process, the same arrivals for every policy; nobody waits for an answer before the
next one asks. First audio counts from the call to the first samples in the caller's process.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from ray import serve
from ray.serve.handle import DeploymentHandle

from engines.contract import Conditioning, Samples, Utterance
from engines.tone.engine import ToneConfig, ToneEngine
from serve_app.app import ROUTER, build_app
from serve_app.config import Settings
from serve_app.handle import RouterHandle
from serve_app.protocol import AudioFrame, EnrolRequest, SpeechRequest
from tests.speech import noisy_tone, wav_bytes

SLOTS = 8
REPLICAS = 2
#: One chunk holds any of the texts: the engine makes one step for a batch.
ENGINE = {"slots": SLOTS, "step_s": 0.30, "row_s": 0.03, "chunk_s": 10.0}
#: What both replicas can serve a second, every batch full.
CEILING_PER_S = REPLICAS * SLOTS / (ENGINE["step_s"] + SLOTS * ENGINE["row_s"])
COLLECT_S = 0.02
OURS, IN_REPLICA, DECORATOR, TIMER = POLICIES = ("router", "replica", "decorator", "timer")

Ask = Callable[[str, int], Awaitable[float]]


@dataclass(frozen=True, slots=True)
class Answered:
    """How one policy did under one load."""

    per_s: float
    p50_s: float
    p95_s: float


class PlainEngine:
    """The engine in a deployment, one batch at a time, and nothing around it."""

    def __init__(self) -> None:
        self._engine = ToneEngine(ToneConfig.model_validate(ENGINE))
        self._engine.load()
        self._turn = threading.Lock()

    def _speak(self, texts: Sequence[tuple[str, int]]) -> list[Samples]:
        pitch_hz = np.asarray([180.0], np.float32)
        voice = Conditioning("tone", self._engine.weights_fingerprint, {"pitch_hz": pitch_hz})
        with self._turn:
            chunks = list(
                self._engine.synthesize([Utterance(text, "en", voice, seed=seed) for text, seed in texts])
            )
        for chunk in chunks:
            if chunk.error is not None:
                raise chunk.error
        return [chunk.samples for chunk in sorted(chunks, key=lambda chunk: chunk.row)]

    async def many(self, texts: list[tuple[str, int]]) -> list[Samples]:
        """A whole batch, for a router that has formed it."""
        return await asyncio.to_thread(self._speak, texts)

    @serve.batch(max_batch_size=SLOTS, batch_wait_timeout_s=COLLECT_S)
    async def one(self, texts: list[tuple[str, int]]) -> list[Samples]:
        """One text; the decorator makes a list of those that come at once."""
        return await asyncio.to_thread(self._speak, texts)


class PassingRouter:
    """Hands each call to an engine."""

    def __init__(self, engine: DeploymentHandle[Any]) -> None:
        self._engine = engine

    async def speak(self, text: str, seed: int) -> Samples:
        """One text."""
        samples: Samples = await self._engine.one.remote((text, seed))
        return samples


class TimerRouter:
    """Collects for a fixed time, then sends what has come."""

    def __init__(self, engine: DeploymentHandle[Any]) -> None:
        self._engine = engine
        self._waiting: list[tuple[tuple[str, int], asyncio.Future[Samples]]] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def speak(self, text: str, seed: int) -> Samples:
        """One text."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(COLLECT_S, self._send)
        answer: asyncio.Future[Samples] = asyncio.get_running_loop().create_future()
        self._waiting.append(((text, seed), answer))
        return await answer

    def _send(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:SLOTS], self._waiting[SLOTS:]
            task = asyncio.create_task(self._exchange(batch))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _exchange(self, batch: list[tuple[tuple[str, int], asyncio.Future[Samples]]]) -> None:
        spoken = await self._engine.many.remote([text for text, _ in batch])
        for samples, (_, answer) in zip(spoken, batch, strict=True):
            answer.set_result(samples)


def deploy(policy: str, routers: int, store: str) -> None:
    """Run the application of ``policy`` under its name."""
    if policy in (DECORATOR, TIMER):
        engine = serve.deployment(PlainEngine).options(  # type: ignore[attr-defined]
            num_replicas=REPLICAS, max_ongoing_requests=64, ray_actor_options={"num_cpus": 0}
        )
        kind = PassingRouter if policy == DECORATOR else TimerRouter
        router = serve.deployment(kind).options(  # type: ignore[attr-defined]
            num_replicas=routers, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, name=ROUTER
        )
        serve.run(router.bind(engine.bind()), name=policy, route_prefix=None)
        return
    engine_settings = {
        "config": ENGINE,
        "replicas": {"num_cpus": 0, "min_replicas": REPLICAS, "max_replicas": REPLICAS},
        "batching": {"form_in": policy},
    }
    settings = {
        "engines": {"tone": engine_settings},
        "router": {"num_cpus": 0, "min_replicas": routers, "max_replicas": routers},
        "ingress": {"num_cpus": 0},
        "voices": {"store": store},
        "limits": {
            "total": {"requests_per_minute": None, "concurrent": None},
            "per_ip": {"requests_per_minute": None, "concurrent": None},
        },
    }
    serve.run(build_app(Settings.model_validate(settings)), name=policy, route_prefix=None)


async def asker(policy: str) -> Ask:
    """What asks the running application of ``policy`` and answers the seconds to the first audio."""
    handle = serve.get_deployment_handle(ROUTER, app_name=policy)
    if policy in (DECORATOR, TIMER):

        async def ask_plain(text: str, seed: int) -> float:
            began_s = time.perf_counter()
            await handle.speak.remote(text, seed)
            return time.perf_counter() - began_s

        return ask_plain
    router = RouterHandle(handle)
    await router.enrol(EnrolRequest("anna", wav_bytes(noisy_tone(180.0)), replace=True))

    async def ask(text: str, seed: int) -> float:
        began_s = time.perf_counter()
        first_audio_s: float | None = None
        async for event in router.speak(SpeechRequest(text, "anna", "tone", seed=seed)):
            if first_audio_s is None and isinstance(event, AudioFrame):
                first_audio_s = time.perf_counter() - began_s
        assert first_audio_s is not None, "an answer without audio"  # noqa: S101
        return first_audio_s

    return ask


async def compare(
    policies: Sequence[str], loads_per_s: Sequence[float], seconds: float, repeats: int
) -> dict[float, dict[str, Answered]]:
    """Medians of every policy under every load, measured in turn. The applications must be running."""
    asks = {policy: await asker(policy) for policy in policies}
    for ask in asks.values():
        await asyncio.gather(*(ask("Warm up.", seed) for seed in range(REPLICAS)))
    seeds = count(REPLICAS, 1_000_000)
    results: dict[float, dict[str, Answered]] = {}
    for per_s in loads_per_s:
        runs: dict[str, list[Answered]] = {policy: [] for policy in policies}
        for _ in range(repeats):
            for policy, ask in asks.items():
                runs[policy].append(await under_load(ask, per_s, seconds, next(seeds)))
        results[per_s] = {policy: _median(answered) for policy, answered in runs.items()}
    return results


def _median(runs: list[Answered]) -> Answered:
    return Answered(*np.median([(run.per_s, run.p50_s, run.p95_s) for run in runs], axis=0).tolist())


async def under_load(ask: Ask, per_s: float, seconds: float, first_seed: int) -> Answered:
    """Ask at ``per_s`` for ``seconds``; the same arrivals every time."""
    requests = round(per_s * seconds)
    gaps_s = np.random.default_rng(7).exponential(1 / per_s, requests)
    began_s = time.perf_counter()

    async def arrive(number: int, at_s: float) -> float:
        await asyncio.sleep(max(0.0, began_s + at_s - time.perf_counter()))
        return await ask(f"Request number {number}.", first_seed + number)

    waits_s = await asyncio.gather(*(arrive(n, at_s) for n, at_s in enumerate(np.cumsum(gaps_s).tolist())))
    took_s = time.perf_counter() - began_s
    p50_s, p95_s = np.percentile(waits_s, [50, 95])
    return Answered(requests / took_s, float(p50_s), float(p95_s))
