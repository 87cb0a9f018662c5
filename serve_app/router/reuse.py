"""Nothing is spoken twice: equal utterances share one recording while it is made, and later if cached.

Equal means: same text, language, engine and weights, conditioning, speed, options and seed. Requests that
name no seed draw one; two of them that ask for the same at the same time get the same one and share as well.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from engines.contract import Samples
from serve_app.metrics import REUSED, Metrics
from serve_app.protocol import UtteranceCall
from serve_app.router.rows import Listener, Recording, Row


def content_key(call: UtteranceCall, conditioning_digest: str) -> bytes:
    """What decides every sample of ``call``, as 16 bytes; ``conditioning_digest`` stands for the voice."""
    options = json.dumps(dict(call.options), sort_keys=True, default=str)
    identity = (
        call.conditioning.engine,
        call.conditioning.weights_fingerprint,
        conditioning_digest,
        call.language,
        repr(call.speed),
        call.seed,
        options,
        call.text,
    )
    return blake2b(json.dumps(identity).encode(), digest_size=16).digest()


class SpokenUtterances:
    """Recordings by content: those being made, and finished ones up to ``max_bytes``, 0 for none."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._making: dict[bytes, Row] = {}
        self._kept: OrderedDict[bytes, Samples] = OrderedDict()
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def making(self) -> int:
        """Recordings being made now."""
        return len(self._making)

    def listen(
        self,
        key: bytes,
        make: Callable[[], Row],
        *,
        keep: bool,
        joined: Callable[[Row], None] = lambda _: None,
    ) -> Listener:
        """Listen to the recording of ``key``; ``make`` starts it if there is none.

        ``keep``: cache it when it is finished. ``joined`` hears of a recording that is shared.
        """
        if (samples := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            self._metrics.count(REUSED, how="cached")
            return Recording.of(samples).join()
        if (recording := self._making.get(key)) is not None:
            self._metrics.count(REUSED, how="shared")
            joined(recording)
            return recording.join()
        recording = make()
        if not recording.ended:
            self._making[key] = recording
            recording.when_done(lambda: self._finish(key, recording, keep))
        return recording.join()

    def _finish(self, key: bytes, recording: Recording, keep: bool) -> None:
        del self._making[key]
        if not keep or not recording.ended or recording.error is not None:
            return
        samples = np.concatenate(recording.pieces)
        if samples.nbytes > self._max_bytes:
            return
        self._kept[key] = samples
        self._kept_bytes += samples.nbytes
        while self._kept_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.nbytes


@dataclass(slots=True)
class _Drawn:
    seed: int
    users: int = 0


class SeedsInUse:
    """Seeds of running requests that named none."""

    def __init__(self, draw: Callable[[], int]) -> None:
        self._draw = draw
        self._drawn: dict[object, _Drawn] = {}

    @contextmanager
    def seed_for(self, content: object) -> Iterator[int]:
        """A new seed, or the one of a running request for the same ``content``."""
        drawn = self._drawn.get(content)
        if drawn is None:
            drawn = self._drawn[content] = _Drawn(self._draw())
        drawn.users += 1
        try:
            yield drawn.seed
        finally:
            drawn.users -= 1
            if not drawn.users:
                del self._drawn[content]
