"""How much the mosaic engine sounds like the speaker, how clear and natural it is, and how fast.

    python -m benchmarks.default_engine            # all speakers; writes results/default_engine.json
    python -m benchmarks.default_engine --quick    # a few, within a minute

For every speaker one clip is enrolled and another clip of the same person, which the engine never saw, is
the measure. Similarity is the cosine between a speaker encoder's vectors of the converted speech and of that
clip, normalised per speaker: 0 is what strangers reach (all other speakers' enrolment clips), 1 is what the
speaker's own enrolment clip reaches. Two encoders are asked: the one enrolment climbs ("enrolment
encoder"), and one it does not know ("second encoder"). Both react to the sound of a microphone too, and the
two clips of a speaker mostly share it: part of every similarity is that.

Constants of the engine were chosen on speakers of the split "tuned" with other sentences than these. But
results of held-out speakers have been looked at in full runs before: the first made the limits on gains and
pitch (docs/mosaic.md) necessary, the second led to the present method, whose constants were then chosen on
tuned speakers only. "Held out" means: no constant was fitted to them, not: never seen. "Fresh" speakers came
after the method and have had no part in anything.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest

import numpy as np
import soxr
from numpy.typing import NDArray

from benchmarks.judges import dnsmos, second_encoder_embedding, transcribe, word_edits
from benchmarks.reporting import machine, write_result
from benchmarks.speakers import SPEAKERS, Clip, Speaker, enrolment_clip, judge_clip
from engines.contract import Conditioning, Reference, Utterance
from engines.mosaic.base_speech import BaseSpeech
from engines.mosaic.engine import MosaicConfig, MosaicEngine
from engines.mosaic.renderer import render
from engines.mosaic.source_filter import joined
from engines.mosaic.speaker_encoder import ENCODER_RATE_HZ, SpeakerEncoder, without_silence
from engines.mosaic.spectrum import BINS
from engines.mosaic.weight_files import SPEAKER_ENCODER
from engines.pitch import track_f0

F32 = NDArray[np.float32]

#: Harvard sentences of lists that the phone projection was not trained on.
SENTENCES = (
    "A fresh start will work such wonders.",
    "The club rented the rink for the fifth night.",
    "After the dance, they went straight home.",
    "The hostess taught the new maid to serve.",
    "He wrote his last novel there at the inn.",
    "Even the worst will beat his low score.",
    "The cement had dried when he moved it.",
    "The loss of the second ship was hard to take.",
    "We talked of the side show in the circus.",
    "Use a pencil to write the first draft.",
    "He ran half way to the hardware store.",
    "The clock struck to mark the third period.",
    "A small creek cut across the field.",
    "Cars and busses stalled in snow drifts.",
    "The set of china hit the floor with a crash.",
    "This is a grand season for hikes on the road.",
    "The dune rose from the edge of the water.",
    "Those words were the cue for the actor to leave.",
    "A yacht slid around the point into the bay.",
    "The two met while playing on the sand.",
    "The ink stain dried on the finished page.",
    "The walled town was seized without a fight.",
    "The lease ran out in sixteen weeks.",
    "A tame squirrel makes a nice pet.",
)
#: Similarity and naturalness settle after this many sentences; only counting words needs all of them.
SOUND_SENTENCES = 8
#: Splits of the speakers, best known first (``benchmarks.speakers.Speaker``).
SPLITS = ("tuned", "held_out", "fresh")
#: Fifteen words each; one gives the engine a clause to start with, the other does not.
LATENCY_SENTENCES = (
    "The small brown dog ran over the old stone bridge and then down to the river.",
    "After the long meeting, the committee went back to work on the plan for next year.",
)
LATENCY_RUNS = 20
QUICK_SPEAKERS = 3
QUICK_SENTENCES = 3


@dataclass(frozen=True, slots=True)
class SpeakerEmbeddings:
    """Unit vectors of one speaker's two clips by one encoder; ``person`` may have two voices in the table."""

    person: str
    enrolment: F32
    judge: F32


@dataclass(frozen=True, slots=True)
class Similarity:
    """Cosines with the judge clip: of the base voice, of the converted one, of strangers, of the speaker."""

    base: float
    converted: float
    floor: float
    ceiling: float

    @property
    def normalised(self) -> float:
        """0 for a stranger, 1 for the speaker."""
        return (self.converted - self.floor) / (self.ceiling - self.floor)


@dataclass(frozen=True, slots=True)
class SpeakerResult:
    """One row of the table. Quality is (DNSMOS overall, DNSMOS P.808)."""

    name: str
    split: str
    f0_hz: float
    enrolment_encoder: Similarity
    second_encoder: Similarity
    word_error_rate: float
    quality: tuple[float, float]
    reference_quality: tuple[float, float]
    enrol_s: float
    refine_s: float


@dataclass(frozen=True, slots=True)
class BaseResult:
    """The base voice, unconverted, saying the same sentences."""

    speech: Clip
    word_error_rate: float
    quality: tuple[float, float]


