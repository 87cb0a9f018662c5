"""What strangers send on purpose: each case ends in a clear answer, costs little, and the server goes on.

The cases are numbered as in the list of attacks that the server is held against: A fields and texts,
B recordings and voices, C what gets through HTTP. Those that need no graph are in tests/unit.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import pickle
import socket
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from tests.graph.conftest import Server, eventually, router_activity
from tests.speech import noisy_tone, read_audio, wav_bytes

GOOD: dict[str, Any] = {"model": "tone", "voice": "anna", "input": "Hello.", "response_format": "pcm"}
JSON = {"content-type": "application/json"}


def speak(server: Server, **fields: Any) -> httpx.Response:
    return server.http.post("/v1/audio/speech", json={**GOOD, **fields})


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.fixture(autouse=True)
def goes_on(server: Server) -> Iterator[None]:
    """After each case the server speaks."""
    yield
    assert speak(server).status_code == 200


# --- A: fields and texts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", "text/json", "x"],
)
def test_a2_json_that_is_announced_as_something_else(server: Server, content_type: str) -> None:
    answer = server.http.post(
        "/v1/audio/speech", content=json.dumps(GOOD), headers={"content-type": content_type}
    )
    assert code(answer) == (415, "json_expected")
    assert "application/json" in answer.json()["detail"]


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"]
)
def test_a2_json_by_any_of_its_names(server: Server, content_type: str) -> None:
    answer = server.http.post(
        "/v1/audio/speech", content=json.dumps(GOOD), headers={"content-type": content_type}
    )
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 100_000, 400),
        (b'{"input":' * 50_000, 400),
        (b'{"voice": "anna", "input": "Hi.", "extra": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", 400),
        (b'{"voice": "anna", "input": "Hi.", "seed": ' + b"9" * 100_000 + b"}", 400),
        (b'{"voice": "anna", "input": "Hi.", "seed": 1e400}', 400),
        (b'{"voice": "anna", "input": "Hi.", "speed": -1e400}', 400),
        (b'{"voice": "anna", "input": "Hi."', 400),
        (b'{"voice": "anna", "input": "Hi."} {}', 400),
        (b'{"voice": "anna", "input": "\xff"}', 400),
        # Python reads these two encodings as well; they hold nothing but what they say.
        (b'\xef\xbb\xbf{"voice": "anna", "input": "Hi."}', 200),
        (json.dumps({"voice": "anna", "input": "Hi."}).encode("utf-16"), 200),
        # The last of two wins, as in every parser of JSON; what counts is that one does.
        (b'{"voice": "nobody", "voice": "anna", "input": "Hi.", "model": "tone"}', 200),
    ],
    ids=[
        "deep", "deep objects", "deep extra", "digits", "float seed", "infinite", "truncated", "two values",
        "no utf-8", "byte-order mark", "utf-16", "twice",
    ],
)  # fmt: skip
def test_a1_json_made_to_break_parsers(server: Server, body: bytes, status: int) -> None:
    answer = server.http.post("/v1/audio/speech", content=body, headers=JSON)
    assert answer.status_code == status, answer.text
    if status == 400:
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert len(answer.content) < 1000


@pytest.mark.parametrize("length", [4096, 4097])
def test_a5_the_longest_text_and_one_character_more(server: Server, length: int) -> None:
    # Code points, not bytes: three of these are nine bytes.
    answer = speak(server, input="あ" * length)
    if length == 4096:
        assert answer.status_code == 200
        return
    assert code(answer) == (400, "input_too_long")
    assert "4097" in answer.json()["detail"]
    assert "4096" in answer.json()["detail"]


def processes() -> list[psutil.Process]:
    """Those that a body passes: Serve's proxy and the ingress."""
    found = [
        process
        for process in psutil.Process().children(recursive=True)
        if any(
            part in " ".join(process.cmdline()) for part in ("ProxyActor", "ServeReplica:voice-clone:ingress")
        )
    ]
    assert len(found) == 2, [process.cmdline() for process in found]
    return found


