"""XTTS-v2 against coqui-tts on the same random weights; and many utterances in one loop."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from engines.contract import (
    Abandon,
    Chunk,
    Conditioning,
    Reference,
    Samples,
    UnsupportedLanguage,
    UnsupportedOption,
    Utterance,
    UtteranceError,
)
from engines.coqui import prepare_coqui
from engines.xtts.engine import XttsEngine
from engines.xtts.settings import XttsConfig
from tests.checkpoints.xtts import write_checkpoint
from tests.speech import noisy_tone

prepare_coqui("xtts")
import torch  # noqa: E402 - after prepare_coqui, as everything below
import torchaudio  # noqa: E402
from transformers import (  # noqa: E402
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engines.xtts import text  # noqa: E402
from engines.xtts.decoder import Decoder  # noqa: E402
from engines.xtts.linear import (  # noqa: E402
    Linear,
    Precision,
    activation_type,
    make_linear,
    row_floor,
)
from engines.xtts.loaded import LoadedXtts  # noqa: E402
from engines.xtts.memory import cache_columns  # noqa: E402
from engines.xtts.sampling import Sampler, Sampling  # noqa: E402
from engines.xtts.vocoder import FRAME_SAMPLES, Vocoder  # noqa: E402

SENTENCES = {
    "en": "The birch canoe slid on the smooth planks.",
    "zh": "你好，今天天气很好。",
    "ja": "こんにちは、元気ですか。",
    "de": "Der schnelle braune Fuchs springt über 3 Hunde.",
}
GREEDY = {"temperature": 0}


@dataclass(frozen=True)
class Pair:
    """Our engine and coqui-tts's model, loaded from the same files."""

    engine: XttsEngine
    coqui: Any
    voice: Conditioning

    @property
    def loaded(self) -> LoadedXtts:
        loaded = self.engine._loaded
        assert loaded is not None
        return loaded


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both, from a file of the published kind: with a pickled configuration inside."""
    folder = write_checkpoint(tmp_path_factory.mktemp("pair"), stop_after=26, seed=1, legacy=True)
    engine = XttsEngine(
        XttsConfig(
            model_dir=folder,
            accept_license=True,
            device="cpu",
            slots=2,
            window_tokens=(6, 10),
            trim_end=False,
        )
    )
    before = (folder / "model.pth").stat().st_mtime_ns
    engine.load()
    assert (folder / "model.pth").stat().st_mtime_ns == before, "loading wrote to the model's file"
    voice = engine.extract_voice(REFERENCE)
    yield Pair(engine, load_coqui(folder), voice)
    engine.unload()


def load_coqui(folder: Path) -> Any:
    """coqui-tts's own loading and model."""
    from TTS.tts.configs.xtts_config import XttsConfig as CoquiConfig
    from TTS.tts.models.xtts import Xtts

    config = CoquiConfig()
    config.load_json(str(folder / "config.json"))
    model = Xtts(config)
    model.load_checkpoint(config, checkpoint_dir=str(folder), eval=True)
    return model


REFERENCE = Reference(noisy_tone(210.0, 9.5), 24_000)


def spoken(engine: XttsEngine, utterance: Utterance) -> Samples:
    """All samples of one utterance."""
    chunks = list(engine.synthesize([utterance]))
    assert all(chunk.error is None for chunk in chunks)
    return np.concatenate([chunk.samples for chunk in chunks])


# --- the same as coqui-tts --------------------------------------------------------------------------------


def test_conditioning_is_coquis(pair: Pair) -> None:
    audio = torchaudio.functional.resample(torch.from_numpy(REFERENCE.samples)[None], 24_000, 22_050)
    latents = pair.coqui.get_gpt_cond_latents(audio, 22_050, length=30, chunk_length=4)
    embedding = pair.coqui.get_speaker_embedding(audio, 22_050)
    np.testing.assert_allclose(pair.voice.arrays["gpt_cond_latent"], latents[0], atol=1e-5)
    np.testing.assert_allclose(pair.voice.arrays["speaker_embedding"], embedding.reshape(-1), atol=1e-5)


