"""CPU time that one request and one chunk of audio cost each part of the graph.

    python -m benchmarks.unit_costs            # writes results/unit_costs.json
    python -m benchmarks.unit_costs --quick    # within a minute

A server in Serve's production transport speaks short and long sentences for some clients at once, with an
engine that takes 20 ms for each chunk of 0.2 s of audio. The CPU time of every process is read before and
after each block; two lengths of sentence give a cost for each request and one for each further chunk. CPU
time, not wall time: other work on the machine hardly shows. docs/scaling.md reckons with these figures.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

import httpx
import numpy as np
import psutil

from benchmarks.graph_overhead import Server, end_on_signal, start_graph, stop, wait_ready
from benchmarks.reporting import machine, write_result
from serve_app.client import HttpClient
from tests.speech import noisy_tone, wav_bytes

#: Notes of a short and of a long sentence; each note is 0.06 s, each chunk 0.2 s.
SHORT, LONG = "The kettle is on.", "The kettle is on and everybody waits for tea " * 4
CHUNK_S = 0.2
CLIENTS = 8
FORMATS = ("pcm", "mp3")
#: Parts by what their processes call themselves.
PARTS = {
    "haproxy": r"^haproxy\b|/haproxy ",
    "ingress": r"^ray::ServeReplica:voice-clone:ingress",
    "router": r"^ray::ServeReplica:voice-clone:router",
    "engine": r"^ray::ServeReplica:voice-clone:engine",
    "controller": r"^ray::ServeController",
    "raylet and gcs": r"raylet/raylet |gcs_server",
}


def chunks(text: str) -> float:
    """Chunks of audio that a text takes."""
    return float(np.ceil(sum(character.isalnum() for character in text) * 0.06 / CHUNK_S))


def cpu_s(server: Server) -> dict[str, float]:
    """CPU seconds so far, by part."""
    spent: dict[str, float] = defaultdict(float)
    for process in psutil.Process(server.process.pid).children(recursive=True):
        title = " ".join(process.cmdline())
        for part, pattern in PARTS.items():
            if re.search(pattern, title):
                times = process.cpu_times()
                spent[part] += times.user + times.system
    return spent


def block(server: Server, text: str, audio_format: str, requests: int, seeds: count[int]) -> dict[str, float]:
    """CPU milliseconds a request, by part."""
    url = f"http://127.0.0.1:{server.port}/v1/audio/speech"
    body = {"model": "paced", "voice": "anna", "input": text, "response_format": audio_format}

    def client(_: int) -> None:
        with httpx.Client(timeout=60) as http:
            for _ in range(requests // CLIENTS):
                http.post(url, json={**body, "seed": next(seeds)}).raise_for_status()

    before = cpu_s(server)
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(client, range(CLIENTS)))
    after = cpu_s(server)
    return {part: 1000 * (after[part] - before[part]) / requests for part in PARTS}


def measure(server: Server, requests: int, rounds: int) -> dict[str, float]:
    """Milliseconds by part, of a request with one chunk and of each further chunk; medians of rounds."""
    with HttpClient(f"http://127.0.0.1:{server.port}") as tts:
        tts.enrol("anna", wav_bytes(noisy_tone(180.0)))
    seeds = count()
    speak = partial(block, server, requests=requests, seeds=seeds)
    speak(SHORT, "pcm")
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for audio_format in FORMATS:
            short, long = speak(SHORT, audio_format), speak(LONG, audio_format)
            for part in PARTS:
                a_chunk_ms = (long[part] - short[part]) / (chunks(LONG) - chunks(SHORT))
                name = f"{part.replace(' ', '_')}_{audio_format}"
                found[f"{name}_request_ms"].append(short[part] - a_chunk_ms * (chunks(SHORT) - 1))
                found[f"{name}_chunk_ms"].append(a_chunk_ms)
    return {name: float(np.median(values)) for name, values in found.items()}


def main() -> None:
    """Measure, print a table, and write the results unless quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer requests, no results file")
    quick: bool = parser.parse_args().quick
    signal.signal(signal.SIGTERM, end_on_signal)
    at = machine()
    # Directly under /tmp: Ray keeps sockets here, and their paths may have 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="vc-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        server = start_graph("throughput", ["paced"], Path(folder))
        try:
            wait_ready(server)
            figures = measure(server, *((80, 1) if quick else (160, 3)))
        finally:
            stop([server])
    print(f"{'CPU milliseconds':20}{'format':>8}{'request':>10}{'chunk':>10}")
    for part in PARTS:
        for audio_format in FORMATS:
            name = f"{part.replace(' ', '_')}_{audio_format}"
            request_ms, chunk_ms = figures[f"{name}_request_ms"], figures[f"{name}_chunk_ms"]
            print(f"{part:20}{audio_format:>8}{request_ms:>10.2f}{chunk_ms:>10.3f}")
    if not quick:
        write_result("unit_costs", figures, at=at, details={})
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