def peak_mib() -> float:
    """Most memory either has had."""
    peaks = []
    for process in processes():
        (line,) = (
            line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line
        )
        peaks.append(int(line.split()[1]) / 1024)
    return max(peaks)


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "undeclared"])
def test_a6_fifty_megabytes_of_text_are_refused_before_they_are_there(server: Server, declared: bool) -> None:
    before = peak_mib()
    read = 0

    def flood() -> Iterator[bytes]:
        nonlocal read
        for _ in range(800):
            read += 65536
            yield b"a" * 65536

    headers = {**JSON, "content-length": str(800 * 65536)} if declared else JSON
    try:
        answer = server.http.post("/v1/audio/speech", content=flood(), headers=headers)
    except httpx.TransportError:
        pass  # the server has answered and hung up while we still talked
    else:
        assert code(answer) == (413, "body_too_large")
    assert peak_mib() - before < 150


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ["Hello."]}, "input"),
        ({"input": {"text": "Hello."}}, "input"),
        ({"input": True}, "input"),
        ({"voice": None}, "voice"),
        ({"voice": 7}, "voice"),
        ({"voice": ""}, "voice"),
        ({"voice": {"id": ""}}, "voice"),
        ({"voice": {"id": 7}}, "voice"),
        ({"voice": {}}, "voice"),
        ({"voice": "x" * 201}, "voice"),
        ({"model": 7}, "model"),
        ({"model": ["tone"]}, "model"),
        ({"speed": None}, "speed"),
        ({"speed": []}, "speed"),
        ({"speed": ""}, "speed"),
        ({"response_format": None}, "response_format"),
        ({"response_format": 7}, "response_format"),
        ({"response_format": "MP3"}, "response_format"),
        ({"response_format": "mp3 "}, "response_format"),
        ({"response_format": "wav\x00"}, "response_format"),
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"seed": "1"}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"sample_rate": 48_001}, "sample_rate"),
        ({"sample_rate": "24000"}, "sample_rate"),
        ({"language": 7}, "language"),
        ({"language": "e"}, "language"),
        ({"language": "e" * 36}, "language"),
        ({"priority": "urgent"}, "priority"),
        ({"engine_options": []}, "engine_options"),
        ({"engine_options": "wobble"}, "engine_options"),
        ({"fallback_engines": "tone"}, "fallback_engines"),
        ({"fallback_engines": ["tone"] * 9}, "fallback_engines"),
        ({"fallback_engines": [7]}, "fallback_engines"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a7_a_wrong_type_names_its_field(server: Server, fields: dict[str, Any], param: str) -> None:
    answer = speak(server, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("speed", [0.25, 4.0, 4])
def test_a8_the_slowest_and_the_fastest(server: Server, speed: float) -> None:
    assert speak(server, speed=speed).status_code == 200


@pytest.mark.parametrize(
    "voice", ["Anna ", "anna\u200b", "ann\u0430", "default", "alloy2", "voice_" + "0" * 26, "tone"]
)
def test_a11_what_is_nearly_a_voice_is_none(server: Server, voice: str) -> None:
    answer = speak(server, voice=voice)
    if voice == "Anna ":
        # Outer space and case are no part of a name.
        assert answer.status_code == 200
        return
    assert code(answer) == (404, "voice_not_found")
    assert "x-voice-id" not in answer.headers


def test_a12_a_voice_made_with_one_engine_speaks_with_another(server: Server) -> None:
    sample = {"audio_sample": ("x.wav", wav_bytes(noisy_tone(210.0)))}
    made = server.http.post(
        "/v1/audio/voices", data={"name": "prepared", "model": "tone"}, files=sample
    ).json()
    answer = speak(server, voice=made["id"], model="mosaic")
    assert answer.status_code == 200
    assert answer.headers["x-engine"] == "mosaic"
    assert answer.headers["x-voice-id"] == made["id"]
    server.http.delete(f"/v1/audio/voices/{made['id']}")


def test_a13_the_language_asked_for_is_the_one_spoken(server: Server) -> None:
    answer = speak(server, input="Guten Morgen, wie geht es dir heute?", language="en-GB")
    assert answer.status_code == 200
    assert answer.headers["x-language"] == "en"
    for language in ("xx", "english", "en\n", "../en", "e\u0301n"):
        assert speak(server, language=language).status_code == 400, language


@pytest.mark.parametrize(
    "text",
    [
        '<!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><speak>&b;</speak>',
        '<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><speak>&f;</speak>',
        "<speak><prosody rate='x-fast'>Hello",
        "<break time='999999999s'/> Hello",
        "{{7*7}} ${7*7} %s %n Hello",
        "'; DROP TABLE voices; -- Hello",
        "Hello\u202e there\u2066 and\u0085 so\u200b on",
        "e" + "\u0301" * 2000,
        "ﷺ " * 500,
        "👩‍👩‍👧‍👦 family " * 100,
    ],
    ids=["entities", "file", "unclosed", "break", "template", "sql", "bidi", "marks", "ligature", "emoji"],
)
def test_a18_markup_and_odd_characters_are_text(server: Server, text: str) -> None:
    answer = speak(server, input=text)
    assert answer.status_code == 200, answer.text
    # Nothing was expanded or waited for: a character is a fraction of a second.
    assert len(answer.content) / 2 / 24_000 < 1 + 0.5 * len(text)


def test_a20_fields_of_other_servers_change_nothing_and_odd_names_are_not_sent_back(server: Server) -> None:
    many = {f"field_{number}": 1 for number in range(10_000)}
    assert len(speak(server, **many).headers["x-ignored-fields"]) < 1000
    answer = speak(
        server, **{"extra_payload": {"a": 1}, "x\r\nSet-Cookie": 1, "é": 2, "lang": "de", "z" * 5000: 3}
    )
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers
    assert len(answer.headers["x-ignored-fields"]) < 1000


@pytest.mark.parametrize("method", ["HEAD", "GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_a26_other_methods(server: Server, method: str) -> None:
    answer = server.http.request(method, "/v1/audio/speech")
    assert answer.status_code == 405
    if method != "HEAD":
        assert answer.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "path",
    ["/v1/audio/speech/", "/v1//audio/speech", "/v1/audio/speech/%2e%2e/voices", "/%2e%2e/", "/a" * 2000],
)
def test_a26_other_paths(server: Server, path: str) -> None:
    answer = server.http.post(path, json=GOOD)
    assert answer.status_code in (307, 404, 405)
    if answer.status_code != 307:
        assert answer.headers["content-type"] == "application/problem+json"


# --- B: recordings and voices ---------------------------------------------------------------------------


def enrol(
    server: Server, name: str, audio: bytes | None = None, filename: str = "x.wav", **form: str
) -> httpx.Response:
    sample = {"audio_sample": (filename, wav_bytes(noisy_tone(150.0)) if audio is None else audio)}
    return server.http.post("/v1/audio/voices", data={"name": name, **form}, files=sample)


@contextmanager
def nothing_outside(server: Server) -> Iterator[None]:
    """No file beside the store appears or goes, and in the store only such as the store names."""

    def beside() -> set[Path]:
        root = server.store.parent
        return {path for path in root.rglob("*") if server.store not in path.parents}

    before = beside()
    yield
    assert beside() == before
    for path in server.store.rglob("*"):
        assert path.name.isascii()
        assert path.is_relative_to(server.store)
        assert not path.is_symlink()


@pytest.mark.parametrize(
    "filename",
    [
        "../../etc/passwd", "..\\..\\boot.ini", "/etc/passwd", "a\x00.wav", "x" * 2000, "CON", ".hidden",
        "🎙.wav", "a.wav/../../b", "$(touch pwned).wav", "x.mp3", "x.exe", "", "a\r\nX-Evil: 1.wav",
        'a"; name="name',
    ],
)  # fmt: skip
def test_b12_a_file_name_is_never_used(server: Server, filename: str) -> None:
    with nothing_outside(server):
        answer = enrol(server, "from a file", filename=filename)
        if filename == "":
            # Without a file name a part is a field, and no recording.
            assert answer.status_code == 400
            return
        assert answer.status_code == 200, answer.text
        stored = "".join(str(path) for path in server.store.rglob("*"))
        assert filename[:20] not in stored
        assert "evil" not in answer.text.lower()
    assert server.http.delete("/v1/audio/voices/from a file").status_code == 200


@pytest.mark.parametrize(
    "name", ["../../x", "<img src=x onerror=alert(1)>", "CON", "a/b", "💀", "'; --", "\u202eanna"]
)
def test_c4_a_name_is_data_and_never_markup(server: Server, name: str) -> None:
    with nothing_outside(server):
        made = enrol(server, name)
        assert made.status_code == 200
        voice = made.json()["id"]
        for path in (f"/v1/audio/voices/{voice}", "/v1/audio/voices?limit=1000", "/api/voices"):
            listed = server.http.get(path)
            assert listed.headers["content-type"] == "application/json"
            assert listed.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in listed.headers["content-security-policy"]
        assert server.http.delete(f"/v1/audio/voices/{voice}").status_code == 200


@pytest.mark.parametrize(
    "voice",
    [
        "..%2f..%2fetc",
        "..%5c..%5cetc",
        "%2e%2e",
        "%00",
        "a%00b",
        "%ff%fe",
        "%F0%9F",
        "a" * 8000,
        "records%2fpublic",
        "%0d%0aX: 1",
    ],
)
def test_b14_an_odd_id_finds_and_removes_nothing(server: Server, voice: str) -> None:
    (server.store.parent / "etc").write_text("safe")
    with nothing_outside(server):
        for prefix in ("/v1/audio/voices/", "/api/voices/"):
            answer = server.http.delete(prefix + voice)
            assert answer.status_code in (404, 405), answer.text
        assert server.http.get(f"/v1/audio/voices/{voice}").status_code == 404
    assert server.http.get("/v1/audio/voices/anna").status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in ("ref_audio", "speaker_wav", "ref_audio_path", "audio_url")
        for value in ("http://127.0.0.1:{port}/x.wav", "file:///etc/passwd", "gopher://127.0.0.1:{port}/")
    ],
)
def test_b16_no_field_makes_the_server_fetch_anything(server: Server, field: str, value: str) -> None:
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(0.2)
        value = value.format(port=trap.getsockname()[1])
        answer = speak(server, **{field: value})
        if answer.status_code == 200:
            assert field in answer.headers["x-ignored-fields"]
        else:
            assert answer.status_code in (400, 403)
        assert enrol(server, "fetched", value.encode()).status_code == 415
        assert speak(server, voice=value).status_code in (400, 404)
        with pytest.raises(TimeoutError):
            trap.accept()
        assert "root:" not in answer.text


def multipart(parts: bytes, boundary: str = "x") -> dict[str, Any]:
    return {"content": parts, "headers": {"content-type": f"multipart/form-data; boundary={boundary}"}}


def part(name: str, body: bytes, extra: str = "") -> bytes:
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + body + b"\r\n"


@pytest.mark.parametrize(
    "form",
    [
        multipart(b"".join(part(f"f{n}", b"1") for n in range(2000)) + b"--x--\r\n"),
        multipart(b"".join(part(f"f{n}", b"1", '; filename="f"') for n in range(2000)) + b"--x--\r\n"),
        multipart(part("name", b"n" * (2 << 20)) + b"--x--\r\n"),
        multipart(part("name", b"anna")),
        multipart(b"no parts at all"),
        multipart(b""),
        multipart(b"--x\r\n" + b"X: " + b"h" * 100_000 + b"\r\n\r\n\r\n--x--\r\n"),
        multipart(part("name", b"\xff\xfe") + b"--x--\r\n"),
        {"content": b"--x--", "headers": {"content-type": "multipart/form-data"}},
        {"content": b"{}", "headers": JSON},
        multipart(part("audio_sample", b"no file") + part("name", b"n") + b"--x--\r\n"),
        multipart(part("name", b"n", '; filename="n"') + part("audio_sample", b"RIFF") + b"--x--\r\n"),
    ],
    ids=[
        "fields", "files", "long field", "unfinished", "none", "empty", "long header", "no utf-8",
        "no boundary", "json", "text as file", "file as text",
    ],
)  # fmt: skip
def test_b6_forms_made_to_break_parsers(server: Server, form: dict[str, Any]) -> None:
    answer = server.http.post("/v1/audio/voices", **form)
    assert answer.status_code in (400, 413, 415), answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def archive_of(kind: str) -> bytes:
    out = io.BytesIO()
    wav = wav_bytes(noisy_tone(150.0))
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("../../x.wav", wav)
    else:
        with tarfile.open(fileobj=out, mode="w") as tar:
            member = tarfile.TarInfo("../../x.wav")
            member.size = len(wav)
            tar.addfile(member, io.BytesIO(wav))
    packers: dict[str, Callable[[bytes], bytes]] = {"tar.gz": gzip.compress, "tar.xz": lzma.compress}
    return packers.get(kind, bytes)(out.getvalue())


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_b6_an_archive_of_recordings_is_no_recording(server: Server, kind: str) -> None:
    with nothing_outside(server):
        answer = enrol(server, "archive", archive_of(kind))
        assert code(answer) == (415, "unsupported_media_type")


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_b22_a_pickle_in_place_of_a_voice_is_never_loaded(server: Server, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = pickle.dumps(Canary(canary))
    assert enrol(server, "pickle", payload).status_code == 415
    voice = enrol(server, "target").json()["id"]
    whole = speak(server, voice=voice, seed=1).content
    blobs = [*server.store.glob(f"voices/{voice}/**/*.safetensors")]
    assert blobs
    for blob in blobs:
        blob.write_bytes(payload)
    # What the router remembers is fine; another engine of the same kind reads the file.
    assert speak(server, voice=voice, seed=1, model="slow").content == whole
    (recording,) = server.store.glob(f"voices/{voice}/*/reference.flac")
    recording.write_bytes(payload)
    for blob in blobs:
        blob.unlink()
    damaged = speak(server, voice=voice, model="mosaic")
    assert code(damaged) == (503, "voice_damaged")
    assert not canary.exists()
    assert server.http.delete(f"/v1/audio/voices/{voice}").status_code == 200


def test_b19_two_enrolments_of_one_name_at_once(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: enrol(server, "raced"), range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
    for answer in answers:
        if answer.status_code == 409:
            assert answer.headers["x-should-retry"] == "false"
    assert server.http.delete("/v1/audio/voices/raced").status_code == 200


def test_b19_a_speech_that_runs_ends_with_the_voice_it_began_with(server: Server) -> None:
    voice = enrol(server, "going").json()["id"]
    text = "One sentence here. " * 12
    whole = speak(server, voice=voice, input=text, model="slow", seed=5).content
    begun = threading.Event()
    heard: list[bytes] = []

    def listen() -> None:
        body = {**GOOD, "voice": voice, "input": text, "model": "slow", "seed": 5}
        with server.http.stream("POST", "/v1/audio/speech", json=body) as answer:
            for piece in answer.iter_raw():
                heard.append(piece)
                begun.set()

    reader = threading.Thread(target=listen)
    reader.start()
    assert begun.wait(30)
    assert enrol(server, "going", wav_bytes(noisy_tone(333.0)), replace="true").status_code == 200
    assert server.http.delete(f"/v1/audio/voices/{voice}").status_code == 200
    assert speak(server, voice=voice).status_code == 404
    reader.join()
    assert b"".join(heard) == whole


# --- C, F: what gets through HTTP, and what comes back --------------------------------------------------


@pytest.mark.parametrize(
    "ranges", ["bytes=0-0", "bytes=0-,0-,0-", "bytes=" + ",".join(["0-1"] * 2000), "junk"]
)
def test_c11_ranges_of_a_speech_are_not_served(server: Server, ranges: str) -> None:
    whole = speak(server, seed=2).content
    answer = server.http.post("/v1/audio/speech", json={**GOOD, "seed": 2}, headers={"range": ranges})
    assert (answer.status_code, answer.content) == (200, whole)


def test_f5_alone_or_in_a_crowd_the_same_samples(server: Server) -> None:
    def ask(number: int) -> bytes:
        return speak(server, input=f"Number {number % 3} speaks.", seed=number % 3).content

    alone = [ask(number) for number in range(3)]
    with ThreadPoolExecutor(12) as pool:
        crowd = list(pool.map(ask, range(24)))
    assert crowd == [alone[number % 3] for number in range(24)]


def test_f2_a_stream_of_many_sentences_is_one_file(server: Server) -> None:
    text = "One sentence. Another one. A third, to be sure."
    for audio_format, mark in (("wav", b"RIFF"), ("flac", b"fLaC"), ("opus", b"OpusHead")):
        body = {**GOOD, "input": text, "response_format": audio_format, "seed": 3}
        answer = server.http.post("/v1/audio/speech", json=body)
        assert answer.content.count(mark) == 1, audio_format
    whole = np.frombuffer(speak(server, input=text, seed=3).content, "<i2")
    wav = server.http.post(
        "/v1/audio/speech", json={**GOOD, "input": text, "response_format": "wav", "seed": 3}
    )
    samples, _ = read_audio(wav.content)
    assert len(samples) == len(whole)


def test_nothing_is_left_behind(server: Server) -> None:
    def held() -> tuple[int, int, int]:
        activity = router_activity()
        return activity.requests, activity.waiting, activity.speaking

    eventually(lambda: held() == (0, 0, 0))
