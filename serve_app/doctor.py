"""What would stop the server on this machine, found before it is started."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engines.contract import EngineError, ModelError
from engines.registry import engine_class
from engines.weights import weights_dir
from serve_app.config import ConfigError, Settings
from serve_app.models import Weights, files_here, load_catalogue
from serve_app.server import check_port, check_ray
from serve_app.transcripts.recogniser import Recogniser
from serve_app.voices.store import StoreNotUsable, VoiceStore


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    ok: bool
    detail: str


def examine(settings: Settings, *, port: int) -> Iterator[Finding]:
    """Look at Python, port, Ray, the voice store, all weights, transcriber and engines, in this order."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", sys.version_info >= (3, 11), f"{version} (3.11 or newer is needed)")
    yield _try("port", f"{port} is free", lambda: check_port("127.0.0.1", port))
    yield _try("ray", "nothing in the way", lambda: check_ray("local"))
    store = settings.voices.store
    yield _try("voice store", f"{store} can be written", lambda: asyncio.run(VoiceStore.open(store).check()))
    served = {engine.engine or name for name, engine in settings.engines.items()}
    for name, weights in load_catalogue().items():
        yield _weights(name, weights, needed=name in served)
    if settings.transcriber is not None:
        recogniser = Recogniser(settings.transcriber.recogniser)
        yield _try("transcriber", "loads", recogniser.load)
    for name, engine in settings.engines.items():
        yield _try(f"engine {name}", "loads", lambda: _load(engine.engine or name, dict(engine.config)))  # noqa: B023 - called at once


def _weights(engine: str, weights: Weights, *, needed: bool) -> Finding:
    subject = f"weights {engine}"
    try:
        folder = weights_dir(engine)
    except ModelError as error:
        return Finding(subject, False, str(error))
    here, all_files = files_here(weights, folder), len(weights.files)
    if here == all_files:
        return Finding(subject, True, f"in {folder}; voice-clone models verify {engine} reads them through")
    needs = "needed" if needed else "not needed by these settings"
    return Finding(
        subject,
        not needed,
        f"{here} of {all_files} files in {folder}, {needs}; voice-clone models pull {engine} fetches them",
    )


def _load(name: str, config: dict[str, object]) -> None:
    kind = engine_class(name)
    engine = kind(kind.Config.model_validate(config))
    engine.load()
    engine.unload()


def _try(subject: str, good: str, look: Callable[[], object]) -> Finding:
    try:
        look()
    except (ConfigError, EngineError, StoreNotUsable) as error:
        return Finding(subject, False, str(error))
    return Finding(subject, True, good)
