"""The Python client: the same methods and the same results over a handle and over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from serve_app.client import Client, HandleClient, HttpClient
from serve_app.errors import AudioTooShort, InputEmpty, VoiceExists, VoiceNotFound
from tests.graph.conftest import Server, activity, eventually
from tests.speech import noisy_tone, wav_bytes


@pytest.fixture(params=["handle", "http"])
def tts(server: Server, request: pytest.FixtureRequest) -> Iterator[Client]:
    """Each kind of client."""
    with HandleClient() if request.param == "handle" else HttpClient(server.url) as client:
        yield client


def test_enrol_speak_list_delete(tts: Client, tmp_path: Path) -> None:
    recording = tmp_path / "carl.wav"
    recording.write_bytes(wav_bytes(noisy_tone(130.0)))
    voice = tts.enrol("carl", recording, consent="Yes.", language="en")
    assert voice.name == "carl"
    assert voice in tts.voices()
    speech = tts.speak("Hello there.", voice.id, engine="tone", seed=4)
    assert speech.voice_id == voice.id
    assert speech.engine == "tone"
    assert speech.seed == 4
    path = speech.save(tmp_path / "hello.wav")
    written, rate_hz = soundfile.read(path, dtype="float32")
    np.testing.assert_allclose(written, speech.samples, atol=1e-4)
    assert rate_hz == speech.sample_rate_hz
    with pytest.raises(VoiceExists):
        tts.enrol("carl", recording)
    tts.delete_voice("carl")
    assert voice not in tts.voices()


def test_a_transcript_is_corrected(tts: Client, server: Server) -> None:
    for text in ("La la la.", ""):
        tts.correct_transcript("anna", text, language="en")
        shown = server.http.get("/v1/audio/voices/anna").json()["transcript"]
        assert (shown and (shown["text"], shown["source"])) == (("La la la.", "edited") if text else None)


def test_both_clients_hear_the_same(server: Server) -> None:
    with HandleClient() as handle, HttpClient(server.url) as http:
        one = handle.speak("The same words. And more words.", "anna", engine="tone", seed=9)
        two = http.speak("The same words. And more words.", "anna", engine="tone", seed=9)
    # HTTP carries 16 bits.
    np.testing.assert_allclose(one.samples, two.samples, atol=1.1 / 32768)


def test_errors_arrive_as_themselves(tts: Client) -> None:
    with pytest.raises(VoiceNotFound):
        tts.speak("Hello.", "nobody")
    with pytest.raises(InputEmpty):
        tts.speak("…", "anna")
    with pytest.raises(AudioTooShort):
        tts.enrol("short", wav_bytes(noisy_tone(200.0, 0.2)))


def test_stream_hands_out_audio_and_leaving_stops_the_engine(tts: Client) -> None:
    with tts.stream("word " * 40, "anna", engine="slow") as stream:
        assert stream.started.engine == "slow"
        assert len(next(iter(stream))) > 0
    eventually(lambda: activity("slow")[0].rows_open == 0)


def test_four_voices_at_once(tts: Client) -> None:
    names = [f"voice {number}" for number in range(4)]
    for number, name in enumerate(names):
        tts.enrol(name, wav_bytes(noisy_tone(100.0 + 40 * number)))
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda name: tts.speak("At once.", name, engine="tone", seed=1), names))
    for name, speech in zip(names, together, strict=True):
        alone = tts.speak("At once.", name, engine="tone", seed=1)
        np.testing.assert_array_equal(alone.samples, speech.samples)
        tts.delete_voice(name)


def test_models_and_readiness(tts: Client) -> None:
    tts.ready()
    models = {model.name: model for model in tts.models()}
    assert models["english"].languages == ("en",)
    assert models["mosaic"].ready
