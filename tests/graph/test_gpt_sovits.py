"""GPT-SoVITS with random weights behind HTTP: Chinese, Japanese and English, streamed, many at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from ray import serve

from serve_app.app import build_app
from serve_app.config import Settings
from tests.graph.conftest import Server
from tests.speech import noisy_tone, wav_bytes

APP = "gpt_sovits"
RATE_HZ = 32_000
TEXTS = {
    "en": "The birch canoe slid on the smooth planks.",
    "zh": "你好，世界。",
    "ja": "こんにちは、元気ですか。",
}
VOICES_HZ = (110.0, 220.0)


@pytest.fixture(scope="module")
def speaking(
    server: Server, tmp_path_factory: pytest.TempPathFactory, gpt_sovits_settings: dict[str, Any]
) -> Iterator[httpx.Client]:
    """Client of an application of its own, with two voices."""
    tiny = {**gpt_sovits_settings, "model_dir": str(gpt_sovits_settings["model_dir"])}
    settings: dict[str, Any] = {
        "engines": {
            "gpt_sovits": {
                "config": tiny,
                "replicas": {"num_cpus": 0.1},
            }
        },
        "voices": {"store": str(tmp_path_factory.mktemp("store"))},
        # Two cores for all of this: slow is not broken.
        "limits": {
            "first_audio_timeout_s": 200,
            "max_queue_wait_s": 200,
            "total": {"requests_per_minute": None},
            "per_ip": {"requests_per_minute": None},
        },
    }
    serve.run(build_app(Settings.model_validate(settings)), name=APP, route_prefix=f"/{APP}")
    with httpx.Client(base_url=f"{server.url}/{APP}", timeout=250) as http:
        for hz in VOICES_HZ:
            recording = wav_bytes(noisy_tone(hz, 4.0))
            sample = {"audio_sample": ("voice.wav", recording)}
            enrolment = {"name": f"voice{hz:g}", "ref_text": "Two blue fish swam in the tank."}
            http.post("/v1/audio/voices", data=enrolment, files=sample).raise_for_status()
        yield http
    serve.delete(APP)


def body(language: str, hz: float = VOICES_HZ[0], **fields: Any) -> dict[str, Any]:
    """A request for raw samples."""
    request = {
        "model": "gpt_sovits",
        "voice": f"voice{hz:g}",
        "input": TEXTS[language],
        "language": language,
        "seed": 3,
        "response_format": "pcm",
    }
    return {**request, **fields}


def pieces(speaking: httpx.Client, request: dict[str, Any]) -> list[bytes]:
    """A streamed answer as it comes."""
    with speaking.stream("POST", "/v1/audio/speech", json=request) as answer:
        assert answer.status_code == 200, answer.read()
        return list(answer.iter_raw())


@pytest.mark.parametrize("language", TEXTS)
def test_it_is_streamed_and_the_pieces_are_the_whole(speaking: httpx.Client, language: str) -> None:
    streamed = pieces(speaking, body(language))
    assert len(streamed) > 2
    whole = speaking.post("/v1/audio/speech", json=body(language, stream=False))
    assert whole.status_code == 200, whole.text
    assert b"".join(streamed) == whole.content
    samples = np.frombuffer(whole.content, "<i2") / 32_768
    assert 1.0 < len(samples) / RATE_HZ < 4.0
    assert 0.01 < np.sqrt(np.mean(samples**2)) < 0.5


def test_languages_and_voices_at_once_are_each_what_they_are_alone(speaking: httpx.Client) -> None:
    requests = [
        body(language, hz, seed=seed, engine_options={"top_k": 20})
        for seed, (language, hz) in enumerate((language, hz) for language in TEXTS for hz in VOICES_HZ)
    ]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: b"".join(pieces(speaking, request)), requests))
    assert len(set(together)) == len(requests)
    for request, expected in zip(requests, together, strict=True):
        assert b"".join(pieces(speaking, request)) == expected


def test_what_it_cannot_speak_is_refused_with_what_it_can(speaking: httpx.Client) -> None:
    answer = speaking.post("/v1/audio/speech", json={**body("en"), "input": "Bonjour.", "language": "fr"})
    assert answer.status_code == 400
    assert "zh" in answer.text
    answer = speaking.post("/v1/audio/speech", json=body("en", input="안녕하세요."))
    assert answer.status_code == 400
