"""The XTTS-v2 engine beside coqui-tts's own code, on the same weights, at the same lengths.

    python -m benchmarks.xtts            # writes results/xtts.json, in about 20 minutes on two cores
    python -m benchmarks.xtts --quick    # within a minute, with a GPT of a fifth of the size

The first run of either makes its checkpoint, which takes longer. Two processes each load it and take
turns, so that whatever else the machine does hits both:

- ``ours``      ``engines.xtts``, up to 16 utterances at once, its decoder in ``--precision``: int8 on a CPU
                and bf16 on CUDA if left out; its vocoder in ``--vocoder-precision``: bf16 if left out where
                the hardware has it. The engine's own defaults are fp32;
- ``baseline``  ``Xtts.inference`` and ``Xtts.inference_stream`` of coqui-tts with their defaults, in float32.

The weights are random, of the published size: nothing here says how it sounds. Their stop token is bent to
come after exactly ``--tokens`` audio tokens (46 ms each), so that both speak the same length.

``throughput_ratio_N``: seconds of audio per second for N utterances that come at once, ours by the baseline's
``inference``. The baseline speaks them one after the other, at the same rate however many there are: it is
timed on one of them in every turn.

``first_audio_ratio_N``: seconds until the median of N listeners who come at once hears something, ours by the
baseline's ``inference_stream``. With N = 1 that is its first chunk. With more, the k-th of them waits for
k - 1 utterances before: that is computed from the streams that were timed, not sat through. The stricter
comparison, with a listener whom ``inference_stream`` serves at once, is in the details.

``continuity_16``: share of the listening time of 16 streams that is not spent waiting for more audio; 1 is no
gap. ``peak_memory_ratio``: greatest resident memory of the process, loading included, after 16 at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np

from benchmarks.reporting import machine, write_result
from engines.coqui import prepare_coqui
from tests.checkpoints.xtts import FULL, Size, write_checkpoint

CACHE = Path(__file__).parents[1] / ".cache" / "xtts_benchmark"
SAMPLE_RATE_HZ = 24_000
SLOTS = 16
#: A fifth of the layers: what a token costs shrinks with them, and HiFi-GAN weighs more than it should.
QUICK_SIZE: Final = Size(6, 1024, 16, 6681)
FULL_TOKENS, QUICK_TOKENS = 140, 20
#: Utterances at once, and turns.
FULL_TURNS: Final = {1: 3, 2: 1, 4: 1, 8: 1, 16: 1}
QUICK_TURNS: Final = {1: 1, 16: 1}
Precision = Literal["fp32", "bf16", "fp16", "int8"]
VocoderPrecision = Literal["fp32", "bf16", "fp16"]
OURS, WHOLE, STREAM = "ours", "inference", "inference_stream"
TEXTS: Final = tuple(
    f"{opening} the streaming server should begin to speak soon, and {rest} must follow in time."
    for opening in ("Today", "In the evening", "As ever", "On a cold day")
    for rest in ("the rest of it", "every word", "what comes after", "the last sentence")
)


@dataclass(frozen=True, slots=True)
class Heard:
    """One utterance as its listener had it: when each chunk came, since the request, and its length in s."""

    chunks: tuple[tuple[float, float], ...]

    @property
    def first_s(self) -> float:
        """When something was to be heard."""
        return self.chunks[0][0]

    @property
    def end_s(self) -> float:
        """When everything was there."""
        return self.chunks[-1][0]

    @property
    def audio_s(self) -> float:
        """Length of the audio."""
        return sum(length_s for _, length_s in self.chunks)

    @property
    def continuity(self) -> float:
        """Share of the time from the first sound to the last in which there was sound."""
        played_s = self.first_s
        for came_s, length_s in self.chunks:
            played_s = max(played_s, came_s) + length_s
        return self.audio_s / (played_s - self.first_s)


@dataclass(frozen=True, slots=True)
class Turn:
    """Utterances that were asked for at once, and what they took."""

    heard: tuple[Heard, ...]
    wall_s: float
    cpu_s: float

    @property
    def audio_s(self) -> float:
        """Audio of all of them."""
        return sum(utterance.audio_s for utterance in self.heard)

    @property
    def rate(self) -> float:
        """Seconds of audio per second."""
        return self.audio_s / self.wall_s


def checkpoint(size: Size, tokens: int) -> Path:
    """A checkpoint of ``size`` that stops after exactly ``tokens``; made once and kept."""
    folder = CACHE / f"{size.layers}-layers-{tokens}-tokens"
    if not (folder / "model.pth").is_file():
        draft = folder.with_suffix(".draft")
        shutil.rmtree(draft, ignore_errors=True)
        write_checkpoint(draft, size)
        _stop_exactly_after(tokens, draft / "model.pth")
        draft.replace(folder)
    return folder


def _stop_exactly_after(tokens: int, file: Path) -> None:
    import torch

    content = torch.load(file, weights_only=True)
    state = content["model"]
    positions, head, bias = (
        state[f"gpt.{name}"] for name in ("mel_pos_embedding.emb.weight", "mel_head.weight", "mel_head.bias")
    )
    stop = content["config"]["model_args"]["gpt_stop_audio_token"]
    width = positions.shape[1]
    # The checkpoint's own way to stop is a matter of chance. Here one direction says it, which only positions
    # from the last token on have, and there far above all else.
    direction = head[stop] / head[stop].norm()
    positions -= (positions @ direction)[:, None] * direction
    positions[tokens:] += 100 * width**0.5 * direction
    head[stop] = 4 * direction
    bias[stop] = -60.0
    torch.save(content, file)


@dataclass(frozen=True, slots=True)
class Setup:
    """What both sides run on; the precisions are ours alone."""

    folder: Path
    threads: int
    device: str
    precision: Precision
    vocoder_precision: VocoderPrecision


class Ours:
    """The engine, with a voice of its checkpoint."""

    def __init__(self, setup: Setup) -> None:
        from engines.xtts.engine import XttsEngine
        from engines.xtts.settings import XttsConfig

        self._engine = XttsEngine(
            XttsConfig(
                slots=SLOTS,
                model_dir=setup.folder,
                accept_license=True,  # of weights that are random
                device=setup.device,
                precision=setup.precision,
                vocoder_precision=setup.vocoder_precision,
                threads=setup.threads,
                trim_end=False,
            )
        )
        self._engine.load()
        self._voice = next(iter(self._engine.built_in_voices.values()))

    def __call__(self, kind: str, texts: Sequence[str]) -> list[Heard]:
        """Speak ``texts`` at once."""
        from engines.contract import Utterance

        batch = [Utterance(text, "en", self._voice, seed=number) for number, text in enumerate(texts)]
        chunks: list[list[tuple[float, float]]] = [[] for _ in batch]
        began_s = time.perf_counter()
        for chunk in self._engine.synthesize(batch):
            if chunk.error is not None:
                raise chunk.error
            if len(chunk.samples):
                came_s = time.perf_counter() - began_s
                chunks[chunk.row].append((came_s, len(chunk.samples) / SAMPLE_RATE_HZ))
        return [Heard(tuple(row)) for row in chunks]


class Baseline:
    """coqui-tts's model, with the same voice."""

    def __init__(self, setup: Setup) -> None:
        prepare_coqui("xtts")
        import torch
        from TTS.tts.configs.xtts_config import XttsConfig
        from TTS.tts.models.xtts import Xtts

        torch.set_num_threads(setup.threads)
        config = XttsConfig()
        config.load_json(str(setup.folder / "config.json"))
        self._model: Any = Xtts.init_from_config(config)
        self._model.load_checkpoint(config, checkpoint_dir=str(setup.folder), eval=True)
        self._model.to(setup.device)
        self._voice = tuple(next(iter(self._model.speaker_manager.speakers.values())).values())
        # As the engine does when it loads: what is set up at first use.
        self._model.inference("Hello.", "en", *self._voice, max_new_tokens=4)

    def __call__(self, kind: str, texts: Sequence[str]) -> list[Heard]:
        """Speak ``texts`` one after the other."""
        import torch

        spoken = []
        began_s = time.perf_counter()
        for number, text in enumerate(texts):
            torch.manual_seed(number)
            if kind == WHOLE:
                pieces = iter([self._model.inference(text, "en", *self._voice)["wav"]])
            else:
                pieces = self._model.inference_stream(text, "en", *self._voice)
            chunks = [(time.perf_counter() - began_s, len(piece) / SAMPLE_RATE_HZ) for piece in pieces]
            spoken.append(Heard(tuple(chunks)))
        return spoken


