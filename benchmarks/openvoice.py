"""What the OpenVoice engine adds to coqui-tts's port of the converter, called once per request.

    python -m benchmarks.openvoice            # writes results/openvoice.json, in a quarter of an hour
    python -m benchmarks.openvoice --quick    # one thread, one and eight requests, within a minute

The weights are random and of the published size: speed is that of the real ones, quality says nothing. Both
speak the same sentences with the same base voice. The port is called as its interface offers it: for each
request the base voice's audio goes in whole, and the embedding of that audio is computed with it; the
target's embedding is kept. N requests come at once: the port answers one after the other, the engine speaks
them as one batch.

Seconds are CPU time with one thread, wall time with two; runs of the two alternate. First audio is the mean
over the requests. Real-time factor: seconds for a second of sound.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reporting import machine, write_result
from engines.contract import Conditioning, Reference, Samples, Utterance
from engines.coqui import prepare_coqui
from engines.openvoice.base_speaker import Sentence
from engines.openvoice.engine import OpenVoiceEngine
from tests.checkpoints.openvoice import write_full_size
from tests.speech import noisy_tone

SENTENCES = (
    "The birch canoe slid on the smooth planks, and then it came to rest in the reeds.",
    "Two blue fish swam in the tank.",
    "Rice is often served in round bowls.",
    "The juice of lemons makes fine punch, if there is enough sugar in the house.",
)
QUICK_SENTENCES = SENTENCES[1:3]
REQUESTS, QUICK_REQUESTS = (1, 2, 4, 8), (1, 8)
THREADS, QUICK_THREADS = (1, 2), (1,)
REPEATS = 3
VOICES_HZ = (110.0, 140.0, 180.0, 230.0)
TAU = 0.3


@dataclass(frozen=True, slots=True)
class Answered:
    """Seconds until all requests were answered, mean seconds to their first audio, and seconds of sound."""

    total_s: float
    first_audio_s: float
    sound_s: float

    @property
    def real_time_factor(self) -> float:
        """Seconds for a second of sound."""
        return self.total_s / self.sound_s


class Bench:
    """Both on the same weights, in one process."""

    def __init__(self, folder: Path, sentences: Sequence[str]) -> None:
        import torch
        from TTS.vc.configs.openvoice_config import OpenVoiceConfig
        from TTS.vc.models.openvoice import OpenVoice

        self._torch = torch
        directory = write_full_size(folder)
        self.engine = OpenVoiceEngine(
            OpenVoiceEngine.Config.model_validate(
                {"model_dir": directory, "cache_dir": folder / "cache", "slots": max(REQUESTS)}
            )
        )
        self.engine.load()
        self.voices = [self.engine.extract_voice(Reference(noisy_tone(hz, 5.0), 24_000)) for hz in VOICES_HZ]
        config = OpenVoiceConfig()
        self.port = OpenVoice(config)
        self.port.load_checkpoint(config, directory / "converter" / "checkpoint.pth", eval=True)
        self.port.tau = TAU
        self.sentences = sentences

    def requests(self, count: int) -> list[tuple[str, Conditioning]]:
        """Sentences and voices in turn."""
        return [
            (self.sentences[number % len(self.sentences)], self.voices[number % len(self.voices)])
            for number in range(count)
        ]

    def ours(self, count: int, clock: Callable[[], float]) -> Answered:
        """One batch through the engine."""
        batch = [
            Utterance(text, "en", voice, seed=number, options={"tau": TAU})
            for number, (text, voice) in enumerate(self.requests(count))
        ]
        first: dict[int, float] = {}
        samples = 0
        began = clock()
        for chunk in self.engine.synthesize(batch):
            if chunk.error is not None:
                raise SystemExit(f"The engine failed: {chunk.error}")
            first.setdefault(chunk.row, clock() - began)
            samples += len(chunk.samples)
        return Answered(clock() - began, float(np.mean(list(first.values()))), samples / 22_050)

    def theirs(self, count: int, clock: Callable[[], float]) -> Answered:
        """One request after the other through the port."""
        torch = self._torch
        base = self.engine._require_loaded().base_voices.nearest("en", 200.0).speaker
        first: list[float] = []
        samples = 0
        began = clock()
        for number, (text, voice) in enumerate(self.requests(count)):
            said = _with_pauses(base.speak(text, "en", 1.0, number), base.sample_rate_hz)
            source = torch.from_numpy(_at_converter_rate(said, base.sample_rate_hz))
            with torch.inference_mode():
                own, spectrum = self.port.extract_se(source)
                target = torch.from_numpy(voice.arrays["tone_colour"])[None, :, None]
                sound = self.port.inference(spectrum, {"g_src": own, "g_tgt": target})["model_outputs"]
            samples += len(sound[0, 0].numpy())
            first.append(clock() - began)
        return Answered(clock() - began, float(np.mean(first)), samples / 22_050)

    def compare(self, threads: int, count: int, repeats: int) -> tuple[Answered, Answered]:
        """The median run of ours and of theirs, alternating."""
        self._torch.set_num_threads(threads)
        clock = time.process_time if threads == 1 else time.perf_counter
        runs = [(self.ours(count, clock), self.theirs(count, clock)) for _ in range(repeats)]
        ours, theirs = zip(*runs, strict=True)
        return _median(ours), _median(theirs)


def _median(runs: Sequence[Answered]) -> Answered:
    return Answered(*(float(np.median(values)) for values in zip(*map(_values, runs), strict=True)))


def _values(run: Answered) -> tuple[float, float, float]:
    return run.total_s, run.first_audio_s, run.sound_s


def _with_pauses(sentences: Iterable[Sentence], rate_hz: int) -> Samples:
    """What a base voice says, as one recording."""
    return np.concatenate(
        [np.pad(sentence.samples, (0, round(sentence.pause_s * rate_hz))) for sentence in sentences]
    )


def _at_converter_rate(samples: Samples, rate_hz: int) -> Samples:
    from engines.openvoice.base_voices import at_rate

    return at_rate(samples, rate_hz, 22_050)


def main() -> None:
    """Measure, print a table, and write the results unless quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter requests, no results file")
    quick = parser.parse_args().quick
    at = machine()
    prepare_coqui("openvoice")
    figures: dict[str, float] = {}
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), QUICK_SENTENCES if quick else SENTENCES)
        for threads in QUICK_THREADS if quick else THREADS:
            for count in QUICK_REQUESTS if quick else REQUESTS:
                repeats = 1 if quick and count > 1 else REPEATS
                ours, theirs = bench.compare(threads, count, repeats)
                throughput = theirs.real_time_factor / ours.real_time_factor
                first_audio = ours.first_audio_s / theirs.first_audio_s
                for name, one in (("engine", ours), ("port", theirs)):
                    print(
                        f"{threads} threads, {count} at once, {name:6}: real-time factor "
                        f"{one.real_time_factor:5.2f}, first audio {1000 * one.first_audio_s:7.0f} ms"
                    )
                    details[f"{threads} threads, {count} at once, {name}"] = asdict(one)
                suffix = f"{count}" if threads == 1 else f"{count}_threads_{threads}"
                figures[f"throughput_ratio_{suffix}"] = throughput
                figures[f"first_audio_ratio_{suffix}"] = first_audio
        bench.engine.unload()
    if not quick:
        path = write_result("openvoice", figures, at=at, details={"runs": details})
        print(f"Written: {path.relative_to(Path.cwd())}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
