"""Processes as a user starts them: each test has a Ray of its own, away from any other on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ports import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a fresh user: own Ray directory, own voice store, nothing inherited that matters."""
    # Not pytest's directory: Ray's socket paths must stay below 108 characters.
    ray_directory = tempfile.mkdtemp(prefix="vc", dir="/tmp")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VOICE_CLONE"))}
    yield {
        **kept,
        "RAY_TMPDIR": ray_directory,
        "VOICE_CLONE__VOICES__STORE": str(tmp_path_factory.mktemp("store") / "voices"),
        "COLUMNS": "300",
        "TERM": "dumb",
    }
    shutil.rmtree(ray_directory, ignore_errors=True)


def haproxy_environment(directory: Path) -> dict[str, str]:
    """Serve's production transport, with ports and files of its own: the defaults are one for a machine."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
    }


class Program:
    """A started program whose output is kept and which is gone, children and all, in the end."""

    def __init__(self, *command: str | Path, environment: dict[str, str]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the program
        self.process = subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            cwd=ROOT,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        self.log.seek(0)
        return self.log.read()

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 60) -> int:
        """Send a signal and wait for the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def kill_all(self) -> None:
        """End whatever is left of its process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


def run(
    *command: str | Path, environment: dict[str, str], timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; output and error output together in ``stdout``."""
    return subprocess.run(
        [str(part) for part in command],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def look_inside(environment: dict[str, str]) -> dict[str, Any]:
    """What routers and engine replicas of the server in this environment hold and have counted."""
    # A handle in the throughput mode needs an event loop; one without it asks such a cluster as well.
    kept = {name: value for name, value in environment.items() if not name.startswith("RAY_SERVE")}
    answer = run(sys.executable, "-m", "tests.cluster.activity", environment=kept)
    assert answer.returncode == 0, answer.stdout
    # Ray prints what it likes beside it.
    (line,) = (line for line in answer.stdout.splitlines() if line.startswith("{"))
    found: dict[str, Any] = json.loads(line)
    return found


def raw_speech_request(data: bytes, declared_bytes: int | None = None) -> bytes:
    """A speech request as it goes over the wire, for clients no library wants to be."""
    length = len(data) if declared_bytes is None else declared_bytes
    head = (
        "POST /v1/audio/speech HTTP/1.1",
        "Host: here",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    )
    return "\r\n".join((*head, "", "")).encode() + data
