"""Whose voices are there for whom."""

from __future__ import annotations

from dataclasses import replace

import obstore
import pytest
from obstore.store import MemoryStore

from serve_app.errors import TooManyVoices, VoiceExists, VoiceForbidden, VoiceNotFound
from serve_app.protocol import Caller
from serve_app.voices.store import VoiceStore
from serve_app.voices.visible import VisibleVoices
from serve_app.voices.voice import NewVoice, Voice
from tests.unit.test_voice_store import recording

STUDIO = Caller(key="studio", owner="studio")
RIVAL = Caller(key="rival", owner="rival")
NOBODY = Caller()
BOSS = Caller(key="boss", owner="boss", admin=True)


class Fixture:
    """A store with a voice of each owner, all called Anna, and one more of the studio's."""

    async def fill(self) -> None:
        self.store = VoiceStore(MemoryStore())
        self.voices: dict[str, Voice] = {}
        for owner in ("public", "studio", "rival"):
            self.voices[owner] = await self.store.create(
                NewVoice(name="Anna", owner=owner), recording(len(owner))
            )
        self.secret = await self.store.create(NewVoice(name="Secret", owner="studio"), recording(9))

    def seen(self, *, owners: tuple[str, ...] = ("public",), ids: tuple[str, ...] = ()) -> VisibleVoices:
        aliases = {"alloy": "Secret", "nova": self.secret.id}
        return VisibleVoices(
            self.store, aliases=aliases, shared_owners=owners, shared_ids=ids, max_per_owner=2
        )


@pytest.fixture
async def given() -> Fixture:
    made = Fixture()
    await made.fill()
    return made


async def test_a_name_means_ones_own_voice_first_and_then_a_shared_one(given: Fixture) -> None:
    seen = given.seen()
    assert await seen.get("anna", STUDIO) == given.voices["studio"]
    assert await seen.get("anna", RIVAL) == given.voices["rival"]
    assert await seen.get("anna", NOBODY) == given.voices["public"]
    assert await seen.get("anna", BOSS) == given.voices["public"]
    assert (await seen.get("alloy", STUDIO)) == (await seen.get("nova", STUDIO)) == given.secret


async def test_b25_voices_of_others_are_not_there_in_the_same_words(given: Fixture) -> None:
    seen = given.seen()
    absent = "voice_" + "0" * 26
    words = set()
    for caller in (RIVAL, NOBODY):
        for voice in (
            given.secret.id,
            "Secret",
            "alloy",
            "nova",
            absent,
            "Nobody",
            given.voices["studio"].id,
        ):
            for ask in (seen.get, seen.delete):
                with pytest.raises(VoiceNotFound) as refused:
                    await ask(voice, caller)
                words.add((refused.value.message, refused.value.param, refused.value.code))
    assert len(words) == 1
    assert await given.store.get("Secret", "studio") == given.secret


async def test_a_damaged_voice_of_others_is_not_there_either(given: Fixture) -> None:
    (record,) = [
        meta["path"]
        for meta in await obstore.list(given.store._store, "records/studio").collect_async()
        if b"Secret" in bytes(await (await obstore.get_async(given.store._store, meta["path"])).bytes_async())
    ]
    await obstore.put_async(given.store._store, record, b"{")
    seen = given.seen()
    for voice in (given.secret.id, "Secret"):
        with pytest.raises(VoiceNotFound):
            await seen.get(voice, RIVAL)
    # Its owner can do what the error says: delete it.
    assert await seen.delete("Secret", STUDIO) == ("Secret", None)


async def test_lists_hold_ones_own_and_the_shared(given: Fixture) -> None:
    async def ids(seen: VisibleVoices, caller: Caller) -> list[str]:
        found: list[str] = []
        while True:
            page = await seen.list(caller, limit=2, after=found[-1] if found else None)
            found += [voice.id for voice in page.voices]
            if not page.has_more:
                return found

    voices, secret = given.voices, given.secret.id
    assert await ids(given.seen(), STUDIO) == [voices["public"].id, voices["studio"].id, secret]
    assert await ids(given.seen(), RIVAL) == [voices["public"].id, voices["rival"].id]
    assert await ids(given.seen(owners=()), RIVAL) == [voices["rival"].id]
    assert await ids(given.seen(owners=()), NOBODY) == [voices["public"].id]
    assert await ids(given.seen(owners=(), ids=(secret,)), RIVAL) == [voices["rival"].id, secret]
    assert await ids(given.seen(owners=("studio",)), RIVAL) == [
        voices["studio"].id,
        voices["rival"].id,
        secret,
    ]
    everything = sorted([*(voice.id for voice in voices.values()), secret])
    assert await ids(given.seen(owners=()), BOSS) == everything
    # A voice that is shared by id and gone is no reason to fail.
    assert await ids(given.seen(owners=(), ids=("voice_" + "0" * 26,)), RIVAL) == [voices["rival"].id]


async def test_a_shared_voice_can_be_used_and_not_deleted(given: Fixture) -> None:
    seen = given.seen(owners=("public",), ids=(given.secret.id,))
    assert await seen.get(given.secret.id, RIVAL) == given.secret
    assert await seen.get("nova", NOBODY) == given.secret
    for voice in (given.secret.id, given.voices["public"].id, "nova"):
        with pytest.raises(VoiceForbidden, match="owner or an admin"):
            await seen.delete(voice, RIVAL)
    with pytest.raises(VoiceForbidden):
        await seen.delete("anna", replace(STUDIO, owner="newcomer"))


async def test_owners_and_admins_delete(given: Fixture) -> None:
    seen = given.seen()
    assert await seen.delete("ANNA", STUDIO) == (given.voices["studio"].id, given.voices["studio"])
    assert await seen.get("anna", RIVAL) == given.voices["rival"]
    assert (await seen.delete(given.voices["rival"].id, BOSS))[0] == given.voices["rival"].id
    assert await seen.get("anna", RIVAL) == given.voices["public"]


async def test_b26_an_owner_has_as_many_voices_as_are_allowed(given: Fixture) -> None:
    seen = given.seen()
    await seen.check_new("another", "rival", replace=False)
    for replace_it in (False, True):
        with pytest.raises(TooManyVoices, match=r"2 voices.*Delete one"):
            await seen.check_new("another", "studio", replace=replace_it)
    # What is there already can still be given another recording.
    await seen.check_new("Secret", "studio", replace=True)
    with pytest.raises(VoiceExists, match=given.secret.id):
        await seen.check_new("secret", "studio", replace=False)
    await seen.delete("Secret", STUDIO)
    await seen.check_new("another", "studio", replace=False)
