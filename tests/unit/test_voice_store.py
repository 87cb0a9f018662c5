"""Voices are whole or absent: under races, crashes, full disks and damaged files."""

# Nothing else runs on the event loop of a test here: looking into files and killing children may block it.
# ruff: noqa: ASYNC220, ASYNC221, ASYNC240, ASYNC251

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import soundfile
from obstore.exceptions import GenericError
from obstore.store import MemoryStore
from pydantic import ValidationError

from engines.contract import Conditioning
from serve_app.errors import (
    StorageFull,
    StoreUnavailable,
    VoiceCloneError,
    VoiceDamaged,
    VoiceExists,
    VoiceNotFound,
)
from serve_app.voices.reference import CheckedReference, decode_flac, fingerprint_of
from serve_app.voices.store import StoreNotUsable, VoiceStore
from serve_app.voices.voice import Consent, NewVoice, Voice, is_voice_id

RATE_HZ = 16_000


def recording(seed: int = 0, seconds: float = 1.0) -> CheckedReference:
    noise = np.random.default_rng(seed).standard_normal(int(seconds * RATE_HZ)) * 0.1
    out = io.BytesIO()
    soundfile.write(out, noise, RATE_HZ, format="FLAC", subtype="PCM_16")
    samples, rate_hz = decode_flac(out.getvalue())
    return CheckedReference(
        samples=samples,
        sample_rate_hz=rate_hz,
        duration_s=seconds,
        warnings=("noisy",),
        flac=out.getvalue(),
        fingerprint=fingerprint_of(samples, rate_hz),
    )


CLIP = recording()


def conditioning(engine: str = "tone", weights: str = "w1", value: float = 1.0) -> Conditioning:
    return Conditioning(engine, weights, {"embedding": np.full((2, 3), value, np.float32)})


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> VoiceStore:
    return VoiceStore(MemoryStore()) if request.param == "memory" else VoiceStore.open(tmp_path / "voices")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "voices"