@pytest.mark.parametrize("language", SENTENCES)
def test_greedy_tokens_are_coquis(pair: Pair, language: str) -> None:
    row = Row(pair, SENTENCES[language], language, pair.voice, Sampling(0, 50, 0.85, 5.0))
    ids = pair.coqui.tokenizer.encode(SENTENCES[language].lower(), lang=language)
    assert list(row.text_tokens) == ids
    with torch.inference_mode():
        theirs = pair.coqui.gpt.generate(
            cond_latents=torch.from_numpy(pair.voice.arrays["gpt_cond_latent"])[None],
            text_inputs=torch.tensor([ids]),
            do_sample=False,
            repetition_penalty=5.0,
        )
    decode(pair.coqui.gpt, [row])
    assert row.tokens == theirs[0].tolist()
    assert len(set(row.tokens)) > 5


@pytest.mark.parametrize(("language", "speed"), [("en", 1.0), ("zh", 1.3), ("ja", 0.7), ("de", 1.0)])
def test_audio_is_coquis(pair: Pair, language: str, speed: float) -> None:
    theirs = pair.coqui.inference(
        SENTENCES[language],
        language,
        torch.from_numpy(pair.voice.arrays["gpt_cond_latent"])[None],
        torch.from_numpy(pair.voice.arrays["speaker_embedding"])[None, :, None],
        do_sample=False,
        repetition_penalty=5.0,
        speed=speed,
    )["wav"]
    utterance = Utterance(SENTENCES[language], language, pair.voice, 1, speed=speed, options=GREEDY)
    chunks = [chunk.samples for chunk in pair.engine.synthesize([utterance]) if len(chunk.samples)]
    assert len(chunks) > 1
    np.testing.assert_allclose(np.concatenate(chunks), theirs, atol=1e-4)
    assert np.abs(theirs).max() > 0.1


def test_tokens_are_drawn_as_transformers_draws_them() -> None:
    """The same draw falls on the same token of what transformers leaves to choose from."""
    sampling = Sampling(0.7, 20, 0.8, 4.0)
    sampler = Sampler(1, 200, start_token=150, device=torch.device("cpu"))
    sampler.begin(0, sampling, seed=11)
    draws, noise = torch.Generator().manual_seed(11), torch.Generator().manual_seed(3)
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(4.0),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.8),
        ]
    )
    # The prompt, as coqui-tts fills it in.
    seen = [1, 1, 150]
    for _ in range(200):
        logits = 3 * torch.randn(1, 200, generator=noise)
        (mine,) = sampler.draw([0], logits)
        prompt = torch.tensor([seen])
        left = theirs(cast(torch.LongTensor, prompt), cast(torch.FloatTensor, logits.clone())).softmax(1)[0]
        order = left.argsort(descending=True)
        reached = left[order].cumsum(0)
        place = int(torch.searchsorted(reached, torch.rand(1, generator=draws) * reached[-1], right=True))
        assert mine is not None
        assert mine == order[place]
        seen.append(mine)


# --- alone and among others -------------------------------------------------------------------------------


class Row:
    """An utterance decoded step by step, without the loop and the vocoder."""

    def __init__(
        self, pair: Pair, words: str, language: str, voice: Conditioning, sampling: Sampling, seed: int = 0
    ) -> None:
        self.text_tokens, _ = pair.loaded._text.tokens(words, language)
        self.voice = torch.from_numpy(voice.arrays["gpt_cond_latent"])
        self.sampling, self.seed = sampling, seed
        self.tokens: list[int] = []
        self.latents: list[torch.Tensor] = []

    def again(self) -> Row:
        """The same, not begun."""
        other = object.__new__(Row)
        other.__dict__.update(self.__dict__, tokens=[], latents=[])
        return other


