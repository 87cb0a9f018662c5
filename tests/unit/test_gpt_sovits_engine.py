"""GPT-SoVITS against gsv-tts-lite on the same random weights; and many utterances in one loop."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from engines.contract import (
    Abandon,
    Chunk,
    Conditioning,
    NothingToSpeak,
    Reference,
    Samples,
    UnsupportedOption,
    Utterance,
    UtteranceTooLong,
)
from engines.gpt_sovits.convert import convert
from engines.gpt_sovits.engine import GptSovitsEngine
from engines.gpt_sovits.in_process import InProcess
from engines.gpt_sovits.package import prepare_package, undisturbed
from engines.gpt_sovits.settings import GptSovitsConfig
from engines.gpt_sovits.voice import RATE_HZ, Voice
from tests.checkpoints.gpt_sovits import GPT, SOVITS, write_bert, write_converted, write_gpt
from tests.speech import noisy_tone

prepare_package()
import torch  # noqa: E402 - after prepare_package, as everything below

from engines.gpt_sovits.checkpoint import load_checkpoint  # noqa: E402
from engines.gpt_sovits.decoder import Decoder  # noqa: E402
from engines.gpt_sovits.options import Sampling  # noqa: E402
from engines.gpt_sovits.sampling import Sampler  # noqa: E402
from engines.gpt_sovits.text import Phones  # noqa: E402
from engines.gpt_sovits.vocoder import noise_seed  # noqa: E402

TEXT = "The birch canoe slid on the smooth planks."
TRANSCRIPT = "Two blue fish swam in the tank."
TEXTS = {"en": TEXT, "zh": "你好，世界。今天天很好。", "ja": "こんにちは、元気ですか。"}
#: Of every utterance. gsv-tts-lite looks for the end at every fifth token only, and streams by 25.
TOKENS, STREAM_TOKENS = 40, 25
SEED = 11


@dataclass(frozen=True)
class Pair:
    """Our settings and gsv-tts-lite's ``TTS``, for the same files; and a recording that both have."""

    settings: dict[str, Any]
    package: Any
    recording: Path
    voice: Conditioning


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """v2ProPlus, which has all parts there are."""
    folder = tmp_path_factory.mktemp("pair")
    settings = write_converted(folder, version="v2ProPlus", stop_after=TOKENS, seed=1)
    reference = Reference(noisy_tone(180.0, 4.0, RATE_HZ), RATE_HZ, TRANSCRIPT, "en")
    voice = GptSovitsEngine(GptSovitsConfig()).extract_voice(reference)
    recording = folder / "voice.wav"
    soundfile.write(recording, voice.arrays["samples"], RATE_HZ, subtype="FLOAT")
    return Pair(settings, load_package(folder), recording, voice)


def load_package(folder: Path) -> Any:
    """gsv-tts-lite's own loading, from the published files."""
    with undisturbed():
        from gsv_tts import TTS

        package = TTS(
            models_dir=str(folder),
            device="cpu",
            gpt_cache=[(1, 512), (1, 1024)],
            always_load_cnhubert=True,
            always_load_sv=True,
        )
        package.load_gpt_model(str(folder / f"{GPT}.ckpt"))
        package.load_sovits_model(str(folder / f"{SOVITS['v2ProPlus']}.pth"))
    return package


def loaded(settings: dict[str, Any], **changed: Any) -> GptSovitsEngine:
    """An engine with these settings, loaded."""
    engine = GptSovitsEngine(GptSovitsConfig(**{**settings, **changed}))
    engine.load()
    return engine


def spoken(engine: GptSovitsEngine, utterance: Utterance) -> Samples:
    """All samples of one utterance."""
    chunks = list(engine.synthesize([utterance]))
    assert all(chunk.error is None for chunk in chunks), chunks[-1].error
    return np.concatenate([chunk.samples for chunk in chunks])


def backend(engine: GptSovitsEngine) -> InProcess:
    assert isinstance(engine._backend, InProcess)
    return engine._backend


