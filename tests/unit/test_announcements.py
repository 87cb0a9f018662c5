"""Announcements outlive the process, and the progress of batches is told to their caller alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from serve_app.errors import AnnouncementNotFound, StorageFull
from serve_app.protocol import BatchProgress
from serve_app.router.batch_board import BatchBoard
from serve_app.voices.announcements import Announcement, Announcements
from serve_app.voices.store import VoiceStore


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "voices"


def opened(place: Path) -> Announcements:
    return Announcements(VoiceStore.open(place))


async def test_they_are_there_after_a_restart_oldest_first(place: Path) -> None:
    later = Announcement(title="Later", message="", created_at=200)
    sooner = Announcement(title="Sooner", message="Down at noon.", type="maintenance", created_at=100)
    for one in (later, sooner):
        await opened(place).put(one)
    assert await opened(place).current() == (sooner, later)
    await opened(place).remove(later.id)
    assert await opened(place).current() == (sooner,)
    with pytest.raises(AnnouncementNotFound):
        await opened(place).remove(later.id)


async def test_one_of_the_same_id_is_replaced(place: Path) -> None:
    await opened(place).put(Announcement(id="notice-1", title="Old", message=""))
    new = Announcement(id="notice-1", title="New", message="")
    await opened(place).put(new)
    assert await opened(place).current() == (new,)


async def test_what_is_over_goes(place: Path) -> None:
    await opened(place).put(Announcement(title="Over", message="", expires_at=time.time() - 1))
    kept = Announcement(title="Not over", message="", expires_at=time.time() + 3600)
    await opened(place).put(kept)
    assert await opened(place).current() == (kept,)
    assert len([*(place / "announcements").iterdir()]) == 1


@pytest.mark.parametrize("blob", [b"", b"{", b"[]", b'{"id": "../x", "title": "t", "message": ""}', b"\xff"])
async def test_a_damaged_one_harms_no_other(place: Path, blob: bytes) -> None:
    good = Announcement(title="Good", message="")
    await opened(place).put(good)
    (place / "announcements" / "bad.json").write_bytes(blob)
    assert await opened(place).current() == (good,)


@pytest.mark.parametrize("attempt", ["../records", "..", "", "a/b", "notice-1.json", "\x00", "x" * 5000])
async def test_hostile_ids_find_nothing(place: Path, attempt: str) -> None:
    await opened(place).put(Announcement(id="notice-1", title="Safe", message=""))
    with pytest.raises(AnnouncementNotFound):
        await opened(place).remove(attempt)
    with pytest.raises(ValidationError):
        Announcement(id=attempt, title="t", message="")
    assert len(await opened(place).current()) == 1


async def test_there_is_an_end_to_them(place: Path) -> None:
    announcements = opened(place)
    for number in range(100):
        await announcements.put(Announcement(id=f"n-{number}", title="t", message=""))
    with pytest.raises(StorageFull, match="Delete one"):
        await announcements.put(Announcement(title="one too many", message=""))
    await announcements.put(Announcement(id="n-5", title="changed", message=""))


def test_progress_is_for_whoever_asked_and_never_goes_back() -> None:
    clock = [0.0]
    board = BatchBoard(lambda: clock[0])
    board.report(BatchProgress("r1", "key:a", 3))
    board.report(BatchProgress("r1", "key:a", 3, succeeded=2))
    # Overtaken on the way.
    board.report(BatchProgress("r1", "key:a", 3, succeeded=1))
    board.report(BatchProgress("r1", "key:b", 9))
    assert board.of("key:a") == [BatchProgress("r1", "key:a", 3, succeeded=2)]
    assert board.of("key:b") == [BatchProgress("r1", "key:b", 9)]
    assert board.of("key:c") == []
    board.report(BatchProgress("r1", "key:a", 3, succeeded=2, failed=1))
    clock[0] = 29
    assert board.of("key:a")[0].ended
    clock[0] = 60
    assert board.of("key:a") == []
    assert len(board.of("key:b")) == 1
    clock[0] = 4000
    assert board.of("key:b") == []


def test_progress_is_bounded() -> None:
    board = BatchBoard()
    for number in range(3000):
        board.report(BatchProgress(f"r{number}", "key:a", 3))
    assert len(board.of("key:a")) == 1000
