"""How far requests of several texts are: what those who watch one are told."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from serve_app.protocol import BatchProgress

#: Long enough for whoever asks once a second; the rest is for batches whose ingress was lost.
_KEPT_AFTER_END_S = 30.0
_KEPT_S = 3600.0
#: Reports that are kept; the oldest go first.
_MOST = 1000


class BatchBoard:
    """The latest report of each batch, in memory and bounded. The answer of the batch itself is elsewhere."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._reports: OrderedDict[tuple[str, str], tuple[float, BatchProgress]] = OrderedDict()

    def report(self, progress: BatchProgress) -> None:
        """Keep ``progress`` unless a later report has overtaken it."""
        key = (progress.client, progress.request_id)
        _, known = self._reports.get(key, (0.0, None))
        # Within one batch every report counts more than the one before.
        if known is not None and known.succeeded + known.failed > progress.succeeded + progress.failed:
            return
        self._reports[key] = (self._now_s(), progress)
        self._reports.move_to_end(key)
        while len(self._reports) > _MOST:
            self._reports.popitem(last=False)

    def of(self, client: str) -> list[BatchProgress]:
        """The batches of ``client``, those that ended a moment ago included."""
        now_s = self._now_s()
        for key, (at_s, progress) in list(self._reports.items()):
            if now_s - at_s > (_KEPT_AFTER_END_S if progress.ended else _KEPT_S):
                del self._reports[key]
        return [progress for _, progress in self._reports.values() if progress.client == client]
