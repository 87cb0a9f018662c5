"""What is said in a recording: heard, timed, corrected, and kept with the voice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from obstore.store import MemoryStore

from benchmarks.judges import word_error_rate
from benchmarks.speakers import DEMO_SPEAKER, Clip, enrolment_clip, speaker
from engines.contract import Conditioning, ModelCorrupt, ModelMissing, Reference, Word
from serve_app.errors import LanguageNeeded, NoSpeechDetected, UnsupportedLanguage
from serve_app.transcripts.alignment import align
from serve_app.transcripts.recogniser import Recogniser, RecogniserConfig
from serve_app.transcripts.transcript import Correction, HeardWord, Hearing, transcript_of
from serve_app.voices.store import VoiceStore
from serve_app.voices.voice import NewVoice
from tests.unit.test_voice_store import CLIP, files_under, recording
from tests.whisper import whisper_folder


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    recogniser = Recogniser(RecogniserConfig(model=str(whisper_folder())))
    recogniser.load()
    return recogniser


@pytest.fixture(scope="module")
def sonnet() -> Clip:
    """20 s of a reader, with the words."""
    return enrolment_clip(speaker(DEMO_SPEAKER))


@pytest.fixture(scope="module")
def heard(recogniser: Recogniser, sonnet: Clip) -> Hearing:
    return recogniser.hear(sonnet.samples, sonnet.sample_rate_hz, "en-GB")


def hearing(*words: str, probability: float = 0.9) -> Hearing:
    """Words of a second each."""
    return Hearing(
        language="en",
        words=tuple(
            HeardWord(text=word, start_s=at, end_s=at + 1, probability=probability)
            for at, word in enumerate(words)
        ),
    )


# --- the recogniser ---


def test_a_reader_is_heard_word_by_word(heard: Hearing, sonnet: Clip) -> None:
    assert sonnet.transcript is not None
    assert word_error_rate(sonnet.transcript, heard.text) < 0.15
    assert heard.language == "en"
    assert 0.6 < heard.confidence <= 1
    starts = [word.start_s for word in heard.words]
    assert starts == sorted(starts)
    assert all(word.start_s <= word.end_s <= sonnet.seconds + 0.5 for word in heard.words)
    assert "".join(word.text for word in heard.words) == heard.text == heard.text.strip()


def test_times_are_those_of_the_recording(recogniser: Recogniser, heard: Hearing, sonnet: Clip) -> None:
    """A second of silence in front moves every word by a second."""
    silence = np.zeros(2 * sonnet.sample_rate_hz, np.float32)
    later = recogniser.hear(np.concatenate([silence, sonnet.samples]), sonnet.sample_rate_hz, "en")
    first, moved = heard.words[3], later.words[3]
    assert (first.text, round(moved.start_s - first.start_s)) == (moved.text, 2)


def test_the_same_recording_gives_the_same_words(
    recogniser: Recogniser, heard: Hearing, sonnet: Clip
) -> None:
    assert recogniser.hear(sonnet.samples, sonnet.sample_rate_hz, "en") == heard


def test_an_english_model_does_not_guess_the_language(recogniser: Recogniser, sonnet: Clip) -> None:
    assert recogniser.languages == ("en",)
    with pytest.raises(LanguageNeeded, match="language=en") as caught:
        recogniser.hear(sonnet.samples, sonnet.sample_rate_hz)
    assert caught.value.param == "language"
    with pytest.raises(UnsupportedLanguage, match="'fr'"):
        recogniser.hear(sonnet.samples, sonnet.sample_rate_hz, "fr-FR")


def test_no_words_are_invented_for_noise(recogniser: Recogniser) -> None:
    noise = np.random.default_rng(1).normal(0, 0.05, 3 * 16_000).astype(np.float32)
    with pytest.raises(NoSpeechDetected, match="No words"):
        recogniser.hear(noise, 16_000, "en")


def test_a_model_that_is_not_there_or_not_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match=r"no model\.bin.*transcripts\.md"):
        Recogniser(RecogniserConfig(model=str(tmp_path))).load()
    (tmp_path / "model.bin").write_bytes(b"no model")
    with pytest.raises(ModelCorrupt, match="Fetch it again"):
        Recogniser(RecogniserConfig(model=str(tmp_path))).load()


# --- times under another text ---

HEARD = [Word("One ", 0, 1), Word("to ", 1, 2), Word("tree", 2, 3), Word(" eleven.", 3, 4)]


def test_words_in_common_keep_their_times_and_the_others_share_the_room() -> None:
    words = align("One, two, three; eleven!", HEARD)
    assert [word.text for word in words] == ["One,", " two,", " three;", " eleven!"]
    assert [(word.start_s, word.end_s) for word in words][::3] == [(0, 1), (3, 4)]
    # Three letters and five share the two seconds between.
    assert words[1] == Word(" two,", 1, 1.75)
    assert words[2] == Word(" three;", 1.75, 3)


def test_words_that_were_not_heard_are_between_their_neighbours() -> None:
    heard = [Word("Seventeen", 0.5, 1), Word(" nineteen", 3, 4)]
    words = align("oh seventeen two three nineteen six", heard)
    assert [word.text.strip() for word in words] == ["oh", "seventeen", "two", "three", "nineteen", "six"]
    assert words[1] == Word(" seventeen", 0.5, 1)
    assert (words[2].start_s, words[3].end_s) == (1, 3)
    assert (words[0].start_s, words[0].end_s) == (0, 0.5)
    assert (words[5].start_s, words[5].end_s) == (4, 4)


def test_a_text_with_little_in_common_gets_no_times() -> None:
    assert align("Something else altogether, indeed.", HEARD) == ()
    assert align("Hello.", []) == ()
    assert align("…", HEARD) == ()


def test_writing_without_spaces_is_timed_sign_by_sign() -> None:
    words = align("你好，世界。", [Word("你好", 0, 2), Word("世界", 3, 5)])
    assert [word.text for word in words] == ["你", "好，", "世", "界。"]
    assert [word.start_s for word in words] == [0, 1, 3, 4]


TEXTS = st.lists(st.sampled_from(["one", "Two,", "«three", "four»", "—", "五", "六。", " "]), max_size=12)


@settings(max_examples=200, deadline=None)
@drawn(TEXTS, TEXTS)
def test_timed_pieces_joined_are_the_text_and_in_order(text: Sequence[str], other: Sequence[str]) -> None:
    heard = [Word(" " + word, at, at + 0.5) for at, word in enumerate(other)]
    whole = " ".join(text)
    words = align(whole, heard)
    if words:
        assert "".join(word.text for word in words) == whole
        edges = [edge for word in words for edge in (word.start_s, word.end_s)]
        assert edges == sorted(edges)


def test_a_reader_is_timed_by_what_a_person_wrote(heard: Hearing, sonnet: Clip) -> None:
    assert sonnet.transcript is not None
    known = transcript_of(sonnet.transcript, "en", heard)
    assert known is not None
    assert "".join(word.text for word in known.words) == sonnet.transcript
    (written,) = [word for word in known.words if "memory" in word.text]
    (spoken,) = [word for word in heard.words if "memory" in word.text]
    assert (written.start_s, written.end_s) == (spoken.start_s, spoken.end_s)


# --- which words count ---


def test_the_latest_word_of_a_person_counts_before_what_was_heard() -> None:
    said = hearing("Hello", " there.")
    for given, correction, text, source in [
        ("", None, "Hello there.", "heard"),
        ("Hello, there!", None, "Hello, there!", "given"),
        ("Hello, there!", Correction(text=" Hello there? "), "Hello there?", "edited"),
        ("Hello, there!", Correction(text=" "), "Hello, there!", "given"),
        ("", Correction(text="", language="de"), "Hello there.", "heard"),
    ]:
        counts = transcript_of(given, "", said, correction)
        assert counts is not None
        assert (counts.text, counts.source, counts.language) == (text, source, "en")
        assert [word.start_s for word in counts.words] == [0, 1]
    assert transcript_of(" ", "en", None, Correction(text="")) is None


def test_only_an_unsure_hearing_asks_for_a_person() -> None:
    unsure = hearing("Mumble", probability=0.3)
    counts = transcript_of("", "", unsure)
    assert counts is not None
    assert counts.is_unsure
    given = transcript_of("Mumble", "", unsure)
    assert given is not None
    assert not given.is_unsure


def test_an_engine_gets_words_times_and_language() -> None:
    counts = transcript_of("", "", hearing("Hello", " there."))
    assert counts is not None
    reference = counts.completes(Reference(CLIP.samples, CLIP.sample_rate_hz))
    assert (reference.transcript, reference.language) == ("Hello there.", "en")
    assert reference.words == (Word("Hello", 0, 1), Word(" there.", 1, 2))


# --- kept with the voice ---


def made(value: float) -> Conditioning:
    return Conditioning("reader", "w1", {"embedding": np.full(3, value, np.float32)})


async def test_words_are_kept_with_the_recording_and_go_with_it(tmp_path: Path) -> None:
    store = VoiceStore.open(tmp_path / "voices")
    voice = await store.create(NewVoice(name="anna"), CLIP, hearing("Hello", " there."))
    counts = await store.transcript(voice)
    assert counts is not None
    assert (counts.text, counts.source) == ("Hello there.", "heard")
    await store.correct(voice, Correction(text="Hello, Anna.", language="en"))
    edited = await VoiceStore.open(tmp_path / "voices").transcript(voice)
    assert edited is not None
    assert (edited.text, edited.source, edited.confidence) == ("Hello, Anna.", "edited", counts.confidence)
    # Another recording says other things: neither the hearing nor the correction is about it.
    replaced = await store.replace(NewVoice(name="anna"), recording(5))
    assert await store.transcript(replaced) is None
    await store.put_hearing(replaced, hearing("New", " words."))
    await store.put_hearing(replaced, hearing("Late", " words."))
    heard = await store.transcript(replaced)
    assert heard is not None
    assert heard.text == "New words."
    await store.delete(replaced.id)
    await store.sweep(grace_s=-1)
    assert not [file for file in files_under(tmp_path) if "json" in file and "voice-store" not in file]


async def test_another_transcript_never_meets_conditioning_made_with_the_old(tmp_path: Path) -> None:
    store = VoiceStore.open(tmp_path / "voices")
    voice = await store.create(NewVoice(name="anna", transcript="Hello."), CLIP)
    first = await store.transcript(voice)
    await store.put_conditioning(voice, made(1.0), first)
    # Of an engine that uses no words, and of one whose weights have a name like a digest.
    await store.put_conditioning(voice, Conditioning("plain", "w1", {"x": np.zeros(1)}))
    await store.put_conditioning(voice, Conditioning("plain", "ab" * 16, {"x": np.zeros(1)}))
    assert await store.conditioning(voice, "reader", "w1", first) is not None
    await store.correct(voice, Correction(text="Hello, Anna."))
    second = await store.transcript(voice)
    assert await store.conditioning(voice, "reader", "w1", second) is None
    assert await store.conditioning(voice, "reader", "w1", first) is None
    assert await store.conditioning(voice, "plain", "w1") is not None
    assert await store.conditioning(voice, "plain", "ab" * 16) is not None


async def test_damaged_words_cost_the_words_and_not_the_voice(tmp_path: Path) -> None:
    store = VoiceStore.open(tmp_path / "voices")
    voice = await store.create(NewVoice(name="anna", transcript="Hello."), CLIP, hearing("Hello"))
    await store.correct(voice, Correction(text="Good bye."))
    for file in (tmp_path / "voices" / "voices").rglob("*.json"):
        file.write_bytes(b"{")
    counts = await store.transcript(voice)
    assert counts is not None
    assert (counts.text, counts.source, counts.words) == ("Hello.", "given", ())


async def test_a_hearing_in_memory_is_kept_once() -> None:
    store = VoiceStore(MemoryStore())
    voice = await store.create(NewVoice(name="anna"), CLIP)
    await store.put_hearing(voice, hearing("First."))
    await store.put_hearing(voice, hearing("Second."))
    counts = await store.transcript(voice)
    assert counts is not None
    assert counts.text == "First."
