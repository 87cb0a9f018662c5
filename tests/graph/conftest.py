"""One local Ray with one served graph for all tests of this folder."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.util import list_named_actors

from benchmarks.ports import free_port
from engines.registry import GROUP
from serve_app.app import APP_NAME, build_app, router_handle
from serve_app.config import Settings
from serve_app.environment import prepare_environment
from serve_app.protocol import ReplicaActivity, RouterActivity
from tests.speech import noisy_tone, wav_bytes
from tests.whisper import whisper_folder

TICKET = Path(tempfile.gettempdir()) / f"voice-clone-fault-{os.getpid()}"

#: One fault per ticket, in whichever replica comes to it.
SHAKY: dict[str, Any] = {
    "engine": "tone",
    "config": {"slots": 2, "step_s": 0.01, "fault_after_chunks": 2, "fault_ticket": str(TICKET)},
    "replicas": {"num_cpus": 0.1, "min_replicas": 2, "max_replicas": 2},
}

#: Keys of the graph under test by holder; its callers without one may do everything too.
SECRETS = {"studio": "vc_studio_secret", "rival": "vc_rival_secret", "reader": "vc_reader", "boss": "vc_boss"}
_SCOPES = {"reader": ["speak"], "boss": ["admin"]}

SETTINGS: dict[str, Any] = {
    "keys": {
        name: {
            "sha256": hashlib.sha256(secret.encode()).hexdigest(),
            "scopes": _SCOPES.get(name, ["speak", "voices"]),
        }
        for name, secret in SECRETS.items()
    },
    "anonymous": ["admin"],
    "engines": {
        "tone": {"config": {"slots": 4, "step_s": 0.005}, "replicas": {"num_cpus": 0.1}},
        # Slow enough that a client can leave in the middle and that requests meet in a batch.
        "slow": {"engine": "tone", "config": {"slots": 4, "step_s": 0.1}, "replicas": {"num_cpus": 0.1}},
        # For one test alone: metrics are exported every few seconds, so those of an earlier test come late.
        "counted": {"engine": "tone", "config": {"slots": 4, "step_s": 0.1}, "replicas": {"num_cpus": 0.1}},
        "pair": {
            "engine": "tone",
            "config": {"slots": 1, "step_s": 0.03},
            "replicas": {"num_cpus": 0.1, "min_replicas": 2, "max_replicas": 2},
        },
        "shaky": {**SHAKY, "batching": {"chunk_timeout_s": 2.0}},
        "unreserved": {**SHAKY, "batching": {"chunk_timeout_s": 2.0, "form_in": "replica"}},
        # Every text is marked: it never speaks.
        "mute": {
            "engine": "tone",
            "config": {"fail_text": ""},
            "replicas": {"num_cpus": 0.1},
            "fallback": ["tone"],
        },
        # For the test that has it stand by.
        "resting": {"engine": "tone", "replicas": {"num_cpus": 0.1}},
        "mosaic": {"replicas": {"num_cpus": 0.1}},
    },
    "model_aliases": {"quick": "tone"},
    "limits": {
        "first_audio_timeout_s": 20,
        "look_ahead_s": 6,
        # All tests come from one address. Limits have a graph of their own: test_admission.py.
        "total": {"requests_per_minute": None},
        "per_ip": {"requests_per_minute": None},
    },
}


@dataclass(frozen=True)
class Server:
    """Where the graph under test listens, and how to talk to it."""

    url: str
    store: Path
    http: httpx.Client
    openai: OpenAI


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The served graph, with a voice called ``anna``."""
    prepare_environment()
    store = tmp_path_factory.mktemp("store")
    english = {
        "engine": "mosaic",
        "replicas": {"num_cpus": 0.1},
        "runtime_env": _without_espeak(tmp_path_factory.mktemp("site")),
    }
    plug_in = tmp_path_factory.mktemp("plug_in")
    search_path = os.pathsep.join([_declared_in(plug_in), str(Path(__file__).parents[2])])
    reading = {"replicas": {"num_cpus": 0.1}, "runtime_env": {"env_vars": {"PYTHONPATH": search_path}}}
    settings = {
        **SETTINGS,
        "engines": {**SETTINGS["engines"], "english": english, "reading": reading},
        "transcriber": {"model": str(whisper_folder()), "replicas": {"num_cpus": 0.1}},
        "voices": {"store": str(store), "aliases": {"alloy": "anna"}},
    }
    port = free_port()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(
            proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host="127.0.0.1", port=port)
        )
        # Not for longer: other tests look at all engines that are installed.
        sys.path.append(str(plug_in))
        app = build_app(Settings.model_validate(settings))
        sys.path.remove(str(plug_in))
        serve.run(app, name=APP_NAME, external_scaler_enabled=True)
        url = f"http://127.0.0.1:{port}"
        openai = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with httpx.Client(base_url=url, timeout=60) as http:
            sample = {"audio_sample": ("anna.wav", wav_bytes(noisy_tone(180.0)))}
            http.post("/v1/audio/voices", data={"name": "anna"}, files=sample).raise_for_status()
            yield Server(url, store, http, openai)
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _without_espeak(folder: Path) -> dict[str, Any]:
    """A runtime environment in which the package of the espeak extra cannot be imported."""
    (folder / "sitecustomize.py").write_text('import sys\nsys.modules["espeakng_loader"] = None\n')
    return {"env_vars": {"PYTHONPATH": str(folder)}}


def _declared_in(folder: Path) -> str:
    """Declare the reading engine in ``folder``, as another distribution would."""
    facts = folder / "reading_engine-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: reading-engine\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(f"[{GROUP}]\nreading = tests.reading_engine:ReadingEngine\n")
    return str(folder)


def activity(engine: str) -> list[ReplicaActivity]:
    """What each replica of an engine does and has done."""
    handle = serve.get_deployment_handle(f"engine-{engine}", app_name=APP_NAME)
    answers: list[ReplicaActivity] = handle.broadcast("activity").results()
    return answers


def places_taken(engine: str) -> int:
    """Places on the replicas of an engine that Serve counts as taken, by running calls and reservations."""
    replicas = [
        ray.get_actor(actor["name"], actor["namespace"])
        for actor in list_named_actors(all_namespaces=True)
        if f"engine-{engine}#" in actor["name"]
    ]
    assert replicas
    return sum(ray.get([replica.get_num_ongoing_requests.remote() for replica in replicas]))


def router_activity() -> RouterActivity:
    """What the router holds now."""
    (answer,) = router_handle().broadcast("activity").results()
    assert isinstance(answer, RouterActivity)
    return answer


def exported() -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, tags and value of each of our series, as Prometheus gets them."""
    (node,) = ray.nodes()  # type: ignore[no-untyped-call]
    page = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name.startswith("ray_tts_"):
                yield sample.name.removeprefix("ray_"), sample.labels, sample.value


def counted(series: str, **tags: str) -> float:
    """Sum of a series over all processes, of those with these tags."""
    return sum(
        value for name, labels, value in exported() if name == series and tags.items() <= labels.items()
    )


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait until ``condition`` holds; fail if it never does."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never held"
        time.sleep(0.05)
