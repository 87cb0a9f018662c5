"""What the served graph costs beside the engine it serves.

    python -m benchmarks.graph_overhead            # writes results/graph_overhead.json
    python -m benchmarks.graph_overhead --quick    # within a minute

The same sentence goes over HTTP through three servers that run side by side, in alternating blocks, so that
whatever else the machine does hits all of them:

- ``uvicorn``     FastAPI and uvicorn in one process around the same engine class: the least a server can be;
- ``default``     the graph (proxy, ingress, router, engine replica) with Ray Serve's own settings;
- ``throughput``  the graph behind HAProxy with Serve's throughput settings.

The engine makes tones and takes no time beyond computing them, so what is left is overhead; ``paced``
requests go to a second engine that takes as long for each 0.2 s of audio as a fast model does. One client
process with keep-alive connections measures the first body byte and the last. ``GET /health/live`` stops in
the ingress and ``GET /health/ready`` in the router: their times say which hop costs what.

``--quick`` leaves out the ``throughput`` server (two graphs do not start within a minute on two cores; ask
for it with ``--mode throughput``), the paced engine, concurrency 8 and most of the repetitions.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import numpy as np
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from benchmarks.reporting import machine, write_result
from engines.contract import Reference, Utterance
from engines.tone.engine import SAMPLE_RATE_HZ, ToneConfig, ToneEngine
from serve_app.audio.encode import to_int16
from serve_app.client import HttpClient
from tests.speech import noisy_tone, wav_bytes

#: One utterance of 13 notes: 0.78 s of audio in four chunks.
SENTENCE = "The kettle is on."
SEED = 7
#: Of the sound that is enrolled as a voice.
PITCH_HZ = 180.0
#: Instant and paced engine. Paced: four steps for 0.78 s of audio are a real-time factor of 0.1.
MODELS: Final = {"tone": ToneConfig(slots=8), "paced": ToneConfig(slots=8, step_s=0.02)}
BASELINE = "uvicorn"
#: Environment of each graph; the second is the production setting. HAProxy's two ports are fixed by default
#: and replicas wait 30 s for outside load balancers to forget them.
MODES: Final[dict[str, dict[str, str]]] = {
    "default": {},
    "throughput": {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    },
}
READY_TIMEOUT_S = 180
STOP_TIMEOUT_S = 45
WARM_UP_REQUESTS = 30


@dataclass(frozen=True, slots=True)
class Timing:
    """One request: milliseconds to the first body byte and to the last."""

    first_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class Series:
    """One kind of request: ``requests`` by each of ``clients`` per block; GET unless a model is named."""

    name: str
    requests: int
    clients: int = 1
    model: str | None = None
    path: str = "/v1/audio/speech"


INSTANT = Series("tone, c=1", 50, model="tone")
LIVE = Series("GET /health/live", 30, path="/health/live")
READY = Series("GET /health/ready", 30, path="/health/ready")
CROWD = Series("tone, c=8", 10, clients=8, model="tone")
PACED = Series("paced, c=1", 10, model="paced")


@dataclass(frozen=True, slots=True)
class Server:
    """A server process that leads its own process group."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path


class BareBody(BaseModel):
    """The fields of ``POST /v1/audio/speech`` that this benchmark sends."""

    model: str
    voice: str
    input: str
    response_format: str
    seed: int


def utterance() -> Utterance:
    """The sentence, as the engine is given it."""
    engine = ToneEngine(MODELS["tone"])
    voice = engine.extract_voice(Reference(noisy_tone(PITCH_HZ), SAMPLE_RATE_HZ))
    return Utterance(SENTENCE, "en", voice, seed=SEED)


