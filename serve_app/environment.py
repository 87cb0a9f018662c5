"""Environment of the Ray processes started here. Set it before Ray is imported: parts of Ray read it then."""

from __future__ import annotations

import os
from pathlib import Path


def prepare_environment() -> None:
    """Set what we want of Ray wherever the user has not set it."""
    # Ray turns token authentication on by itself in a cluster that is started here, and writes the token; but
    # it does not when it joins one. Without a token in place, asking for one would stop the start.
    if (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Workers run at nice 15 by default: on a shared machine speech would stutter.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Logs go to Ray's log directory; the terminal belongs to whoever typed the command.
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    # HAProxy must learn that an ingress replica goes before it is gone, or what it sends there is lost. Serve
    # allows 30 s, for load balancers elsewhere; the one on this machine is told in less.
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "5")
    # Ray gives its daemons 30 s to come up, which a busy machine needs more than.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    # Each engine replica is a process of its own: libraries that all take every core get in the way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
