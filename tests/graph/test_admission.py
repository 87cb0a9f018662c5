"""Limits over HTTP, with two routers that share them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest
import ray
from openai import OpenAI
from ray import serve

from serve_app.app import build_app
from serve_app.config import Settings
from tests.graph.conftest import Server, eventually
from tests.speech import noisy_tone, wav_bytes

APP = "limited"
#: Each test has a key of its own, and so windows of its own.
KEYS: dict[str, dict[str, Any]] = {
    "small": {"requests_per_minute": 7},
    "large": {"requests_per_minute": 60},
    "letters": {"characters_per_minute": 100},
    "narrow": {"concurrent": 2},
    "leaving": {"concurrent": 1},
    "failing": {"concurrent": 1},
    "enrolling": {"requests_per_minute": 2},
    "busy": {},
    "other": {},
    "watching": {"concurrent": 1},
    "orphan": {"requests_per_minute": 6, "concurrent": 3},
}
TOTAL_CONCURRENT = 12
LONG = "This is a long text that goes on and on for a while. " * 75


@pytest.fixture(scope="module")
def limited(server: Server) -> Iterator[str]:
    """URL of a second application with limits."""
    settings = {
        "engines": {
            "tone": {"config": {"slots": 8}, "replicas": {"num_cpus": 0.1}},
            "slow": {"engine": "tone", "config": {"slots": 32, "step_s": 0.1}, "replicas": {"num_cpus": 0.1}},
        },
        "router": {"min_replicas": 2, "max_replicas": 2},
        "voices": {"store": str(server.store), "consent": "required"},
        "limits": {
            "total": {"requests_per_minute": None, "concurrent": TOTAL_CONCURRENT},
            "per_ip": {"requests_per_minute": 5},
        },
        "anonymous": ["speak", "voices"],
        "keys": {
            name: {"sha256": hashlib.sha256(name.encode()).hexdigest(), **quota}
            for name, quota in KEYS.items()
        },
    }
    serve.run(build_app(Settings.model_validate(settings)), name=APP, route_prefix=f"/{APP}")
    yield f"{server.url}/{APP}"
    serve.delete(APP)


def client(limited: str, key: str | None, headers: dict[str, str] | None = None) -> httpx.Client:
    authorization = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=limited, timeout=60, headers={**authorization, **(headers or {})})


def body(text: str = "Hello.", model: str = "tone") -> dict[str, Any]:
    return {"model": model, "voice": "anna", "input": text, "response_format": "pcm"}


def speak(http: httpx.Client, text: str = "Hello.") -> httpx.Response:
    return http.post("/v1/audio/speech", json=body(text))


def stream(stack: ExitStack, http: httpx.Client) -> httpx.Response:
    """A speech that goes on until the stack is left."""
    return stack.enter_context(http.stream("POST", "/v1/audio/speech", json=body(LONG, "slow")))


def code(answer: httpx.Response) -> str:
    answer.read()
    found: str = answer.json()["error"]["code"]
    return found


def test_exactly_the_limit_passes_over_both_routers(limited: str) -> None:
    sdk = OpenAI(base_url=f"{limited}/v1", api_key="small", max_retries=0)
    for _ in range(7):
        sdk.audio.speech.create(model="tone", voice="anna", input="Hello.", response_format="pcm")
    for _ in range(5):
        with pytest.raises(openai.RateLimitError) as refused:
            sdk.audio.speech.create(model="tone", voice="anna", input="Hello.", response_format="pcm")
        assert refused.value.code == "rate_limit_exceeded"
        headers = refused.value.response.headers
        wait_s = int(headers["retry-after"])
        assert 1 <= wait_s <= 60
        assert headers["ratelimit-policy"] == '"requests-per-key";q=7;w=60'
        assert headers["ratelimit"] == f'"requests-per-key";r=0;t={wait_s}'
        assert headers["x-ratelimit-limit-requests"] == "7"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert headers["x-ratelimit-reset-requests"] == f"{wait_s}s"


def test_many_at_once_pass_no_more_than_the_limit(limited: str) -> None:
    with client(limited, "large") as http, ThreadPoolExecutor(12) as pool:
        statuses = [answer.status_code for answer in pool.map(speak, [http] * 100)]
    assert set(statuses) == {200, 429}
    # A router that stalls for seconds loses what it leased, an eighth of the rest at most.
    assert 52 <= statuses.count(200) <= 60


def test_characters_are_counted(limited: str) -> None:
    with client(limited, "letters") as http:
        assert speak(http, "a" * 60).status_code == 200
        refused = speak(http, "a" * 41)
        assert (refused.status_code, code(refused)) == (429, "rate_limit_exceeded")
        assert refused.headers["ratelimit-policy"] == '"characters-per-key";q=100;w=60'
        assert refused.headers["x-ratelimit-remaining-characters"] == "40"
        assert speak(http, "a" * 40).status_code == 200
        never = speak(http, "a" * 101)
        assert (never.status_code, code(never)) == (400, "input_too_long")


def test_no_more_streams_at_once_than_allowed_and_slots_come_back(limited: str) -> None:
    with client(limited, "narrow") as http:
        for _ in range(3):
            with ExitStack() as stack:
                assert stream(stack, http).status_code == 200
                assert stream(stack, http).status_code == 200
                for _ in range(4):
                    refused = speak(http)
                    assert (refused.status_code, code(refused)) == (429, "concurrency_limit_exceeded")
                    assert refused.headers["retry-after"] == "1"
                    policy = '"concurrent-per-key";q=2;qu="concurrent-requests"'
                    assert refused.headers["ratelimit-policy"] == policy
            # Both clients have left in the middle.
            eventually(lambda: speak(http).status_code == 200)
            # One after the other: whoever has the whole answer has its slot back, on either router.
            assert [speak(http).status_code for _ in range(10)] == [200] * 10


def test_slots_come_back_after_errors_and_abrupt_ends(limited: str) -> None:
    with client(limited, "failing") as http:
        for text in ("[fail] now", "…", "Hello.", "[nan] now", "Hello."):
            whole = http.post("/v1/audio/speech", json={**body(text), "stream": False})
            assert whole.status_code != 429
        assert http.post("/v1/audio/speech", json={**body(), "voice": "nobody"}).status_code == 404
        assert http.post("/v1/audio/speech", json={**body(), "model": "none"}).status_code == 404
    with client(limited, "leaving") as http:
        for _ in range(3):
            # Before the first audio, so before there is an answer to leave.
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/audio/speech", json=body("[hang] now", "slow"), timeout=0.5)
            eventually(lambda: speak(http).status_code == 200)


def test_everybody_together(limited: str) -> None:
    with ExitStack() as stack, client(limited, "busy") as http:
        with ThreadPoolExecutor(TOTAL_CONCURRENT) as pool:
            streams = pool.map(stream, [stack] * TOTAL_CONCURRENT, [http] * TOTAL_CONCURRENT)
            assert [answer.status_code for answer in streams] == [200] * TOTAL_CONCURRENT
        with client(limited, "other") as other:
            refused = speak(other)
        assert refused.status_code == 503
        assert code(refused) == "overloaded"
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["ratelimit-policy"].startswith(f'"concurrent";q={TOTAL_CONCURRENT}')


def test_an_address_has_one_limit_whatever_it_says_it_is(limited: str) -> None:
    statuses = []
    for number in range(9):
        forged = {"x-forwarded-for": f"1.2.3.{number}", "forwarded": f"for=1.2.3.{number}"}
        with client(limited, f"dummy-{number}", forged) as http:
            statuses.append(speak(http).status_code)
    assert statuses == [200] * 5 + [429] * 4


def test_enrolment_is_a_request(limited: str) -> None:
    with client(limited, "enrolling") as http:
        for status in (422, 422, 429):
            form = {"name": "x", "consent": "I agree."}
            answer = http.post(
                "/v1/audio/voices", data=form, files={"audio_sample": ("x.wav", b"RIFF\0\0\0\0WAVE")}
            )
            assert answer.status_code == status, answer.text


@pytest.mark.parametrize("consent", [{}, {"consent": ""}, {"consent": " \n\t"}])
def test_b24_where_consent_is_required_nobody_enrols_without(limited: str, consent: dict[str, str]) -> None:
    sample = {"audio_sample": ("x.wav", wav_bytes(noisy_tone(150.0)))}
    with client(limited, "other") as http:
        answer = http.post("/v1/audio/voices", data={"name": "unasked", **consent}, files=sample)
        assert (answer.status_code, code(answer)) == (403, "consent_required")
        old = http.post(
            "/api/extract_voice", data={"voice_id": "unasked"}, files={"audio": sample["audio_sample"]}
        )
        assert (old.status_code, old.json()["code"]) == (403, "AUTH_ERROR")
        assert http.get("/v1/audio/voices/unasked").status_code == 404


def test_what_the_operator_needs_is_closed_without_an_admin_key(limited: str) -> None:
    with client(limited, None) as http:
        # Through Serve's proxy, and from this machine: there are keys, so it does not matter.
        refused = http.post("/v1/models")
        assert (refused.status_code, code(refused)) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
    with client(limited, "other") as http:
        refused = http.post("/v1/models")
        assert (refused.status_code, code(refused)) == (403, "forbidden")


def named(part: str) -> list[Any]:
    """Actors of this application with ``part`` in their names."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [
        ray.get_actor(actor["name"], actor["namespace"])
        for actor in actors
        if APP in actor["name"] and part in actor["name"]
    ]


def refused_while_streaming(limited: str) -> bool:
    """Whether a second request is refused wherever it goes, while the only one allowed is answered."""
    with client(limited, "watching") as http, ExitStack() as stack:
        first = stream(stack, http)
        return first.status_code == 200 and [speak(http).status_code for _ in range(8)] == [429] * 8


def test_nothing_breaks_when_the_actor_dies(limited: str) -> None:
    with client(limited, "orphan") as http:
        assert [speak(http).status_code for _ in range(4)] == [200] * 4
        (actor,) = named("budget")
        ray.kill(actor)
        statuses = [speak(http).status_code for _ in range(12)]
        assert set(statuses) <= {200, 429}
        # Half a limit more, at worst: had one router spent all of it, the other would not know.
        assert 4 + statuses.count(200) <= 9
    # With the new actor, both routers share limits again.
    eventually(lambda: refused_while_streaming(limited), timeout_s=60)


def test_slots_of_killed_routers_come_back(limited: str) -> None:
    with client(limited, "leaving") as http:
        with ExitStack() as stack:
            assert stream(stack, http).status_code == 200
            assert speak(http).status_code == 429
            for router in named("router#"):
                ray.kill(router)
        eventually(lambda: speak(http).status_code == 200, timeout_s=60)