def bare_api() -> FastAPI:
    """What the baseline serves: the engine behind one streaming route, and nothing in between."""
    engines = {name: ToneEngine(config) for name, config in MODELS.items()}
    voice = utterance().conditioning
    api = FastAPI()

    @api.post("/v1/audio/speech")
    async def speak(body: BareBody) -> StreamingResponse:
        chunks = engines[body.model].synthesize([Utterance(body.input, "en", voice, seed=body.seed)])
        parts = (to_int16(chunk.samples).tobytes() for chunk in chunks)
        return StreamingResponse(parts, media_type="audio/pcm")

    @api.get("/health/live")
    @api.get("/health/ready")
    async def health() -> dict[str, str]:
        return {"status": "live"}

    return api


@contextmanager
def running_servers(modes: Sequence[str], models: Sequence[str], folder: Path) -> Iterator[list[Server]]:
    """All servers, ready; stopped on leaving, whatever the reason."""
    servers: list[Server] = []
    try:
        servers.append(start_bare(folder))
        for mode in modes:
            servers.append(start_graph(mode, models, folder))  # noqa: PERF401 - what runs must be stopped
        for server in servers:
            wait_ready(server)
        yield servers
    finally:
        stop(servers)


def start_bare(folder: Path) -> Server:
    """The baseline: ``bare_api`` in uvicorn."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", "benchmarks.graph_overhead:bare_api"]
    options = ["--port", str(port), "--log-level", "warning"]
    return _start(BASELINE, port, [*command, *options], {"OMP_NUM_THREADS": "1"}, folder)


def start_graph(mode: str, models: Sequence[str], folder: Path) -> Server:
    """``voice-clone serve`` with a Ray and a voice store of its own."""
    port = free_port()
    config = folder / f"{mode}.yaml"
    engines = {
        name: {"engine": "tone", "config": MODELS[name].model_dump(), "replicas": {"num_cpus": 0.1}}
        for name in models
    }
    limits = {"total": {"requests_per_minute": None}, "per_ip": {"requests_per_minute": None}}
    settings_tree = {
        "engines": engines,
        "voices": {"store": str(folder / mode / "voices")},
        "limits": limits,
    }
    # JSON is YAML too.
    config.write_text(json.dumps(settings_tree))
    serve = str(Path(sys.executable).with_name("voice-clone"))
    ray_folder = folder / mode
    ray_folder.mkdir()
    settings = {
        **MODES[mode],
        "RAY_TMPDIR": str(ray_folder),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(ray_folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(ray_folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(ray_folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(ray_folder / "server-state"),
    }
    return _start(
        mode, port, [serve, "serve", "--config", str(config), "--port", str(port)], settings, folder
    )


def _start(
    name: str, port: int, command: Sequence[str], variables: Mapping[str, str], folder: Path
) -> Server:
    # The caller's own settings of Ray, Serve and the server would be measured along.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "VOICE_CLONE_"))}
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**kept, **variables}, stdout=output, stderr=output, start_new_session=True
        )
    return Server(name, port, process, log)


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_ready(server: Server) -> None:
    """Return once the server can speak; end the benchmark with its log if it cannot."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s and server.process.poll() is None:
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
            connection.request("GET", "/health/ready")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    print(server.log.read_text(errors="replace")[-2000:], file=sys.stderr)
    raise SystemExit(f"The server '{server.name}' did not become ready.")