def decode(
    gpt: Any, rows: Sequence[Row], precision: Precision = "fp32", *, static: bool = False, every: int = 1
) -> None:
    """Decode ``rows`` to their ends with as many slots; one joins every ``every`` steps."""
    slots = 8
    device = torch.device("cpu")
    with torch.inference_mode():
        decoder = Decoder(gpt, slots, cache_columns(gpt), precision, device, static=static)
        sampler = Sampler(slots, decoder.vocabulary, decoder.start_token, device)
        live: dict[int, Row] = {}
        coming, step = list(rows), 0
        # A place in the middle for a row that is alone, any for others.
        free = [3, 7, 0, 5, 1, 6, 2, 4]
        while live or coming:
            if coming and step % every == 0:
                row, slot = coming.pop(0), free.pop(0)
                sampler.begin(slot, row.sampling, row.seed)
                logits, latent = decoder.begin(slot, row.text_tokens, row.voice)
                (token,) = sampler.draw([slot], logits[None])
                row.tokens.append(int(token or 0))
                row.latents.append(latent.clone())
                live[slot] = row
            step += 1
            for slot, row in list(live.items()):
                if row.tokens[-1] == decoder.stop_token or len(row.tokens) == 60:
                    del live[slot]
                    free.append(slot)
            if not live:
                continue
            order = sorted(live)
            all_logits, latents = decoder.step(
                order, [live[slot].tokens[-1] for slot in order], [len(live[slot].tokens) for slot in order]
            )
            for slot, latent, token in zip(order, latents, sampler.draw(order, all_logits), strict=True):
                live[slot].tokens.append(int(token or 0))
                live[slot].latents.append(latent.clone())


@pytest.mark.parametrize(
    ("precision", "static"), [("fp32", False), ("int8", False), ("bf16", False), ("fp32", True)]
)
def test_a_row_is_the_same_alone_and_among_others_that_come_and_go(
    pair: Pair, precision: Precision, static: bool
) -> None:
    voices = [pair.voice, *pair.engine.built_in_voices.values()]
    greedy, free = Sampling(0, 50, 0.85, 5.0), Sampling(0.9, 40, 0.9, 2.0)
    languages = ["en", "zh", "ja", "de", "en", "de", "en", "zh"]
    together = [
        Row(
            pair,
            SENTENCES[language] + " Now." * number,
            language,
            voices[number % 3],
            greedy if number == 1 else free,
            seed=number,
        )
        for number, language in enumerate(languages)
    ]
    decode(pair.coqui.gpt, together, precision, static=static, every=3)
    assert len({tuple(row.tokens) for row in together}) == len(together)
    for row in together:
        alone = row.again()
        decode(pair.coqui.gpt, [alone], precision, static=static)
        assert alone.tokens == row.tokens
        assert all(torch.equal(mine, other) for mine, other in zip(alone.latents, row.latents, strict=True))


def test_static_step_decodes_what_the_other_does(pair: Pair) -> None:
    """What CUDA runs, on the CPU."""
    row = Row(pair, SENTENCES["en"], "en", pair.voice, Sampling(0.75, 50, 0.85, 5.0), seed=4)
    static = row.again()
    decode(pair.coqui.gpt, [row])
    decode(pair.coqui.gpt, [static], static=True)
    assert static.tokens == row.tokens
    torch.testing.assert_close(torch.stack(static.latents), torch.stack(row.latents), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("int8", 0.015), ("bf16", 0.01)])
def test_products_are_those_of_the_weights(precision: Precision, bound: float) -> None:
    noise = torch.Generator().manual_seed(2)
    # Transposed, as GPT-2 has them, and inputs as skewed as those behind its activation.
    weight, bias = torch.randn(128, 96, generator=noise).t(), torch.randn(96, generator=noise)
    linear = make_linear(weight, bias, precision, torch.device("cpu"))
    for rows in (1, 3, 40):
        x = torch.nn.functional.gelu(torch.randn(rows, 128, generator=noise))
        exact = torch.nn.functional.linear(x, weight, bias)
        near = linear(x.to(activation_type(precision))).float()
        assert float((near - exact).norm() / exact.norm()) < bound


