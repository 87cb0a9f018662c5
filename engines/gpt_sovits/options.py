"""Options of a request: how tokens are drawn. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.contract import UnsupportedOption

#: Option -> smallest and largest value, and whether it is a whole number.
_RANGES: dict[str, tuple[float, float, bool]] = {
    "top_k": (1, 1025, True),
    "top_p": (0.01, 1.0, False),
    "temperature": (0.0, 5.0, False),
    "repetition_penalty": (1.0, 10.0, False),
}
#: Names one of the configured pairs of weights, where servers of api_v2 speak.
WEIGHTS = "weights"
OPTIONS = (*_RANGES, WEIGHTS)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; defaults are upstream's. A ``temperature`` of 0 takes the likeliest one."""

    top_k: int = 15
    top_p: float = 1.0
    temperature: float = 1.0
    repetition_penalty: float = 1.35

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Sampling:
        """From the options of an utterance. Raises ``UnsupportedOption``."""
        for name, value in options.items():
            if name not in _RANGES:
                raise UnsupportedOption(
                    f"'{name}' is for GPT-SoVITS on servers of its own.", next_step=f"Leave '{name}' out."
                )
            low, high, whole = _RANGES[name]
            fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not fits or not low <= value <= high:
                kind = "a whole number" if whole else "a number"
                raise UnsupportedOption(
                    f"'{name}' is {kind} from {low:g} to {high:g}.",
                    next_step=f"Leave '{name}' out or change it.",
                )
        return cls(**options)