def files_under(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


async def assert_whole(store: VoiceStore, voice: Voice) -> None:
    """The voice is found both ways and its recording is the one that was enrolled."""
    assert await store.get(voice.name, voice.owner) == voice
    assert await store.get(voice.id, voice.owner) == voice
    reference = await store.reference(voice)
    assert fingerprint_of(reference.samples, reference.sample_rate_hz) == voice.fingerprint


# --- enrol, find, list, delete --------------------------------------------------------------------------


async def test_a_voice_comes_back_as_it_was_enrolled(store: VoiceStore) -> None:
    new = NewVoice(
        name="Anna Müller",
        language="de-CH",
        transcript="Grüezi mitenand.",
        description="warm",
        consent=Consent(statement="I agree.", recorded_at=1_700_000_000, who="Anna"),
    )
    voice = await store.create(new, CLIP)
    await assert_whole(store, voice)
    assert is_voice_id(voice.id)
    assert (voice.name, voice.owner, voice.language) == ("Anna Müller", "public", "de-CH")
    assert voice.consent == new.consent
    assert (voice.duration_s, voice.sample_rate_hz, voice.warnings) == (1.0, RATE_HZ, ("noisy",))
    reference = await store.reference(voice)
    np.testing.assert_array_equal(reference.samples, CLIP.samples)
    assert (reference.transcript, reference.language) == ("Grüezi mitenand.", "de-CH")


@pytest.mark.parametrize("other", ["anna", "ANNA", " Anna ", "Ann\u0061"])
async def test_a_name_is_taken_whatever_its_case(store: VoiceStore, other: str) -> None:
    voice = await store.create(NewVoice(name="Anna"), CLIP)
    with pytest.raises(VoiceExists, match="another name"):
        await store.create(NewVoice(name=other), recording(1))
    assert await store.get(other) == voice
    await assert_whole(store, voice)


async def test_one_name_in_two_spellings_of_unicode(store: VoiceStore) -> None:
    voice = await store.create(NewVoice(name="Zoe\u0308"), CLIP)
    assert voice.name == "Zo\u00eb"
    assert await store.get("ZO\u00cb") == voice


async def test_voices_of_other_owners_do_not_exist(store: VoiceStore) -> None:
    mine = await store.create(NewVoice(name="Anna", owner="key-a"), CLIP)
    theirs = await store.create(NewVoice(name="Anna", owner="key-b"), recording(1))
    await assert_whole(store, mine)
    await assert_whole(store, theirs)
    for attempt in (mine.id, "anna"):
        assert (await store.get(attempt, "key-a")).id == mine.id
        with pytest.raises(VoiceNotFound):
            await store.get(attempt, "key-c")
        with pytest.raises(VoiceNotFound):
            await store.delete(attempt, "key-c")
    assert [voice.id for voice in (await store.list("key-b")).voices] == [theirs.id]
    assert (await store.list("public")).voices == ()


async def test_pages_are_in_order_of_enrolment(store: VoiceStore) -> None:
    ids = []
    for index in range(7):
        ids.append((await store.create(NewVoice(name=f"voice {index}"), CLIP)).id)
        await asyncio.sleep(0.002)  # ids are ordered by the millisecond
    seen: list[str] = []
    after = None
    while True:
        page = await store.list(limit=3, after=after)
        seen += [voice.id for voice in page.voices]
        if not page.has_more:
            break
        after = seen[-1]
    assert seen == ids == sorted(ids)
    assert (await store.list(limit=7)).has_more is False


async def test_a_deleted_voice_is_gone_with_its_recording(store: VoiceStore, directory: Path) -> None:
    voice = await store.create(NewVoice(name="Anna"), CLIP)
    await store.put_conditioning(voice, conditioning())
    assert await store.delete(voice.id) == voice
    for attempt in (voice.id, "Anna"):
        with pytest.raises(VoiceNotFound, match="GET /v1/audio/voices"):
            await store.get(attempt)
        with pytest.raises(VoiceNotFound):
            await store.delete(attempt)
    with pytest.raises(VoiceNotFound):
        await store.reference(voice)
    assert await store.conditioning(voice, "tone", "w1") is None
    assert (await store.list()).voices == ()
    if directory.exists():
        assert not [name for name in files_under(directory) if name.endswith((".flac", ".safetensors"))]
    again = await store.create(NewVoice(name="anna"), recording(2))
    assert again.id != voice.id
    await assert_whole(store, again)


async def test_two_stores_on_one_directory_see_each_other(directory: Path) -> None:
    first, second = VoiceStore.open(directory), VoiceStore.open(directory)
    voice = await first.create(NewVoice(name="Anna"), CLIP)
    assert (await second.list()).voices == (voice,)
    renewed = await first.replace(NewVoice(name="Anna", description="new"), recording(1))
    assert (await second.list()).voices == (renewed,)
    await first.delete("Anna")
    assert (await second.list()).voices == ()


# --- replace --------------------------------------------------------------------------------------------


async def test_replacing_keeps_the_id_and_forgets_old_conditioning(store: VoiceStore) -> None:
    old = await store.create(NewVoice(name="Anna"), CLIP)
    await store.put_conditioning(old, conditioning())
    new = await store.replace(NewVoice(name="ANNA", language="en"), recording(1))
    assert (new.id, new.created_at, new.name, new.language) == (old.id, old.created_at, "ANNA", "en")
    assert new.revision != old.revision
    await assert_whole(store, new)
    assert await store.conditioning(new, "tone", "w1") is None
    # Who began with the old voice can finish with it.
    np.testing.assert_array_equal((await store.reference(old)).samples, CLIP.samples)
    assert (await store.list()).voices == (new,)


async def test_replacing_what_is_not_there_enrols_it(store: VoiceStore) -> None:
    await assert_whole(store, await store.replace(NewVoice(name="Anna"), CLIP))


# --- conditioning ---------------------------------------------------------------------------------------


async def test_conditioning_is_kept_per_engine_and_weights(store: VoiceStore) -> None:
    voice = await store.create(NewVoice(name="Anna"), CLIP)
    for engine, weights, value in [("tone", "w1", 1.0), ("tone", "w2", 2.0), ("xtts", "w1", 3.0)]:
        await store.put_conditioning(voice, conditioning(engine, weights, value))
    found = await store.conditioning(voice, "tone", "w2")
    assert found is not None
    np.testing.assert_array_equal(found.arrays["embedding"], np.full((2, 3), 2.0, np.float32))
    assert await store.conditioning(voice, "tone", "w3") is None


@pytest.mark.parametrize("fingerprint", ["../../escape", "a/b", "", "Ünï", "x" * 500, "a-b"])
async def test_an_odd_weights_fingerprint_is_just_data(directory: Path, fingerprint: str) -> None:
    store = VoiceStore.open(directory)
    voice = await store.create(NewVoice(name="Anna"), CLIP)
    await store.put_conditioning(voice, conditioning("tone", fingerprint))
    assert await store.conditioning(voice, "tone", fingerprint) is not None
    assert files_under(directory.parent) == {f"voices/{name}" for name in files_under(directory)}


async def test_damaged_conditioning_is_as_good_as_none(directory: Path) -> None:
    store = VoiceStore.open(directory)
    voice = await store.create(NewVoice(name="Anna"), CLIP)
    await store.put_conditioning(voice, conditioning())
    (blob,) = directory.rglob("*.safetensors")
    for content in (b"", blob.read_bytes()[:-3], b"\xff" * 64, conditioning("other").to_bytes()):
        blob.write_bytes(content)
        assert await store.conditioning(voice, "tone", "w1") is None


# --- names and ids are data -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attempt",
    [
        "../../etc/passwd", "..\\..\\x", "/etc/passwd", "..", ".", "", " ", "%00", "a\x00b", "x" * 100_000,
        "voice_../../../etc/passwd", "voice_" + "A" * 25, "voice_" + "Z" * 26, "\ud800", "a\nb", "voice_",
        "voice_01JABCDEFGHJKMNPQRSTVWXYZ0\n", "records/public", "..%2f..%2fetc",
    ],
)  # fmt: skip
async def test_hostile_ids_find_nothing_and_touch_nothing(directory: Path, attempt: str) -> None:
    store = VoiceStore.open(directory)
    (directory.parent / "outside.txt").write_text("safe")
    voice = await store.create(NewVoice(name="Anna"), CLIP)
    before = files_under(directory.parent)
    for call in (store.get, store.delete):
        with pytest.raises(VoiceNotFound):
            await call(attempt)
        with pytest.raises(VoiceNotFound):
            await call("Anna", attempt)
    assert (await store.list(attempt)).voices == ()
    assert files_under(directory.parent) == before
    await assert_whole(store, voice)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "..\\x",
        "CON",
        ".hidden",
        "👩‍🎤",
        "<img onerror=x>",
        "x" * 100,
        "a/b",
        "a#1",
        "%00",
    ],
)
async def test_any_printable_name_is_a_name(directory: Path, name: str) -> None:
    store = VoiceStore.open(directory)
    await assert_whole(store, await store.create(NewVoice(name=name), CLIP))
    assert files_under(directory.parent) == {f"voices/{item}" for item in files_under(directory)}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "   ",
        "x" * 101,
        "a\x00b",
        "a\nb",
        "\x7f",
        "a\u2028b",
        "\ud800",
        "\u200b",
        "voice_01JABCDEFGHJKMNPQRSTVWXYZ0",
    ],
)
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(ValidationError):
        NewVoice(name=name)


