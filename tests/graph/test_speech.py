"""Speaking through the whole graph with the official OpenAI SDK and with plain HTTP."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from typing import Any, Literal, get_args

import av
import httpx
import numpy as np
import openai
import pytest

from tests.graph.conftest import SETTINGS, Server, activity, eventually
from tests.speech import read_audio

TEXT = "The birch canoe slid on the smooth planks."
Format = Literal["wav", "mp3", "opus", "flac", "aac", "pcm"]
FORMATS = get_args(Format)


def pcm(server: Server, text: str = TEXT, **fields: object) -> np.ndarray:
    """Samples [n] int16 of a speech."""
    body = {"model": "tone", "voice": "anna", "input": text, "response_format": "pcm", **fields}
    answer = server.http.post("/v1/audio/speech", json=body)
    assert answer.status_code == 200, answer.text
    return np.frombuffer(answer.content, "<i2")


@pytest.mark.parametrize("audio_format", FORMATS)
def test_sdk_gets_decodable_audio_in_every_format(server: Server, audio_format: Format) -> None:
    expected_s = len(pcm(server)) / 24_000
    answer = server.openai.audio.speech.create(
        model="tone", voice="anna", input=TEXT, response_format=audio_format
    )
    data = answer.read()
    if audio_format == "pcm":
        seconds = len(data) / 2 / 24_000
    else:
        with av.open(io.BytesIO(data), "r") as container:
            frames = list(container.decode(audio=0))
        seconds = sum(frame.samples for frame in frames) / frames[0].sample_rate
    assert seconds == pytest.approx(expected_s, abs=0.05)


@pytest.mark.parametrize("audio_format", FORMATS)
def test_content_type_says_what_the_body_is(server: Server, audio_format: str) -> None:
    body = {"voice": "anna", "input": "Hi there.", "model": "tone", "response_format": audio_format}
    answer = server.http.post("/v1/audio/speech", json=body)
    expected = {"mp3": "audio/mpeg", "opus": "audio/ogg"}.get(audio_format, f"audio/{audio_format}")
    assert answer.headers["content-type"] == expected
    assert answer.headers["x-engine"] == "tone"
    assert answer.headers["x-ai-generated"] == "true"


def test_audio_arrives_while_the_engine_still_speaks(server: Server) -> None:
    request = {"model": "slow", "voice": "anna", "input": TEXT, "response_format": "pcm"}
    with server.http.stream("POST", "/v1/audio/speech", json=request) as answer:
        body = answer.iter_raw()
        first = next(body)
        (replica,) = activity("slow")
        assert replica.rows_open == 1, "the engine had finished before the first bytes came"
        rest = b"".join(body)
    assert first
    assert rest


def test_unstreamed_wav_has_its_exact_length(server: Server) -> None:
    body = {"model": "tone", "voice": "anna", "input": TEXT, "response_format": "wav", "stream": False}
    answer = server.http.post("/v1/audio/speech", json=body)
    samples, rate_hz = read_audio(answer.content)
    assert int(answer.headers["content-length"]) == len(answer.content) == 44 + 2 * len(samples)
    assert int.from_bytes(answer.content[4:8], "little") == len(answer.content) - 8
    assert int(answer.headers["x-audio-duration-ms"]) == pytest.approx(1000 * len(samples) / rate_hz, abs=1)


def test_seed_repeats_and_its_absence_does_not(server: Server) -> None:
    np.testing.assert_array_equal(pcm(server, seed=7), pcm(server, seed=7))
    assert not np.array_equal(pcm(server), pcm(server))


def test_the_answer_names_the_seed_that_repeats_it(server: Server) -> None:
    body = {"model": "tone", "voice": "anna", "input": TEXT, "response_format": "pcm"}
    answer = server.http.post("/v1/audio/speech", json=body)
    again = pcm(server, seed=int(answer.headers["x-seed"]))
    np.testing.assert_array_equal(np.frombuffer(answer.content, "<i2"), again)


def test_long_text_keeps_its_order_over_two_replicas(server: Server) -> None:
    sentences = [f"Sentence number {index} says {'la ' * (index % 5 + 1)}now." for index in range(30)]
    whole = pcm(server, " ".join(sentences), model="pair", seed=100)
    parts = [pcm(server, sentence + " ", model="pair", seed=100 + i) for i, sentence in enumerate(sentences)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert sum(replica.batches > 0 for replica in activity("pair")) == 2


def test_concurrent_requests_share_batches_and_keep_apart(server: Server) -> None:
    texts = [f"Request {index} asks for {'more ' * index}words." for index in range(8)]
    alone = [pcm(server, text, model="slow", seed=index) for index, text in enumerate(texts)]
    together: dict[int, np.ndarray] = {}

    def ask(index: int) -> None:
        together[index] = pcm(server, texts[index], model="slow", seed=index)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, samples in enumerate(alone):
        np.testing.assert_array_equal(samples, together[index])
    (replica,) = activity("slow")
    assert 1 < replica.largest_batch <= 4


def test_client_that_leaves_stops_the_engine(server: Server) -> None:
    before = activity("slow")[0].chunks
    request = {"model": "slow", "voice": "anna", "input": "word " * 40, "response_format": "pcm"}
    with (
        httpx.Client(base_url=server.url) as client,
        client.stream("POST", "/v1/audio/speech", json=request) as answer,
    ):
        next(answer.iter_raw())
    eventually(lambda: activity("slow")[0].rows_open == 0)
    # 160 notes of 60 ms in chunks of 0.2 s: 48 steps of 0.1 s if nobody had stopped it.
    assert activity("slow")[0].chunks - before < 20


def test_client_that_leaves_a_shared_batch_takes_only_its_row(server: Server) -> None:
    text = "A row that stays to the end of its sentence."
    alone = pcm(server, text, model="slow", seed=3)
    result: list[np.ndarray] = []
    # Keeps the only replica busy while the two others queue up behind it into one batch.
    blockers = [
        threading.Thread(target=pcm, args=(server, "block the door"), kwargs={"model": "slow"})
        for _ in range(2)
    ]
    stays = threading.Thread(target=lambda: result.append(pcm(server, text, model="slow", seed=3)))
    for thread in [*blockers, stays]:
        thread.start()
    with server.http.stream(
        "POST",
        "/v1/audio/speech",
        json={"model": "slow", "voice": "anna", "input": "leave " * 40, "response_format": "pcm"},
    ) as answer:
        next(answer.iter_raw())
    for thread in [*blockers, stays]:
        thread.join()
    np.testing.assert_array_equal(alone, result[0])
    eventually(lambda: activity("slow")[0].rows_open == 0)


def test_failure_before_the_first_audio_is_an_error_not_an_empty_200(server: Server) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        server.openai.audio.speech.create(model="tone", voice="anna", input="please [fail] now")
    assert caught.value.code == "engine_error"


def test_failure_after_the_first_audio_cuts_the_body(server: Server) -> None:
    request = {
        "model": "tone",
        "voice": "anna",
        "input": "All is well. But [fail] here.",
        "response_format": "pcm",
    }
    with server.http.stream("POST", "/v1/audio/speech", json=request) as answer:
        assert answer.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            answer.read()


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """What a body of server-sent events holds, as far as it came."""
    found = []
    with contextlib.suppress(httpx.RemoteProtocolError):
        for line in answer.iter_lines():
            if line:
                assert line.startswith("data: ")
                found.append(json.loads(line.removeprefix("data: ")))
    return found


@pytest.mark.parametrize("audio_format", FORMATS)
def test_events_carry_the_slices_of_one_stream(server: Server, audio_format: str) -> None:
    body = {"model": "tone", "voice": "anna", "input": TEXT, "seed": 5, "response_format": audio_format}
    plain = server.http.post("/v1/audio/speech", json=body)
    with server.http.stream("POST", "/v1/audio/speech", json={**body, "stream_format": "sse"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        *deltas, done = events(answer)
    assert len(deltas) > 1
    assert {delta["type"] for delta in deltas} == {"speech.audio.delta"}
    audio = b"".join(base64.b64decode(delta["audio"]) for delta in deltas)
    if audio_format != "opus":  # an Ogg stream has a serial number of its own
        assert audio == plain.content
    assert len(audio) == len(plain.content)
    assert done == {
        "type": "speech.audio.done",
        "usage": {"input_tokens": len(TEXT), "output_tokens": 0, "total_tokens": len(TEXT)},
    }


def test_failure_after_the_first_audio_is_an_event_and_a_cut(server: Server) -> None:
    request = {
        "model": "tone",
        "voice": "anna",
        "input": "All is well. But [fail] here.",
        "stream_format": "sse",
        "response_format": "pcm",
    }
    with server.http.stream("POST", "/v1/audio/speech", json=request) as answer:
        assert answer.status_code == 200
        *deltas, error = events(answer)
    assert deltas
    assert error["type"] == "speech.audio.error"
    assert error["error"]["code"] == "engine_error"
    assert error["error"]["partial_audio"] is True
    with (
        server.http.stream("POST", "/v1/audio/speech", json=request) as answer,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        answer.read()


def test_events_do_not_hide_an_early_failure(server: Server) -> None:
    body = {"model": "tone", "voice": "nobody", "input": "Hi.", "stream_format": "sse"}
    answer = server.http.post("/v1/audio/speech", json=body)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "voice_not_found"


def test_model_alias_and_openai_model_names(server: Server) -> None:
    for model in ("quick", "tts-1", "gpt-4o-mini-tts", None):
        body = {"model": model, "voice": "anna", "input": "Hi.", "response_format": "pcm"}
        answer = server.http.post("/v1/audio/speech", json=body)
        assert answer.headers["x-engine"] == "tone"


def test_voice_by_id_name_alias_and_object(server: Server) -> None:
    voice_id = server.http.get("/v1/audio/voices/anna").json()["id"]
    samples = [pcm(server, seed=1, voice=voice) for voice in ("anna", voice_id, "alloy", {"id": voice_id})]
    body = {"model": "tone", "speaker": "anna", "input": TEXT, "response_format": "pcm", "seed": 1}
    samples.append(np.frombuffer(server.http.post("/v1/audio/speech", json=body).content, "<i2"))
    for other in samples[1:]:
        np.testing.assert_array_equal(samples[0], other)


def test_unknown_fields_are_ignored_and_named(server: Server) -> None:
    body = {"model": "tone", "voice": "anna", "input": "Hi.", "extra_thing": 1, "instructions": "shout"}
    answer = server.http.post("/v1/audio/speech", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "extra_thing, instructions"
    body = {"model": "tone", "voice": "anna", "input": "Hi.", "a b": 1, "é": 1, "x" * 41: 1}
    answer = server.http.post("/v1/audio/speech", json=body | {f"n{n}": n for n in range(500)})
    assert len(answer.headers["x-ignored-fields"].split(", ")) == 20


def test_request_id_is_taken_or_made(server: Server) -> None:
    taken = server.http.get("/health/live", headers={"X-Request-Id": "abc-1"})
    assert taken.headers["x-request-id"] == "abc-1"
    assert server.http.get("/health/live").headers["x-request-id"]
    odd = server.http.get("/nowhere", headers={"X-Request-Id": "odd id <script>"})
    assert "script" not in odd.text


def test_models_list_the_served_engines(server: Server) -> None:
    models = {model.id: model for model in server.openai.models.list()}
    assert set(models) == {*SETTINGS["engines"], "english", "reading"}
    audio = server.http.get("/v1/audio/models").json()
    assert {model["id"] for model in audio["models"]} == set(models)
    assert server.http.get("/v1/models/quick").json()["id"] == "tone"
    assert server.http.get("/v1/models/nothing").json()["error"]["code"] == "model_not_found"
    mosaic = server.http.get("/v1/models/mosaic").json()
    assert mosaic["languages"][0] == "en"
    assert "es" in mosaic["languages"]
    assert mosaic["status"] == "ready"
    assert server.http.get("/v1/models/english").json()["languages"] == ["en"]


def test_health(server: Server) -> None:
    assert server.http.get("/health/live").json() == {"status": "live"}
    assert server.http.get("/health/ready").json() == {"status": "ready"}


def test_default_engine_speaks_the_voice(server: Server) -> None:
    samples = pcm(server, "Hello there.", model="mosaic", seed=1).astype(np.float64) / 32768
    assert 0.4 < len(samples) / 24_000 < 4
    assert np.sqrt(np.mean(samples**2)) > 0.01


def test_default_engine_speaks_other_languages_with_the_espeak_extra(server: Server) -> None:
    body = {"model": "mosaic", "voice": "anna", "input": "Buenos días a todos. ¿Cómo estáis hoy?"}
    spoken = server.http.post("/v1/audio/speech", json={**body, "response_format": "pcm"})
    assert spoken.status_code == 200, spoken.text
    assert spoken.headers["x-language"] == "es"
    assert 2 < len(spoken.content) / 2 / 24_000 < 8


@pytest.mark.parametrize("language", [None, "de", "ja"])
def test_default_engine_without_the_extra_refuses_other_languages_and_names_it(
    server: Server, language: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.audio.speech.create(
            model="english",
            voice="anna",
            input="Guten Morgen, wie geht es dir heute?",
            extra_body={"language": language} if language else {},
        )
    assert caught.value.code == "unsupported_language"
    assert "It speaks: en." in caught.value.message
    assert "pip install 'voice-clone-tts[espeak]'" in caught.value.message
