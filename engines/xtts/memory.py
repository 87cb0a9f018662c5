"""What a slot costs, and whether the slots asked for fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engines.contract import ModelError
from engines.linear import Precision, activation_type

#: Latents of a voice, which precede the text. coqui-tts fixes their number.
VOICE_LATENTS = 32


def cache_columns(gpt: Any) -> int:
    """Longest prompt and speech of coqui-tts's ``GPT``, in tokens."""
    text_with_ends: int = gpt.max_text_tokens
    max_tokens: int = gpt.max_gen_mel_tokens
    return VOICE_LATENTS + text_with_ends + 1 + max_tokens


def slot_bytes(gpt: Any, precision: Precision) -> int:
    """Memory of a slot: attention keys and values of all layers, and the latents of one utterance."""
    item_bytes = activation_type(precision).itemsize
    cache = 2 * gpt.layers * cache_columns(gpt) * gpt.model_dim * item_bytes
    latents = gpt.max_gen_mel_tokens * gpt.model_dim * item_bytes
    return int(cache + latents)


def require_room(slots: int, bytes_per_slot: int, budget_mb: int | None, device: torch.device) -> None:
    """Raise ``ModelError`` unless ``slots`` fit into the budget, or without one into what is free."""
    room = _free_bytes(device)
    whose = "are free"
    if budget_mb is not None and budget_mb << 20 < room:
        room, whose = budget_mb << 20, "are allowed (cache_mb)"
    needed = slots * bytes_per_slot
    if needed > room:
        fitting = room // bytes_per_slot
        advice = f"Set slots to {fitting} or fewer" if fitting else "Allow more memory"
        raise ModelError(
            f"{slots} slots of XTTS-v2 take {needed >> 20} MB of memory; {room >> 20} MB {whose}.",
            next_step=f"{advice}, or on CUDA halve it with precision: bf16.",
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    # A container may have less than its machine.
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (allowed := limit.read_text().strip()) != "max":
        free.append(int(allowed) - int(used.read_text()))
    return min(free)
