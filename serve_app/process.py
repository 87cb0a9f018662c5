"""What is alive in this process: for whoever looks for what is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import time
from pathlib import Path

from serve_app.protocol import ProcessActivity

_STARTED_S = time.monotonic()


def process_usage() -> tuple[float, float, float]:
    """CPU seconds used, seconds since this module was loaded, and percent of the machine's memory.

    Takes microseconds.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        used.ru_utime + used.ru_stime,
        time.monotonic() - _STARTED_S,
        100 * pages / os.sysconf("SC_PHYS_PAGES"),
    )


def process_activity() -> ProcessActivity:
    """Count what is alive now, after a collection of garbage. Takes some 0.1 s: not for every request."""
    gc.collect()
    return ProcessActivity(os.getpid(), len(asyncio.all_tasks()), len(gc.get_objects()))
