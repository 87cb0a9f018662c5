"""When the router has a recording heard, and what it does where nobody can hear."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from obstore.store import MemoryStore
from ray.exceptions import RayActorError

from engines.contract import Samples
from engines.tone.engine import ToneEngine
from serve_app.errors import LanguageNeeded, TranscriberUnavailable, TranscriptNeeded, VoiceCloneError
from serve_app.protocol import Failure
from serve_app.router.transcription import Transcription
from serve_app.transcripts.transcript import Correction, Hearing
from serve_app.voices.store import VoiceStore
from serve_app.voices.voice import NewVoice, Voice
from tests.reading_engine import ReadingEngine
from tests.unit.test_transcripts import hearing
from tests.unit.test_voice_store import CLIP, recording

NEEDS = ReadingEngine.card
LIKES = replace(NEEDS, transcript_optional=True)
#: Uses only a part of a recording of a second.
CUTS = replace(NEEDS, max_reference_s=0.5)
PLAIN = ToneEngine.card

Answer = Hearing | Failure


class Transcriber:
    """Where the handle of the deployment ends: answers, and counts."""

    def __init__(self, answer: Callable[[], Awaitable[Answer]]) -> None:
        self.calls: list[str] = []
        self.called = asyncio.Event()
        self.hear = self
        self._answer = answer

    async def remote(self, samples: Samples, sample_rate_hz: int, language: str) -> Answer:
        assert len(samples) > sample_rate_hz / 2
        self.calls.append(language)
        self.called.set()
        return await self._answer()


def answering(answer: Answer) -> Transcriber:
    async def now() -> Answer:
        await asyncio.sleep(0)
        return answer

    return Transcriber(now)


def transcription(store: VoiceStore, transcriber: Any, timeout_s: float = 5.0) -> Transcription:
    return Transcription(store, transcriber, timeout_s=timeout_s)


@pytest.fixture
def store() -> VoiceStore:
    return VoiceStore(MemoryStore())


async def anna(store: VoiceStore, **fields: str) -> Voice:
    return await store.create(NewVoice(name="anna", **fields), CLIP)


SAID = hearing("Hello", " there.")


async def test_an_engine_that_wants_no_transcript_costs_no_hearing(store: VoiceStore) -> None:
    transcriber = answering(SAID)
    assert await transcription(store, transcriber).of_voice(await anna(store), PLAIN) is None
    assert await transcription(store, transcriber).of_recording("", "", CLIP, PLAIN) == (
        None,
        None,
    )
    assert not transcriber.calls


async def test_a_voice_is_heard_once_and_kept(store: VoiceStore) -> None:
    transcriber = answering(SAID)
    voice = await anna(store, language="en-GB")
    words = transcription(store, transcriber)
    first, second = await asyncio.gather(words.of_voice(voice, NEEDS), words.of_voice(voice, NEEDS))
    again = await transcription(store, transcriber).of_voice(voice, NEEDS)
    assert first == second == again
    assert first is not None
    assert (first.text, first.source, len(first.words)) == ("Hello there.", "heard", 2)
    assert transcriber.calls == ["en-GB"]


async def test_a_new_recording_is_heard_before_it_is_a_voice(store: VoiceStore) -> None:
    counts, heard = await transcription(store, answering(SAID)).of_recording("", "en", CLIP, NEEDS)
    assert counts is not None
    assert (counts.text, heard) == ("Hello there.", SAID)


async def test_known_words_are_heard_only_to_cut_them(store: VoiceStore) -> None:
    transcriber = answering(SAID)
    voice = await anna(store, transcript="Hello, there!")
    words = transcription(store, transcriber)
    whole = await words.of_voice(voice, NEEDS)
    assert whole is not None
    assert (whole.text, whole.words, transcriber.calls) == ("Hello, there!", (), [])
    cut = await words.of_voice(voice, CUTS)
    assert cut is not None
    assert (cut.text, cut.source, len(cut.words)) == ("Hello, there!", "given", 2)
    await store.correct(voice, Correction(text="Hello there, Anna."))
    edited = await words.of_voice(voice, CUTS)
    assert edited is not None
    assert (edited.text, len(edited.words), len(transcriber.calls)) == ("Hello there, Anna.", 3, 1)


async def test_known_words_do_without_a_transcriber_that_fails(store: VoiceStore) -> None:
    ill = answering(Failure(TranscriberUnavailable("No.")))
    voice = await anna(store, transcript="Hello.")
    known = await transcription(store, ill).of_voice(voice, CUTS)
    assert known is not None
    assert (known.text, known.words) == ("Hello.", ())
    counts, heard = await transcription(store, ill).of_recording("Hello.", "", CLIP, CUTS)
    assert (counts, heard) == (known, None)


async def test_without_a_transcriber_the_engine_decides(store: VoiceStore) -> None:
    voice = await anna(store)
    words = transcription(store, None)
    with pytest.raises(TranscriptNeeded, match=r"'reading' needs.*ref_text.*PATCH"):
        await words.of_voice(voice, NEEDS)
    with pytest.raises(TranscriptNeeded):
        await words.of_recording("", "", CLIP, NEEDS)
    assert await words.of_voice(voice, LIKES) is None
    assert await words.of_recording("", "", CLIP, LIKES) == (None, None)
    await store.correct(voice, Correction(text="Hello."))
    assert await words.of_voice(voice, NEEDS) is not None


@pytest.mark.parametrize("card", [NEEDS, LIKES], ids=["needs", "likes"])
async def test_what_the_transcriber_refuses_is_the_answer(store: VoiceStore, card: Any) -> None:
    asks = answering(Failure(LanguageNeeded("Which?", param="language")))
    with pytest.raises(LanguageNeeded):
        await transcription(store, asks).of_voice(await anna(store), card)
    # Nothing is kept of a failure: the next one may go well.
    assert await transcription(store, answering(SAID)).of_voice(await store.get("anna"), card) is not None


async def test_a_transcriber_that_is_lost_or_silent_is_unavailable(store: VoiceStore) -> None:
    async def lost() -> Answer:
        raise RayActorError

    async def silent() -> Answer:
        await asyncio.Event().wait()
        raise AssertionError

    voice = await anna(store)
    for answer, timeout_s in ((lost, 5.0), (silent, 0.05)):
        with pytest.raises(TranscriberUnavailable, match="try again later") as caught:
            await transcription(store, Transcriber(answer), timeout_s).of_voice(voice, NEEDS)
        assert caught.value.retryable


async def test_a_caller_that_leaves_does_not_stop_the_hearing(store: VoiceStore) -> None:
    heard = asyncio.Event()

    async def later() -> Answer:
        await heard.wait()
        return SAID

    voice = await anna(store)
    transcriber = Transcriber(later)
    words = transcription(store, transcriber)
    leaving = asyncio.create_task(words.of_voice(voice, NEEDS))
    await transcriber.called.wait()
    staying = asyncio.create_task(words.of_voice(voice, NEEDS))
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    heard.set()
    counts = await staying
    assert counts is not None
    assert (counts.text, len(transcriber.calls)) == ("Hello there.", 1)


async def test_another_recording_is_heard_anew(store: VoiceStore) -> None:
    transcriber = answering(SAID)
    words = transcription(store, transcriber)
    await words.of_voice(await anna(store), NEEDS)
    replaced = await store.replace(NewVoice(name="anna"), recording(7))
    await words.of_voice(replaced, NEEDS)
    assert len(transcriber.calls) == 2


def test_every_error_says_what_to_do_next() -> None:
    assert issubclass(TranscriptNeeded, VoiceCloneError)
    assert (TranscriptNeeded.status, TranscriberUnavailable.status, LanguageNeeded.status) == (400, 503, 400)
