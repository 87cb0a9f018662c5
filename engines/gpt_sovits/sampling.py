"""The next semantic token of every live row.

In the order of upstream's ``logits_to_probs`` and ``sample`` (AR/models/utils.py): repetition penalty,
top-p, temperature, top-k, draw. A draw is the greatest of all probabilities divided by an exponential
variable each, so one row's numbers come from a generator of its own and every row's arithmetic has the same
width in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engines.gpt_sovits.options import Sampling

#: These two, and the end, may not be among the first tokens: known to be silence (gsv-tts-lite).
SUPPRESSED_AT_FIRST = (280, 486)
#: So many tokens, at least.
FEWEST_TOKENS = 10
_COLDEST = 1e-5


class Sampler:
    """Sampling state of all slots."""

    def __init__(self, slots: int, vocabulary: int, end_token: int, device: torch.device) -> None:
        self._device, self._vocabulary, self._end = device, vocabulary, end_token
        self._seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)
        self._temperature, self._top_p, self._penalty = (
            torch.ones(slots, 1, device=device) for _ in range(3)
        )
        self._top_k = torch.ones(slots, 1, dtype=torch.long, device=device)
        self._draws = [torch.Generator() for _ in range(slots)]
        self._drawn = [0] * slots
        suppressed = [*SUPPRESSED_AT_FIRST, end_token]
        self._suppressed = torch.tensor([token for token in suppressed if token < vocabulary], device=device)

    def begin(self, slot: int, sampling: Sampling, prompt: Tensor, generator: torch.Generator) -> None:
        """Another utterance takes ``slot``; the tokens of its ``prompt`` [n] count as said before."""
        self._seen[slot] = False
        self._seen[slot, prompt] = True
        self._temperature[slot] = max(sampling.temperature, _COLDEST)
        self._top_p[slot] = sampling.top_p
        self._top_k[slot] = min(sampling.top_k, self._vocabulary)
        self._penalty[slot] = sampling.repetition_penalty
        self._draws[slot] = generator
        self._drawn[slot] = 0

    def draw(self, slots: Sequence[int], logits: Tensor) -> list[int | None]:
        """Next token of each of ``slots`` from ``logits`` [n, vocabulary]; None where they are no number."""
        rows = torch.tensor(slots, device=self._device)
        logits = logits.float()
        sound = torch.isfinite(logits).all(1)
        early = torch.tensor([self._drawn[slot] < FEWEST_TOKENS for slot in slots], device=self._device)
        logits[:, self._suppressed] = logits[:, self._suppressed].masked_fill(early[:, None], -math.inf)
        penalty = self._penalty[rows]
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(self._seen[rows], penalised, logits)
        ordered, tokens = logits.sort(dim=1, descending=True, stable=True)
        top_p = self._top_p[rows]
        beyond = (ordered.softmax(1).cumsum(1) > top_p) & (top_p < 1)
        beyond[:, 0] = False
        ordered = ordered.masked_fill(beyond, -math.inf) / self._temperature[rows]
        least = ordered.gather(1, self._top_k[rows] - 1)
        ordered = ordered.masked_fill(ordered < least, -math.inf)
        likely = torch.full_like(ordered, -math.inf).scatter(1, tokens, ordered).softmax(1)
        drawn = (likely / self._exponentials(slots)).argmax(1, keepdim=True)
        self._seen[rows] = self._seen[rows].scatter(1, drawn, torch.ones_like(drawn, dtype=torch.bool))
        for slot in slots:
            self._drawn[slot] += 1
        return [
            token if good else None for token, good in zip(drawn[:, 0].tolist(), sound.tolist(), strict=True)
        ]

    def _exponentials(self, slots: Sequence[int]) -> Tensor:
        """[n, vocabulary]; as upstream draws them, for the first token without the end."""
        numbers = torch.ones(len(slots), self._vocabulary)
        for row, slot in enumerate(slots):
            width = self._vocabulary - 1 if self._drawn[slot] == 0 else self._vocabulary
            numbers[row, :width] = torch.empty(width).exponential_(1, generator=self._draws[slot])
        return numbers.to(self._device)
