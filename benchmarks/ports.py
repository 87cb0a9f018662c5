"""A port for a server that is about to start."""

from __future__ import annotations

import random
import socket

#: Below Linux's range for outgoing connections: Ray opens dozens of those while it starts, and would
#: sooner or later take a port that was found free up there.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on right now."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("No free port was found among a hundred.")
