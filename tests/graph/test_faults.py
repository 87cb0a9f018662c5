"""A replica dies while it speaks: nobody hears it."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import psutil

from tests.graph.conftest import Server, activity, eventually
from tests.graph.test_speech import pcm


def replicas(engine: str) -> list[int]:
    """Process ids of an engine's replicas in this test's Ray."""
    title = f"ray::ServeReplica:voice-clone:engine-{engine}"
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if title in " ".join(child.cmdline())]


def test_killed_replica_is_not_heard(server: Server) -> None:
    text = " ".join(f"Sentence number {number} goes on for quite some time." for number in range(8))
    undisturbed = pcm(server, text, model="pair", seed=11)
    heard: list[np.ndarray] = []
    listener = threading.Thread(target=lambda: heard.append(pcm(server, text, model="pair", seed=11)))
    listener.start()
    eventually(lambda: all(replica.rows_open for replica in activity("pair")))
    os.kill(replicas("pair")[0], signal.SIGKILL)
    listener.join()
    np.testing.assert_array_equal(undisturbed, heard[0])
    eventually(lambda: len(activity("pair")) == 2, timeout_s=60)
