"""The GPT-SoVITS engine beside gsv-tts-lite's own calls, on the same weights, at the same lengths.

    python -m benchmarks.gpt_sovits            # writes results/gpt_sovits.json
    python -m benchmarks.gpt_sovits --quick    # with a GPT of a sixth of the size, mostly loading

The first run of either makes its checkpoint, which takes longer. One process loads both, and they take
turns, so that whatever else the machine does hits both:

- ``engine``   ``engines.gpt_sovits`` with four slots and its default settings, in float32;
- ``package``  ``TTS.infer`` and ``TTS.infer_stream`` of gsv-tts-lite with their defaults, in float32, called
               for one text after the other; its voices are in its cache before it is timed, as ours are.

The weights are random, of the published size (v2ProPlus): nothing here says how it sounds. They end after
exactly ``--tokens`` semantic tokens (40 ms each), so that both speak the same length. Four different texts
and voices.

``gpt_stage_ratio_4``: semantic tokens per second of the GPT alone with four utterances at once, prompts
included, by the package's ``Text2SemanticDecoder.infer`` on one after the other.

``throughput_ratio_4``: seconds of audio per second for four utterances that come at once, ours by the
package's ``infer``. Ours are streamed, which costs more SoVITS.

``first_audio_ratio_1``: seconds until a single listener hears something, ours by ``infer_stream``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import soundfile

from benchmarks.reporting import machine, write_result
from engines.contract import Abandon, Reference, Utterance
from engines.gpt_sovits.engine import GptSovitsEngine
from engines.gpt_sovits.in_process import InProcess
from engines.gpt_sovits.package import prepare_package, undisturbed
from engines.gpt_sovits.settings import GptSovitsConfig
from engines.gpt_sovits.voice import RATE_HZ
from tests.checkpoints.gpt_sovits import FULL, GPT, SOVITS, Size, write_converted
from tests.speech import noisy_tone

SLOTS: Final = 4
VERSION: Final = "v2ProPlus"
#: A sixth of the layers, so that it fits into a minute; SoVITS weighs more in it than it should.
QUICK_SIZE: Final = replace(FULL, layers=4, hubert_layers=2)
FULL_TOKENS, QUICK_TOKENS = 150, 30
FULL_TURNS, QUICK_TURNS = 3, 1
TRANSCRIPT: Final = "Two blue fish swam in the tank."
TEXTS: Final = (
    "The birch canoe slid on the smooth planks.",
    "The cat sat on the mat and the fish swam in the tank.",
    "Hello world, says number two in the blue canoe.",
    "Two fish sat on the smooth planks in the tank.",
)
VOICES_HZ: Final = (110.0, 140.0, 180.0, 230.0)
VOICE_S = 3.5


CACHE: Final = Path(__file__).parents[1] / ".cache" / "gpt_sovits_benchmark"


def checkpoint(size: Size, tokens: int) -> dict[str, Any]:
    """Settings that load a checkpoint of ``size`` that stops after exactly ``tokens``; made once and kept."""
    folder = CACHE / f"{size.layers}-layers-{tokens}-tokens"
    if not folder.is_dir():
        draft = folder.with_suffix(".draft")
        shutil.rmtree(draft, ignore_errors=True)
        write_converted(draft, size, VERSION, stop_after=tokens)
        draft.replace(folder)
    return {"model_dir": folder, "gpt": GPT, "sovits": SOVITS[VERSION], "device": "cpu"}


class Both:
    """The engine and the package on the same files, with the same four voices."""

    def __init__(self, folder: Path, size: Size, tokens: int, threads: int) -> None:
        """``folder``: where recordings may be left for the package."""
        # Of the package: at every token.
        os.environ.setdefault("TQDM_DISABLE", "1")
        prepare_package()
        import torch

        torch.set_num_threads(threads)
        self.tokens = tokens
        settings = checkpoint(size, tokens)
        self.engine = GptSovitsEngine(
            GptSovitsConfig(**settings, slots=SLOTS, languages=("en",), threads=threads, pause_s=0.0)
        )
        self.engine.load()
        backend = self._backend = cast(InProcess, self.engine._backend)
        self.voices = [
            self.engine.extract_voice(Reference(noisy_tone(hz, VOICE_S, RATE_HZ), RATE_HZ, TRANSCRIPT, "en"))
            for hz in VOICES_HZ
        ]
        self.recordings = []
        for number, voice in enumerate(self.voices):
            self.recordings.append(str(folder / f"{number}.wav"))
            soundfile.write(self.recordings[-1], voice.arrays["samples"], RATE_HZ, subtype="FLOAT")
        self.package = self._load_package(settings["model_dir"])
        # Texts are read and voices listened to before anything is timed.
        self.orders = [
            backend._order(row, utterance, Abandon(), None)  # type: ignore[arg-type]
            for row, utterance in enumerate(self.utterances(SLOTS))
        ]
        for recording in self.recordings:
            self.package.cache_spk_audio(recording)
            self.package.cache_prompt_audio(recording, TRANSCRIPT, prompt_language="en")

    def _load_package(self, folder: Path) -> Any:
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
            package.load_sovits_model(str(folder / f"{SOVITS[VERSION]}.pth"))
        return package

    def utterances(self, count: int) -> list[Utterance]:
        """The first ``count`` texts, each in its own voice."""
        return [Utterance(TEXTS[row], "en", self.voices[row], seed=row) for row in range(count)]

    def engine_speaks(self, count: int) -> tuple[float, float, float]:
        """Seconds for ``count`` at once, to the first sound of the first, and of sound."""
        began_s, first_s, samples = time.perf_counter(), 0.0, 0
        for chunk in self.engine.synthesize(self.utterances(count)):
            if chunk.error is not None:
                raise chunk.error
            samples += len(chunk.samples)
            if samples and not first_s:
                first_s = time.perf_counter() - began_s
        return time.perf_counter() - began_s, first_s, samples / RATE_HZ

    def package_speaks(self, count: int) -> tuple[float, float]:
        """Seconds for ``count`` one after the other, and of sound."""
        began_s, samples = time.perf_counter(), 0
        for row in range(count):
            recording = self.recordings[row]
            clip = self.package.infer(
                recording, recording, TRANSCRIPT, TEXTS[row], text_language="en", prompt_language="en"
            )
            samples += len(clip.audio_data)
        return time.perf_counter() - began_s, samples / RATE_HZ

    def package_begins(self) -> float:
        """Seconds to the first sound of a stream."""
        recording = self.recordings[0]
        began_s = time.perf_counter()
        stream = self.package.infer_stream(
            recording, recording, TRANSCRIPT, TEXTS[0], text_language="en", prompt_language="en", debug=False
        )
        next(stream)
        first_s = time.perf_counter() - began_s
        stream.close()
        # What the package leaves behind of an abandoned stream.
        next(iter(self.package.sovits_models.values())).vq_model.enc_p.y_overlap = None
        return first_s

    def engine_decodes(self) -> float:
        """Seconds for the tokens of four utterances at once, prompts included."""
        import torch

        from engines.gpt_sovits.sampling import Sampler

        loop = self._backend._require_loop()
        decoder = loop._decoder
        sampler = Sampler(SLOTS, decoder.vocabulary, decoder.end_token, torch.device("cpu"))
        slots = list(range(SLOTS))
        counted = [0] * SLOTS
        with torch.inference_mode():
            began_s = time.perf_counter()
            logits = []
            for slot, order in enumerate(self.orders):
                sampler.begin(slot, order.sampling, order.prompt, torch.Generator().manual_seed(slot))
                logits.append(decoder.begin(slot, order.phones, order.prompt))
            drawn = sampler.draw(slots, torch.stack(logits))
            for number in range(self.tokens):
                counted = [
                    count + (token != decoder.end_token) for count, token in zip(counted, drawn, strict=True)
                ]
                positions = [len(order.prompt) + number for order in self.orders]
                drawn = sampler.draw(
                    slots, decoder.step(slots, [int(token or 0) for token in drawn], positions)
                )
            seconds = time.perf_counter() - began_s
        if counted != [self.tokens] * SLOTS or set(drawn) != {decoder.end_token}:
            raise SystemExit(f"The utterances have {counted} tokens, not {self.tokens} each.")
        return seconds

    def package_decodes(self) -> float:
        """The same, one after the other."""
        import torch

        model = next(iter(self.package.gpt_models.values())).t2s_model
        inputs = [
            (torch.tensor([order.phones.ids]), order.prompt[None], order.phones.features[None])
            for order in self.orders
        ]
        began_s = time.perf_counter()
        for phones, prompt, bert in inputs:
            model.infer(phones, prompt, bert)
        return time.perf_counter() - began_s


def alternating(turns: int, *measured: Callable[[], Any]) -> list[list[Any]]:
    """What each of ``measured`` gave in every turn."""
    taken: list[list[Any]] = [[] for _ in measured]
    for _ in range(turns):
        for results, measure in zip(taken, measured, strict=True):
            results.append(measure())
    return taken


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def main() -> None:
    """Measure, print a table, and write the results unless quick."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small GPT, short utterances; no file")
    parser.add_argument("--tokens", type=int, help="semantic tokens of every utterance")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of each side")
    asked = parser.parse_args()
    size = QUICK_SIZE if asked.quick else FULL
    tokens = asked.tokens or (QUICK_TOKENS if asked.quick else FULL_TOKENS)
    turns = QUICK_TURNS if asked.quick else FULL_TURNS
    at = machine()
    with tempfile.TemporaryDirectory() as folder:
        both = Both(Path(folder), size, tokens, asked.threads)
        decoding = alternating(turns, both.engine_decodes, both.package_decodes)
        first = alternating(turns, lambda: both.engine_speaks(1)[1], both.package_begins)
        speaking = alternating(turns, lambda: both.engine_speaks(SLOTS), lambda: both.package_speaks(SLOTS))
        both.engine.unload()
    rates = [[taken[-1] / taken[0] for taken in side] for side in speaking]
    seconds = {
        "gpt of four": [median(side) for side in decoding],
        "first audio of one": [median(side) for side in first],
        "four": [median([taken[0] for taken in side]) for side in speaking],
    }
    for name, (ours, theirs) in seconds.items():
        print(f"{name:>20}: engine {ours:6.2f} s, package {theirs:6.2f} s")
    figures = {
        "gpt_stage_ratio_4": seconds["gpt of four"][1] / seconds["gpt of four"][0],
        "throughput_ratio_4": median(rates[0]) / median(rates[1]),
        "first_audio_ratio_1": seconds["first audio of one"][0] / seconds["first audio of one"][1],
    }
    if not asked.quick:
        details = {
            "seconds": {
                name: dict(zip(("engine", "package"), pair, strict=True)) for name, pair in seconds.items()
            },
            "turns": turns,
            "tokens": tokens,
            "threads": asked.threads,
            "layers": size.layers,
        }
        print(f"Written to {write_result('gpt_sovits', figures, at=at, details=details)}.")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
