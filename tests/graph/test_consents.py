"""Recorded consents, and voices that refer to one, with OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest

from tests.graph.conftest import Server
from tests.speech import noisy_tone, wav_bytes

RECORDING = ("consent.wav", wav_bytes(noisy_tone(175.0, 2.0)), "audio/wav")


@pytest.fixture
def consent_id(server: Server) -> Iterator[str]:
    """A recorded consent."""
    consent = server.openai.audio.voice_consents.create(name="Zoë", language="en-GB", recording=RECORDING)
    yield consent.id
    server.http.delete(f"/v1/audio/voice_consents/{consent.id}")


def test_a_consent_from_its_recording_to_its_deletion(server: Server) -> None:
    consents = server.openai.audio.voice_consents
    made = consents.create(name="Ada", language="en", recording=RECORDING)
    assert made.object == "audio.voice_consent"
    assert made.id.startswith("cons_")
    assert consents.retrieve(made.id) == made
    assert made in consents.list().data
    renamed = consents.update(made.id, name="Ada L.")
    assert (renamed.id, renamed.name, renamed.created_at) == (made.id, "Ada L.", made.created_at)
    (folder,) = server.store.rglob(made.id)
    assert (folder / "recording.flac").is_file()
    gone = consents.delete(made.id)
    assert gone.deleted
    assert not folder.exists() or not list(folder.iterdir())
    with pytest.raises(openai.NotFoundError) as missing:
        consents.retrieve(made.id)
    assert missing.value.code == "consent_not_found"


def test_consents_come_in_pages(server: Server) -> None:
    consents = server.openai.audio.voice_consents
    ids = [consents.create(name=f"n{n}", language="en", recording=RECORDING).id for n in range(3)]
    # The SDK asks for the next page after the last id by itself.
    seen = [consent.id for consent in consents.list(limit=2)]
    assert [found for found in seen if found in ids] == ids
    assert len(set(seen)) == len(seen)
    for consent in ids:
        consents.delete(consent)


def test_a_voice_refers_to_its_consent_and_outlives_it(server: Server, consent_id: str) -> None:
    made = server.openai.audio.voices.create(
        name="zoe", audio_sample=("z.wav", wav_bytes(noisy_tone(260.0)), "audio/wav"), consent=consent_id
    )
    assert made.object == "audio.voice"
    noted = server.http.get(f"/v1/audio/voices/{made.id}").json()["consent"]
    assert noted["id"] == consent_id
    assert noted["who"] == "Zoë"
    server.http.delete(f"/v1/audio/voice_consents/{consent_id}")
    assert server.http.get("/v1/audio/voices/zoe").json()["consent"] == noted
    assert server.openai.audio.voices.delete(made.id).deleted


def test_an_unknown_consent_enrols_nobody(server: Server) -> None:
    with pytest.raises(openai.PermissionDeniedError) as refused:
        server.openai.audio.voices.create(
            name="liar", audio_sample=RECORDING, consent="cons_01K0000000000000000000000A"
        )
    assert refused.value.code == "consent_required"
    assert server.http.get("/v1/audio/voices/liar").status_code == 404
    body = {"model": "tone", "input": "Hi.", "ref_audio": "data:;base64,AAAA", "consent": "cons_x"}
    answer = server.http.post("/v1/audio/speech", json=body)
    assert answer.json()["error"]["code"] == "consent_required"


def record(server: Server, recording: tuple[str, bytes] = RECORDING[:2], **changes: str) -> httpx.Response:
    """POST a consent that is wrong somewhere."""
    form = {"name": "Ada", "language": "en", **changes}
    return server.http.post("/v1/audio/voice_consents", data=form, files={"recording": recording})


def test_what_is_no_consent_is_refused(server: Server) -> None:
    assert record(server, name="tab\tname").json()["error"]["param"] == "name"
    assert record(server, language="no such").json()["error"]["param"] == "language"
    silence = ("s.wav", wav_bytes(np.zeros(48_000, np.float32)))
    assert record(server, recording=silence).json()["error"]["code"] == "no_speech_detected"
    page = ("p.wav", b"<html></html>")
    assert record(server, recording=page).json()["error"]["code"] == "unsupported_media_type"
    for odd in ("cons_1", "..%2f..%2fetc", "%00", "x" * 5000):
        assert server.http.get(f"/v1/audio/voice_consents/{odd}").status_code == 404
        assert server.http.delete(f"/v1/audio/voice_consents/{odd}").status_code == 404
    assert server.openai.audio.voice_consents.list().data == []
