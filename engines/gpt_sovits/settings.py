"""What the operator may set for the GPT-SoVITS engine. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from engines.contract import EngineConfig
from engines.gpt_sovits.remote import RemoteSettings, remote_settings

#: Frames that neighbouring windows share; a shorter window would lie inside its overlap.
_SHORTEST_WINDOW_TOKENS = 5


class GptSovitsConfig(EngineConfig):
    """Settings of the GPT-SoVITS engine."""

    slots: int = Field(default=4, ge=1, le=1024, description="Utterances one replica works on at once.")
    model_dir: Path | None = Field(
        default=None,
        description="Folder of the converted weights and the text data; `gpt_sovits` in the models folder if "
        "left out.",
    )
    remote: RemoteSettings | None = Field(
        default_factory=remote_settings,
        description="Have servers of `api_v2.py` speak instead of this process, one utterance each: `slots` "
        "is their number then. From the variable `GPT_SOVITS_API_URL` if left out.",
    )
    gpt: str = Field(
        default="s1v3", description="GPT weights in `model_dir`, without their ending: `NAME.safetensors`."
    )
    sovits: str = Field(
        default="v2Pro/s2Gv2ProPlus",
        description="SoVITS weights in `model_dir`, without their ending; v2, v2Pro or v2ProPlus.",
    )
    languages: tuple[Literal["en", "zh", "ja"], ...] = Field(
        default=("en", "zh", "ja"),
        min_length=1,
        description="What is spoken; the text data of each is read when the engine loads.",
    )
    bert: bool = Field(
        default=False,
        description="Read Chinese with `chinese-roberta-wwm-ext-large` (1.3 GB more) for better prosody.",
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto is CUDA if there is one."
    )
    precision: Literal["fp32", "bf16", "fp16", "int8"] = Field(
        default="fp32", description="Arithmetic of the GPT; int8 is for CPUs, fp16 for CUDA."
    )
    threads: int | None = Field(
        default=None, ge=1, le=256, description="CPU threads of the model; OMP_NUM_THREADS if left out."
    )
    kv_buckets: tuple[int, ...] = Field(
        default=(512, 768, 1024),
        min_length=1,
        description="Columns of the attention cache: prompt and speech of an utterance fit into the greatest "
        "(25 a second of audio, and one a phone). On CUDA a step attends to the smallest that is enough.",
    )
    cuda_graphs: bool = Field(
        default=True, description="Replay the decode step as a CUDA graph, one for each of `kv_buckets`."
    )
    window_tokens: tuple[int, ...] = Field(
        default=(16, 25),
        min_length=1,
        description="Semantic tokens (40 ms each) of the first, second, ... chunk; the last number repeats.",
    )
    pause_s: float = Field(
        default=0.2, ge=0, le=5, description="Silence after each utterance, at speed 1; s."
    )
    cached_voices: int = Field(
        default=64, ge=1, le=100_000, description="Voices whose prompt and speaker are kept in memory."
    )

    @field_validator("kv_buckets")
    @classmethod
    def _ascending(cls, buckets: tuple[int, ...]) -> tuple[int, ...]:
        if not all(256 <= columns <= 4000 for columns in buckets) or sorted(set(buckets)) != list(buckets):
            raise ValueError("kv_buckets must be ascending, from 256 to 4000")
        return buckets

    @field_validator("window_tokens")
    @classmethod
    def _wide_enough(cls, windows: tuple[int, ...]) -> tuple[int, ...]:
        if min(windows) < _SHORTEST_WINDOW_TOKENS:
            raise ValueError(f"window_tokens must be {_SHORTEST_WINDOW_TOKENS} or more")
        return windows
