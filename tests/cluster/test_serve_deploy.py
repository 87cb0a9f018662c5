"""``serve deploy serve_config.yaml`` on a Ray that runs, exactly as README says it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from benchmarks.ports import free_port
from tests.cluster.conftest import BIN, ROOT, Program, run
from tests.cluster.test_command_line import wait_ready
from tests.speech import noisy_tone, wav_bytes


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[tuple[dict[str, str], Program]]:
    """A Ray head with its dashboard; the environment to reach it."""
    environment = {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 32}
    gcs_port, dashboard_port = free_port(), free_port()
    program = Program(
        BIN / "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=4",
        "--node-ip-address=127.0.0.1",
        f"--port={gcs_port}",
        f"--dashboard-port={dashboard_port}",
        "--disable-usage-stats",
        environment=environment,
    )
    reached = {
        **environment,
        "RAY_ADDRESS": f"127.0.0.1:{gcs_port}",
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard_port}",
    }
    try:
        deadline_s = time.monotonic() + 180
        while run(BIN / "serve", "status", environment=reached).returncode != 0:
            assert time.monotonic() < deadline_s, program.output
            time.sleep(1)
        yield reached, program
    finally:
        program.stop()
        program.kill_all()


def deploy(config: dict[str, object], path: Path, environment: dict[str, str]) -> None:
    """Write and deploy a configuration."""
    path.write_text(yaml.safe_dump(config))
    answer = run(BIN / "serve", "deploy", path, environment=environment)
    assert answer.returncode == 0, answer.stdout


def test_ray_that_runs_already_is_said_in_one_sentence(cluster: tuple[dict[str, str], Program]) -> None:
    environment, _ = cluster
    fresh_shell = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    answer = run(BIN / "voice-clone", "serve", "--port", str(free_port()), environment=fresh_shell)
    assert answer.returncode == 1
    assert "Ray is already running" in answer.stdout
    assert environment["RAY_ADDRESS"].split(":")[1] in answer.stdout
    assert "ray stop" in answer.stdout
    assert "Traceback" not in answer.stdout


def test_deploy_speak_and_refuse_a_typo(cluster: tuple[dict[str, str], Program], tmp_path: Path) -> None:
    environment, program = cluster
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    port = config["http_options"]["port"] = free_port()
    config["applications"][0]["args"]["voices"] = {"store": str(tmp_path / "voices")}
    deploy(config, tmp_path / "config.yaml", environment)
    url = f"http://127.0.0.1:{port}"
    wait_ready(url, program)
    sample = {"audio_sample": ("me.wav", wav_bytes(noisy_tone(150.0)))}
    httpx.post(f"{url}/v1/audio/voices", data={"name": "me"}, files=sample, timeout=60).raise_for_status()
    body = {"voice": "me", "input": "Deployed.", "response_format": "wav", "stream": False}
    answer = httpx.post(f"{url}/v1/audio/speech", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.content[:4] == b"RIFF"

    # A configuration with a mistake is refused, says which key, and what runs goes on.
    config["applications"][0]["args"]["limits"] = {"max_input_char": 5}
    deploy(config, tmp_path / "config.yaml", environment)
    deadline_s = time.monotonic() + 90
    while "DEPLOY_FAILED" not in (status := run(BIN / "serve", "status", environment=environment).stdout):
        assert time.monotonic() < deadline_s, status
        time.sleep(1)
    assert "max_input_char" in status
    assert httpx.post(f"{url}/v1/audio/speech", json=body, timeout=60).status_code == 200
