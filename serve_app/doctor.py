"""What would stop the server on this machine, found before it is started."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engines.contract import EngineError
from engines.registry import engine_class
from serve_app.config import ConfigError, Settings
from serve_app.server import check_port, check_ray
from serve_app.voices.store import StoreNotUsable, VoiceStore


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    ok: bool
    detail: str


def examine(settings: Settings, *, port: int) -> Iterator[Finding]:
    """Look at Python, port, Ray, the voice store and every configured engine, in this order."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", sys.version_info >= (3, 11), f"{version} (3.11 or newer is needed)")
    yield _try("port", f"{port} is free", lambda: check_port("127.0.0.1", port))
    yield _try("ray", "nothing in the way", lambda: check_ray("local"))
    store = settings.voices.store
    yield _try("voice store", f"{store} can be written", lambda: asyncio.run(VoiceStore.open(store).check()))
    for name, engine in settings.engines.items():
        yield _try(f"engine {name}", "loads", lambda: _load(engine.engine or name, dict(engine.config)))  # noqa: B023 - called at once


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