def stop(servers: Sequence[Server]) -> None:
    """Ask all at once, wait, and kill what is left of their process groups."""
    for server in servers:
        server.process.terminate()
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    for server in servers:
        try:
            server.process.wait(max(0.1, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"The server '{server.name}' did not stop in time and is killed.", file=sys.stderr)
        with suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


class Bench:
    """The running servers, the voice each knows, and all timings so far."""

    def __init__(self, servers: Sequence[Server], audio_bytes: int) -> None:
        self._servers = servers
        self._audio_bytes = audio_bytes
        self._seeds = count(SEED)
        self._voices = {server.name: self._enrol(server) for server in servers}
        self.timings: dict[tuple[str, str], list[Timing]] = defaultdict(list)

    @staticmethod
    def _enrol(server: Server) -> str:
        if server.name == BASELINE:
            return "the only one"
        with HttpClient(f"http://127.0.0.1:{server.port}") as tts:
            return tts.enrol("anna", wav_bytes(noisy_tone(PITCH_HZ))).id

    def run(self, series: Sequence[Series], rounds: int) -> None:
        """``rounds`` times one block of each series on each server, the order reversed every other time."""
        for server in self._servers:
            for kind in series:
                self._block(server, kind, max(1, WARM_UP_REQUESTS // kind.clients))
        for number in range(rounds):
            for kind in series:
                for server in self._servers if number % 2 else reversed(self._servers):
                    self.timings[server.name, kind.name] += self._block(server, kind, kind.requests)

    def _block(self, server: Server, series: Series, requests: int) -> list[Timing]:
        with ThreadPoolExecutor(series.clients) as clients:
            blocks = clients.map(partial(self._requests, server, series), [requests] * series.clients)
            return [timing for block in blocks for timing in block]

    def _requests(self, server: Server, series: Series, requests: int) -> list[Timing]:
        """Requests one after the other on one connection; the first, which opens it, does not count."""
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        try:
            return [self._request(connection, server, series) for _ in range(requests + 1)][1:]
        finally:
            connection.close()

    def _request(self, connection: http.client.HTTPConnection, server: Server, series: Series) -> Timing:
        body = series.model and json.dumps(
            {
                "model": series.model,
                "voice": self._voices[server.name],
                "input": SENTENCE,
                "response_format": "pcm",
                # Equal requests at the same time would share one recording.
                "seed": next(self._seeds),
            }
        )
        started_s = time.perf_counter()
        connection.request("POST" if body else "GET", series.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read1(1 << 16)
        first_s = time.perf_counter()
        answer += response.read()
        ended_s = time.perf_counter()
        if response.status != 200 or (series.model and len(answer) != self._audio_bytes):
            raise SystemExit(f"'{server.name}' answered {response.status}, {len(answer)} bytes.")
        return Timing(1000 * (first_s - started_s), 1000 * (ended_s - started_s))

    def p50_ms(self, server: str, series: Series) -> Timing:
        """Medians."""
        return self._percentile(server, series, 50)

    def _percentile(self, server: str, series: Series, percent: int) -> Timing:
        timings = self.timings[server, series.name]
        return Timing(
            float(np.percentile([timing.first_ms for timing in timings], percent)),
            float(np.percentile([timing.total_ms for timing in timings], percent)),
        )

    def table(self, series: Sequence[Series]) -> list[dict[str, str | float]]:
        """A row per series and server: p50 and p95 of first byte and total, and ratios to the baseline."""
        rows: list[dict[str, str | float]] = []
        for kind in series:
            bare = self.p50_ms(BASELINE, kind)
            for server in self._servers:
                p50, p95 = self.p50_ms(server.name, kind), self._percentile(server.name, kind, 95)
                rows.append(
                    {
                        "requests": kind.name,
                        "server": server.name,
                        "n": len(self.timings[server.name, kind.name]),
                        "first_p50_ms": round(p50.first_ms, 2),
                        "first_p95_ms": round(p95.first_ms, 2),
                        "total_p50_ms": round(p50.total_ms, 2),
                        "total_p95_ms": round(p95.total_ms, 2),
                        "ratio": round(p50.total_ms / bare.total_ms, 2),
                    }
                )
        return rows


def engine_alone_ms(engine: ToneEngine, spoken: Utterance, runs: int) -> tuple[float, int]:
    """Median time of the engine in this process, conversion to PCM included; and the bytes it makes."""
    waits_ms, audio_bytes = [], 0
    for _ in range(runs):
        started_s = time.perf_counter()
        audio_bytes = sum(len(to_int16(chunk.samples).tobytes()) for chunk in engine.synthesize([spoken]))
        waits_ms.append(1000 * (time.perf_counter() - started_s))
    return float(np.median(waits_ms)), audio_bytes


def summary(bench: Bench, modes: Sequence[str], series: Sequence[Series]) -> dict[str, float]:
    """The named figures, for each transport mode; milliseconds are the graph minus the bare server."""
    figures: dict[str, float] = {}
    bare = bench.p50_ms(BASELINE, INSTANT)
    live_bare = bench.p50_ms(BASELINE, LIVE).total_ms
    for mode in modes:
        full = bench.p50_ms(mode, INSTANT)
        live, ready = bench.p50_ms(mode, LIVE).total_ms, bench.p50_ms(mode, READY).total_ms
        figures |= {
            f"overhead_p50_ms_{mode}": full.total_ms - bare.total_ms,
            f"ratio_vs_uvicorn_{mode}": full.total_ms / bare.total_ms,
            f"first_chunk_overhead_ms_{mode}": full.first_ms - bare.first_ms,
            f"hop_proxy_and_ingress_ms_{mode}": live - live_bare,
            f"hop_router_ms_{mode}": ready - live,
        }
        for name, kind in (("c8", CROWD), ("paced", PACED)):
            if kind in series:
                other, base = bench.p50_ms(mode, kind), bench.p50_ms(BASELINE, kind)
                figures[f"overhead_{name}_p50_ms_{mode}"] = other.total_ms - base.total_ms
                figures[f"ratio_{name}_vs_uvicorn_{mode}"] = other.total_ms / base.total_ms
    return figures


def print_table(rows: Sequence[Mapping[str, str | float]]) -> None:
    """Show the rows to people."""
    times = {"first_p50_ms": 11, "first_p95_ms": 8, "total_p50_ms": 11, "total_p95_ms": 8, "ratio": 8}
    print(f"{'milliseconds':<32}{'n':>5}{'first p50':>11}{'p95':>8}{'total p50':>11}{'p95':>8}{'ratio':>8}")
    for row in rows:
        columns = "".join(f"{row[name]:>{width}.1f}" for name, width in times.items())
        print(f"{row['requests']:<20}{row['server']:<12}{row['n']:>5}{columns}")


def end_on_signal(_signal: int, _frame: FrameType | None) -> NoReturn:
    """A handler of SIGTERM: what was started is stopped on the way out."""
    raise SystemExit("Stopped.")


def main() -> None:
    """Run, print, and in a full run write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="within a minute")
    parser.add_argument(
        "--mode", choices=MODES, help="only this transport mode; --quick alone takes 'default'"
    )
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    modes = [arguments.mode] if arguments.mode else ["default"] if quick else list(MODES)
    models = ["tone"] if quick else list(MODELS)
    series = [INSTANT, LIVE, READY] if quick else [INSTANT, LIVE, READY, CROWD, PACED]
    # A killed benchmark must not leave two clusters behind.
    signal.signal(signal.SIGTERM, end_on_signal)
    at_start = machine()
    # Directly under /tmp: Ray keeps sockets here, and their paths may have 107 characters at most.
    with (
        tempfile.TemporaryDirectory(prefix="vc-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        running_servers(modes, models, Path(folder)) as servers,
    ):
        spoken, engine = utterance(), ToneEngine(MODELS["tone"])
        engine_alone_ms(engine, spoken, runs=20)
        alone_ms, audio_bytes = engine_alone_ms(engine, spoken, runs=100)
        bench = Bench(servers, audio_bytes)
        bench.run(series, rounds=2 if quick else 10)
        rows = bench.table(series)
        figures = {"engine_alone_ms": alone_ms, **summary(bench, modes, series)}
    print_table(rows)
    figures = {name: round(value, 3) for name, value in figures.items()}
    if not quick and not arguments.mode:
        write_result(
            "graph_overhead",
            figures,
            at=at_start,
            details={"load_average_after": os.getloadavg(), "rows": rows},
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
