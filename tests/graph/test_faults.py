"""A replica dies while it speaks: nobody hears it."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
from ray.exceptions import RayActorError

from tests.graph.conftest import Server, activity, eventually
from tests.graph.test_speech import pcm


def test_killed_replica_is_not_heard(server: Server) -> None:
    text = " ".join(f"Sentence number {number} goes on for quite some time." for number in range(8))
    undisturbed = pcm(server, text, model="pair", seed=11)
    heard: list[np.ndarray] = []
    listener = threading.Thread(target=lambda: heard.append(pcm(server, text, model="pair", seed=11)))
    listener.start()
    busy: list[int] = []

    def somebody_speaks() -> bool:
        busy[:] = [replica.process_id for replica in activity("pair") if replica.rows_open]
        return bool(busy)

    eventually(somebody_speaks)
    os.kill(busy[0], signal.SIGKILL)
    listener.join()
    np.testing.assert_array_equal(undisturbed, heard[0])

    def replaced() -> bool:
        try:
            alive = {replica.process_id for replica in activity("pair")}
        except RayActorError:
            return False  # still counted among the living
        return len(alive) == 2 and busy[0] not in alive

    eventually(replaced, timeout_s=60)
