"""Weights of engines: what belongs to one, whether it is there and right, and how it is fetched.

``models/catalogue.yaml`` says which files an engine needs. They lie in the folder of
``engines.weights``, under the paths of their repository. A file gets its name when it is whole and checked.
Until then it is ``NAME.REVISION.part`` beside it, which the next ``pull`` goes on with.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from engines.contract import LicenceNotAccepted
from engines.weights import LICENCE_ACCEPTED
from serve_app.hub import Hub, HubError

_HERE = Path(__file__).resolve().parent
_IN_CHECKOUT = _HERE.parent / "models" / "catalogue.yaml"
#: The wheel carries the file inside this package.
CATALOGUE = _IN_CHECKOUT if _IN_CHECKOUT.is_file() else _HERE / "catalogue.yaml"

FileState = Literal["ok", "missing", "wrong size", "wrong hash", "not known"]
#: What a whole set of weights may be made of. "not known": the file is there, and nobody recorded its hash.
GOOD: tuple[FileState, ...] = ("ok", "not known")


class PullFailed(Exception):
    """The weights are not all there. The message says why and what to do about it."""


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts:
        raise ValueError("must be a relative path without '..'")
    return path


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightFile(_Entry):
    """One file, under the path it has in its repository."""

    path: Annotated[str, AfterValidator(_inside)] = Field(description="Path in the repository, and here.")
    size_bytes: int | None = Field(default=None, ge=0, description="Left out if nobody recorded it.")
    sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="Left out if nobody recorded it."
    )


class Licence(_Entry):
    """The licence of the weights, not of any code."""

    name: str = Field(description="Its own name, with its version.")
    link: str = Field(pattern="^https://", description="Where to read it.")
    terms: str = Field(description="What it allows, in half a sentence.")
    must_be_accepted: bool = Field(description="Whether the operator has to accept it before the download.")


class Weights(_Entry):
    """What one engine needs."""

    repository: str = Field(pattern="^[^/]+/[^/]+$", description="owner/name on the hub.")
    revision: str = Field(pattern="^[0-9a-f]{40}$", description="The commit: a branch could change under us.")
    licence: Licence
    files: tuple[WeightFile, ...] = Field(min_length=1)

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes that are recorded."""
        return sum(file.size_bytes or 0 for file in self.files)


Catalogue = Mapping[str, Weights]


def load_catalogue(path: Path = CATALOGUE) -> Catalogue:
    """The weights by engine. Raises pydantic's ``ValidationError`` if the file is not a catalogue."""
    return TypeAdapter(dict[str, Weights]).validate_python(yaml.safe_load(path.read_text()))


def check(weights: Weights, folder: Path) -> Iterator[tuple[WeightFile, FileState]]:
    """Read every file in ``folder`` and compare it with the catalogue, hash included."""
    for file in weights.files:
        yield file, _state(file, folder / file.path)


def files_here(weights: Weights, folder: Path) -> int:
    """How many of the files lie in ``folder`` with their size. Quick: no file is read."""
    return sum(
        path.is_file() and file.size_bytes in (None, path.stat().st_size)
        for file in weights.files
        for path in [folder / file.path]
    )


def pull(
    engine: str,
    weights: Weights,
    folder: Path,
    *,
    accept_licence: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> None:
    """Bring all files of ``weights`` into ``folder``; those that are there and right are left alone.

    ``accept_licence`` is the operator's own word. Needs no network if every file is there. ``say`` is told of
    each file. Raises ``LicenceNotAccepted`` or ``PullFailed``; files that were finished before stay.
    """
    _settle_licence(engine, weights.licence, folder, accepted=accept_licence)
    wanted = []
    for file, state in check(weights, folder):
        if state in GOOD:
            say(f"{file.path}: {state}")
        else:
            wanted.append(file)
    if not wanted:
        return
    try:
        hub = Hub(weights.repository, weights.revision)
        sizes = {file.path: _agreed_size(file, hub) for file in wanted}
        parts = {file.path: _part(folder / file.path, weights.revision) for file in wanted}
        _check_space(folder, sum(max(0, (sizes[path] or 0) - _size(part)) for path, part in parts.items()))
        for file in wanted:
            part = parts[file.path]
            part.parent.mkdir(parents=True, exist_ok=True)
            hub.fetch(file.path, part, sizes[file.path])
            state = _state(file, part)
            if state not in GOOD:
                part.unlink()
                raise PullFailed(
                    f"{file.path} came from {hub.endpoint} with the {state} and was thrown away. "
                    "Run the command again; if HF_ENDPOINT is a mirror, try without it."
                )
            part.replace(folder / file.path)
            say(f"{file.path}: {state}")
    except HubError as error:
        raise PullFailed(str(error)) from error


def _settle_licence(engine: str, licence: Licence, folder: Path, *, accepted: bool) -> None:
    if not licence.must_be_accepted:
        return
    record = folder / LICENCE_ACCEPTED
    if record.is_file() and record.read_text().startswith(f"{licence.name}\n"):
        return
    if not accepted:
        raise LicenceNotAccepted(
            f"The weights of '{engine}' come under the {licence.name}: {licence.terms}.",
            next_step=f"Read it: {licence.link} "
            f"If you accept it: voice-clone models pull {engine} --accept-license",
        )
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    draft = record.with_suffix(".part")
    draft.write_text(f"{licence.name}\n{licence.link}\naccepted {now}\n")
    draft.replace(record)


def _agreed_size(file: WeightFile, hub: Hub) -> int | None:
    offered = hub.size_bytes(file.path)
    if None not in (offered, file.size_bytes) and offered != file.size_bytes:
        raise PullFailed(
            f"{file.path} has {offered} bytes at {hub.endpoint}, where {file.size_bytes} are expected. "
            "If HF_ENDPOINT is a mirror, try without it."
        )
    return file.size_bytes if offered is None else offered


def _check_space(folder: Path, needed_bytes: int) -> None:
    disk = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(disk).free
    if free_bytes < needed_bytes:
        raise PullFailed(
            f"{needed_bytes / 1e6:.0f} MB are to be fetched, and {disk} has {free_bytes / 1e6:.0f} MB left. "
            "Make room, or set VOICE_CLONE_MODELS_DIR to a folder on another disk."
        )


def _part(path: Path, revision: str) -> Path:
    # The revision in the name: what is left of another one is never gone on with.
    return path.with_name(f"{path.name}.{revision[:12]}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _state(file: WeightFile, path: Path) -> FileState:
    if not path.is_file():
        return "missing"
    if file.size_bytes is not None and path.stat().st_size != file.size_bytes:
        return "wrong size"
    if file.sha256 is None:
        return "not known"
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    return "ok" if found == file.sha256 else "wrong hash"