def test_rows_are_computed_in_company_where_their_number_matters() -> None:
    def summed_differently_up_to(rows: int) -> Linear:
        return lambda x: x * (1.0 if len(x) > rows else 1.0 + 1e-6)

    cpu = torch.device("cpu")
    for rows in (0, 2, 5):
        linears = [(summed_differently_up_to(rows), 16), (summed_differently_up_to(1), 8)]
        assert row_floor(linears, 8, torch.float32, cpu) == max(rows, 1) + 1


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.02), ("bf16", 0.02)])
def test_cheaper_arithmetic_stays_near(pair: Pair, precision: Precision, bound: float) -> None:
    rows = [Row(pair, SENTENCES["en"], "en", pair.voice, Sampling(0, 50, 0.85, 5.0)) for _ in range(2)]
    decode(pair.coqui.gpt, rows[:1])
    decode(pair.coqui.gpt, rows[1:], precision)
    exact, near = (row.latents[0].float() for row in rows)
    assert float((near - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("speed", [1.0, 0.6, 1.7])
def test_windows_have_no_seams(pair: Pair, speed: float) -> None:
    vocoder = Vocoder(pair.coqui.hifigan_decoder)
    stretch = vocoder.stretch(speed)
    latents = torch.randn(30, 64, generator=torch.Generator().manual_seed(5))
    embedding = torch.from_numpy(pair.voice.arrays["speaker_embedding"])
    with torch.inference_mode():
        whole = Vocoder.window(stretch, latents, 0, ended=True)
        assert whole is not None
        (expected,) = vocoder.samples([whole], [embedding])
        pieces, done = [], 0
        for known in (9, 10, 17, 30):
            window = Vocoder.window(stretch, latents[:known], done, ended=known == 30)
            if window is not None:
                pieces += vocoder.samples([window], [embedding])
                done = window.last
    assert len(pieces) >= 3
    assert done * FRAME_SAMPLES == len(expected)
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-5, rtol=0)


def test_bf16_vocoder_stays_near(pair: Pair) -> None:
    latents = torch.randn(30, 64, generator=torch.Generator().manual_seed(5))
    embedding = torch.from_numpy(pair.voice.arrays["speaker_embedding"])
    exact = Vocoder(pair.coqui.hifigan_decoder)
    cheaper = Vocoder(deepcopy(pair.coqui.hifigan_decoder), torch.bfloat16)
    window = Vocoder.window(exact.stretch(1.0), latents, 0, ended=True)
    assert window is not None
    with torch.inference_mode():
        (expected,), (heard,) = (vocoder.samples([window], [embedding]) for vocoder in (exact, cheaper))
    assert heard.dtype == torch.float32
    assert not torch.equal(heard, expected)
    assert float((heard - expected).norm() / expected.norm()) < 0.03


# --- calls ------------------------------------------------------------------------------------------------


def test_more_utterances_than_slots_wait_their_turn_and_say_so(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.xtts.engine._BEAT_S", 0.005)
    batch = [Utterance("One. Two.", "en", pair.voice, seed, options={"temperature": 1}) for seed in range(3)]
    chunks = list(pair.engine.synthesize(batch))
    assert {chunk.row for chunk in chunks if chunk.last} == {0, 1, 2}
    assert any(not len(chunk.samples) and not chunk.last for chunk in chunks)
    together = np.concatenate([chunk.samples for chunk in chunks if chunk.row == 2])
    np.testing.assert_array_equal(spoken(pair.engine, batch[2]), together)


def test_slots_are_free_again_when_nobody_listens(pair: Pair) -> None:
    gone = Abandon()
    stream = pair.engine.synthesize(
        [Utterance(SENTENCES["en"], "en", pair.voice, 1, abandoned=gone), good_one(pair, 2)]
    )
    next(stream)
    gone.set()
    heard = [chunk.row for chunk in stream]
    assert heard.count(0) <= 1
    other = pair.engine.synthesize([good_one(pair, 3)])
    next(other)
    other.close()  # type: ignore[attr-defined]
    deadline_s = time.monotonic() + 60
    while pair.loaded.loop.live_slots:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def good_one(pair: Pair, seed: int) -> Utterance:
    return Utterance(SENTENCES["en"], "en", pair.voice, seed)


def test_model_that_does_not_stop_is_stopped(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("engines.xtts.loaded._TOKENS_AT_LEAST", 5)
    monkeypatch.setattr("engines.xtts.loaded._TOKENS_PER_CHARACTER", 1)
    chunks = list(pair.engine.synthesize([Utterance("A.", "en", pair.voice, 1)]))
    assert chunks[-1].last
    assert chunks[-1].error is None
    assert 0 < sum(len(chunk.samples) for chunk in chunks) < 24_000 * 0.5
    assert "did not stop" in caplog.text


def test_failing_turn_fails_its_utterances_and_nothing_after_them(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the step broke")

    with monkeypatch.context() as patch:
        patch.setattr(pair.loaded.loop._decoder, "step", broken)
        (chunk,) = [c for c in pair.engine.synthesize([good_one(pair, 1)]) if c.last]
        assert chunk.error is not None
    assert len(spoken(pair.engine, good_one(pair, 1))) > 0


def test_built_in_voices_are_conditioning(pair: Pair) -> None:
    voices = pair.engine.built_in_voices
    assert list(voices) == ["Random Ana", "Random Ben"]
    for voice in voices.values():
        pair.engine.check_conditioning(voice)
        assert voice.arrays["gpt_cond_latent"].shape == (32, 64)


def failure(pair: Pair, **changed: Any) -> Chunk:
    fields: dict[str, Any] = {
        "text": "Yes.",
        "language": "en",
        "conditioning": pair.voice,
        "seed": 1,
        **changed,
    }
    (chunk,) = pair.engine.synthesize([Utterance(**fields)])
    return chunk


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_k": 2.5},
        {"top_k": 0},
        {"top_p": 0},
        {"top_k": True},
    ],
)
def test_options_out_of_range_are_refused(pair: Pair, options: dict[str, Any]) -> None:
    error = failure(pair, options=options).error
    assert isinstance(error, UnsupportedOption)
    assert next(iter(options)) in error.message


def test_number_that_cannot_be_spelled_out_is_refused(pair: Pair) -> None:
    error = failure(pair, text="नमस्ते 50", language="hi").error
    assert type(error) is UtteranceError
    assert "words" in error.next_step


def test_language_without_its_package_names_the_extra(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "find_spec", lambda name: None if name == "cutlet" else object())
    monkeypatch.setattr(pair.loaded, "languages", text.installed_languages())
    assert "zh" in pair.engine.languages
    error = failure(pair, text="はい。", language="ja").error
    assert isinstance(error, UnsupportedLanguage)
    assert "voice-clone-tts[xtts-cjk]" in error.next_step


@pytest.mark.gpu
def test_cuda_graph_decodes_what_the_cpu_does(pair: Pair) -> None:
    row = Row(pair, SENTENCES["en"], "en", pair.voice, Sampling(0.75, 50, 0.85, 5.0), seed=4)
    decode(pair.coqui.gpt, [row])
    settings = pair.engine.settings.model_copy(update={"device": "cuda"})
    engine = XttsEngine(settings)
    engine.load()
    try:
        on_cuda = spoken(engine, good_one(pair, 4))
    finally:
        engine.unload()
    np.testing.assert_allclose(on_cuda, spoken(pair.engine, good_one(pair, 4)), atol=1e-3)


def test_class_is_read_without_torch() -> None:
    code = "import sys, engines.xtts.engine; sys.exit('torch' in sys.modules or 'TTS' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