# --- the same as gsv-tts-lite -----------------------------------------------------------------------------


def in_its_own_dictionaries(folder: Path) -> None:
    """Have the package make its analysers anew, as in a process of its own."""
    from gsv_tts.Config import global_config

    global_config.models_dir = str(folder)
    global_config.english_g2p = global_config.chinese_g2p = global_config.japanese_g2p = None


def with_noise_of(seed: int, decode: Callable[..., Any], first: int) -> Callable[..., Any]:
    """gsv-tts-lite's ``decode`` with noise from a generator of its own, as ours.

    And with the first token put back, which the package loses before the end of a stream and in a whole
    answer (upstream does not): ``pre_tokens[:, -idx:]`` is one token short there.
    """
    noise = torch.Generator().manual_seed(seed).get_state()

    def decoded(codes: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal noise
        if int(codes[0, 0, 0]) != first:
            codes = torch.cat([torch.tensor([[[first]]]), codes], -1)
            if named.get("stream_mode"):
                codes = codes[..., :-1]
        tokens = torch.get_rng_state()
        torch.set_rng_state(noise)
        answer = decode(codes, *arguments, **named)
        noise = torch.get_rng_state()
        torch.set_rng_state(tokens)
        return answer

    return decoded


def first_token(pair: Pair, engine: GptSovitsEngine, utterance: Utterance) -> int:
    """The first of ``utterance``, from our own decoder."""
    order = backend(engine)._order(0, utterance, Abandon(), None)  # type: ignore[arg-type]
    loop = backend(engine)._require_loop()
    sampler = Sampler(1, loop._decoder.vocabulary, loop._decoder.end_token, torch.device("cpu"))
    sampler.begin(0, order.sampling, order.prompt, torch.Generator().manual_seed(utterance.seed))
    weights = load_checkpoint(engine.card, pair.settings["model_dir"], engine.settings).gpt
    decoder = Decoder(weights, 1, (512,), "fp32", torch.device("cpu"), static=False)
    (token,) = sampler.draw([0], decoder.begin(0, order.phones, order.prompt)[None])
    assert token is not None
    return token


@pytest.fixture(scope="module")
def whole(pair: Pair) -> Iterator[GptSovitsEngine]:
    """An engine that speaks an utterance in one piece."""
    engine = loaded(pair.settings, window_tokens=(1000,), pause_s=0.2)
    yield engine
    engine.unload()


@pytest.mark.parametrize("language", TEXTS)
def test_a_whole_answer_is_the_packages(
    pair: Pair, whole: GptSovitsEngine, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    utterance = Utterance(TEXTS[language], language, pair.voice, seed=SEED)
    ours = spoken(whole, utterance)
    model = next(iter(pair.package.sovits_models.values())).vq_model
    first = first_token(pair, whole, utterance)
    monkeypatch.setattr(model, "decode", with_noise_of(noise_seed(SEED), model.decode, first))
    in_its_own_dictionaries(pair.settings["model_dir"])
    recording = str(pair.recording)
    torch.manual_seed(SEED)
    with undisturbed():
        clip = pair.package.infer(
            recording,
            recording,
            TRANSCRIPT,
            TEXTS[language],
            text_language=language,
            prompt_language="en",
        )
    assert clip.samplerate == whole.card.sample_rate_hz
    assert len(ours) > RATE_HZ
    np.testing.assert_allclose(ours, clip.audio_data, atol=1e-4)


def test_a_stream_is_the_packages(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    # A pause of 0.4 s, one and a half times as long at a full stop.
    engine = loaded(pair.settings, window_tokens=(STREAM_TOKENS,), pause_s=0.6, languages=("en",))
    utterance = Utterance(TEXT, "en", pair.voice, seed=SEED)
    ours = [chunk.samples for chunk in engine.synthesize([utterance])]
    model = next(iter(pair.package.sovits_models.values())).vq_model
    first = first_token(pair, engine, utterance)
    monkeypatch.setattr(model, "decode", with_noise_of(noise_seed(SEED), model.decode, first))
    engine.unload()
    in_its_own_dictionaries(pair.settings["model_dir"])
    recording = str(pair.recording)
    torch.manual_seed(SEED)
    with undisturbed():
        clips = list(
            pair.package.infer_stream(
                recording,
                recording,
                TRANSCRIPT,
                TEXT,
                text_language="en",
                prompt_language="en",
                is_cut_text=False,
                stream_chunk=STREAM_TOKENS,
                debug=False,
            )
        )
    assert len(ours) == len(clips) == 2
    for mine, clip in zip(ours, clips, strict=True):
        np.testing.assert_allclose(mine, clip.audio_data, atol=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(top_k=5, top_p=0.6, temperature=0.7, repetition_penalty=1.0),
        Sampling(top_k=1025, top_p=0.3, temperature=1.6, repetition_penalty=3.0),
    ],
)
def test_tokens_are_drawn_as_the_package_does(sampling: Sampling) -> None:
    from gsv_tts.GPT_SoVITS.GPT.utils import sample

    said = torch.tensor([3, 700, 3])
    sampler = Sampler(2, 1025, 1024, torch.device("cpu"))
    for slot in (0, 1):
        sampler.begin(slot, sampling, said, torch.Generator().manual_seed(slot))
    theirs: list[list[int]] = [[], []]
    rows = torch.randn(20, 2, 1025, generator=torch.Generator().manual_seed(9)) * 3
    ours = [sampler.draw([1, 0], logits[[1, 0]].clone())[::-1] for logits in rows]
    for slot in (0, 1):
        torch.manual_seed(slot)
        before = said[None]
        for number, row in enumerate(rows[:, slot : slot + 1].clone()):
            if number < 10:
                row[:, [280, 486, 1024]] = -float("inf")
            token = sample(
                row[:, :-1] if number == 0 else row,
                before,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                temperature=sampling.temperature,
                repetition_penalty=sampling.repetition_penalty,
            )[0]
            before = torch.cat([before, token], 1)
            theirs[slot].append(int(token))
    assert [[row[slot] for row in ours] for slot in (0, 1)] == theirs


def test_the_static_step_of_cuda_is_the_same_arithmetic(pair: Pair) -> None:
    settings = GptSovitsConfig(**pair.settings)
    weights = load_checkpoint(GptSovitsEngine.card, pair.settings["model_dir"], settings).gpt
    plain, static = (
        Decoder(weights, 3, (16, 32, 64), "fp32", torch.device("cpu"), static=static)
        for static in (False, True)
    )
    prompts = {0: torch.tensor([5, 6, 7]), 2: torch.zeros(0, dtype=torch.long)}
    with torch.inference_mode():
        for slot, prompt in prompts.items():
            phones = Phones([40 + slot, 50, 60], None)
            torch.testing.assert_close(
                plain.begin(slot, phones, prompt), static.begin(slot, phones, prompt), atol=1e-5, rtol=0
            )
        # Past the ends of two buckets.
        for number in range(40):
            tokens = [700 + number, 800 + number]
            positions = [3 + number, number]
            torch.testing.assert_close(
                plain.step([0, 2], tokens, positions),
                static.step([0, 2], tokens, positions),
                atol=1e-4,
                rtol=0,
            )


# --- many at once -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(gpt_sovits_settings: dict[str, Any]) -> Iterator[GptSovitsEngine]:
    """v2 with eight slots, so that sixteen have to wait for each other."""
    engine = loaded(gpt_sovits_settings, slots=8, cached_voices=4)
    yield engine
    engine.unload()


def voice(engine: GptSovitsEngine, pitch_hz: float, transcript: str = "Anna.") -> Conditioning:
    samples = noisy_tone(pitch_hz, 3.2)
    return engine.extract_voice(Reference(samples, 24_000, transcript, "en" if transcript else ""))


def test_sixteen_requests_with_sixteen_voices_are_each_what_they_are_alone(engine: GptSovitsEngine) -> None:
    languages = list(TEXTS)
    requests = [
        Utterance(
            TEXTS[languages[number % 3]],
            languages[number % 3],
            voice(engine, 90.0 + 12 * number, "" if number % 4 == 3 else "Anna."),
            seed=number,
            speed=(1.0, 1.3, 0.8)[number % 3],
            options={"top_k": 5 + number},
        )
        for number in range(16)
    ]
    alone = [spoken(engine, request) for request in requests]
    start = threading.Barrier(len(requests))

    def speak(request: Utterance) -> Samples:
        start.wait()
        return spoken(engine, request)

    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(speak, requests))
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        np.testing.assert_array_equal(one, other, err_msg=f"request {number}")
        assert not any(np.array_equal(one, another) for another in alone[:number])
    # More voices than are kept.
    assert len(backend(engine)._voices) == 4


def test_an_abandoned_stream_leaves_no_trace_in_the_next(engine: GptSovitsEngine) -> None:
    first = Utterance(TEXT, "en", voice(engine, 120.0), seed=1)
    other = Utterance(TEXTS["ja"], "ja", voice(engine, 230.0), seed=2)
    clean = spoken(engine, first)
    stream = engine.synthesize([other])
    assert not next(stream).last
    stream.close()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(spoken(engine, first), clean)


def test_an_utterance_that_is_cancelled_frees_its_slot(engine: GptSovitsEngine) -> None:
    gone = [Utterance(TEXT, "en", voice(engine, 120.0), seed=n, abandoned=Abandon()) for n in range(8)]
    stream = engine.synthesize(gone)
    next(stream)
    for utterance in gone:
        utterance.abandoned.set()
    assert not any(chunk.last for chunk in stream)
    loop = backend(engine)._require_loop()
    assert spoken(engine, Utterance(TEXT, "en", voice(engine, 120.0), seed=1)).any()
    deadline_s = time.monotonic() + 10
    while loop._live:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert len(loop._free) == 8


def test_a_failure_inside_the_loop_is_told_and_the_others_go_on(
    engine: GptSovitsEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Utterance(TEXT, "en", voice(engine, 120.0), seed=1)
    expected = spoken(engine, good)
    loop = backend(engine)._require_loop()
    window = loop._vocoder.window

    def breaking(voicing: Any, tokens: Sequence[int], *, last: bool) -> Any:
        if voicing.speed == 1.75:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return window(voicing, list(tokens), last=last)

    monkeypatch.setattr(loop._vocoder, "window", breaking)
    bad = Utterance(TEXT, "en", good.conditioning, seed=1, speed=1.75)
    chunks = list(engine.synthesize([bad, good]))
    (failed,) = [chunk for chunk in chunks if chunk.error]
    assert (failed.row, type(failed.error).__name__) == (0, "OutOfMemory")
    np.testing.assert_array_equal(expected, np.concatenate([c.samples for c in chunks if c.row == 1]))


# --- voices -----------------------------------------------------------------------------------------------


def test_the_words_of_the_reference_count(engine: GptSovitsEngine) -> None:
    """The package keeps a reference by its path, and would speak with the words it was first given."""
    said = [
        # Several: random weights do not hear every difference.
        [
            spoken(engine, Utterance(TEXT, "en", voice(engine, 150.0, words), seed=seed)).tobytes()
            for seed in range(4)
        ]
        for words in ("Anna.", "Two blue fish swam in the tank.", "")
    ]
    assert said[0] != said[1]
    assert said[0] != said[2]


def test_words_in_a_language_that_is_not_read_are_as_none(engine: GptSovitsEngine) -> None:
    french = Reference(noisy_tone(150.0, 3.2), 24_000, "Deux poissons bleus.", "fr")
    unread = spoken(engine, Utterance(TEXT, "en", engine.extract_voice(french), seed=1))
    none = spoken(engine, Utterance(TEXT, "en", voice(engine, 150.0, ""), seed=1))
    np.testing.assert_array_equal(unread, none)


@pytest.mark.parametrize(
    ("seconds", "kept_s", "words"), [(3.0, 3.0, "Anna."), (10.0, 10.0, "Anna."), (14.0, 10.0, "")]
)
def test_a_reference_is_three_to_ten_seconds(
    engine: GptSovitsEngine, seconds: float, kept_s: float, words: str
) -> None:
    long = engine.extract_voice(Reference(noisy_tone(150.0, seconds, 44_100), 44_100, "Anna.", "en"))
    kept = Voice.from_arrays(long.arrays)
    assert len(kept.samples) == kept_s * RATE_HZ
    assert (kept.transcript, kept.language) == (words, "en")


def test_bert_reads_chinese_alone(gpt_sovits_settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "with_bert"
    shutil.copytree(gpt_sovits_settings["model_dir"], folder)
    write_bert(folder)
    convert(folder, GPT, SOVITS["v2"])
    said = []
    for bert in (False, True):
        engine = loaded({**gpt_sovits_settings, "model_dir": folder}, languages=("zh", "ja"), bert=bert)
        said.append(
            [
                spoken(engine, Utterance(TEXTS[language], language, voice(engine, 150.0), seed=1))
                for language in ("zh", "ja")
            ]
        )
        engine.unload()
    assert not np.array_equal(said[0][0], said[1][0])
    np.testing.assert_array_equal(said[0][1], said[1][1])


# --- what cannot be spoken --------------------------------------------------------------------------------


def refused(engine: GptSovitsEngine, text: str, language: str, **options: Any) -> Chunk:
    (chunk,) = engine.synthesize([Utterance(text, language, voice(engine, 150.0), seed=1, options=options)])
    return chunk


@pytest.mark.parametrize(
    ("text", "language"),
    [("", "en"), ("...", "en"), ("🙂", "zh"), ("안녕하세요.", "en"), ("안녕하세요.", "ja"), ("。、", "ja")],
)
def test_a_text_without_a_word_is_refused(engine: GptSovitsEngine, text: str, language: str) -> None:
    assert isinstance(refused(engine, text, language).error, NothingToSpeak)


@pytest.mark.parametrize(
    "options", [{"top_k": 0}, {"top_k": 1.5}, {"top_p": 0.0}, {"temperature": "hot"}, {"temperature": True}]
)
def test_an_option_out_of_range_is_refused(engine: GptSovitsEngine, options: dict[str, Any]) -> None:
    assert isinstance(refused(engine, TEXT, "en", **options).error, UnsupportedOption)


def test_a_text_that_does_not_fit_beside_its_reference_is_refused(
    gpt_sovits_settings: dict[str, Any],
) -> None:
    small = loaded(gpt_sovits_settings, kv_buckets=(256,), languages=("ja",))
    try:
        assert small.languages == ("ja",)
        assert spoken(small, Utterance("はい。", "ja", voice(small, 150.0), seed=1)).any()
        error = refused(small, "こんにちは、元気ですか。" * 5, "ja").error
        assert isinstance(error, UtteranceTooLong)
        assert "kv_buckets" in error.next_step
    finally:
        small.unload()


def test_an_utterance_that_does_not_end_is_ended(
    gpt_sovits_settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "endless"
    shutil.copytree(gpt_sovits_settings["model_dir"], folder)
    write_gpt(folder, stop_after=400)
    convert(folder, GPT, SOVITS["v2"])
    endless = loaded({**gpt_sovits_settings, "model_dir": folder}, languages=("ja",), pause_s=0)
    try:
        samples = spoken(endless, Utterance("はい。", "ja", voice(endless, 150.0), seed=1))
        # 40 tokens, and 8 for each phone: there are fewer than 10.
        assert 40 * 1280 < len(samples) <= 120 * 1280
        assert backend(endless)._require_loop().runaways == 1
        assert "did not stop" in caplog.text
    finally:
        endless.unload()