def _work(kind: type[Ours] | type[Baseline], setup: Setup, pipe: Connection) -> None:
    """The life of a process: load, then speak what is asked for. None ends it."""
    speaker = kind(setup)
    pipe.send(_resident_mb())
    while (request := pipe.recv()) is not None:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        heard = speaker(*request)
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        pipe.send(Turn(tuple(heard), wall_s, cpu_s))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Worker:
    """A process with one of the two in it."""

    def __init__(self, kind: type[Ours] | type[Baseline], setup: Setup) -> None:
        # Started anew, not forked: its memory is its own.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(kind, setup, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.loaded_mb = 0.0

    def ready(self) -> None:
        """Return once it has loaded."""
        self.loaded_mb = self._pipe.recv()

    def speak(self, kind: str, texts: Sequence[str]) -> Turn:
        """See ``Ours`` and ``Baseline``."""
        self._pipe.send((kind, tuple(texts)))
        turn: Turn = self._pipe.recv()
        return turn

    def end(self) -> float:
        """Peak of its resident memory in MB."""
        self._pipe.send(None)
        peak_mb: float = self._pipe.recv()
        self._process.join()
        return peak_mb


@contextmanager
def workers(setup: Setup) -> Iterator[tuple[Worker, Worker]]:
    """Ours and the baseline, loaded."""
    ours, baseline = (Worker(kind, setup) for kind in (Ours, Baseline))
    ours.ready()
    baseline.ready()
    yield ours, baseline


