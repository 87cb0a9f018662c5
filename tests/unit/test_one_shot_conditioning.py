"""Conditioning of a recording that is no voice: computed once, never stored, forgotten soon."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from engines.contract import Conditioning, EngineCard, Reference, ReferenceUnusable
from engines.tone.engine import ToneEngine
from serve_app.errors import UnusableAudio
from serve_app.protocol import EngineFacts, OneShotReference
from serve_app.router.conditioning import ConditioningSource
from serve_app.router.dispatch import EngineDispatch
from serve_app.router.transcription import Transcription
from serve_app.voices.reference import CheckedReference, ReferenceReader
from serve_app.voices.store import VoiceStore

CARD: EngineCard = ToneEngine.card
FACTS = EngineFacts(CARD, CARD.languages, 1, "weights")


class Desk:
    """In the place of the engine and of the decoder process: counts what is asked of them."""

    def __init__(self) -> None:
        self.read_count = 0
        self.references: list[Reference] = []

    async def read(self, audio: bytes) -> CheckedReference:
        self.read_count += 1
        await asyncio.sleep(0)
        return CheckedReference(np.zeros(9, np.float32), 24_000, 1.0, (), audio, "f")

    async def extract_voice(self, reference: Reference) -> Conditioning:
        self.references.append(reference)
        if reference.transcript == "unusable":
            raise ReferenceUnusable("Nobody speaks.")
        return Conditioning("tone", "weights", {"pitch": np.array([len(self.references)])})


async def ask(source: ConditioningSource, desk: Desk, audio: bytes = b"a", transcript: str = "") -> Any:
    """Pitch that stands for the conditioning."""
    prepared = await source.once(
        OneShotReference(audio, transcript),
        FACTS,
        cast(EngineDispatch, desk),
        cast(ReferenceReader, desk),
        Transcription(cast(VoiceStore, None), None, timeout_s=1),
    )
    return int(prepared.conditioning.arrays["pitch"][0])


def source(folder: Path, ttl_s: float = 60) -> ConditioningSource:
    """Over an empty store."""
    return ConditioningSource(VoiceStore.open(folder), max_bytes=1 << 20, ttl_s=ttl_s)


async def test_equal_requests_share_one_computation(tmp_path: Path) -> None:
    desk, conditioning = Desk(), source(tmp_path)
    assert await asyncio.gather(*(ask(conditioning, desk) for _ in range(5))) == [1] * 5
    assert await ask(conditioning, desk) == 1
    assert desk.read_count == 1
    # Another recording, and other words to the same one, are something else.
    assert await ask(conditioning, desk, b"b") == 2
    assert await ask(conditioning, desk, transcript="words") == 3
    assert desk.references[-1].transcript == "words"


async def test_nothing_is_stored_and_nothing_is_kept(tmp_path: Path) -> None:
    desk, conditioning = Desk(), source(tmp_path, ttl_s=0.01)
    assert await ask(conditioning, desk) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # noqa: ASYNC240
    async with asyncio.timeout(20):
        while conditioning.held_bytes:  # noqa: ASYNC110 - nothing tells when it is forgotten
            await asyncio.sleep(0.01)
    assert await ask(conditioning, desk) == 2


async def test_the_fault_is_in_ref_audio(tmp_path: Path) -> None:
    desk, conditioning = Desk(), source(tmp_path)
    with pytest.raises(UnusableAudio) as refused:
        await ask(conditioning, desk, transcript="unusable")
    assert refused.value.param == "ref_audio"
