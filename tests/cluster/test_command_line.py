"""``voice-clone`` as a user types it: a server, its client commands, and what stops the start."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import soundfile

from benchmarks.ports import free_port
from tests.cluster.conftest import BIN, Program, run
from tests.speech import noisy_tone, wav_bytes

VOICE_CLONE = BIN / "voice-clone"
#: What a notebook does beside a running server.
JOIN = """
from serve_app.environment import prepare_environment
prepare_environment()
from serve_app.server import ensure_graph
from serve_app.client import HandleClient
ensure_graph()
with HandleClient() as tts:
    print([model.name for model in tts.models()])
"""


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A file to enrol."""
    path = tmp_path / "me.wav"
    path.write_bytes(wav_bytes(noisy_tone(150.0)))
    return path


def wait_ready(url: str, program: Program, timeout_s: float = 120) -> None:
    """Return once the server is ready."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        assert program.process.poll() is None, program.output
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise AssertionError(program.output)


@pytest.fixture
def served(environment: dict[str, str]) -> Iterator[tuple[str, Program]]:
    """A server started from the command line with the default configuration."""
    port = free_port()
    program = Program(VOICE_CLONE, "serve", "--port", str(port), environment=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(url, program)
        yield url, program
    finally:
        program.kill_all()


def test_serve_enrol_speak_stop(
    served: tuple[str, Program], environment: dict[str, str], recording: Path, tmp_path: Path
) -> None:
    url, program = served
    client = {**environment, "VOICE_CLONE_SERVER": url}
    added = run(VOICE_CLONE, "voices", "add", "me", recording, "--consent", "Yes.", environment=client)
    assert added.returncode == 0, added.stdout
    assert "voice_" in added.stdout
    out = tmp_path / "out.wav"
    spoken = run(VOICE_CLONE, "speak", "Hello there.", "--voice", "me", "-o", out, environment=client)
    assert spoken.returncode == 0, spoken.stdout
    samples, rate_hz = soundfile.read(out)
    assert 0.4 < len(samples) / rate_hz < 4
    assert "me" in run(VOICE_CLONE, "voices", "list", environment=client).stdout
    missing = run(VOICE_CLONE, "speak", "Hello.", "--voice", "you", "-o", out, environment=client)
    assert missing.returncode == 1
    assert "GET /v1/audio/voices" in missing.stdout
    assert "Traceback" not in missing.stdout
    assert run(VOICE_CLONE, "voices", "delete", "me", environment=client).returncode == 0

    # There are no keys: a program on this machine may administer, what comes through a proxy may not.
    nodes = httpx.get(f"{url}/api/nodes").json()["nodes"]
    assert [node["engine_type"] for node in nodes] == ["mosaic"]
    for header in ("x-forwarded-for", "forwarded", "via"):
        assert httpx.get(f"{url}/api/nodes", headers={header: "for=127.0.0.1"}).status_code == 401
    assert httpx.get(f"{url}/api/nodes", headers={"host": "evil.example"}).status_code == 403
    page = {"origin": "https://evil.example"}
    assert httpx.post(f"{url}/v1/audio/speech", headers=page, json={}).status_code == 403
    assert "Everybody who can reach" not in program.output

    second = run(VOICE_CLONE, "serve", "--port", str(free_port()), environment=environment)
    assert second.returncode == 1
    assert "Ray is already running" in second.stdout
    assert "Traceback" not in second.stdout

    joined = run(BIN / "python", "-c", JOIN, environment=environment)
    assert joined.returncode == 0, joined.stdout
    assert "mosaic" in joined.stdout

    assert program.stop() == 0, program.output
    assert "listens on" in program.output
    assert "Traceback" not in program.output


def test_stopped_server_finishes_what_it_has_begun(environment: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("engines: {tone: {config: {step_s: 0.2}}}\nlimits: {look_ahead_utterances: 1}\n")
    port = free_port()
    program = Program(
        *(VOICE_CLONE, "serve", "--port", str(port), "--config", config), environment=environment
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, program)
        sample = {"audio_sample": ("me.wav", wav_bytes(noisy_tone(150.0)))}
        httpx.post(f"{url}/v1/audio/voices", data={"name": "slow"}, files=sample).raise_for_status()
        # Later sentences need the engine again, long after the signal.
        body = {"model": "tone", "voice": "slow", "input": "Five words in one sentence. " * 4, "seed": 1}
        body["response_format"] = "pcm"
        whole = httpx.post(f"{url}/v1/audio/speech", json=body, timeout=60).content
        with httpx.stream("POST", f"{url}/v1/audio/speech", json=body, timeout=60) as answer:
            parts = answer.iter_raw()
            heard = [next(parts)]
            program.process.send_signal(signal.SIGTERM)
            heard.extend(parts)
        assert b"".join(heard) == whole
        assert program.process.wait(60) == 0, program.output
        assert "Traceback" not in program.output
    finally:
        program.kill_all()


def test_taken_port_is_said_in_one_sentence(environment: dict[str, str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        answer = run(VOICE_CLONE, "serve", "--port", port, environment=environment)
    assert answer.returncode == 1
    assert f"Port {port}" in answer.stdout
    assert "--port" in answer.stdout
    assert "Traceback" not in answer.stdout


def test_foreign_ray_address_is_said_in_one_sentence(environment: dict[str, str]) -> None:
    elsewhere = {**environment, "RAY_ADDRESS": "10.1.2.3:6379"}
    answer = run(VOICE_CLONE, "serve", environment=elsewhere)
    assert answer.returncode == 1
    assert "RAY_ADDRESS points to 10.1.2.3:6379" in answer.stdout
    assert "Unset it" in answer.stdout


def test_typo_in_the_configuration_stops_the_start(environment: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("engines:\n  tone:\n    config: {stepp_s: 1}\n")
    answer = run(VOICE_CLONE, "serve", "--config", config, environment=environment)
    assert answer.returncode == 1
    assert "stepp_s" in answer.stdout
    assert str(config) in answer.stdout
    variable = {**environment, "VOICE_CLONE__LIMTS__MAX_INPUT_CHARS": "5"}
    answer = run(VOICE_CLONE, "serve", environment=variable)
    assert answer.returncode == 1
    assert "VOICE_CLONE__LIMTS__MAX_INPUT_CHARS" in answer.stdout


def test_store_that_is_a_file_stops_the_start(environment: dict[str, str], tmp_path: Path) -> None:
    store = tmp_path / "file"
    store.write_text("not a directory")
    answer = run(VOICE_CLONE, "serve", environment={**environment, "VOICE_CLONE__VOICES__STORE": str(store)})
    assert answer.returncode == 1
    assert str(store) in answer.stdout
    assert "Traceback" not in answer.stdout


def test_client_without_a_server(environment: dict[str, str]) -> None:
    nowhere = {**environment, "VOICE_CLONE_SERVER": f"http://127.0.0.1:{free_port()}"}
    answer = run(VOICE_CLONE, "voices", "list", environment=nowhere)
    assert answer.returncode == 1
    assert "did not answer" in answer.stdout


@pytest.mark.parametrize("output", ["speech.txt", "/no/such/place/speech.wav"])
def test_output_that_cannot_be_written_is_refused_at_once(environment: dict[str, str], output: str) -> None:
    answer = run(VOICE_CLONE, "speak", "Hello.", "--voice", "me", "-o", output, environment=environment)
    assert answer.returncode == 2
    assert "--output" in answer.stdout
    missing = run(VOICE_CLONE, "voices", "add", "me", "/no/such/recording.wav", environment=environment)
    assert missing.returncode == 1
    assert "/no/such/recording.wav" in missing.stdout
    assert "Traceback" not in answer.stdout + missing.stdout


def test_doctor_finds_nothing_and_something(environment: dict[str, str]) -> None:
    environment = environment | {"VOICE_CLONE_MODELS_DIR": environment["RAY_TMPDIR"]}
    well = run(VOICE_CLONE, "doctor", "--port", str(free_port()), environment=environment)
    assert well.returncode == 0, well.stdout
    assert "engine mosaic: loads" in well.stdout
    assert "weights xtts: 0 of 5" in well.stdout
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ill = run(VOICE_CLONE, "doctor", "--port", str(other.getsockname()[1]), environment=environment)
    assert ill.returncode == 1
    assert "FAIL port" in ill.stdout
