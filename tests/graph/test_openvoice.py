"""OpenVoice through the whole graph: enrolled over HTTP, spoken over HTTP, and understood."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from ray import serve

from benchmarks.judges import transcribe, word_error_rate
from benchmarks.speakers import DEMO_SPEAKER, enrolment_clip, speaker
from engines.contract import Samples
from engines.coqui import prepare_coqui
from serve_app.app import build_app
from serve_app.config import Settings
from tests.checkpoints.openvoice import write_spoken, write_tiny
from tests.graph.conftest import Server
from tests.speech import noisy_tone, wav_bytes

APP = "openvoice"
RATE_HZ = 22_050
TEXT = "Glue the sheet to the dark blue background. Rice is often served in round bowls."
#: The recogniser is small and the voice a robot's.
MOST_ERRORS = 0.2
TONES_HZ = (110.0, 160.0, 230.0)


@pytest.fixture(scope="module")
def speaking(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A second application: one converter that lets words through, and one with random weights.

    Its voices: a real speaker called ``sonnets``, and tones.
    """
    prepare_coqui("openvoice")
    folder = tmp_path_factory.mktemp("openvoice")
    engines = {
        name: {
            "engine": "openvoice",
            "config": {"model_dir": str(write(folder / name)), "cache_dir": str(folder / "cache")},
            "replicas": {"num_cpus": 0.1},
        }
        for name, write in (("spoken", write_spoken), ("random", write_tiny))
    }
    unlimited = {"requests_per_minute": None}
    settings = {
        "engines": engines,
        "voices": {"store": str(folder / "voices")},
        "limits": {"total": unlimited, "per_ip": unlimited},
    }
    serve.run(build_app(Settings.model_validate(settings)), name=APP, route_prefix=f"/{APP}")
    with httpx.Client(base_url=f"{server.url}/{APP}", timeout=60) as http:
        clip = enrolment_clip(speaker(DEMO_SPEAKER))
        recordings = {"sonnets": wav_bytes(clip.samples, clip.sample_rate_hz)}
        recordings.update({f"tone {hz:g}": wav_bytes(noisy_tone(hz)) for hz in TONES_HZ})
        for name, recording in recordings.items():
            sample = {"audio_sample": (f"{name}.wav", recording)}
            http.post("/v1/audio/voices", data={"name": name}, files=sample).raise_for_status()
        yield http
    serve.delete(APP)


def body(voice: str = "sonnets", model: str = "spoken", **fields: Any) -> dict[str, Any]:
    """A request for raw samples."""
    request = {"model": model, "voice": voice, "input": TEXT, "response_format": "pcm", "seed": 1}
    return {**request, **fields}


def pcm(speaking: httpx.Client, *arguments: str, **fields: Any) -> Samples:
    """Samples [n] of a speech."""
    answer = speaking.post("/v1/audio/speech", json=body(*arguments, **fields))
    assert answer.status_code == 200, answer.text
    return samples(answer.content)


def samples(content: bytes) -> Samples:
    """16-bit samples as float32."""
    return np.frombuffer(content, "<i2").astype(np.float32) / np.float32(32_768)


def test_the_words_come_through(speaking: httpx.Client) -> None:
    assert word_error_rate(TEXT, transcribe(pcm(speaking), RATE_HZ)) <= MOST_ERRORS


def test_audio_arrives_in_pieces_that_are_the_whole(speaking: httpx.Client) -> None:
    with speaking.stream("POST", "/v1/audio/speech", json=body()) as answer:
        pieces = list(answer.iter_raw())
    assert len(pieces) > 3
    np.testing.assert_array_equal(samples(b"".join(pieces)), pcm(speaking, stream=False))


def test_four_voices_at_once_are_each_the_same_as_alone(speaking: httpx.Client) -> None:
    voices = ["sonnets", *(f"tone {hz:g}" for hz in TONES_HZ)]
    alone = [pcm(speaking, voice) for voice in voices]
    with ThreadPoolExecutor(len(voices)) as pool:
        together = list(pool.map(lambda voice: pcm(speaking, voice), voices))
    for index, voice in enumerate(voices):
        np.testing.assert_array_equal(together[index], alone[index], err_msg=voice)
        assert word_error_rate(TEXT, transcribe(together[index], RATE_HZ)) <= MOST_ERRORS
        assert not any(np.array_equal(alone[index], other) for other in alone[index + 1 :])


def test_tau_is_an_option_and_is_checked(speaking: httpx.Client) -> None:
    calm = pcm(speaking, engine_options={"tau": 0})
    assert not np.array_equal(calm, pcm(speaking, engine_options={"tau": 1.0}))
    for wrong in (1.5, "much", True):
        answer = speaking.post("/v1/audio/speech", json=body(engine_options={"tau": wrong}))
        assert answer.status_code == 400
        assert "tau" in answer.text


def test_another_language_is_refused_with_what_to_do(speaking: httpx.Client) -> None:
    answer = speaking.post("/v1/audio/speech", json=body(input="Bonjour.", language="fr"))
    assert answer.status_code == 400
    assert "voice-clone-tts[piper]" in answer.text


def test_random_weights_sound(speaking: httpx.Client) -> None:
    spoken = pcm(speaking, "sonnets", "random")
    assert len(spoken) == len(pcm(speaking))
    assert 0.005 < np.sqrt(np.mean(spoken**2)) < 0.5
