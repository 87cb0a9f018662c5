"""Several Ray nodes, streaming clients, and things that die under them.

What dies with an engine is redone elsewhere: no client hears it. What dies with a router or an ingress is the
request it was working on: its client sees a broken connection or an error, never a short answer that looks
whole.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from benchmarks.ports import free_port
from tests.cluster.conftest import BIN, Program, run
from tests.cluster.load import Load
from tests.cluster.test_command_line import wait_ready
from tests.speech import noisy_tone, wav_bytes

pytestmark = pytest.mark.timeout(900)

MODES = {
    "default": {},
    "throughput": {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
}
SETTINGS: dict[str, Any] = {
    "engines": {
        "tone": {
            # Slow enough that clients wait for the engine and not for this machine's cores.
            "config": {"slots": 4, "step_s": 0.1},
            "replicas": {"num_cpus": 1, "min_replicas": 3, "max_replicas": 3},
            "batching": {"chunk_timeout_s": 5},
        }
    },
    "router": {"min_replicas": 2, "max_replicas": 2},
    "ingress": {"min_replicas": 2, "max_replicas": 2},
    "limits": {"total": {"requests_per_minute": None}, "per_ip": {"requests_per_minute": None}},
}


@dataclass
class Nodes:
    """A head without engines and workers that carry them."""

    environment: dict[str, str]
    head: Program
    address: str
    config_path: Path
    config: dict[str, Any]
    url: str
    workers: list[Program] = field(default_factory=list)

    @property
    def application(self) -> dict[str, Any]:
        """The configured application."""
        application: dict[str, Any] = self.config["applications"][0]
        return application

    def add_worker(self) -> None:
        """Another node with room for two engine replicas, up when this returns."""
        worker = Program(
            *(BIN / "ray", "start", "--block", f"--address={self.address}", "--num-cpus=2"),
            *("--node-ip-address=127.0.0.1", "--disable-usage-stats"),
            environment=self.environment,
        )
        self.workers.append(worker)
        deadline_s = time.monotonic() + 180
        while "Ray runtime started" not in worker.output:
            assert time.monotonic() < deadline_s, worker.output
            assert worker.process.poll() is None, worker.output
            time.sleep(0.5)

    def replicas(self, deployment: str, *programs: Program) -> list[psutil.Process]:
        """Processes of a deployment's replicas on the nodes of ``programs``, or on all."""
        wanted = f"ray::ServeReplica:voice-clone:{deployment}"
        return [process for process in self._processes(*programs) if wanted in title(process)]

    def controller(self) -> psutil.Process:
        """Serve's controller."""
        (controller,) = [p for p in self._processes() if "ray::ServeController" in title(p)]
        return controller

    def _processes(self, *programs: Program) -> list[psutil.Process]:
        return [
            child
            for program in programs or (self.head, *self.workers)
            if program.process.poll() is None
            for child in psutil.Process(program.process.pid).children(recursive=True)
        ]

    def deploy(self) -> None:
        """Deploy the configuration and wait until it is what runs."""
        self.config_path.write_text(yaml.safe_dump(self.config))
        answer = run(BIN / "serve", "deploy", self.config_path, environment=self.environment)
        assert answer.returncode == 0, answer.stdout
        self.wait_whole()

    def wait_whole(self, timeout_s: float = 180) -> None:
        """Return once every deployment has all the replicas it should have."""
        deadline_s = time.monotonic() + timeout_s
        while not self._whole():
            assert time.monotonic() < deadline_s, self.status()
            time.sleep(0.5)

    def status(self) -> dict[str, Any]:
        """What Serve says of the application; empty as long as it says nothing."""
        try:
            answer = httpx.get(
                f"{self.environment['RAY_DASHBOARD_ADDRESS']}/api/serve/applications/",
                headers={"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"},
                timeout=30,
            )
        except httpx.TransportError:
            return {}
        if answer.status_code != 200:
            return {}
        application: dict[str, Any] = answer.json()["applications"].get("voice-clone", {})
        return application

    def _whole(self) -> bool:
        status = self.status()
        deployments = status.get("deployments", {}).values()
        return status.get("status") == "RUNNING" and all(
            deployment["status"] == "HEALTHY" for deployment in deployments
        )