class Bench:
    """One run of the benchmark over ``speakers`` and ``sentences``."""

    def __init__(self, speakers: Sequence[Speaker], sentences: Sequence[str]) -> None:
        self.speakers, self.sentences = speakers, sentences
        self.engine = MosaicEngine(MosaicConfig())
        self.engine.load()
        self._encoder = SpeakerEncoder(SPEAKER_ENCODER.tensors())
        self.voices: dict[str, Conditioning] = {}

    def run(self) -> tuple[BaseResult, list[SpeakerResult]]:
        """Measure every speaker; prints each row as it is ready."""
        clips = {speaker.name: (enrolment_clip(speaker), judge_clip(speaker)) for speaker in SPEAKERS}
        first = _embed_clips(clips, self.embed)
        second = _embed_clips(clips, _second_embedding)
        base = self._base()
        print(_HEADER)
        results = []
        for speaker in self.speakers:
            results.append(self._measure(speaker, clips[speaker.name], first, second, base))
            print(_row(results[-1]), flush=True)
        return base, results

    def embed(self, recording: Clip) -> F32:
        """The enrolment encoder's vector of ``recording``."""
        narrow = soxr.resample(recording.samples, recording.sample_rate_hz, ENCODER_RATE_HZ)
        return self._encoder.embed(without_silence(narrow.astype(np.float32)))

    def speak(self, text: str, voice: Conditioning) -> F32:
        """``text`` in ``voice``, 24 kHz."""
        chunks = list(self.engine.synthesize([Utterance(text, "en", voice, seed=1)]))
        errors = [chunk.error for chunk in chunks if chunk.error]
        if errors:
            raise errors[0]
        return np.concatenate([chunk.samples for chunk in chunks])

    def _base(self) -> BaseResult:
        base = BaseSpeech(threads=1)
        spoken = [
            render(
                joined([base.speak(run, 1.0) for run in base.phoneme_runs(sentence)]),
                np.zeros(BINS, np.float32),
                np.random.default_rng(1),
            )
            for sentence in self.sentences
        ]
        speech = np.concatenate(spoken[:SOUND_SENTENCES])
        rate_hz = self.engine.card.sample_rate_hz
        return BaseResult(Clip(speech, rate_hz, None), self._word_error_rate(spoken), dnsmos(speech, rate_hz))

    def _word_error_rate(self, spoken: Sequence[F32]) -> float:
        """Over all words of the sentences, each heard by itself."""
        edits, words = 0, 0
        for sentence, samples in zip(self.sentences, spoken, strict=True):
            wrong, said = word_edits(sentence, transcribe(samples, self.engine.card.sample_rate_hz))
            edits, words = edits + wrong, words + said
        return edits / words

    def _measure(
        self,
        speaker: Speaker,
        clips: tuple[Clip, Clip],
        first: dict[str, SpeakerEmbeddings],
        second: dict[str, SpeakerEmbeddings],
        base: BaseResult,
    ) -> SpeakerResult:
        enrolled, judged = clips
        reference = Reference(enrolled.samples, enrolled.sample_rate_hz)
        started_s = time.process_time()
        quick = self.engine.extract_voice(reference)
        extracted_s = time.process_time()
        self.voices[speaker.name] = voice = self.engine.refine_voice(reference, quick)
        refined_s = time.process_time()
        spoken = [self.speak(sentence, voice) for sentence in self.sentences]
        speech = Clip(np.concatenate(spoken[:SOUND_SENTENCES]), self.engine.card.sample_rate_hz, None)
        f0_hz = track_f0(enrolled.samples, enrolled.sample_rate_hz)
        return SpeakerResult(
            name=speaker.name,
            split=speaker.split,
            f0_hz=float(np.median(f0_hz[f0_hz > 0])),
            enrolment_encoder=_similarity(speaker.name, first, self.embed(base.speech), self.embed(speech)),
            second_encoder=_similarity(
                speaker.name, second, _second_embedding(base.speech), _second_embedding(speech)
            ),
            word_error_rate=self._word_error_rate(spoken),
            quality=dnsmos(speech.samples, speech.sample_rate_hz),
            reference_quality=dnsmos(judged.samples, judged.sample_rate_hz),
            enrol_s=extracted_s - started_s,
            refine_s=refined_s - extracted_s,
        )


def _embed_clips(
    clips: dict[str, tuple[Clip, Clip]], embed: Callable[[Clip], F32]
) -> dict[str, SpeakerEmbeddings]:
    return {
        speaker.name: SpeakerEmbeddings(speaker.person, *(embed(clip) for clip in clips[speaker.name]))
        for speaker in SPEAKERS
    }


def _second_embedding(recording: Clip) -> F32:
    return second_encoder_embedding(recording.samples, recording.sample_rate_hz)


def _similarity(name: str, speakers: dict[str, SpeakerEmbeddings], base: F32, converted: F32) -> Similarity:
    own = speakers[name]
    strangers = [
        float(other.enrolment @ own.judge) for other in speakers.values() if other.person != own.person
    ]
    return Similarity(
        base=float(base @ own.judge),
        converted=float(converted @ own.judge),
        floor=float(np.mean(strangers)),
        ceiling=float(own.enrolment @ own.judge),
    )


