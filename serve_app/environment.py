"""Environment of the Ray processes started here. Set it before Ray is imported: parts of Ray read it then."""

from __future__ import annotations

import os


def prepare_environment() -> None:
    """Set what we want of Ray wherever the user has not set it.

    Token authentication is left to Ray, which turns it on by itself for a cluster started here and writes the
    token to ``~/.ray``.
    """
    # Workers run at nice 15 by default: on a shared machine speech would stutter.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Logs go to Ray's log directory; the terminal belongs to whoever typed the command.
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    # Each engine replica is a process of its own: libraries that all take every core get in the way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
