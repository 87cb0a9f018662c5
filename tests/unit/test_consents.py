"""Recorded consents in the store, and what counts as consent."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
import soundfile
from ulid import ULID

from serve_app.config import VoiceSettings
from serve_app.errors import ConsentNotFound, ConsentRequired, UnsupportedAudio
from serve_app.protocol import ConsentRequest
from serve_app.router.consents import Consents
from serve_app.voices.consents import ConsentStore, VoiceConsent
from serve_app.voices.reference import CheckedReference, ReferenceReader
from serve_app.voices.store import VoiceStore
from tests.speech import noisy_tone


def recording() -> CheckedReference:
    """A recording that has been checked."""
    samples, rate_hz = noisy_tone(170.0, 1.0), 24_000
    flac = io.BytesIO()
    soundfile.write(flac, samples, rate_hz, format="FLAC")
    return CheckedReference(samples, rate_hz, 1.0, (), flac.getvalue(), "f" * 64)


def recordings(folder: Path) -> list[Path]:
    """All that is stored of them."""
    return list(folder.rglob("*.flac"))


async def recorded(store: ConsentStore, owner: str = "public") -> VoiceConsent:
    """A consent of Ada's."""
    return await store.create("Ada", "en-GB", owner, recording())


@pytest.fixture
def voices(tmp_path: Path) -> VoiceStore:
    return VoiceStore.open(tmp_path)


async def test_each_owner_has_its_own(voices: VoiceStore) -> None:
    store = ConsentStore(voices.objects)
    mine, other = await recorded(store), await recorded(store, "somebody")
    assert (await store.list("public", limit=10, after=None)).consents == (mine,)
    for attempt in (store.get, store.delete):
        with pytest.raises(ConsentNotFound):
            await attempt(other.id, "public")
    with pytest.raises(ConsentNotFound):
        await store.rename(other.id, "Eve", "public")
    assert await store.get(other.id, "somebody") == other


async def test_sweep_removes_recordings_of_no_consent(voices: VoiceStore, tmp_path: Path) -> None:
    store = ConsentStore(voices.objects)
    kept, killed = await recorded(store), await recorded(store)
    place = tmp_path / "consents" / "public"
    (place / killed.id / "record.json").unlink()
    assert await store.sweep() == []
    old_s = time.time() - 7200
    for path in recordings(tmp_path):
        os.utime(path, (old_s, old_s))
    assert await store.sweep() == [f"consents/public/{killed.id}/recording.flac"]
    assert await store.get(kept.id, "public") == kept
    assert (place / kept.id / "recording.flac").is_file()
    # The voices' own sweep leaves consents alone.
    assert (await voices.sweep(grace_s=0)).removed == []


async def test_what_counts_as_consent(voices: VoiceStore) -> None:
    consents = Consents(voices, ReferenceReader())
    consent = await recorded(ConsentStore(voices.objects))
    required, asked = VoiceSettings(consent="required"), VoiceSettings(consent="recorded")
    assert await consents.demanded(" ", "public", asked) is None
    with pytest.raises(ConsentRequired):
        await consents.demanded(" ", "public", required)
    stated = await consents.demanded("I agree. cons_", "public", required)
    assert stated is not None
    assert (stated.statement, stated.id) == ("I agree. cons_", None)
    referred = await consents.demanded(consent.id, "public", required)
    assert referred is not None
    assert (referred.id, referred.who, referred.recorded_at) == (consent.id, "Ada", consent.created_at)
    for policy in (required, asked):
        for unknown in ("cons_1", "cons_../../etc", f"cons_{ULID()}"):
            with pytest.raises(ConsentRequired):
                await consents.demanded(unknown, "public", policy)
        with pytest.raises(ConsentRequired):
            await consents.demanded(consent.id, "somebody", policy)


async def test_a_recording_is_checked_before_it_is_kept(voices: VoiceStore, tmp_path: Path) -> None:
    consents = Consents(voices, ReferenceReader())
    with pytest.raises(UnsupportedAudio):
        await consents.record(ConsentRequest("Ada", "en", b"<html></html>"))
    assert recordings(tmp_path) == []
