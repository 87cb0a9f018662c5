"""The next audio token of every live row.

In the order of transformers' generate(), which coqui-tts uses: repetition penalty, temperature, top-k, top-p,
draw. Each row draws from a generator of its own, and every row's arithmetic has the same width in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engines.contract import UnsupportedOption

#: coqui-tts fills the prompt with this token, and so its penalty applies to it from the start.
_PROMPT_FILLER = 1

#: Option -> smallest and largest value, and whether it is a whole number.
_RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0.0, 5.0, False),
    "top_k": (1, 4096, True),
    "top_p": (0.01, 1.0, False),
    "repetition_penalty": (1.0, 50.0, False),
}
OPTIONS = tuple(_RANGES)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. A ``temperature`` of 0 takes the likeliest one instead."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float

    def changed(self, options: Mapping[str, Any]) -> Sampling:
        """With the ``options`` of an utterance in place of these. Raises ``UnsupportedOption``."""
        for name, value in options.items():
            low, high, whole = _RANGES[name]
            fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not fits or not low <= value <= high:
                kind = "a whole number" if whole else "a number"
                raise UnsupportedOption(
                    f"'{name}' is {kind} from {low:g} to {high:g}.",
                    next_step=f"Leave '{name}' out or change it.",
                )
        return replace(self, **options)


class Sampler:
    """Sampling state of all slots."""

    def __init__(self, slots: int, vocabulary: int, start_token: int, device: torch.device) -> None:
        self._start_token = start_token
        self._device = device
        self._seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)
        self._temperature, self._top_p, self._penalty = (
            torch.ones(slots, 1, device=device) for _ in range(3)
        )
        self._top_k = torch.ones(slots, 1, dtype=torch.long, device=device)
        self._draws = [torch.Generator() for _ in range(slots)]
        self._rank = torch.arange(vocabulary, device=device)

    def begin(self, slot: int, sampling: Sampling, seed: int) -> None:
        """Another utterance takes ``slot``."""
        greedy = sampling.temperature == 0
        self._seen[slot] = False
        self._seen[slot, [_PROMPT_FILLER, self._start_token]] = True
        self._temperature[slot] = 1.0 if greedy else sampling.temperature
        self._top_p[slot] = sampling.top_p
        self._top_k[slot] = 1 if greedy else sampling.top_k
        self._penalty[slot] = sampling.repetition_penalty
        self._draws[slot].manual_seed(seed % 2**63)

    def draw(self, slots: Sequence[int], logits: Tensor) -> list[int | None]:
        """Next token of each of ``slots`` from ``logits`` [n, vocabulary]; None where they are no number."""
        rows = torch.tensor(slots, device=self._device)
        chance = torch.stack([torch.rand(1, generator=self._draws[slot]) for slot in slots]).to(self._device)
        logits = logits.float()
        sound = torch.isfinite(logits).all(1)
        penalty = self._penalty[rows]
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(self._seen[rows], penalised, logits) / self._temperature[rows]
        # All of the vocabulary is sorted: taking only the best k would make sums as wide as the largest k.
        ordered, tokens = logits.sort(dim=1, descending=True, stable=True)
        ordered = ordered.masked_fill(self._rank >= self._top_k[rows], -math.inf)
        share = ordered.softmax(1)
        before = share.cumsum(1) - share
        share = share.masked_fill(before >= self._top_p[rows], 0.0)
        reached = share.cumsum(1)
        place = torch.searchsorted(reached, chance * reached[:, -1:], right=True)
        # A draw of exactly the whole sum would fall behind the last token that may be drawn.
        place = place.clamp(max=(share > 0).sum(1, keepdim=True) - 1)
        drawn = tokens.gather(1, place)
        self._seen[rows] = self._seen[rows].scatter(1, drawn, torch.ones_like(drawn, dtype=torch.bool))
        return [
            token if good else None for token, good in zip(drawn[:, 0].tolist(), sound.tolist(), strict=True)
        ]