def measure(ours: Worker, baseline: Worker, turns: Mapping[int, int], streams: int) -> dict[str, list[Turn]]:
    """All turns by what spoke and how many utterances came at once, the sides in alternation."""
    taken: dict[str, list[Turn]] = {}

    def take(worker: Worker, kind: str, texts: Sequence[str]) -> None:
        turn = worker.speak(kind, texts)
        taken.setdefault(f"{kind} {len(texts)}", []).append(turn)
        print(
            f"{kind:>16} {len(texts):2}: {turn.wall_s:6.1f} s for {turn.audio_s:5.1f} s of audio", flush=True
        )

    for number in range(max(turns.values())):
        for at_once in [at_once for at_once, repeats in turns.items() if number < repeats]:
            take(baseline, WHOLE, TEXTS[number : number + 1])
            take(ours, OURS, [TEXTS[(number + row) % len(TEXTS)] for row in range(at_once)])
            if number < streams and at_once == 1:
                take(baseline, STREAM, TEXTS[number : number + 1])
    return taken


def figures_of(
    taken: Mapping[str, Sequence[Turn]], peaks_mb: Sequence[float]
) -> tuple[dict[str, float], dict[str, Any]]:
    """The figures, and what they hide."""
    whole = taken[f"{WHOLE} 1"]
    streams = [turn.heard[0] for turn in taken[f"{STREAM} 1"]]
    baseline_rate = _rate(whole)
    first_s = float(np.median([stream.first_s for stream in streams]))
    stream_s = float(np.median([stream.end_s for stream in streams]))
    figures: dict[str, float] = {}
    details: dict[str, Any] = {
        "baseline": {
            "audio_s_per_s": round(baseline_rate, 4),
            "cpu_s_per_audio_s": round(_cpu(whole), 3),
            "stream_first_audio_s": round(first_s, 2),
            "stream_s": round(stream_s, 2),
        }
    }
    for at_once in (1, 2, 4, 8, 16):
        turns = taken.get(f"{OURS} {at_once}")
        if not turns:
            continue
        listeners = [heard for turn in turns for heard in turn.heard]
        ours_first_s = float(np.median([heard.first_s for heard in listeners]))
        # The median of those who wait in a row, each for all before it.
        theirs_first_s = float(np.median([first_s + before * stream_s for before in range(at_once)]))
        details[f"at_once_{at_once}"] = {
            "audio_s_per_s": round(_rate(turns), 4),
            "throughput_ratio": round(_rate(turns) / baseline_rate, 3),
            "cpu_s_per_audio_s": round(_cpu(turns), 3),
            "cpu_ratio": round(_cpu(whole) / _cpu(turns), 3),
            "first_audio_s": round(ours_first_s, 2),
            "first_audio_ratio": round(ours_first_s / theirs_first_s, 4),
            "first_audio_vs_served_at_once": round(ours_first_s / first_s, 3),
            "continuity": round(float(np.mean([heard.continuity for heard in listeners])), 3),
        }
    for at_once in (1, SLOTS):
        row = details[f"at_once_{at_once}"]
        figures[f"throughput_ratio_{at_once}"] = row["throughput_ratio"]
        figures[f"first_audio_ratio_{at_once}"] = row["first_audio_ratio"]
    figures[f"continuity_{SLOTS}"] = details[f"at_once_{SLOTS}"]["continuity"]
    figures["peak_memory_ratio"] = round(peaks_mb[0] / peaks_mb[1], 3)
    return figures, details


