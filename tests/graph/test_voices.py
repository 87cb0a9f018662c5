"""Enrolling, listing and deleting voices over HTTP, in the OpenAI and in the v3 dialect."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graph.conftest import Server
from tests.speech import noisy_tone, read_audio, wav_bytes


def enrol(server: Server, name: str, audio: bytes, **form: str):  # type: ignore[no-untyped-def]
    """POST a recording."""
    return server.http.post(
        "/v1/audio/voices", data={"name": name, **form}, files={"audio_sample": ("x.wav", audio)}
    )


def pcm(server: Server, voice: str) -> bytes:
    """A fixed sentence by a voice."""
    body = {"model": "tone", "voice": voice, "input": "Same words.", "response_format": "pcm", "seed": 1}
    answer = server.http.post("/v1/audio/speech", json=body)
    assert answer.status_code == 200, answer.text
    return answer.content


def test_a_voice_from_enrolment_to_deletion(server: Server) -> None:
    answer = enrol(
        server,
        "Zoë 🎙",
        wav_bytes(noisy_tone(240.0)),
        consent="I agree that my voice is cloned.",
        ref_text="la la la",
        language="en",
        speaker_description="Warm and slow.",
    )
    assert answer.status_code == 200, answer.text
    voice = answer.json()
    assert voice["description"] == "Warm and slow."
    assert voice["object"] == "audio.voice"
    assert voice["id"].startswith("voice_")
    assert voice["consent"]["statement"] == "I agree that my voice is cloned."
    assert voice["has_transcript"]
    assert 2 < voice["duration_s"] < 3.2
    listed = server.http.get("/v1/audio/voices").json()
    assert voice["id"] in [item["id"] for item in listed["data"]]
    assert server.http.get(f"/v1/audio/voices/{voice['id']}").json() == voice
    assert pcm(server, voice["id"]) == pcm(server, "Zoë 🎙") != pcm(server, "anna")
    gone = server.http.delete(f"/v1/audio/voices/{voice['id']}")
    assert gone.json() == {"id": voice["id"], "object": "audio.voice.deleted", "deleted": True}
    assert server.http.get(f"/v1/audio/voices/{voice['id']}").status_code == 404
    assert server.http.delete(f"/v1/audio/voices/{voice['id']}").status_code == 404


def test_a_voice_of_several_recordings(server: Server) -> None:
    samples = [("audio_sample", ("clip", wav_bytes(noisy_tone(pitch_hz)))) for pitch_hz in (140.0, 150.0)]
    answer = server.http.post("/v1/audio/voices", data={"name": "in two parts"}, files=samples)
    assert answer.status_code == 200, answer.text
    assert 4 < answer.json()["duration_s"] < 6.4
    assert pcm(server, "in two parts") != pcm(server, "anna")
    silent = [*samples, ("audio_sample", ("clip", wav_bytes(np.zeros(24_000, np.float32))))]
    refused = server.http.post("/v1/audio/voices", data={"name": "in three"}, files=silent)
    assert refused.status_code == 422
    assert refused.json()["error"]["message"].startswith("Recording 3 of 3: ")


def test_list_comes_in_pages(server: Server) -> None:
    ids = [enrol(server, f"page {n}", wav_bytes(noisy_tone(150.0 + n))).json()["id"] for n in range(3)]
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = server.http.get("/v1/audio/voices", params={"limit": 2, **after}).json()
        seen += [voice["id"] for voice in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert [voice for voice in seen if voice in ids] == ids
    assert len(set(seen)) == len(seen)
    for voice in ids:
        server.http.delete(f"/v1/audio/voices/{voice}")


def test_list_is_read_by_clients_of_every_age(server: Server) -> None:
    listed = server.http.get("/v1/audio/voices").json()
    (anna,) = [voice for voice in listed["voices"] if voice["name"] == "anna"]
    assert anna in listed["data"]
    assert anna["aliases"] == ["alloy"]
    assert "tone" in anna["engines"]
    assert anna["status"] == "ready"
    legacy = server.http.get("/v1/audio/voices", params={"legacy": "true"}).json()
    assert "anna" in legacy["voices"]
    assert legacy["data"] == listed["data"]


def test_voices_are_made_of_recordings_only(server: Server) -> None:
    answer = enrol(server, "dreamt", wav_bytes(noisy_tone(200.0)), type="prompt")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "type"


def test_taken_name_is_refused_and_the_voice_stays(server: Server) -> None:
    before = pcm(server, "anna")
    answer = enrol(server, "Anna", wav_bytes(noisy_tone(99.0)))
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "voice_exists"
    assert pcm(server, "anna") == before


def test_replacing_takes_effect_at_once(server: Server) -> None:
    first = enrol(server, "swap", wav_bytes(noisy_tone(120.0))).json()
    before = pcm(server, "swap")
    second = enrol(server, "swap", wav_bytes(noisy_tone(320.0)), replace="true").json()
    assert second["id"] == first["id"]
    assert pcm(server, "swap") != before
    server.http.delete("/v1/audio/voices/swap")


@pytest.mark.parametrize(
    ("audio", "status", "code"),
    [
        (b"", 415, "unsupported_media_type"),
        (b"<html></html>", 415, "unsupported_media_type"),
        (b"PK\x03\x04 not audio", 415, "unsupported_media_type"),
        (wav_bytes(noisy_tone(200.0))[:44] + b"", 422, None),
        (wav_bytes(np.zeros(48_000, np.float32)), 422, "no_speech_detected"),
        (wav_bytes(noisy_tone(200.0, 0.3)), 422, "audio_too_short"),
        (wav_bytes(noisy_tone(200.0, 31.0, 16_000), 16_000), 422, "audio_too_long"),
    ],
    ids=["empty", "html", "zip", "header only", "silence", "short", "long"],
)
def test_bad_recording_is_refused_and_the_old_voice_stays(
    server: Server, audio: bytes, status: int, code: str | None
) -> None:
    before = pcm(server, "anna")
    for name, form in (("fresh", {}), ("anna", {"replace": "true"})):
        answer = enrol(server, name, audio, **form)
        assert answer.status_code == status, answer.text
        assert code in (None, answer.json()["error"]["code"])
        assert "/" not in answer.json()["detail"].replace("/v1/", "").replace("GET /", "")
    assert pcm(server, "anna") == before
    assert server.http.get("/v1/audio/voices/fresh").status_code == 404


def test_upload_over_the_limit_is_refused(server: Server) -> None:
    answer = enrol(server, "big", b"\0" * (11 << 20))
    assert answer.status_code == 413


def test_fields_are_checked(server: Server) -> None:
    good = wav_bytes(noisy_tone(200.0))
    assert enrol(server, "", good).json()["error"]["param"] == "name"
    assert enrol(server, "x" * 101, good).json()["error"]["param"] == "name"
    assert enrol(server, "tab\tname", good).json()["error"]["param"] == "name"
    assert enrol(server, "lang", good, language="no such language").json()["error"]["param"] == "language"
    missing = server.http.post("/v1/audio/voices", data={"name": "nothing"})
    assert missing.json()["error"]["code"] == "missing_field"
    assert missing.json()["error"]["param"] == "audio_sample"


@pytest.mark.parametrize("voice", ["..%2f..%2fetc%2fpasswd", "%00", "x" * 3000, "voice_" + "0" * 26])
def test_odd_ids_are_not_found(server: Server, voice: str) -> None:
    assert server.http.get(f"/v1/audio/voices/{voice}").status_code == 404
    assert server.http.delete(f"/v1/audio/voices/{voice}").status_code == 404


def test_v3_extract_synthesize_list_delete(server: Server) -> None:
    audio = {"audio": ("me.wav", wav_bytes(noisy_tone(170.0)))}
    extracted = server.http.post(
        "/api/extract_voice", data={"voice_id": "old-id", "voice_name": "Me"}, files=audio
    )
    assert extracted.status_code == 200, extracted.text
    assert extracted.json()["success"] is True
    body = {"text": "Hello from the old client.", "voice_id": "old-id", "language": "en"}
    answer = server.http.post("/api/synthesize", json=body)
    assert answer.headers["content-type"] == "audio/wav"
    assert answer.headers["x-engine"] == "tone"
    samples, rate_hz = read_audio(answer.content)
    assert rate_hz == 24_000
    assert len(samples) > rate_hz / 2
    listed = server.http.get("/api/voices").json()["voices"]
    assert "old-id" in [voice["name"] for voice in listed]
    again = server.http.post("/api/extract_voice", data={"voice_id": "old-id"}, files=audio)
    assert again.json()["voice_id"] == extracted.json()["voice_id"]
    assert server.http.delete("/api/voices/old-id").json()["success"] is True


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"text": "Hi.", "voice_id": "nobody"}, 404, "VOICE_NOT_FOUND"),
        ({"text": "Hi.", "voice_id": "anna", "engine": "nope"}, 404, "NODE_NOT_FOUND"),
        ({"text": "", "voice_id": "anna"}, 400, "INVALID_REQUEST"),
        ({"text": "Hi.", "voice_id": "anna", "pitch": 1.5}, 400, "INVALID_REQUEST"),
        ({"text": "Hi.", "voice_id": "anna", "language": "xx"}, 400, "INVALID_REQUEST"),
        ({"text": "please [fail]", "voice_id": "anna"}, 500, "ENGINE_ERROR"),
    ],
)
def test_v3_errors_have_real_status_codes(
    server: Server, body: dict[str, object], status: int, code: str
) -> None:
    answer = server.http.post("/api/synthesize", json=body)
    assert answer.status_code == status
    assert answer.json()["success"] is False
    assert answer.json()["code"] == code
    assert answer.json()["message"]
