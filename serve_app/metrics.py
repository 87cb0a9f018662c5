"""What routers and replicas measure, through Ray: scraped with Ray's own metrics, prefixed ``ray_``.

Ray adds the deployment, the replica and the application to every series. ``client`` is "key" for callers with
an API key and "ip" for all others: names of clients would make as many series as there are clients.
docs/metrics.md lists the names and is checked against this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ray.serve import metrics

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0]
_ROWS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
_FACTORS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]


class Described(NamedTuple):
    """One series: its name without Ray's prefix, its meaning with its unit, and its tags."""

    name: str
    meaning: str
    tags: tuple[str, ...]


QUEUE_WAIT = Described("tts_queue_wait_seconds", "Wait of an utterance for an engine.", ("engine", "tier"))
BATCH_ROWS = Described("tts_batch_rows", "Utterances an engine began together.", ("engine",))
FIRST_AUDIO = Described(
    "tts_first_audio_seconds", "From a request in the router to its first audio.", ("engine", "client")
)
REAL_TIME_FACTOR = Described(
    "tts_real_time_factor", "Seconds from sending an utterance to its end, per second of audio.", ("engine",)
)
GAPS = Described(
    "tts_playback_gap_seconds",
    "Silence a listener in real time would hear between chunks, per speech.",
    ("engine", "client"),
)
REQUESTS = Described("tts_requests_total", "Speeches ended, by outcome.", ("engine", "client", "outcome"))
REFUSALS = Described("tts_refusals_total", "Speeches refused or failed, by error code.", ("client", "code"))
RETRIES = Described("tts_retries_total", "Utterances spoken again elsewhere.", ("engine", "reason"))
CHARACTERS = Described("tts_characters_total", "Characters accepted.", ("engine", "client"))
AUDIO = Described("tts_audio_seconds_total", "Seconds of audio delivered.", ("engine", "client"))
WAITING = Described("tts_waiting_utterances", "Utterances waiting for an engine now.", ("engine",))
REUSED = Described(
    "tts_reused_utterances_total", "Utterances not spoken again: from the cache or another's.", ("how",)
)

VERIFIED = Described(
    "tts_verified_utterances_total", "Utterances heard again before they were sent.", ("engine", "outcome")
)

COUNTERS = (REQUESTS, REFUSALS, RETRIES, CHARACTERS, AUDIO, REUSED, VERIFIED)
HISTOGRAMS: Mapping[Described, list[float]] = {
    QUEUE_WAIT: _SECONDS,
    BATCH_ROWS: _ROWS,
    FIRST_AUDIO: _SECONDS,
    REAL_TIME_FACTOR: _FACTORS,
    GAPS: _SECONDS,
}
GAUGES = (WAITING,)


class Metrics:
    """All series. Tags are given by name; a missing one is an error."""

    def __init__(self) -> None:
        self._counters = {series: metrics.Counter(**_arguments(series)) for series in COUNTERS}
        self._histograms = {
            series: metrics.Histogram(boundaries=boundaries, **_arguments(series))
            for series, boundaries in HISTOGRAMS.items()
        }
        self._gauges = {series: metrics.Gauge(**_arguments(series)) for series in GAUGES}

    def count(self, series: Described, amount: float = 1.0, **tags: str) -> None:
        """Add ``amount`` to a counter; nothing is added for zero."""
        if amount > 0:
            self._counters[series].inc(amount, tags=tags)

    def observe(self, series: Described, value: float, **tags: str) -> None:
        """Put ``value`` into a histogram."""
        self._histograms[series].observe(value, tags=tags)

    def level(self, series: Described, value: float, **tags: str) -> None:
        """Set a gauge."""
        self._gauges[series].set(value, tags=tags)


def _arguments(series: Described) -> dict[str, Any]:
    # Ray annotates tag_keys as one name; it takes any number.
    return {"name": series.name, "description": series.meaning, "tag_keys": series.tags}
