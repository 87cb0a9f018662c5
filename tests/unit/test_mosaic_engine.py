"""The mosaic engine through the contract. Its speakers are the base voice, pitch and vocal tract changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.contract import (
    Chunk,
    Conditioning,
    ConditioningMismatch,
    EngineError,
    ModelCorrupt,
    ModelError,
    ModelMissing,
    NothingToSpeak,
    Reference,
    ReferenceUnusable,
    Samples,
    UnsupportedLanguage,
    UnsupportedOption,
    Utterance,
    UtteranceTooLong,
)
from engines.mosaic import engine as engine_module
from engines.mosaic.base_speech import BaseSpeech
from engines.mosaic.engine import MosaicConfig, MosaicEngine, VoiceCache
from engines.mosaic.phone_features import PhoneFeatures
from engines.mosaic.profile import VoiceProfile
from engines.mosaic.source_filter import Parts
from engines.mosaic.speaker_encoder import ENCODER_RATE_HZ, SpeakerEncoder, without_silence
from engines.mosaic.spectrum import HANN, HOP, WINDOW, Bool, log_energy, log_power, resample
from engines.mosaic.voice_map import PreparedVoice
from engines.mosaic.weight_files import PHONE_PROJECTION, SPEAKER_ENCODER
from engines.pitch import track_f0
from engines.weight_file import WeightFile
from tests.unit.imitated_speakers import imitated_speaker

RATE_HZ = 24_000
LONG_TEXT = "Nine rows of soldiers stood in line. The beach is dry and shallow at low tide."
TEXT = "The committee will meet again on Thursday."


@pytest.fixture(scope="module")
def engine() -> MosaicEngine:
    loaded = MosaicEngine(MosaicConfig())
    loaded.load()
    return loaded


@pytest.fixture(scope="module")
def large_speaker() -> Reference:
    return imitated_speaker(pitch=0.5, vocal_tract=0.84)


@pytest.fixture(scope="module")
def small_speaker() -> Reference:
    return imitated_speaker(pitch=1.2, vocal_tract=1.12)


@pytest.fixture(scope="module")
def large_voice(engine: MosaicEngine, large_speaker: Reference) -> Conditioning:
    return engine.extract_voice(large_speaker)


@pytest.fixture(scope="module")
def small_voice(engine: MosaicEngine, small_speaker: Reference) -> Conditioning:
    return engine.extract_voice(small_speaker)


def spoken(engine: MosaicEngine, utterances: Sequence[Utterance]) -> list[Samples]:
    """Whole samples per row; fails on any error."""
    rows: list[list[Samples]] = [[] for _ in utterances]
    finished = set()
    for chunk in engine.synthesize(utterances):
        assert chunk.error is None
        assert chunk.row not in finished
        rows[chunk.row].append(chunk.samples)
        if chunk.last:
            finished.add(chunk.row)
    assert finished == set(range(len(utterances)))
    return [np.concatenate(row) for row in rows]


def speak(
    engine: MosaicEngine, voice: Conditioning, text: str = TEXT, *, seed: int = 1, speed: float = 1.0
) -> Samples:
    return spoken(engine, [Utterance(text, "en", voice, seed=seed, speed=speed)])[0]


def only_error(engine: MosaicEngine, utterance: Utterance) -> EngineError | None:
    chunks = list(engine.synthesize([utterance]))
    assert [chunk.last for chunk in chunks] == [True]
    assert not len(chunks[0].samples)
    return chunks[0].error


def median_f0_hz(samples: Samples) -> float:
    f0_hz = track_f0(samples, RATE_HZ)
    return float(np.median(f0_hz[f0_hz > 0]))


def sound_kinds(base: Parts) -> tuple[Bool, Bool]:
    """Which frames of the base voice hiss, and which sound otherwise; neither if they are faint."""
    power = base.power()
    energy = log_energy(power)
    audible = energy > energy.max() + log_power(-30.0)
    hissing = power[:, 200:].sum(axis=1) > power[:, :200].sum(axis=1)
    return audible & hissing, audible & ~hissing


# --- speech ---------------------------------------------------------------------------------------------


def test_samples_are_mono_float32_within_full_scale(engine: MosaicEngine, large_voice: Conditioning) -> None:
    samples = speak(engine, large_voice)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert 0.05 < np.abs(samples).max() < 1.0
    assert 1.0 < len(samples) / RATE_HZ < 4.0


def test_a_row_is_bit_identical_alone_and_in_any_batch(
    engine: MosaicEngine, large_voice: Conditioning, small_voice: Conditioning
) -> None:
    utterances = [
        Utterance(TEXT, "en", large_voice, seed=1),
        Utterance("Yes.", "en", small_voice, seed=2),
        Utterance("First this, and then that; but never both at once.", "en", small_voice, seed=3),
    ]
    together = spoken(engine, utterances)
    reversed_batch = spoken(engine, utterances[::-1])[::-1]
    for utterance, one, other in zip(utterances, together, reversed_batch, strict=True):
        alone = spoken(engine, [utterance])[0]
        np.testing.assert_array_equal(alone, one)
        np.testing.assert_array_equal(alone, other)


def test_another_engine_with_stored_conditioning_gives_the_same_samples(
    engine: MosaicEngine, large_voice: Conditioning
) -> None:
    other = MosaicEngine(MosaicConfig())
    other.load()
    stored = Conditioning.from_bytes(large_voice.to_bytes())
    np.testing.assert_array_equal(speak(other, stored), speak(engine, large_voice))


def test_block_size_does_not_change_the_sound(
    engine: MosaicEngine, large_voice: Conditioning, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = speak(engine, large_voice)
    monkeypatch.setattr(engine_module, "_FIRST_BLOCK_FRAMES", 10_000)
    monkeypatch.setattr(engine_module, "_BLOCK_FRAMES", 10_000)
    whole = speak(engine, large_voice)
    np.testing.assert_allclose(streamed, whole, atol=2e-4)


def test_the_seed_changes_the_noise_and_nothing_else(engine: MosaicEngine, large_voice: Conditioning) -> None:
    one, other = speak(engine, large_voice, seed=1), speak(engine, large_voice, seed=2)
    assert len(one) == len(other)
    assert not np.array_equal(one, other)
    assert np.corrcoef(one, other)[0, 1] > 0.8


@pytest.mark.parametrize("speed", [0.25, 0.5, 2.0, 4.0])
def test_speed_changes_the_duration_and_not_the_pitch(
    engine: MosaicEngine, large_voice: Conditioning, speed: float
) -> None:
    normal, changed = speak(engine, large_voice), speak(engine, large_voice, speed=speed)
    assert len(changed) / len(normal) == pytest.approx(1 / speed, rel=0.35)
    assert median_f0_hz(changed) == pytest.approx(median_f0_hz(normal), rel=0.25)


def test_blocks_of_a_batch_alternate_and_the_first_is_short(
    engine: MosaicEngine, large_voice: Conditioning
) -> None:
    chunks = list(engine.synthesize([Utterance(TEXT, "en", large_voice, seed=row) for row in range(3)]))
    assert [chunk.row for chunk in chunks[:6]] == [0, 1, 2, 0, 1, 2]
    assert len(chunks[0].samples) <= 0.25 * RATE_HZ


def test_the_base_voice_is_voiced_where_harmonics_are_heard_not_where_it_has_a_pitch() -> None:
    base = BaseSpeech(threads=1)
    hissing_text = base.speak_all("She sees six thick ships pass the fast sea coast.")
    humming_text = base.speak_all("We were away in a warm room near Rome all year long.")
    hissing, _ = sound_kinds(hissing_text)
    _, humming = sound_kinds(humming_text)
    assert hissing_text.pitched[hissing].mean() > 0.5
    assert hissing_text.voiced[hissing].mean() < 0.25
    assert humming_text.voiced[humming].mean() > 0.8


@pytest.mark.parametrize("voice", ["large_voice", "small_voice"])
def test_hissing_consonants_go_on_hissing(
    engine: MosaicEngine, voice: str, request: pytest.FixtureRequest
) -> None:
    text = "She sees six thick ships pass the fast sea coast."
    base = BaseSpeech(threads=1).speak_all(text)
    hissing, _ = sound_kinds(base)
    samples = speak(engine, request.getfixturevalue(voice), text)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples, WINDOW // 2), WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames[: len(base)] * HANN, axis=1)) ** 2
    share_above_3_khz = power[:, 150:].sum(axis=1) / power.sum(axis=1)
    assert np.median(share_above_3_khz[hissing]) > 0.8


@pytest.mark.parametrize(
    "text", ["$5.20", "Ünïcode naïve café", "I", "9" * 40, "x" * 60, "a . b", "你好 hello"]
)
def test_odd_texts_are_spoken(engine: MosaicEngine, large_voice: Conditioning, text: str) -> None:
    assert len(speak(engine, large_voice, text)) > 0.2 * RATE_HZ


def test_the_longest_text_is_spoken(engine: MosaicEngine, large_voice: Conditioning) -> None:
    limit = engine.card.max_chars("en")
    samples = speak(engine, large_voice, ("the small dog ran over the old bridge and then " * 20)[:limit])
    assert 15 < len(samples) / RATE_HZ < 45


def test_sentences_end_with_a_short_pause(engine: MosaicEngine, large_voice: Conditioning) -> None:
    samples = speak(engine, large_voice)
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    assert 0.1 < (len(samples) - loud[-1]) / RATE_HZ < 0.5
    assert loud[0] / RATE_HZ < 0.15


# --- likeness -------------------------------------------------------------------------------------------


def test_pitch_follows_the_reference(
    engine: MosaicEngine,
    large_speaker: Reference,
    small_speaker: Reference,
    large_voice: Conditioning,
    small_voice: Conditioning,
) -> None:
    for reference, voice in ((large_speaker, large_voice), (small_speaker, small_voice)):
        samples = speak(engine, voice, LONG_TEXT)
        assert median_f0_hz(samples) == pytest.approx(median_f0_hz(reference.samples), rel=0.1)


def test_the_encoder_hears_the_enrolled_speaker(
    engine: MosaicEngine,
    large_speaker: Reference,
    small_speaker: Reference,
    large_voice: Conditioning,
    small_voice: Conditioning,
) -> None:
    encoder = SpeakerEncoder(SPEAKER_ENCODER.tensors())

    def embed(samples: Samples) -> Samples:
        return encoder.embed(without_silence(resample(samples, RATE_HZ, ENCODER_RATE_HZ)))

    speakers = [embed(large_speaker.samples), embed(small_speaker.samples)]
    voices = [embed(speak(engine, voice, LONG_TEXT)) for voice in (large_voice, small_voice)]
    cosines = np.array(voices) @ np.array(speakers).T
    assert cosines[0, 0] > cosines[0, 1] + 0.1
    assert cosines[1, 1] > cosines[1, 0] + 0.1


# --- enrolment ------------------------------------------------------------------------------------------


def test_enrolment_is_deterministic_and_refining_is_idempotent(
    engine: MosaicEngine, large_speaker: Reference, large_voice: Conditioning
) -> None:
    again = engine.extract_voice(large_speaker)
    refined = engine.refine_voice(large_speaker, large_voice)
    twice = engine.refine_voice(large_speaker, refined)
    for name, array in large_voice.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
        np.testing.assert_array_equal(twice.arrays[name], refined.arrays[name])
    assert not np.array_equal(refined.arrays["closing_equaliser"], large_voice.arrays["closing_equaliser"])


@pytest.mark.parametrize("rate_hz", [8000, 11_025, 44_100, 192_000])
def test_a_reference_may_have_any_rate(engine: MosaicEngine, large_speaker: Reference, rate_hz: int) -> None:
    samples = resample(large_speaker.samples, RATE_HZ, rate_hz)
    voice = engine.extract_voice(Reference(samples, rate_hz))
    spoken_f0_hz = median_f0_hz(speak(engine, voice, LONG_TEXT))
    assert spoken_f0_hz == pytest.approx(median_f0_hz(large_speaker.samples), rel=0.1)


def tone(seconds: float) -> Samples:
    time_s = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    swelling = 1 + np.sin(2 * np.pi * 3 * time_s)
    return (0.2 * swelling * np.sin(2 * np.pi * 150 * time_s)).astype(np.float32)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros(0, np.float32), "lasts"),
        (tone(1.0), "lasts"),
        (np.zeros(5 * RATE_HZ, np.float32), "silent"),
        (np.full(5 * RATE_HZ, np.nan, np.float32), "silent"),
        (tone(5.0), "steady"),
        (np.random.default_rng(0).normal(0, 0.1, 5 * RATE_HZ).astype(np.float32), "No voice"),
    ],
    ids=["empty", "short", "silence", "not-a-number", "tone", "noise"],
)
def test_what_is_not_speech_is_refused(engine: MosaicEngine, samples: Samples, reason: str) -> None:
    with pytest.raises(ReferenceUnusable, match=reason) as refusal:
        engine.extract_voice(Reference(samples, RATE_HZ))
    assert refusal.value.next_step


def test_a_word_in_a_long_silence_is_too_short(engine: MosaicEngine, large_speaker: Reference) -> None:
    silence = np.zeros(4 * RATE_HZ, np.float32)
    samples = np.concatenate([silence, large_speaker.samples[: RATE_HZ // 2], silence])
    with pytest.raises(ReferenceUnusable, match="only"):
        engine.extract_voice(Reference(samples, RATE_HZ))


def test_silence_before_the_speech_does_not_count(
    engine: MosaicEngine, large_speaker: Reference, large_voice: Conditioning
) -> None:
    late = np.concatenate([np.zeros(40 * RATE_HZ, np.float32), large_speaker.samples])
    voice = engine.extract_voice(Reference(late, RATE_HZ))
    assert len(voice.arrays["unit_voiced"]) == pytest.approx(len(large_voice.arrays["unit_voiced"]), rel=0.05)


# --- refusals and failures ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "  ", "…!!", "😀", "你好", "((("])
def test_text_without_words_is_nothing_to_speak(
    engine: MosaicEngine, large_voice: Conditioning, text: str
) -> None:
    assert isinstance(only_error(engine, Utterance(text, "en", large_voice, seed=1)), NothingToSpeak)


def test_what_every_engine_refuses(engine: MosaicEngine, large_voice: Conditioning) -> None:
    good = Utterance(TEXT, "en", large_voice, seed=1)
    foreign = replace(large_voice, weights_fingerprint="other")
    too_long = "a" * (engine.card.max_chars("en") + 1)
    cases: list[tuple[Utterance, type[EngineError]]] = [
        (replace(good, conditioning=foreign), ConditioningMismatch),
        (replace(good, language="tlh"), UnsupportedLanguage),
        (replace(good, text=too_long), UtteranceTooLong),
        (replace(good, options={"temperature": 1}), UnsupportedOption),
    ]
    for utterance, expected in cases:
        assert isinstance(only_error(engine, utterance), expected)


def test_conditioning_that_lacks_an_array_is_a_mismatch(
    engine: MosaicEngine, large_voice: Conditioning
) -> None:
    broken = replace(large_voice, arrays={"speaker": large_voice.arrays["speaker"]})
    assert isinstance(only_error(engine, Utterance(TEXT, "en", broken, seed=1)), ConditioningMismatch)


def test_a_failing_row_leaves_the_others_alone(engine: MosaicEngine, large_voice: Conditioning) -> None:
    good = Utterance(TEXT, "en", large_voice, seed=1)
    chunks = list(engine.synthesize([replace(good, text="…"), good]))
    assert [type(chunk.error) for chunk in chunks if chunk.error] == [NothingToSpeak]
    survivor = np.concatenate([chunk.samples for chunk in chunks if chunk.row == 1])
    np.testing.assert_array_equal(survivor, spoken(engine, [good])[0])


def test_an_abandoned_row_stops_at_once(engine: MosaicEngine, large_voice: Conditioning) -> None:
    left, stayed = (Utterance(TEXT, "en", large_voice, seed=seed) for seed in (1, 2))
    seen: list[Chunk] = []
    for chunk in engine.synthesize([left, stayed]):
        seen.append(chunk)
        left.abandoned.set()
    assert [chunk.row for chunk in seen].count(0) == 1
    assert seen[-1].row == 1
    assert seen[-1].last


def test_closing_the_iterator_ends_it(engine: MosaicEngine, large_voice: Conditioning) -> None:
    chunks = engine.synthesize([Utterance(TEXT, "en", large_voice, seed=1)])
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert list(chunks) == []


# --- weights and caches ---------------------------------------------------------------------------------


def test_an_engine_that_is_not_loaded_says_so() -> None:
    unloaded = MosaicEngine(MosaicConfig())
    with pytest.raises(ModelError, match="not loaded"):
        _ = unloaded.weights_fingerprint


def test_unload_and_load_again(large_voice: Conditioning) -> None:
    engine = MosaicEngine(MosaicConfig())
    engine.load()
    engine.unload()
    engine.load()
    assert len(speak(engine, large_voice)) > 0


@pytest.mark.parametrize("name", ["HIBARI_MODEL", "SPEAKER_ENCODER", "PHONE_PROJECTION"])
def test_a_changed_or_missing_model_file_stops_loading(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: WeightFile = getattr(engine_module, name)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(original.path.read_bytes()[:-1] + b"\x00")
    for path, expected in ((damaged, ModelCorrupt), (tmp_path / "absent", ModelMissing)):
        monkeypatch.setattr(engine_module, name, replace(original, path=path))
        with pytest.raises(expected) as failure:
            MosaicEngine(MosaicConfig()).load()
        assert failure.value.next_step


def test_the_cache_keeps_the_voices_used_last(large_voice: Conditioning) -> None:
    features = PhoneFeatures(PHONE_PROJECTION.tensors()["projection"])
    cache = VoiceCache[PreparedVoice](capacity=2)

    def get(voice: Conditioning, language: str = "en") -> PreparedVoice:
        return cache.get(voice, language, lambda profile: PreparedVoice.of(profile, features))

    variants = [
        replace(large_voice, arrays={**large_voice.arrays, "level": np.array([float(number)])})
        for number in range(3)
    ]
    first = get(variants[0])
    get(variants[1])
    equal_copy = Conditioning.from_bytes(variants[0].to_bytes())
    assert get(equal_copy) is first
    get(variants[2])
    assert len(cache) == 2
    assert get(variants[0]) is first
    assert get(variants[0], "es") is not first


def test_a_profile_survives_storage(large_voice: Conditioning) -> None:
    stored = Conditioning.from_bytes(large_voice.to_bytes())
    profile = VoiceProfile.from_arrays(stored.arrays)
    for name, array in profile.to_arrays().items():
        np.testing.assert_array_equal(array, large_voice.arrays[name])
