"""What is measured is documented, and what is documented is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.metrics import COUNTERS, GAPS, GAUGES, HISTOGRAMS, REQUESTS, Described, Metrics

KINDS = {"counter": COUNTERS, "histogram": tuple(HISTOGRAMS), "gauge": GAUGES}
SERIES = [(kind, series) for kind, all_series in KINDS.items() for series in all_series]


def documented() -> list[str]:
    """Rows of the table."""
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    return [line for line in page.read_text().splitlines() if line.startswith("| `tts_")]


@pytest.mark.parametrize(("kind", "series"), SERIES, ids=lambda value: str(getattr(value, "name", value)))
def test_series_is_documented_as_it_is(kind: str, series: Described) -> None:
    tags = " ".join(f"`{tag}`" for tag in series.tags)
    assert f"| `{series.name}` | {kind} | {tags} | {series.meaning} |" in documented()


def test_nothing_else_is_documented() -> None:
    assert len(documented()) == len(SERIES)


def test_missing_tag_is_an_error() -> None:
    with pytest.raises(ValueError, match="outcome"):
        Metrics().count(REQUESTS, engine="tone", client="ip")
    Metrics().observe(GAPS, 0.0, engine="tone", client="ip")