def _rate(turns: Sequence[Turn]) -> float:
    return sum(turn.audio_s for turn in turns) / sum(turn.wall_s for turn in turns)


def _cpu(turns: Sequence[Turn]) -> float:
    return sum(turn.cpu_s for turn in turns) / sum(turn.audio_s for turn in turns)


def _has_bf16(device: str) -> bool:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return device != "cpu" or bool(flags & {"avx512_bf16", "amx_bf16"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small weights, short utterances; no file")
    parser.add_argument("--tokens", type=int, help="audio tokens of every utterance")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of each side")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=get_args(Precision), help="of our decoder")
    parser.add_argument("--vocoder-precision", choices=get_args(VocoderPrecision), help="of our vocoder")
    asked = parser.parse_args()
    size = QUICK_SIZE if asked.quick else FULL
    tokens = asked.tokens or (QUICK_TOKENS if asked.quick else FULL_TOKENS)
    at = machine()
    quickest: Precision = "int8" if asked.device == "cpu" else "bf16"
    setup = Setup(
        checkpoint(size, tokens),
        asked.threads,
        asked.device,
        asked.precision or quickest,
        asked.vocoder_precision or ("bf16" if _has_bf16(asked.device) else "fp32"),
    )
    if asked.quick:
        print(
            f"Quick: a GPT of {size.layers} layers, not {FULL.layers}, and {tokens} tokens. "
            "HiFi-GAN weighs more in it than it should."
        )
    with workers(setup) as (ours, baseline):
        loaded_mb = [ours.loaded_mb, baseline.loaded_mb]
        taken = measure(ours, baseline, QUICK_TURNS if asked.quick else FULL_TURNS, 1 if asked.quick else 2)
        peaks_mb = [ours.end(), baseline.end()]
    figures, details = figures_of(taken, peaks_mb)
    details["memory_mb"] = {
        side: {"loaded": round(loaded), "peak": round(peak)}
        for side, loaded, peak in zip(("ours", "baseline"), loaded_mb, peaks_mb, strict=True)
    }
    details["settings"] = {
        "weights": f"random, {size.layers} layers of width {size.width}",
        "tokens": tokens,
        "threads": setup.threads,
        "device": setup.device,
        "precision": {"ours": setup.precision, "our vocoder": setup.vocoder_precision, "baseline": "fp32"},
    }
    report(details)
    if not asked.quick:
        path = write_result("xtts", figures, at=at, details={"details": details})
        print(f"Written to {path}.")
    print(json.dumps(figures))


def report(details: Mapping[str, Any]) -> None:
    """A table for people."""
    print(f"\nbaseline: {details['baseline']}\nmemory: {details['memory_mb']}\n")
    rows = {name: row for name, row in details.items() if name.startswith("at_once_")}
    columns = list(next(iter(rows.values())))
    print(f"{'at once':>8} " + " ".join(f"{column:>30}" for column in columns))
    for name, row in rows.items():
        print(f"{name.removeprefix('at_once_'):>8} " + " ".join(f"{row[column]:>30}" for column in columns))
    print()


if __name__ == "__main__":
    main()
