"""What every benchmark says about itself: the machine it ran on, and the file its figures go to."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str | int | list[float] | None]:
    """Processor, its cores, and the load averages (1, 5, 15 minutes) at this moment."""
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def write_result(
    name: str, figures: Mapping[str, float], *, at: Mapping[str, Any], details: Mapping[str, Any]
) -> Path:
    """Write ``results/<name>.json``; ``at`` is what ``machine`` gave, ``details`` what the figures hide."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.{name} {' '.join(sys.argv[1:])}".strip(),
        "machine": dict(at),
        "figures": dict(figures),
        **details,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path