@pytest.mark.parametrize(
    "fields", [{"owner": "../x"}, {"owner": ""}, {"owner": "a\n"}, {"language": "english!"}, {"nmae": "x"}]
)
def test_other_fields_are_checked_too(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NewVoice(**{"name": "Anna", **fields})


# --- races ----------------------------------------------------------------------------------------------


async def test_of_many_enrolments_of_one_name_one_wins(store: VoiceStore) -> None:
    clips = [recording(seed) for seed in range(8)]
    results = await asyncio.gather(
        *(store.create(NewVoice(name="Anna"), clip) for clip in clips), return_exceptions=True
    )
    winners = [result for result in results if isinstance(result, Voice)]
    assert len(winners) == 1
    assert sum(isinstance(result, VoiceExists) for result in results) == 7
    await assert_whole(store, winners[0])
    assert (await store.list()).voices == (winners[0],)
    assert (await store.sweep(grace_s=-60)).removed == []


async def test_of_many_replacements_of_a_new_name_all_are_one_voice(store: VoiceStore) -> None:
    voices = await asyncio.gather(
        *(store.replace(NewVoice(name="Anna"), recording(seed)) for seed in range(6))
    )
    assert len({voice.id for voice in voices}) == 1
    current = await store.get("Anna")
    assert current in voices
    await assert_whole(store, current)


async def test_a_crowd_that_enrols_replaces_and_deletes_leaves_whole_voices(store: VoiceStore) -> None:
    clips = [recording(seed, 0.1) for seed in range(4)]
    chance = random.Random(5)  # noqa: S311 - not a secret

    async def someone() -> None:
        for _ in range(12):
            new = NewVoice(name=f"voice {chance.randrange(3)}")
            action = chance.randrange(3)
            try:
                if action == 0:
                    await store.create(new, chance.choice(clips))
                elif action == 1:
                    await store.replace(new, chance.choice(clips))
                else:
                    await store.delete(new.name)
            except (VoiceExists, VoiceNotFound):
                pass

    await asyncio.gather(*(someone() for _ in range(8)))
    for voice in (await store.list()).voices:
        await assert_whole(store, voice)
    await store.sweep(grace_s=-60)
    for voice in (await store.list()).voices:
        await assert_whole(store, voice)


# --- sweep ----------------------------------------------------------------------------------------------


async def test_sweep_takes_orphans_and_nothing_else(directory: Path) -> None:
    store = VoiceStore.open(directory)
    kept = await store.create(NewVoice(name="Anna"), CLIP)
    await store.put_conditioning(kept, conditioning())
    old = await store.create(NewVoice(name="Ben"), CLIP)
    new = await store.replace(NewVoice(name="Ben"), recording(1))
    gone = await store.create(NewVoice(name="Carl"), CLIP)
    await store.delete("Carl")
    await store.put_conditioning(gone, conditioning())  # an engine that finished late
    (directory / "voices" / kept.id / kept.revision / "reference.flac#1").write_bytes(b"half")

    assert (await store.sweep()).removed == []  # all of it is younger than the grace
    removed = (await store.sweep(grace_s=-60)).removed
    assert any(old.revision in path for path in removed)
    assert any(gone.id in path for path in removed)
    assert any(path.endswith("#1") for path in removed)
    assert files_under(directory) == {
        *(path.relative_to(directory).as_posix() for path in (directory / "records").rglob("*.json")),
        f"voices/{kept.id}/record",
        f"voices/{kept.id}/{kept.revision}/reference.flac",
        f"voices/{kept.id}/{kept.revision}/conditioning/tone-w1.safetensors",
        f"voices/{new.id}/record",
        f"voices/{new.id}/{new.revision}/reference.flac",
    }
    assert not (directory / "voices" / gone.id).exists()
    await assert_whole(store, kept)
    await assert_whole(store, new)
    assert (await store.sweep(grace_s=-60)).removed == []


# --- damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"id": "x"}', None])
async def test_a_damaged_record_harms_only_its_voice(
    directory: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    store = VoiceStore.open(directory)
    good = await store.create(NewVoice(name="Anna"), CLIP)
    (good_record,) = (directory / "records").rglob("*.json")
    bad = await store.create(NewVoice(name="Ben"), CLIP)
    (bad_record,) = set((directory / "records").rglob("*.json")) - {good_record}
    # None: a record of another voice, copied over it.
    bad_record.write_bytes(good_record.read_bytes() if content is None else content)

    assert (await store.list()).voices == (good,)
    assert "damaged" in caplog.text
    for attempt in (bad.id, "Ben"):
        with pytest.raises(VoiceDamaged, match="Delete it and enrol it again") as caught:
            await store.get(attempt)
        assert not caught.value.retryable
    await store.sweep(grace_s=-60)
    assert (directory / "voices" / bad.id / bad.revision / "reference.flac").exists()
    with pytest.raises(VoiceExists):
        await store.create(NewVoice(name="Ben"), CLIP)
    await store.delete(bad.id)
    await assert_whole(store, await store.create(NewVoice(name="Ben"), recording(1)))
    await assert_whole(store, good)


async def test_a_damaged_record_can_be_replaced(directory: Path) -> None:
    store = VoiceStore.open(directory)
    await store.create(NewVoice(name="Ben"), CLIP)
    (record,) = (directory / "records").rglob("*.json")
    record.write_bytes(b"")
    await assert_whole(store, await store.replace(NewVoice(name="Ben"), recording(1)))


async def test_a_damaged_recording_is_a_typed_error(directory: Path) -> None:
    store = VoiceStore.open(directory)
    voice = await store.create(NewVoice(name="Anna"), CLIP)
    (flac,) = directory.rglob("*.flac")
    for content in (b"", flac.read_bytes()[:5000], b"x" * 1000, recording(9).flac):
        flac.write_bytes(content)
        with pytest.raises(VoiceDamaged, match="damaged"):
            await store.reference(voice)
    assert (await store.list()).voices == (voice,)


async def test_a_record_of_a_later_version_is_read(directory: Path) -> None:
    store = VoiceStore.open(directory)
    voice = await store.create(NewVoice(name="Anna"), CLIP)
    (record,) = (directory / "records").rglob("*.json")
    record.write_text(record.read_text().replace("{", '{"mood": "cheerful",', 1))
    assert await store.get("Anna") == voice


async def test_a_lost_answer_does_not_lose_the_voice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store commits the record, but the answer is lost and the retry finds it there."""
    store = VoiceStore.open(tmp_path)
    put = obstore.put_async

    async def put_twice(where: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        result = await put(where, path, *args, **kwargs)
        return await put(where, path, *args, **kwargs) if path.startswith("records/") else result

    monkeypatch.setattr(obstore, "put_async", put_twice)
    await assert_whole(store, await store.create(NewVoice(name="Anna"), CLIP))


# --- the place itself -----------------------------------------------------------------------------------


async def test_open_takes_paths_and_urls(tmp_path: Path) -> None:
    for location in (tmp_path / "a", str(tmp_path / "b"), f"file://{tmp_path}/c", "memory://"):
        store = VoiceStore.open(location)
        await store.check()
        await store.check()
        await assert_whole(store, await store.create(NewVoice(name="Anna"), CLIP))


async def test_a_place_that_cannot_be_used_is_named_to_the_operator(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreNotUsable, match=r"file is a file, not a directory\. Move it"):
        VoiceStore.open(tmp_path / "file")
    with pytest.raises(StoreNotUsable, match="cannot be used"):
        VoiceStore.open("ftp://host/x")
    with pytest.raises(StoreNotUsable):
        VoiceStore.open(tmp_path / "file" / "below")


async def test_a_store_of_another_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "voice-store.json").write_text('{"layout": 99}')
    with pytest.raises(StoreNotUsable, match="layout 99"):
        await VoiceStore.open(tmp_path).check()


async def test_a_store_that_vanished_is_not_an_empty_one(directory: Path) -> None:
    store = VoiceStore.open(directory)
    await store.check()
    await store.create(NewVoice(name="Anna"), CLIP)
    shutil.rmtree(directory)
    calls = [
        store.get("Anna"),
        store.list(),
        store.delete("Anna"),
        store.create(NewVoice(name="Ben"), CLIP),
        store.replace(NewVoice(name="Ben"), CLIP),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable) as caught:
            await call
        assert str(directory) not in caught.value.message
    assert not directory.exists()


async def test_a_file_in_place_of_the_store_is_a_typed_error(directory: Path) -> None:
    store = VoiceStore.open(directory)
    await store.create(NewVoice(name="Anna"), CLIP)
    shutil.rmtree(directory)
    directory.write_text("not a directory")
    for call in (store.get("Anna"), store.create(NewVoice(name="Ben"), CLIP)):
        with pytest.raises(StoreUnavailable) as caught:
            await call
        assert str(directory) not in caught.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Unable to copy data to file: No space left on device (os error 28)", StorageFull),
        ("Unable to open file /srv/x#1: Read-only file system (os error 30)", StoreUnavailable),
        ("Unable to open file /srv/x#1: Permission denied (os error 13)", StoreUnavailable),
        ("connection refused", StoreUnavailable),
    ],
)
@pytest.mark.parametrize("failing", ["reference.flac", "/record", ".json"])
async def test_a_store_that_fails_at_any_step(
    store: VoiceStore,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    expected: type[VoiceCloneError],
    failing: str,
) -> None:
    old = await store.create(NewVoice(name="Ben"), recording(1))
    put = obstore.put_async

    async def put_or_fail(where: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        if path.endswith(failing):
            raise GenericError(text)
        return await put(where, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(obstore, "put_async", put_or_fail)
        for call in (store.create(NewVoice(name="Anna"), CLIP), store.replace(NewVoice(name="Ben"), CLIP)):
            with pytest.raises(expected) as caught:
                await call
            assert "/srv" not in caught.value.message
            assert "os error" not in caught.value.message
    with pytest.raises(VoiceNotFound):
        await store.get("Anna")
    await assert_whole(store, old)
    await store.sweep(grace_s=-60)
    await assert_whole(store, old)
    await assert_whole(store, await store.create(NewVoice(name="Anna"), CLIP))


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A disk of 256 KiB, where the machine lets us have one."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], check=False)
    if done.returncode != 0:
        pytest.skip("mounting needs privileges")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


async def enrol_until_full(store: VoiceStore) -> list[Voice]:
    enrolled: list[Voice] = []
    with suppress(StorageFull):
        while True:
            enrolled.append(await store.create(NewVoice(name=f"voice {len(enrolled)}"), CLIP))
    return enrolled


async def test_a_full_disk_costs_no_voice(small_disk: Path) -> None:
    store = VoiceStore.open(small_disk)
    await store.check()
    enrolled = await enrol_until_full(store)
    assert enrolled
    with pytest.raises(StorageFull):
        await store.replace(NewVoice(name=enrolled[0].name), recording(5))
    assert len((await store.list()).voices) == len(enrolled)
    for voice in enrolled:
        await assert_whole(store, voice)
    await store.delete(enrolled[0].name)
    await store.sweep(grace_s=-60)
    await assert_whole(store, await store.create(NewVoice(name=enrolled[0].name), CLIP))


async def test_a_read_only_disk(small_disk: Path) -> None:
    store = VoiceStore.open(small_disk)
    voice = await store.create(NewVoice(name="Anna"), CLIP)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreNotUsable, match="read-only"):
        await VoiceStore.open(small_disk).check()
    with pytest.raises(StoreUnavailable, match="make it writable"):
        await store.create(NewVoice(name="Ben"), CLIP)
    with pytest.raises(StoreUnavailable, match="make it writable"):
        await store.delete("Anna")
    await assert_whole(store, voice)


# --- crashes --------------------------------------------------------------------------------------------

#: Reads a directory per line, forks a child that enrols there without end, and writes the child's id. One
#: process that has imported everything serves all children; it never uses the store itself.
NURSERY = """
import asyncio, itertools, os, sys
sys.path.insert(0, sys.argv[1])
from test_voice_store import NewVoice, VoiceExists, VoiceNotFound, VoiceStore, recording
clips = [recording(seed, 0.2) for seed in range(3)]
async def enrol_for_ever(directory):
    store = VoiceStore.open(directory)
    for turn in itertools.count():
        new = NewVoice(name=f"voice {turn % 5}")
        try:
            if turn % 3 == 0: await store.create(new, clips[turn % 3])
            elif turn % 3 == 1: await store.replace(new, clips[turn % 3])
            else: await store.delete(new.name)
        except (VoiceExists, VoiceNotFound):
            pass
for line in sys.stdin:
    child = os.fork()
    if not child:
        asyncio.run(enrol_for_ever(line.strip()))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


async def test_kill_9_leaves_every_voice_whole_or_absent(directory: Path) -> None:
    chance = random.Random(11)  # noqa: S311 - not a secret
    whole_voices = 0
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for _ in range(40):
            nursery.stdin.write(f"{directory}\n")
            nursery.stdin.flush()
            child = int(nursery.stdout.readline())
            time.sleep(chance.uniform(0.0, 0.15))
            os.kill(child, signal.SIGKILL)
            assert nursery.stdout.readline() == "gone\n"

            store = VoiceStore.open(directory)
            voices = (await store.list()).voices
            assert len(list((directory / "records").rglob("*.json"))) == len(voices)
            for voice in voices:
                await assert_whole(store, voice)
            whole_voices += len(voices)

    assert whole_voices > 20
    store = VoiceStore.open(directory)
    await store.sweep(grace_s=-60)
    voices = (await store.list()).voices
    for voice in voices:
        await assert_whole(store, voice)
    assert len([name for name in files_under(directory) if name.endswith(".flac")]) == len(voices)
    assert not [name for name in files_under(directory) if "#" in name]
    for index in range(5):
        await assert_whole(store, await store.replace(NewVoice(name=f"voice {index}"), CLIP))
        await store.delete(f"voice {index}")
        await assert_whole(store, await store.create(NewVoice(name=f"voice {index}"), CLIP))


async def test_ten_thousand_voices_are_listed_page_by_page(directory: Path) -> None:
    store = VoiceStore.open(directory)
    model = await store.create(NewVoice(name="Anna"), CLIP)
    for index in range(10_000):
        voice = model.model_copy(update={"name": f"copy {index}", "id": f"voice_{index:026d}"})
        key = hashlib.sha256(voice.name.encode()).hexdigest()
        (directory / "records" / "public" / f"{key}.json").write_text(voice.model_dump_json())
    page = await store.list(limit=100)
    assert len(page.voices) == 100
    assert page.has_more
    page = await store.list(limit=20_000, after=page.voices[-1].id)
    assert len(page.voices) == 9_901
    assert page.voices[-1] == model
