"""The demo: enrol a real person, speak over HTTP, look at the result.

``make demo`` runs this. It starts the graph on a free port, enrols a public-domain recording, speaks with the
OpenAI SDK, writes ``demo.wav`` and ``demo.png``, and prints first audio, real-time factor and similarity.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import matplotlib as mpl
import numpy as np
import soundfile
import soxr
from openai import OpenAI
from rich.console import Console

from benchmarks.ports import free_port
from benchmarks.speakers import DEMO_SPEAKER, Clip, enrolment_clip, speaker
from engines.contract import Samples
from engines.mosaic.speaker_encoder import ENCODER_RATE_HZ, SpeakerEncoder
from engines.mosaic.weight_files import SPEAKER_ENCODER

TEXT = (
    "Hello! A few seconds of a recording are all I had to go by. "
    "Now I can read anything aloud, and this sentence was never recorded by anyone."
)
READY_TIMEOUT_S = 120
REFINE_TIMEOUT_S = 90

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Spoken:
    """One answer of the server and how long it took."""

    samples: Samples
    sample_rate_hz: int
    first_audio_s: float
    total_s: float


def main() -> None:
    """Run the demo from start to clean stop."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--text", default=TEXT, help="what to say")
    arguments.add_argument("--out", type=Path, default=Path("demo.wav"), help="where to write it")
    chosen = arguments.parse_args()

    person = speaker(DEMO_SPEAKER)
    console.print(f"Reference: {person.source}; {person.licence}.", highlight=False)
    clip = enrolment_clip(person)
    with tempfile.TemporaryDirectory() as store, server(Path(store)) as url:
        with console.status("Enrolling the voice…"):
            started_s = time.perf_counter()
            voice_id = enrol(url, clip)
            enrol_s = time.perf_counter() - started_s
        with console.status("Speaking…"):
            speak(url, voice_id, "Hello.")
            spoken = speak(url, voice_id, chosen.text)
    soundfile.write(chosen.out, spoken.samples, spoken.sample_rate_hz)
    picture = chosen.out.with_suffix(".png")
    draw(clip, spoken, picture)
    audio_s = len(spoken.samples) / spoken.sample_rate_hz
    print(f"{chosen.out}: {audio_s:.1f} s in the voice of '{person.name}'; {picture} shows both.")
    print(
        f"enrolment        {enrol_s:.2f} s for {len(clip.samples) / clip.sample_rate_hz:.0f} s of recording"
    )
    print(f"first audio      {1000 * spoken.first_audio_s:.0f} ms after the request")
    print(f"real-time factor {spoken.total_s / audio_s:.3f} (below 1 is faster than it plays)")
    print(f"similarity       {similarity(clip, spoken):.2f} (cosine of speaker embeddings; 1 is the same)")


@contextmanager
def server(store: Path) -> Iterator[str]:
    """``voice-clone serve`` in a process of its own on a free port; stopped on leaving."""
    port = free_port()
    environment = {**os.environ, "VOICE_CLONE__VOICES__STORE": str(store)}
    environment.pop("RAY_ADDRESS", None)
    command = [str(Path(sys.executable).with_name("voice-clone")), "serve", "--port", str(port)]
    process = subprocess.Popen(command, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return once ``/health/ready`` says so; stop the demo if the server ends or takes too long."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise SystemExit(f"The server ended with status {process.returncode} before it was ready.")
        try:
            if httpx.get(f"{url}/health/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise SystemExit(f"The server was not ready after {READY_TIMEOUT_S} s.")


def enrol(url: str, clip: Clip) -> str:
    """Upload the clip as a WAV file; the id of the new voice."""
    wav = io.BytesIO()
    soundfile.write(wav, clip.samples, clip.sample_rate_hz, format="WAV")
    form = {"name": "demo", "consent": "Public-domain recording.", "language": "en"}
    answer = httpx.post(
        f"{url}/v1/audio/voices", data=form, files={"audio_sample": wav.getvalue()}, timeout=60
    )
    answer.raise_for_status()
    voice_id: str = answer.json()["id"]
    return voice_id


def speak(url: str, voice_id: str, text: str) -> Spoken:
    """Ask with the OpenAI SDK, as any OpenAI client would, and take the time."""
    client = OpenAI(base_url=f"{url}/v1", api_key="not needed", max_retries=0)
    first_audio_s = 0.0
    parts: list[bytes] = []
    started_s = time.perf_counter()
    with client.audio.speech.with_streaming_response.create(
        model="mosaic", voice=voice_id, input=text, response_format="pcm"
    ) as answer:
        for part in answer.iter_bytes():
            if not parts:
                first_audio_s = time.perf_counter() - started_s
            parts.append(part)
    total_s = time.perf_counter() - started_s
    samples = (np.frombuffer(b"".join(parts), "<i2") / 32768).astype(np.float32)
    return Spoken(samples, 24_000, first_audio_s, total_s)


def similarity(clip: Clip, spoken: Spoken) -> float:
    """Cosine of the speaker embeddings of recording and result."""
    encoder = SpeakerEncoder(SPEAKER_ENCODER.tensors())
    reference, result = (
        encoder.embed(soxr.resample(sound.samples, sound.sample_rate_hz, ENCODER_RATE_HZ))
        for sound in (clip, spoken)
    )
    return float(reference @ result)


def audible(samples: Samples) -> Samples:
    """``samples`` over a noise floor at -100 dBFS, so that digital silence has a logarithm."""
    noise = np.random.default_rng(0).normal(0, 1e-5, len(samples))
    return (samples + noise).astype(np.float32)


def draw(clip: Clip, spoken: Spoken, path: Path) -> None:
    """Waveforms and spectrograms of recording and result, one above the other."""
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 1, figsize=(11, 9), constrained_layout=True)
    shown: dict[str, Clip | Spoken] = {"reference": clip, "demo.wav": spoken}
    for row, (title, sound) in enumerate(shown.items()):
        samples, rate_hz = sound.samples, sound.sample_rate_hz
        wave, spectrum = axes[2 * row], axes[2 * row + 1]
        wave.plot(np.arange(len(samples)) / rate_hz, samples, linewidth=0.4)
        wave.set(title=title, xlim=(0, len(samples) / rate_hz), ylabel="amplitude")
        spectrum.specgram(audible(samples), NFFT=512, Fs=rate_hz, noverlap=384, vmin=-120, cmap="magma")
        spectrum.set(xlabel="seconds", ylabel="Hz", ylim=(0, 8000))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
