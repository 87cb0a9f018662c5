"""What the router adds when much waits, and what more replicas give.

    python -m benchmarks.router            # writes results/router.json, in half an hour
    python -m benchmarks.router --quick    # within five minutes

Batching: the policies of benchmarks/batching_policies.py under three loads, with one router and with two.
Ours against the best of the others at each: served requests, and 50th and 95th percentile of first audio.

Queue: requests of 50 clients wait at once for one engine whose replica answers at once and in this process.
CPU time from the first submission to the last end, per request, with few and with many waiting: it should not
depend on how many wait.

Scaling: one long text, spoken by an engine that sleeps half a second for a sentence, on one, two and four
replicas behind the same router. Efficiency is the speed-up over one replica, by the number of replicas. The
samples must be the same each time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

from serve_app.environment import prepare_environment

# Ray reads it when it is imported.
prepare_environment()

import numpy as np
import ray
from ray import serve
from ray.serve.config import ProxyLocation

from benchmarks.batching_policies import CEILING_PER_S, OURS, POLICIES, Answered, compare, deploy
from benchmarks.reporting import machine, write_result
from engines.contract import Conditioning, Samples
from serve_app.app import APP_NAME, build_app, router_handle
from serve_app.config import Settings
from serve_app.handle import RouterHandle
from serve_app.metrics import Metrics
from serve_app.protocol import AudioFrame, BatchTerms, EnrolRequest, RowAudio, SpeechRequest, UtteranceCall
from serve_app.router.batching import EngineQueue, QueueLimits
from serve_app.router.dispatch import EngineDispatch, Slot, rows_per_call
from serve_app.router.rows import Row
from tests.speech import noisy_tone, wav_bytes

CLIENTS = 50
SLOTS = 8
FEW, MANY = 100, 1000
REPEATS = 7
REPLICAS = (1, 2, 4)
ROUTERS = (1, 2)
#: Shares of what the engines can serve.
LOADS = (0.2, 0.6, 0.85)
LOAD_S, QUICK_LOAD_S = 15.0, 2.0
LOAD_REPEATS = 2
SENTENCES, QUICK_SENTENCES = 200, 16
#: One chunk holds any of the sentences: the engine sleeps once for each.
STEP_S = 0.5
ENGINE_CONFIG = {"slots": 1, "step_s": STEP_S, "chunk_s": 10.0}


class InstantReplica(EngineDispatch):
    """One replica with one slot that answers every row with a little sound."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(1)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """The only one."""
        async with self._free:
            yield Slot(self._answer, "replica")

    async def _answer(
        self, batch: list[UtteranceCall], terms: BatchTerms, avoid: str | None
    ) -> AsyncGenerator[list[RowAudio], None]:
        sound = np.full(240, 0.1, np.float32)
        yield [RowAudio(row, sound, last=True) for row in range(len(batch))]


async def queue_cost_us(waiting: int) -> float:
    """CPU time of one request in microseconds if ``waiting`` are submitted at once."""
    limits = QueueLimits(
        rows_per_call=rows_per_call(SLOTS),
        max_rows=SLOTS,
        max_chars=None,
        max_waiting=waiting,
        max_wait_s=60,
        max_redo_wait_s=60,
        chunk_timeout_s=60,
    )
    queue = EngineQueue("instant", InstantReplica(), limits, Metrics(), 24_000)
    voice = Conditioning("instant", "1", {})

    async def hear(row: Row) -> None:
        async for _ in row.join():
            pass

    began_s = time.process_time()
    rows = [
        queue.submit(
            UtteranceCall("", f"Request {number}.", "en", voice, seed=number), client=str(number % CLIENTS)
        )
        for number in range(waiting)
    ]
    await asyncio.gather(*(hear(row) for row in rows))
    return 1e6 * (time.process_time() - began_s) / waiting


def queue_costs() -> dict[int, float]:
    """Median cost with few and with many waiting, measured in turn."""
    measured: dict[int, list[float]] = {FEW: [], MANY: []}
    for _ in range(REPEATS):
        for waiting, costs in measured.items():
            costs.append(asyncio.run(queue_cost_us(waiting)))
    return {waiting: float(np.median(costs)) for waiting, costs in measured.items()}


async def speak(engine: str, text: str) -> tuple[float, Samples]:
    """Seconds and samples of one text."""
    request = SpeechRequest(text, "anna", engine, seed=1)
    began_s = time.perf_counter()
    frames = [frame async for frame in RouterHandle(router_handle()).speak(request)]
    spoken_s = time.perf_counter() - began_s
    return spoken_s, np.concatenate([frame.samples for frame in frames if isinstance(frame, AudioFrame)])


def scaling(sentences: int) -> dict[int, float]:
    """Seconds for a text of so many sentences by number of replicas."""
    text = " ".join(f"Sentence {number} of the long text." for number in range(sentences))
    with tempfile.TemporaryDirectory() as store:
        engines = {
            f"on{replicas}": {
                "engine": "tone",
                "config": ENGINE_CONFIG,
                "replicas": {"num_cpus": 0.1, "min_replicas": replicas, "max_replicas": replicas},
            }
            for replicas in REPLICAS
        }
        settings = {"engines": engines, "voices": {"store": store}, "limits": {"max_input_chars": len(text)}}
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            serve.start(proxy_location=ProxyLocation.Disabled)
            serve.run(build_app(Settings.model_validate(settings)), name=APP_NAME)
            recording = EnrolRequest("anna", wav_bytes(noisy_tone(180.0)))
            asyncio.run(RouterHandle(router_handle()).enrol(recording))
            for replicas in REPLICAS:
                asyncio.run(speak(f"on{replicas}", "Warm up."))
            results = {replicas: asyncio.run(speak(f"on{replicas}", text)) for replicas in REPLICAS}
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
    for _, samples in results.values():
        if not np.array_equal(samples, results[1][1]):
            raise SystemExit("More replicas have spoken something else.")
    return {replicas: spoken_s for replicas, (spoken_s, _) in results.items()}


def batching(quick: bool) -> dict[int, dict[float, dict[str, Answered]]]:
    """How each policy does, by number of routers and requests a second."""
    results = {}
    for routers in ROUTERS[:1] if quick else ROUTERS:
        with tempfile.TemporaryDirectory() as store:
            ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
            try:
                serve.start(proxy_location=ProxyLocation.Disabled)
                for policy in POLICIES:
                    deploy(policy, routers, f"{store}/{policy}")
                loads_per_s = [round(share * CEILING_PER_S, 1) for share in LOADS]
                seconds, repeats = (QUICK_LOAD_S, 1) if quick else (LOAD_S, LOAD_REPEATS)
                results[routers] = asyncio.run(compare(POLICIES, loads_per_s, seconds, repeats))
            finally:
                serve.shutdown()  # type: ignore[no-untyped-call]
                ray.shutdown()
    return results


def against_best(results: dict[str, Answered]) -> Answered:
    """Ours over the best of the others, each at least as good if 1 or more."""
    ours, others = results[OURS], [results[policy] for policy in POLICIES if policy != OURS]
    return Answered(
        ours.per_s / max(other.per_s for other in others),
        min(other.p50_s for other in others) / ours.p50_s,
        min(other.p95_s for other in others) / ours.p95_s,
    )


def main() -> None:
    """Measure, print a table, and write the results unless quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short text, no results file")
    quick = parser.parse_args().quick
    at = machine()
    costs_us = queue_costs()
    for waiting, cost_us in costs_us.items():
        print(f"{waiting:5} waiting: {cost_us:6.1f} µs of CPU a request")
    compared = batching(quick)
    ratios = []
    for routers, by_load in compared.items():
        for per_s, answered in by_load.items():
            print(f"{routers} router{'s' * (routers > 1)}, {per_s:g} requests a second:")
            for policy, one in answered.items():
                print(f"  {policy:10} {one.per_s:5.1f}/s, p50 {one.p50_s:6.2f} s, p95 {one.p95_s:6.2f} s")
            ratios.append(against_best(answered))
    sentences = QUICK_SENTENCES if quick else SENTENCES
    spoken_s = scaling(sentences)
    figures = {
        "queue_cost_us": costs_us[MANY],
        "queue_cost_ratio_many_to_few": costs_us[MANY] / costs_us[FEW],
        "throughput_vs_best": min(ratio.per_s for ratio in ratios),
        "p50_vs_best": min(ratio.p50_s for ratio in ratios),
        "p95_vs_best": min(ratio.p95_s for ratio in ratios),
    }
    for replicas, seconds in spoken_s.items():
        efficiency = spoken_s[1] / seconds / replicas
        print(f"{sentences} sentences on {replicas} replicas: {seconds:6.1f} s, efficiency {efficiency:.2f}")
        if replicas > 1:
            figures[f"scaling_efficiency_{replicas}"] = efficiency
    if not quick:
        details = {
            "sentences": sentences,
            "step_s": STEP_S,
            "seconds": spoken_s,
            "queue_us": costs_us,
            "batching": {
                f"{routers} routers, {per_s:g}/s, {policy}": asdict(one)
                for routers, by_load in compared.items()
                for per_s, answered in by_load.items()
                for policy, one in answered.items()
            },
        }
        print(f"Written: {write_result('router', figures, at=at, details=details).relative_to(Path.cwd())}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
