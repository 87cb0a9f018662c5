"""From a name to an engine class, through entry points.

Built-in engines come through the same door as plug-ins: a distribution declares ::

    [project.entry-points."voice_clone_tts.engines"]
    my_engine = "my_package.engine:MyEngine"

and the name is usable in ``model`` and in the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from engines.contract import Engine, EngineError

GROUP = "voice_clone_tts.engines"


class UnknownEngine(EngineError):
    """No installed distribution declares an engine of this name."""


class BrokenEngine(EngineError):
    """The engine is declared, but its class cannot be imported (a missing extra, mostly)."""


def engine_names() -> tuple[str, ...]:
    """Names of all installed engines, sorted."""
    return tuple(sorted(point.name for point in entry_points(group=GROUP)))


def engine_class(name: str) -> type[Engine]:
    """The class behind ``name``. Raises ``UnknownEngine`` or ``BrokenEngine``."""
    points: list[EntryPoint] = [point for point in entry_points(group=GROUP) if point.name == name]
    if not points:
        raise UnknownEngine(
            f"There is no engine '{name}'.",
            next_step=f"Installed engines: {', '.join(engine_names())}.",
        )
    if len({point.value for point in points}) > 1:
        raise BrokenEngine(
            f"Engine '{name}' is declared more than once: {', '.join(p.value for p in points)}.",
            next_step="Uninstall one of the distributions that declare it.",
        )
    try:
        loaded = points[0].load()
    except ImportError as error:
        raise BrokenEngine(
            f"Engine '{name}' cannot be imported: {error}.",
            next_step=f"Install its extra: pip install 'voice-clone-tts[{name.replace('_', '-')}]'.",
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Engine)):
        raise BrokenEngine(f"'{points[0].value}' is not an engine class.", next_step="Derive it from Engine.")
    return loaded


def make_engine(name: str, settings: Mapping[str, Any]) -> Engine:
    """Engine ``name`` with these settings, not loaded. Raises as ``engine_class``, or ``ValidationError``."""
    kind = engine_class(name)
    return kind(kind.Config.model_validate(settings))
