"""Each client that docs/compatibility.md lists, as it speaks to the server."""

from __future__ import annotations

import base64
import io
import json
from importlib import import_module
from typing import Any, Literal, get_args

import av
import httpx
import numpy as np
import openai
import pytest
from elevenlabs.client import AsyncElevenLabs, ElevenLabs
from elevenlabs.core.api_error import ApiError
from openai import AsyncOpenAI

from tests.graph.clients import ITS_OPENAI, LIBRARY, PAGE, shows, table
from tests.graph.conftest import Server
from tests.speech import noisy_tone, read_audio, wav_bytes

TEXT = "The birch canoe slid on the smooth planks."
Format = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]
FORMATS: tuple[Format, ...] = get_args(Format)


def seconds_of(data: bytes) -> tuple[float, int]:
    """Length and sample rate of an encoded file."""
    with av.open(io.BytesIO(data), "r") as container:
        frames = list(container.decode(audio=0))
    return sum(frame.samples for frame in frames) / frames[0].sample_rate, frames[0].sample_rate


# --- OpenAI's library ---


@shows("openai (Python)", "speech in six formats, streamed", means=LIBRARY)
def test_openai_streams_to_a_file(server: Server) -> None:
    for audio_format in FORMATS:
        with server.openai.audio.speech.with_streaming_response.create(
            model="tts-1", voice="alloy", input=TEXT, response_format=audio_format
        ) as answer:
            assert sum(len(part) for part in answer.iter_bytes()) > 1000


@shows(
    "openai (Python, async)",
    "speech",
    "typed errors",
    means=LIBRARY,
)
async def test_openai_async(server: Server) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2) as client:
        answer = await client.audio.speech.create(
            model="gpt-4o-mini-tts", voice="alloy", input=TEXT, response_format="pcm", speed=2.0
        )
        assert len(await answer.aread()) > 10_000
        with pytest.raises(openai.NotFoundError) as missing:
            await client.audio.speech.create(model="tts-1", voice="nobody", input=TEXT)
        assert missing.value.code == "voice_not_found"
        assert missing.value.request_id
        assert missing.value.response.headers["x-should-retry"] == "false"


@shows("openai (Python)", "voice by id object", "models", "custom voices with consents", means=LIBRARY)
def test_openai_custom_voice(server: Server) -> None:
    sample = ("s.wav", wav_bytes(noisy_tone(220.0)), "audio/wav")
    consent = server.openai.audio.voice_consents.create(name="Eve", language="en", recording=sample)
    voice = server.openai.audio.voices.create(name="eve", audio_sample=sample, consent=consent.id)
    spoken = server.openai.audio.speech.create(model="tone", voice={"id": voice.id}, input=TEXT)
    assert len(spoken.content) > 1000
    assert server.openai.models.retrieve("tone").id == "tone"
    server.openai.audio.voices.delete(voice.id)
    server.openai.audio.voice_consents.delete(consent.id)


# --- clients that speak OpenAI's dialect in their own way ---


@shows("LiveKit (openai plugin)", "speech as events, and plain for tts-1")
def test_livekit(server: Server) -> None:
    body: dict[str, Any] = {"input": TEXT, "model": "gpt-4o-mini-tts", "voice": "alloy"}
    body |= {"response_format": "mp3", "speed": 1.0, "instructions": "Warmly.", "stream_format": "sse"}
    audio = b""
    with server.http.stream("POST", "/v1/audio/speech", json=body, timeout=30) as answer:
        # The media type decides how it reads the body.
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data:"):
                event = json.loads(line[5:].strip())
                if event["type"] == "speech.audio.delta":
                    audio += base64.b64decode(event.get("delta") or event["audio"])
    assert seconds_of(audio)[0] > 2
    plain = server.http.post("/v1/audio/speech", json={**body, "model": "tts-1", "stream_format": "audio"})
    assert plain.headers["content-type"] == "audio/mpeg"


