"""Speech that is heard again before it is sent, with a real voice and a real recogniser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.speakers import DEMO_SPEAKER, enrolment_clip, speaker
from tests.graph.conftest import Server, counted, eventually
from tests.speech import wav_bytes

VERIFY = {"max_wer": 0.25, "tries": 2}


@pytest.fixture(scope="module", autouse=True)
def reader(server: Server) -> Iterator[None]:
    """A voice of a person: of a tone nobody would understand a word."""
    clip = enrolment_clip(speaker(DEMO_SPEAKER))
    sample = {"audio_sample": ("x.wav", wav_bytes(clip.samples, clip.sample_rate_hz))}
    form = {"name": "verified", "model": "mosaic"}
    server.http.post("/v1/audio/voices", data=form, files=sample).raise_for_status()
    yield
    server.http.delete("/v1/audio/voices/verified")


def speak(server: Server, **fields: Any) -> Any:
    """A WAV of a fixed text."""
    body = {"voice": "verified", "input": "The weather is nice today. We will go home.", "seed": 3, **fields}
    return server.http.post("/v1/audio/speech", json={"response_format": "pcm", **body})


def test_good_speech_passes_and_is_what_it_is_without(server: Server) -> None:
    plain = speak(server, model="mosaic", language="en", stream=False)
    assert "x-verified" not in plain.headers
    for stream in (False, True):
        answer = speak(server, model="mosaic", language="en", stream=stream, verify=VERIFY)
        assert answer.status_code == 200, answer.text
        passed, of = map(int, answer.headers["x-verified"].split("/"))
        assert passed == of >= (1 if stream else 2)
        assert int(answer.headers["x-verify-tries"]) >= of
        assert float(answer.headers["x-verify-worst-wer"]) <= 0.25
        if answer.headers["x-verify-tries"] == str(of) and not stream:
            assert answer.content == plain.content


def test_what_has_no_words_is_redone_and_the_best_is_sent(server: Server) -> None:
    answer = speak(server, model="tone", language="en", stream=False, input="Only tones.", verify=VERIFY)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-verified"] == "0/1"
    assert answer.headers["x-verify-tries"] == "2"
    assert len(answer.content) > 1000
    again = speak(server, model="tone", language="en", stream=False, input="Only tones.", verify=VERIFY)
    assert again.content == answer.content
    eventually(lambda: counted("tts_verified_utterances_total", engine="tone", outcome="failed") >= 2)


def test_a_language_the_transcriber_does_not_know_is_refused(server: Server) -> None:
    answer = speak(server, model="tone", language="de", verify=VERIFY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_language")


def test_terms_are_checked(server: Server) -> None:
    for terms in ({"tries": 0}, {"max_wer": 2}, {"wer": 0.1}, True):
        answer = speak(server, model="tone", verify=terms)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "verify")
    unverified = speak(server, model="tone", verify=False)
    assert unverified.status_code == 200
    assert "x-verified" not in unverified.headers
