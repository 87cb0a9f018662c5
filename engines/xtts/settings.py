"""What the operator may set for the XTTS-v2 engine. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from engines.contract import EngineConfig

_LONGEST_WINDOW_TOKENS = 605


class XttsConfig(EngineConfig):
    """Settings of the XTTS-v2 engine."""

    slots: int = Field(default=4, ge=1, le=1024, description="Utterances one replica works on at once.")
    model_dir: Path | None = Field(
        default=None, description="Folder of the model's files; `xtts` in the models folder if left out."
    )
    accept_license: bool = Field(
        default=False,
        description="The operator accepts the Coqui Public Model License (non-commercial) of the weights.",
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto is CUDA if there is one."
    )
    precision: Literal["fp32", "bf16", "fp16", "int8"] = Field(
        default="fp32", description="Arithmetic of the GPT; int8 is for CPUs, fp16 for CUDA."
    )
    vocoder_precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="Arithmetic of the vocoder; bf16 is faster on CUDA and on CPUs with AVX512-BF16 or AMX, "
        "fp16 is for CUDA.",
    )
    cache_mb: int | None = Field(
        default=None, ge=1, description="Memory the slots may take; what is free if left out."
    )
    threads: int | None = Field(
        default=None, ge=1, le=256, description="CPU threads of the model; OMP_NUM_THREADS if left out."
    )
    window_tokens: tuple[int, ...] = Field(
        default=(10, 20, 40),
        min_length=1,
        description="Audio tokens (46 ms each) of the first, second, ... chunk; the last number repeats.",
    )
    trim_end: bool = Field(default=True, description="Cut silence and noise after the last sound.")
    cuda_graphs: bool = Field(default=True, description="Replay the decode step as a CUDA graph.")

    @model_validator(mode="after")
    def _usable(self) -> XttsConfig:
        if not all(1 <= tokens <= _LONGEST_WINDOW_TOKENS for tokens in self.window_tokens):
            raise ValueError(f"window_tokens must be from 1 to {_LONGEST_WINDOW_TOKENS}")
        return self
