"""The client of api_v2 servers over real sockets, against a server that misbehaves as the real one does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from engines.contract import (
    Chunk,
    Conditioning,
    EngineError,
    ModelCorrupt,
    ModelMissing,
    NothingToSpeak,
    ReferenceUnusable,
    Samples,
    SynthesisFailed,
    UnsupportedLanguage,
    UnsupportedOption,
    Utterance,
)
from engines.gpt_sovits.remote import RemoteBackend, RemoteSettings, remote_settings
from tests.api_v2_server import ApiV2TestServer

RATE_HZ = 32_000
SLOW_S = 0.6

Backend = Callable[..., RemoteBackend]


@pytest.fixture
def servers() -> Iterator[tuple[ApiV2TestServer, ApiV2TestServer]]:
    pair = (ApiV2TestServer(slow_s=SLOW_S).start(), ApiV2TestServer(slow_s=SLOW_S).start())
    yield pair
    for server in pair:
        server.stop()


@pytest.fixture
def server(servers: tuple[ApiV2TestServer, ApiV2TestServer]) -> ApiV2TestServer:
    return servers[0]


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Backend]:
    """Makes loaded backends that are unloaded at the end."""
    made: list[RemoteBackend] = []

    def make(*servers: ApiV2TestServer, **settings: Any) -> RemoteBackend:
        fields = {"shared_dir": tmp_path / "shared", "probe_timeout_s": 0.2, **settings}
        one = RemoteBackend(RemoteSettings(urls=tuple(server.url for server in servers), **fields))
        made.append(one)
        one.load()
        return one

    yield make
    for one in made:
        one.unload()


def voice(
    seed: int = 0, seconds: float = 4.0, transcript: str = "So it is.", language: str = "en"
) -> Conditioning:
    noise = np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE_HZ)).astype(np.float32)
    return Conditioning(
        "gpt_sovits",
        "w",
        {
            "samples": noise,
            "transcript": np.frombuffer(transcript.encode(), np.uint8),
            "language": np.frombuffer(language.encode(), np.uint8),
        },
    )


VOICE = voice()


def say(text: str, conditioning: Conditioning = VOICE, **fields: Any) -> Utterance:
    return Utterance(text, fields.pop("language", "en"), conditioning, seed=fields.pop("seed", 7), **fields)


def spoken(backend: RemoteBackend, utterance: Utterance) -> Samples:
    """All of one utterance; raises what it ended with."""
    (samples,) = all_of(backend, [utterance])
    if isinstance(samples, EngineError):
        raise samples
    return samples


def all_of(backend: RemoteBackend, batch: Sequence[Utterance]) -> list[Samples | EngineError]:
    """Each row's samples, or its error."""
    parts: dict[int, list[Samples]] = {row: [] for row in range(len(batch))}
    ends: dict[int, EngineError | None] = {}
    for chunk in backend.synthesize(batch):
        assert chunk.row not in ends
        parts[chunk.row].append(chunk.samples)
        if chunk.last:
            ends[chunk.row] = chunk.error
    assert ends.keys() == parts.keys()
    return [ends[row] or np.concatenate(parts[row]) for row in parts]


# --- what is asked ---


def test_an_utterance_is_asked_for_as_api_v2_wants_it(
    backend: Backend, server: ApiV2TestServer, tmp_path: Path
) -> None:
    one = backend(server)
    samples = spoken(one, say("Hello there.", speed=1.25, seed=2**40 + 3, options={"top_k": 5}))
    (asked,) = server.requests
    assert (asked["text"], asked["text_lang"], asked["prompt_lang"]) == ("Hello there.", "en", "en")
    assert (asked["prompt_text"], asked["speed_factor"], asked["top_k"]) == ("So it is.", 1.25, 5)
    assert asked["seed"] == 3
    assert Path(asked["ref_audio_path"]).parent == tmp_path / "shared"
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, server.pipeline.tone(asked).astype(np.float32) / 32768)
    assert one.sample_rate_hz == RATE_HZ