def title(process: psutil.Process) -> str:
    """What a process calls itself; empty if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module", params=MODES)
def nodes(
    request: pytest.FixtureRequest, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Nodes]:
    """Three nodes that serve the tone engine, with a voice called ``anna``."""
    directory = tmp_path_factory.mktemp("nodes")
    environment = {
        **environment,
        **MODES[request.param],
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "t" * 32,
        "RAY_worker_niceness": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    }
    gcs_port, dashboard_port, port = free_port(), free_port(), free_port()
    head = Program(
        *(BIN / "ray", "start", "--head", "--block", "--num-cpus=0", f"--port={gcs_port}"),
        *("--node-ip-address=127.0.0.1", f"--dashboard-port={dashboard_port}", "--disable-usage-stats"),
        environment=environment,
    )
    application = {
        "name": "voice-clone",
        "route_prefix": "/",
        "import_path": "serve_app.app:build_app",
        "args": {**SETTINGS, "voices": {"store": str(directory / "voices")}},
    }
    made = Nodes(
        environment={
            **environment,
            "RAY_ADDRESS": f"127.0.0.1:{gcs_port}",
            "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard_port}",
        },
        head=head,
        address=f"127.0.0.1:{gcs_port}",
        config_path=directory / "config.yaml",
        config={
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": port},
            "applications": [application],
        },
        url=f"http://127.0.0.1:{port}",
    )
    try:
        deadline_s = time.monotonic() + 180
        while run(BIN / "serve", "status", environment=made.environment).returncode != 0:
            assert time.monotonic() < deadline_s, head.output
            time.sleep(1)
        made.add_worker()
        made.add_worker()
        made.deploy()
        wait_ready(made.url, head)
        sample = {"audio_sample": ("anna.wav", wav_bytes(noisy_tone(180.0)))}
        httpx.post(
            f"{made.url}/v1/audio/voices", data={"name": "anna"}, files=sample, timeout=60
        ).raise_for_status()
        yield made
    finally:
        for program in (*made.workers, head):
            program.process.send_signal(signal.SIGTERM)
        for program in (*made.workers, head):
            program.kill_all()


@pytest.fixture(scope="module")
def load(nodes: Nodes) -> Load:
    """Clients who know what they should hear."""
    clients = Load(nodes.url)
    clients.learn()
    return clients


def test_killed_engines_are_not_heard(nodes: Nodes, load: Load) -> None:
    with load.running():
        for _ in range(2):
            os.kill(nodes.replicas("engine-tone")[0].pid, signal.SIGKILL)
            load.wait_for(16)
    assert set(load.outcomes) == {"whole"}, f"{load.outcomes} {load.refusals}"
    nodes.wait_whole()


def test_killed_controller_is_not_heard(nodes: Nodes, load: Load) -> None:
    with load.running():
        os.kill(nodes.controller().pid, signal.SIGKILL)
        load.wait_for(24)
    assert set(load.outcomes) == {"whole"}, f"{load.outcomes} {load.refusals}"
    nodes.wait_whole()


@pytest.mark.parametrize("deployment", ["router", "ingress"])
def test_killed_router_or_ingress_is_seen_by_its_clients_only(
    nodes: Nodes, load: Load, deployment: str
) -> None:
    with load.running():
        os.kill(nodes.replicas(deployment)[0].pid, signal.SIGKILL)
        load.wait_for(24)
    assert not load.outcomes["other"]
    # Each of the eight clients can have had one request there, and find the dead one once more on its way.
    assert load.outcomes["cut"] + load.outcomes["refused"] <= 16, f"{load.outcomes} {load.refusals}"
    nodes.wait_whole()


def test_changed_limits_apply_without_a_restart(nodes: Nodes, load: Load) -> None:
    before = {process.pid for process in nodes.replicas("router")}
    application = nodes.application
    application["deployments"] = [{"name": "router", "user_config": {"limits": {"max_input_chars": 10}}}]
    nodes.deploy()
    body = {"model": "tone", "voice": "anna", "input": "More than ten characters."}
    deadline_s = time.monotonic() + 60
    while httpx.post(f"{nodes.url}/v1/audio/speech", json=body, timeout=60).status_code != 400:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert {process.pid for process in nodes.replicas("router")} == before
    application["deployments"] = [{"name": "router", "user_config": {}}]
    nodes.deploy()
    deadline_s = time.monotonic() + 60
    while httpx.post(f"{nodes.url}/v1/audio/speech", json=body, timeout=60).status_code != 200:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_rolling_update_loses_nothing(nodes: Nodes, load: Load) -> None:
    before = {process.pid for process in nodes.replicas("engine-tone")}
    application = nodes.application
    with load.running():
        application["args"]["limits"] = {**SETTINGS["limits"], "max_input_chars": 4000}
        nodes.deploy()
        load.wait_for(16)
    assert set(load.outcomes) == {"whole"}, f"{load.outcomes} {load.refusals}"
    assert not before & {process.pid for process in nodes.replicas("engine-tone")}


def test_drained_node_loses_nothing(nodes: Nodes, load: Load) -> None:
    nodes.add_worker()
    going = nodes.workers[0]
    node_ids = _node_ids(nodes)
    with load.running():
        drained = run(
            *(
                BIN / "ray",
                "drain-node",
                "--address",
                nodes.address,
                "--node-id",
                node_ids[going.process.pid],
            ),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "maintenance"),
            *("--deadline-remaining-seconds", "300"),
            environment=nodes.environment,
        )
        assert drained.returncode == 0, drained.stdout
        deadline_s = time.monotonic() + 120
        while nodes.replicas("engine-tone", going):
            assert time.monotonic() < deadline_s, "the node was never left"
            time.sleep(0.5)
        load.wait_for(16)
    assert set(load.outcomes) == {"whole"}, f"{load.outcomes} {load.refusals}"
    nodes.wait_whole()


def test_lost_node_costs_only_what_its_routers_had(nodes: Nodes, load: Load) -> None:
    """Last of all: a worker goes without a word."""
    nodes.add_worker()
    going = max(nodes.workers, key=lambda worker: len(nodes.replicas("engine-tone", worker)))
    front = len(nodes.replicas("router", going)) + len(nodes.replicas("ingress", going))
    with load.running():
        going.kill_all()
        load.wait_for(24)
    assert not load.outcomes["other"]
    if not front:
        assert set(load.outcomes) == {"whole"}, f"{load.outcomes} {load.refusals}"
    assert load.outcomes["cut"] + load.outcomes["refused"] <= 16 * max(front, 1)
    nodes.wait_whole()


def _node_ids(nodes: Nodes) -> dict[int, str]:
    """Ray's node id by the process id of the program that started the node."""
    listing = run(
        *(BIN / "ray", "list", "nodes", "--format", "json", "--detail"), environment=nodes.environment
    ).stdout
    listed = json.loads(listing[listing.index("[") :])
    by_raylet: dict[int, str] = {}
    for worker in nodes.workers:
        if worker.process.poll() is not None:
            continue
        for child in psutil.Process(worker.process.pid).children(recursive=True):
            for node in listed:
                if any(str(node["node_id"]) in part for part in child.cmdline()):
                    by_raylet[worker.process.pid] = node["node_id"]
    return by_raylet