@shows(
    "Pipecat (OpenAITTSService)",
    "24 kHz PCM, voices under OpenAI's names by alias",
    "400 for a bad field",
    means=ITS_OPENAI,
)
async def test_pipecat(server: Server) -> None:
    """It calls OpenAI's library so, and catches nothing but ``BadRequestError``."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        parameters: dict[str, Any] = {"model": "gpt-4o-mini-tts", "voice": "alloy"}
        parameters |= {"response_format": "pcm", "input": TEXT}
        async with client.audio.speech.with_streaming_response.create(**parameters) as answer:
            assert answer.status_code == 200
            pcm = b"".join([part async for part in answer.iter_bytes(4096)])
        whole = server.http.post(
            "/v1/audio/speech", json={**parameters, "response_format": "wav", "stream": False}
        )
        assert len(pcm) / 2 / 24_000 == pytest.approx(seconds_of(whole.content)[0], abs=0.05)
        with pytest.raises(openai.BadRequestError):
            async with client.audio.speech.with_streaming_response.create(**{**parameters, "speed": 9}):
                pass


@shows("Open WebUI", "speech", "lists of models and voices", "readable errors")
def test_open_webui(server: Server) -> None:
    headers = {"Authorization": "Bearer none"}
    models = server.http.get("/v1/audio/models").json()["models"]
    assert "tone" in [model["id"] for model in models]
    voices = server.http.get("/v1/audio/voices").json()["voices"]
    assert "anna" in {voice["id"]: voice["name"] for voice in voices}.values()
    payload = {"model": "tone", "voice": voices[0]["id"], "input": TEXT}
    answer = server.http.post("/v1/audio/speech", json=payload, headers=headers)
    assert answer.status_code == 200
    assert seconds_of(answer.content)[0] > 2
    refused = server.http.post("/v1/audio/speech", json={**payload, "voice": "gone"}, headers=headers)
    assert "voice" in refused.json()["error"]["message"]


@shows("SillyTavern (OpenAI compatible)", "speech")
def test_sillytavern_openai(server: Server) -> None:
    payload = {"model": "tts-1", "input": TEXT, "response_format": "mp3", "speed": 1, "voice": "anna"}
    answer = server.http.post("/v1/audio/speech", json=payload)
    assert answer.headers["content-type"] == "audio/mpeg"


@shows(
    "Home Assistant (openai_tts)", "speech in mp3 and, streamed, in opus", "its extra fields are tolerated"
)
def test_home_assistant(server: Server) -> None:
    payload = {"model": "tts-1", "input": TEXT, "voice": "anna", "response_format": "mp3", "speed": 1.0}
    answer = server.http.post("/v1/audio/speech", json={**payload, "chime": True, "extra": {"a": 1}})
    assert answer.headers["x-ignored-fields"] == "chime, extra"
    assert seconds_of(answer.content)[0] > 2
    with server.http.stream(
        "POST", "/v1/audio/speech", json={**payload, "response_format": "opus"}, timeout=30
    ) as opus:
        assert next(opus.iter_raw()).startswith(b"OggS")


@shows("OpenReader and others that know Kokoro", "list of voices, of objects or of names")
def test_kokoro_clients(server: Server) -> None:
    names = server.http.get("/v1/audio/voices?legacy=true").json()["voices"]
    objects = server.http.get("/v1/audio/voices").json()["voices"]
    assert names == [voice["name"] for voice in objects]
    assert all(voice["id"] for voice in objects)


@shows("vLLM-Omni's clients", "speech with ref_audio", "batches", "upload of voices")
def test_vllm_omni(server: Server) -> None:
    sample = wav_bytes(noisy_tone(230.0))
    form = {"name": "omni", "consent": "user_consent_1", "ref_text": "la", "speaker_description": "calm"}
    uploaded = server.http.post("/v1/audio/voices", data=form, files={"audio_sample": ("a.wav", sample)})
    assert uploaded.json()["name"] == "omni"
    body = {"input": TEXT, "task_type": "Base", "response_format": "wav", "max_new_tokens": 2048}
    url = f"data:audio/wav;base64,{base64.b64encode(sample).decode()}"
    one = server.http.post("/v1/audio/speech", json={**body, "seed": 1, "ref_audio": url, "ref_text": "la"})
    two = server.http.post("/v1/audio/speech", json={**body, "seed": 1, "speaker": "omni"})
    # The default engine refines an enrolled voice at leisure, a recording that comes once it does not.
    assert one.status_code == two.status_code == 200
    items = [{"input": "One."}, {"input": "Two."}]
    batch = server.http.post(
        "/v1/audio/speech/batch", json={"voice": "omni", "model": "tone", "items": items}
    )
    assert batch.json()["succeeded"] == 2
    assert server.http.delete("/v1/audio/voices/omni").json()["deleted"] is True


# --- ElevenLabs ---


def elevenlabs(server: Server) -> ElevenLabs:
    """Their client, pointed here."""
    return ElevenLabs(base_url=server.url, api_key="none")


@shows("elevenlabs (Python)", "text to speech, whole and streamed", means=LIBRARY)
@pytest.mark.parametrize(
    ("output_format", "rate_hz"),
    [("mp3_44100_128", 44_100), ("mp3_22050_32", 22_050), ("wav_24000", 24_000), ("opus_48000_64", 48_000)],
)
def test_elevenlabs_speaks(server: Server, output_format: str, rate_hz: int) -> None:
    client = elevenlabs(server)
    (voice,) = [voice for voice in client.voices.get_all().voices if voice.name == "anna"]
    arguments = {"text": TEXT, "model_id": "eleven_multilingual_v2", "output_format": output_format}
    whole = b"".join(client.text_to_speech.convert(voice.voice_id, **arguments))  # type: ignore[arg-type]
    streamed = b"".join(client.text_to_speech.stream(voice.voice_id, **arguments))  # type: ignore[arg-type]
    for audio in (whole, streamed):
        seconds, found_hz = seconds_of(audio)
        assert seconds > 2
        assert found_hz == rate_hz


@shows("elevenlabs (Python)", "bit rates and PCM rates of output_format", "voice settings", means=LIBRARY)
def test_elevenlabs_settings(server: Server) -> None:
    client = elevenlabs(server)

    def size(**arguments: object) -> int:
        chosen = {"text": TEXT, "model_id": "tone", "output_format": "pcm_16000", "seed": 1, **arguments}
        return len(b"".join(client.text_to_speech.convert("anna", **chosen)))  # type: ignore[arg-type]

    assert size(output_format="pcm_32000") == pytest.approx(2 * size(), rel=0.01)
    assert size(output_format="mp3_44100_192") > 2 * size(output_format="mp3_44100_32")
    assert size(voice_settings={"speed": 2.0, "stability": 0.5}) == pytest.approx(size() / 2, rel=0.05)
    answer = server.http.post(
        "/v1/text-to-speech/anna", json={"text": TEXT, "previous_text": "x", "voice_settings": {"style": 1}}
    )
    assert answer.headers["x-ignored-fields"] == "previous_text, voice_settings.style"


@shows("elevenlabs (Python, async)", "text to speech", "list of models", means=LIBRARY)
async def test_elevenlabs_async(server: Server) -> None:
    client = AsyncElevenLabs(base_url=server.url, api_key="none")
    parts = [
        part async for part in client.text_to_speech.stream("anna", text=TEXT, output_format="pcm_24000")
    ]
    assert len(b"".join(parts)) > 48_000
    assert "tone" in [model.model_id for model in await client.models.list()]


@shows("elevenlabs (Python)", "cloning, searching, showing and deleting voices", means=LIBRARY)
def test_elevenlabs_voices(server: Server) -> None:
    client = elevenlabs(server)
    sample = ("s.wav", wav_bytes(noisy_tone(280.0)))
    made = client.voices.ivc.create(name="Liv", description="From the sea.", files=[sample])
    assert client.voices.get(made.voice_id).name == "Liv"
    assert [voice.name for voice in client.voices.search(search="THE SEA").voices] == ["Liv"]
    pages, token = [], None
    while True:
        page = client.voices.search(page_size=1, next_page_token=token)
        pages += [voice.voice_id for voice in page.voices]
        token = page.next_page_token
        if not page.has_more:
            break
    assert len(pages) == len(set(pages)) == page.total_count
    client.voices.delete(made.voice_id)
    with pytest.raises(ApiError) as gone:
        client.voices.get(made.voice_id)
    assert gone.value.status_code == 404


@shows("elevenlabs (Python)", "errors in its shape", means=LIBRARY)
@pytest.mark.parametrize(
    ("voice", "arguments", "status", "code"),
    [
        ("nobody", {}, 404, "voice_not_found"),
        ("anna", {"model_id": "gpt-9"}, 404, "model_not_found"),
        ("anna", {"text": "…"}, 400, "input_empty"),
        ("anna", {"output_format": "ulaw_8000"}, 400, "unsupported_format"),
        ("anna", {"output_format": "mp3_44100_33"}, 400, "unsupported_format"),
        ("anna", {"output_format": "pcm_11111"}, 400, "unsupported_format"),
        ("anna", {"seed": -1}, 400, "invalid_value"),
        ("anna", {"language_code": "tlh"}, 400, "unsupported_language"),
    ],
)
def test_elevenlabs_errors(
    server: Server, voice: str, arguments: dict[str, object], status: int, code: str
) -> None:
    with pytest.raises(ApiError) as refused:
        list(elevenlabs(server).text_to_speech.convert(voice, **{"text": TEXT, **arguments}))  # type: ignore[arg-type]
    assert refused.value.status_code == status
    assert refused.value.body["detail"]["status"] == code
    assert refused.value.body["detail"]["message"]


# --- XTTS servers ---


@shows(
    "SillyTavern (XTTSv2)", "list of speakers", "speech, whole and streamed", "its sliders", "errors as text"
)
def test_sillytavern_xtts(server: Server) -> None:
    speakers = server.http.get("/speakers").json()
    (anna,) = [speaker for speaker in speakers if speaker["name"] == "anna"]
    sliders: dict[str, Any] = {
        "temperature": 0.75,
        "speed": 1,
        "length_penalty": 1.0,
        "repetition_penalty": 5.0,
    }
    sliders |= {"top_p": 0.85, "top_k": 50, "enable_text_splitting": True, "stream_chunk_size": "100"}
    assert server.http.post("/set_tts_settings", json=sliders).status_code == 200
    speech = {"text": TEXT, "speaker_wav": anna["voice_id"], "language": "en"}
    whole = server.http.post("/tts_to_audio/", json=speech)
    assert whole.headers["content-type"] == "audio/wav"
    samples, _ = read_audio(whole.content)
    assert int(whole.headers["content-length"]) == 44 + 2 * len(samples)
    # It gives this address to an audio element.
    with server.http.stream("GET", "/tts_stream/", params=speech) as streamed:
        assert next(streamed.iter_raw()).startswith(b"RIFF")
        assert "content-length" not in streamed.headers
    gone = server.http.post("/tts_to_audio/", json={**speech, "speaker_wav": "gone"})
    assert gone.status_code == 404
    assert "voice" in gone.json()["detail"]


@shows("xtts-api-server's clients", "speakers by file name", "names and languages")
def test_xtts_server_by_file_name(server: Server) -> None:
    assert "anna" in server.http.get("/speakers_list").json()
    assert server.http.get("/languages").json()["languages"]["en"] == "en"
    body = {"text": TEXT, "speaker_wav": "anna.wav", "language": "en", "save_path": "/etc/passwd"}
    assert server.http.post("/tts_to_audio", json=body).status_code == 200
    for path in ("/etc/passwd", "../../etc/passwd", "C:\\voices\\anna.wav"):
        answer = server.http.post("/tts_to_audio/", json={**body, "speaker_wav": path})
        assert answer.status_code == 404
        assert "passwd" not in answer.text
    missing = server.http.get("/tts_stream", params={"text": TEXT})
    assert missing.status_code == 400
    assert "speaker_wav" in missing.json()["detail"]


def test_both_dialects_speak_the_same(server: Server) -> None:
    """One voice and one seed sound the same whoever asks."""
    body = {"input": TEXT, "model": "tone", "voice": "anna", "seed": 4, "response_format": "pcm"}
    ours = np.frombuffer(server.http.post("/v1/audio/speech", json=body).content, "<i2")
    path = "/v1/text-to-speech/anna?output_format=pcm_24000"
    answer = httpx.post(f"{server.url}{path}", json={"text": TEXT, "model_id": "tone", "seed": 4}, timeout=60)
    np.testing.assert_array_equal(ours, np.frombuffer(answer.content, "<i2"))


def test_the_page_says_what_is_tested() -> None:
    import_module("tests.graph.test_live")
    assert PAGE.read_text() == table(), "Run: python -m tests.graph.clients"