def test_the_same_seed_gives_the_same_samples_and_another_others(
    backend: Backend, server: ApiV2TestServer
) -> None:
    one = backend(server)
    first, again, other = (spoken(one, say("Hello.", seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_each_recording_has_a_file_of_its_own(
    backend: Backend, server: ApiV2TestServer, tmp_path: Path
) -> None:
    one = backend(server)
    first, other = spoken(one, say("Hello.")), spoken(one, say("Hello.", voice(1)))
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(spoken(one, say("Hello.")), first)
    files = sorted(tmp_path.rglob("*"))
    assert len([file for file in files if file.suffix == ".wav"]) == 2
    assert not [file for file in files if file.suffix == ".part"]
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in files if file.suffix == ".wav")


def test_the_servers_own_path_of_the_folder_is_sent(backend: Backend, server: ApiV2TestServer) -> None:
    one = backend(server, remote_dir="/data/recordings/")
    with pytest.raises(SynthesisFailed, match=r"does not see the recording.*`remote_dir`"):
        spoken(one, say("Hello."))
    path = server.requests[0]["ref_audio_path"]
    assert path.startswith("/data/recordings/")
    assert len(Path(path).stem) == 64


@pytest.mark.parametrize(
    ("transcript", "language", "sent"),
    [
        ("Hello.", "en-GB", ("Hello.", "en")),
        ("你好。", "zh", ("你好。", "zh")),
        ("", "", ("", "auto")),
        ("Hello.", "", ("Hello.", "auto")),
        ("Bonjour.", "fr", ("", "auto")),
    ],
)
def test_what_is_said_in_the_recording_is_told_in_a_language_it_knows(
    backend: Backend, server: ApiV2TestServer, transcript: str, language: str, sent: tuple[str, str]
) -> None:
    spoken(backend(server), say("Hi.", voice(0, 4, transcript, language)))
    assert (server.requests[0]["prompt_text"], server.requests[0]["prompt_lang"]) == sent


@pytest.mark.parametrize(
    ("utterance", "error"),
    [
        (say("Bonjour.", language="fr"), UnsupportedLanguage),
        (say("… !"), NothingToSpeak),
        (say("Hi.", options={"top_q": 1}), UnsupportedOption),
        (say("Hi.", options={"weights": "nobody"}), UnsupportedOption),
    ],
)
def test_what_cannot_be_asked_for_is_not_sent(
    backend: Backend, server: ApiV2TestServer, utterance: Utterance, error: type[EngineError]
) -> None:
    with pytest.raises(error):
        spoken(backend(server), utterance)
    assert not server.requests


@pytest.mark.parametrize(("version", "rate_hz"), [("v1", 32_000), ("v3", 24_000), ("v4", 48_000)])
def test_versions_differ_in_rate_and_languages(backend: Backend, version: str, rate_hz: int) -> None:
    server = ApiV2TestServer(version).start()
    try:
        one = backend(server, version=version)
        assert one.sample_rate_hz == rate_hz
        assert ("ko" in one.languages) == (version != "v1")
        assert len(spoken(one, say("Hello."))) == round(0.02 * 6 * rate_hz)
        bare = say("Hello.", voice(transcript="", language=""))
        if version == "v1":
            assert len(spoken(one, bare))
        else:
            with pytest.raises(ReferenceUnusable, match="Add the transcript"):
                spoken(one, bare)
    finally:
        server.stop()


# --- what is answered ---


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_every_mode_gives_the_sound_and_streams_it_in_parts(
    backend: Backend, server: ApiV2TestServer, mode: int
) -> None:
    one = backend(server, streaming_mode=mode)
    chunks = list(one.synthesize([say("Hello there, how are you?")]))
    sound = np.concatenate([chunk.samples for chunk in chunks])
    tone = server.pipeline.tone(server.requests[0]).astype(np.float32) / 32768
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].error is None
    heard = sound[sound != 0] if mode == 1 else sound[: len(tone)]
    np.testing.assert_array_equal(heard, tone[tone != 0] if mode == 1 else tone)
    assert len(sound) >= len(tone)
    assert (len(chunks) > 2) == (mode > 0)


@pytest.mark.parametrize("mode", [0, 1, 3])
@pytest.mark.parametrize("text", ["[fail] This.", "[late] This is cut off."])
def test_silence_and_a_cut_stream_are_failures_of_their_row_alone(
    backend: Backend, server: ApiV2TestServer, mode: int, text: str
) -> None:
    one = backend(server, streaming_mode=mode)
    bad, good = all_of(one, [say(text), say("This is well.")])
    if mode or "fail" in text:
        assert isinstance(bad, SynthesisFailed)
    assert isinstance(good, np.ndarray)
    assert good.any()


@pytest.mark.parametrize("mode", [0, 2])
def test_silence_at_the_right_rate_is_no_speech_either(
    backend: Backend, server: ApiV2TestServer, mode: int
) -> None:
    with pytest.raises(SynthesisFailed, match="answered with silence"):
        spoken(backend(server, streaming_mode=mode), say("[none] Hello."))


def test_another_rate_is_named_and_not_played(backend: Backend, server: ApiV2TestServer) -> None:
    with pytest.raises(SynthesisFailed, match=r"32000 Hz instead of 48000 Hz.*`version`"):
        spoken(backend(server, version="v4"), say("Hello."))


def test_a_recording_it_refuses_is_named(backend: Backend, server: ApiV2TestServer) -> None:
    with pytest.raises(ReferenceUnusable, match="for its length"):
        spoken(backend(server), say("Hello.", voice(seconds=2.5)))


# --- slots, and servers that die ---


def test_a_server_does_one_thing_at_a_time(
    backend: Backend, servers: tuple[ApiV2TestServer, ApiV2TestServer]
) -> None:
    one = backend(*servers, streaming_mode=2)
    batch = [say(f"Number {number}.", voice(number)) for number in range(6)]
    alone = [spoken(one, utterance) for utterance in batch]
    for server in servers:
        server.requests.clear()
    for sound, expected in zip(all_of(one, batch), alone, strict=True):
        np.testing.assert_array_equal(sound, expected)
    assert [server.pipeline.most_active for server in servers] == [1, 1]
    assert all(len(server.requests) >= 1 for server in servers)
    assert one.concurrent_batches == 2


def test_two_servers_work_at_the_same_time(
    backend: Backend, servers: tuple[ApiV2TestServer, ApiV2TestServer]
) -> None:
    both = threading.Barrier(2, timeout=20)

    for server in servers:
        server.pipeline.tone = _meeting(server.pipeline.tone, both)  # type: ignore[method-assign]
    one = backend(*servers)
    sounds = all_of(one, [say("One."), say("Two.")])
    assert all(isinstance(sound, np.ndarray) for sound in sounds)
    # Whether in one call or in two.
    with ThreadPoolExecutor(2) as callers:
        assert all(len(sound) for sound in callers.map(spoken, [one, one], [say("One."), say("Two.")]))


def _meeting(
    tone: Callable[[dict[str, Any]], np.ndarray], both: threading.Barrier
) -> Callable[..., np.ndarray]:
    def meet(request: dict[str, Any]) -> np.ndarray:
        both.wait()
        return tone(request)

    return meet


def test_a_dead_server_is_skipped_and_found_again(
    backend: Backend, servers: tuple[ApiV2TestServer, ApiV2TestServer]
) -> None:
    first, second = servers
    one = backend(first, second)
    first.stop()
    sounds = all_of(one, [say(f"Number {number}.") for number in range(4)])
    assert all(isinstance(sound, np.ndarray) for sound in sounds)
    assert len(second.requests) == 4
    first.start()
    eventually(lambda: bool(all_of(one, [say("Back?"), say("Here.")])) and bool(first.requests))


def test_a_server_that_is_dead_at_the_start_does_not_stop_it(
    backend: Backend, servers: tuple[ApiV2TestServer, ApiV2TestServer]
) -> None:
    servers[0].stop()
    assert len(spoken(backend(*servers), say("Hello.")))
    assert servers[1].requests


def test_a_server_that_dies_before_it_has_said_anything_costs_nobody_a_word(
    backend: Backend, servers: tuple[ApiV2TestServer, ApiV2TestServer]
) -> None:
    one = backend(*servers, streaming_mode=3)
    dying: list[ApiV2TestServer] = []

    def crash() -> None:
        eventually(lambda: any(server.pipeline.active for server in servers))
        dying.extend(server for server in servers if server.pipeline.active)
        dying[0].stop()

    crashing = threading.Thread(target=crash)
    crashing.start()
    sound = spoken(one, say("[slow] Hello."))
    crashing.join()
    (other,) = [server for server in servers if server is not dying[0]]
    tone = other.pipeline.tone(other.requests[0]).astype(np.float32) / 32768
    np.testing.assert_array_equal(sound[: len(tone)], tone)


def test_no_server_at_all_is_said_with_the_next_step(backend: Backend, server: ApiV2TestServer) -> None:
    server.stop()
    with pytest.raises(ModelMissing, match=r"No GPT-SoVITS server answers.*api_v2\.py"):
        backend(server)


def test_servers_that_die_later_fail_the_row_and_not_the_engine(
    backend: Backend, server: ApiV2TestServer
) -> None:
    one = backend(server)
    server.stop()
    with pytest.raises(SynthesisFailed, match="No GPT-SoVITS server answers"):
        spoken(one, say("Hello."))
    server.start()
    # It is looked for again, and waited for a moment.
    assert len(spoken(one, say("Hello.")))


def test_something_else_on_the_port_is_no_server(backend: Backend, server: ApiV2TestServer) -> None:
    one = RemoteBackend(RemoteSettings(urls=(f"{server.url}/docs",)))
    with pytest.raises(ModelCorrupt, match="no api_v2"):
        one.load()


def test_a_busy_server_is_not_taken_for_dead(backend: Backend, server: ApiV2TestServer) -> None:
    body = {"text": "[slow] Hello.", "text_lang": "en", "prompt_lang": "en", "prompt_text": "x"}
    one = backend(server)
    spoken(one, say("Hello."))
    body["ref_audio_path"] = server.requests[0]["ref_audio_path"]
    other = threading.Thread(target=lambda: httpx.post(f"{server.url}/tts", json=body, timeout=30))
    other.start()
    try:
        eventually(lambda: server.pipeline.active == 1)
        # Loading now finds it silent: busy.
        assert len(spoken(backend(server), say("Hello.")))
    finally:
        other.join()


def test_work_that_is_left_keeps_its_server_until_it_is_done(
    backend: Backend, servers: tuple[ApiV2TestServer, ApiV2TestServer]
) -> None:
    one = backend(*servers)
    left = say("[slow] Hello.")
    chunks = one.synthesize([left])
    leaving = threading.Timer(SLOW_S / 3, left.abandoned.set)
    leaving.start()
    began_s = time.monotonic()
    assert list(chunks) == []
    assert time.monotonic() - began_s < 30
    busy, idle = sorted(servers, key=lambda server: -len(server.requests))
    assert len(spoken(one, say("Next."))) > 0
    assert (len(busy.requests), len(idle.requests)) == (1, 1)


def test_closing_the_iterator_leaves_every_row(backend: Backend, server: ApiV2TestServer) -> None:
    one = backend(server, streaming_mode=3)
    chunks = one.synthesize([say("[slow] A long text that is left early."), say("Next.")])
    assert isinstance(next(iter(chunks)), Chunk)
    chunks.close()  # type: ignore[attr-defined]
    assert len(spoken(one, say("Hello.")))
    assert server.pipeline.most_active == 1


# --- weights ---

PAIRS = {
    "calm": {"gpt": "calm.ckpt", "sovits": "calm.pth"},
    "gone": {"gpt": "calm.ckpt", "sovits": "missing.pth"},
    "loud": {"gpt": "loud.ckpt", "sovits": "loud.pth"},
}


def test_weights_are_switched_only_when_another_pair_is_wanted(
    backend: Backend, server: ApiV2TestServer
) -> None:
    one = backend(server, weights=PAIRS)
    calm, again, loud = (
        spoken(one, say("Hello.", options=options))
        for options in ({}, {"weights": "calm"}, {"weights": "loud"})
    )
    np.testing.assert_array_equal(calm, again)
    assert not np.array_equal(calm, loud)
    assert server.switches == [
        ("gpt", "calm.ckpt"),
        ("sovits", "calm.pth"),
        ("gpt", "loud.ckpt"),
        ("sovits", "loud.pth"),
    ]


def test_a_pair_that_is_half_loaded_is_loaded_anew(backend: Backend, server: ApiV2TestServer) -> None:
    one = backend(server, weights=PAIRS)
    calm = spoken(one, say("Hello."))
    with pytest.raises(SynthesisFailed, match="could not load its weights"):
        spoken(one, say("Hello.", options={"weights": "gone"}))
    server.switches.clear()
    np.testing.assert_array_equal(spoken(one, say("Hello.")), calm)
    assert server.switches == [("gpt", "calm.ckpt"), ("sovits", "calm.pth")]


def test_a_server_that_came_back_gets_its_weights_again(backend: Backend, server: ApiV2TestServer) -> None:
    one = backend(server, weights=PAIRS)
    calm = spoken(one, say("Hello."))
    server.stop()
    with pytest.raises(SynthesisFailed):
        spoken(one, say("Hello."))
    server.start()
    np.testing.assert_array_equal(spoken(one, say("Hello.")), calm)


def test_each_server_keeps_to_its_pair_while_it_can(
    backend: Backend, servers: tuple[ApiV2TestServer, ApiV2TestServer]
) -> None:
    one = backend(*servers, weights=PAIRS)
    all_of(one, [say("One.", options={"weights": "calm"}), say("Two.", options={"weights": "loud"})])
    switches = [len(server.switches) for server in servers]
    for name in ("loud", "calm", "loud", "calm"):
        spoken(one, say("Hello.", options={"weights": name}))
    if switches == [2, 2]:
        assert [len(server.switches) for server in servers] == switches


# --- settings ---


def test_settings_come_from_the_environment() -> None:
    assert remote_settings({}) is None
    assert remote_settings({"GPT_SOVITS_API_URL": " , "}) is None
    found = remote_settings(
        {
            "GPT_SOVITS_API_URL": "http://a:9880, http://b:9880",
            "GPT_SOVITS_SHARED_DIR": "/srv/here",
            "GPT_SOVITS_REMOTE_DIR": "/srv/there",
        },
        version="v4",
    )
    assert found is not None
    assert found.urls == ("http://a:9880", "http://b:9880")
    assert (found.shared_dir, found.remote_dir, found.version) == (Path("/srv/here"), "/srv/there", "v4")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"urls": ["ftp://a"]}, "no http"),
        ({"urls": ["a:9880"]}, "no http"),
        ({"urls": []}, "at least 1"),
        ({"urls": ["http://a", "http://a"]}, "twice"),
        ({"urls": ["http://a"], "default_weights": "calm"}, "no weights 'calm'"),
        ({"urls": ["http://a"], "streaming": 1}, "streaming"),
    ],
)
def test_mistakes_in_settings_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        RemoteSettings.model_validate(fields)


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait until ``condition`` holds; fail if it never does."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never held"
        time.sleep(0.05)