_HEADER = (
    f"{'speaker':<16}{'split':<10}{'F0':>4}  {'enrolment encoder':<26}{'second encoder':<26}{'WER':>6}"
    f"  {'DNSMOS ovrl/p808':<18}{'reference':<12}{'enrol':>6}{'refine':>7}\n"
    f"{'':<32}{'base conv ceil norm':<26}{'base conv ceil norm':<26}"
)


def _row(result: SpeakerResult) -> str:
    def cosines(similarity: Similarity) -> str:
        values = (similarity.base, similarity.converted, similarity.ceiling, similarity.normalised)
        return " ".join(f"{value:.2f}" for value in values)

    def quality(pair: tuple[float, float]) -> str:
        return f"{pair[0]:.2f}/{pair[1]:.2f}"

    similarities = f"{cosines(result.enrolment_encoder):<26}{cosines(result.second_encoder):<26}"
    qualities = f"{quality(result.quality):<18}{quality(result.reference_quality):<12}"
    return (
        f"{result.name:<16}{result.split:<10}{result.f0_hz:>4.0f}  {similarities}"
        f"{result.word_error_rate:>6.3f}  {qualities}{result.enrol_s:>6.1f}{result.refine_s:>7.1f}"
    )


def measure_speed(bench: Bench) -> dict[str, float]:
    """Real-time factor (CPU time over audio time) and time to the first block of a 15-word sentence."""
    voice = next(iter(bench.voices.values()))
    for sentence in bench.sentences:
        bench.speak(sentence, voice)
    started_s = time.process_time()
    samples = sum(len(bench.speak(sentence, voice)) for sentence in [*bench.sentences] * 3)
    cpu_s = time.process_time() - started_s
    waits_ms = [
        _first_audio_ms(bench, sentence, voice) for sentence in LATENCY_SENTENCES for _ in range(LATENCY_RUNS)
    ]
    return {
        "rtf": cpu_s * bench.engine.card.sample_rate_hz / samples,
        "first_audio_ms": float(np.median(waits_ms)),
        "first_audio_p95_ms": float(np.percentile(waits_ms, 95)),
    }


def _first_audio_ms(bench: Bench, sentence: str, voice: Conditioning) -> float:
    started_s = time.perf_counter()
    chunks = bench.engine.synthesize([Utterance(sentence, "en", voice, seed=1)])
    next(chunks)
    waited_ms = (time.perf_counter() - started_s) * 1e3
    for _ in chunks:
        pass
    return waited_ms


def summary(base: BaseResult, results: Sequence[SpeakerResult], speed: dict[str, float]) -> dict[str, float]:
    """The named figures of the last line."""
    figures = _means(results, base, "")
    for split in SPLITS:
        members = [result for result in results if result.split == split]
        if members:
            figures |= _means(members, base, f"_{split}")
    figures["dnsmos_base"] = base.quality[1]
    figures["dnsmos_reference"] = _mean(result.reference_quality[1] for result in results)
    figures |= speed
    figures["enrol_s"] = _mean(result.enrol_s for result in results)
    figures["refine_s"] = _mean(result.refine_s for result in results)
    figures["speakers"] = len(results)
    return {name: round(value, 4) for name, value in figures.items()}


def _means(results: Sequence[SpeakerResult], base: BaseResult, suffix: str) -> dict[str, float]:
    delta = _mean(result.word_error_rate for result in results) - base.word_error_rate
    return {
        f"sim_enrol_encoder{suffix}": _mean(result.enrolment_encoder.normalised for result in results),
        f"sim_second_encoder{suffix}": _mean(result.second_encoder.normalised for result in results),
        f"wer_delta_points{suffix}": 100 * delta,
        f"dnsmos{suffix}": _mean(result.quality[1] for result in results),
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _spread(speakers: Sequence[Speaker], count: int) -> list[Speaker]:
    """``count`` speakers, of all splits in turn."""
    by_split = [[speaker for speaker in speakers if speaker.split == split] for split in SPLITS]
    mixed = [speaker for pair in zip_longest(*by_split) for speaker in pair if speaker is not None]
    return mixed[:count]


def main() -> None:
    """Run, print, and in a full run write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few speakers and sentences, nothing is written")
    quick = parser.parse_args().quick
    speakers = _spread(SPEAKERS, QUICK_SPEAKERS) if quick else list(SPEAKERS)
    bench = Bench(speakers, SENTENCES[:QUICK_SENTENCES] if quick else SENTENCES)
    started_on = machine()
    base, results = bench.run()
    print(f"base voice: WER {base.word_error_rate:.3f}, DNSMOS {base.quality[0]:.2f}/{base.quality[1]:.2f}")
    figures = summary(base, results, measure_speed(bench))
    for name, value in figures.items():
        print(f"{name:<32}{value:>10.3f}")
    if not quick:
        write_result(
            "default_engine", figures, at=started_on, details={"speakers": [asdict(one) for one in results]}
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
