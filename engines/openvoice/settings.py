"""Settings of the OpenVoice engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from engines.contract import EngineConfig


class _BaseVoiceSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HibariSettings(_BaseVoiceSettings):
    """English, in the default installation."""

    kind: Literal["hibari"] = Field(description="English (American), a woman; in the default installation.")


class PiperSettings(_BaseVoiceSettings):
    """A Piper voice: the extra ``piper`` is GPL-3.0-or-later."""

    kind: Literal["piper"] = Field(description="A Piper voice; needs the extra `piper`, which is GPL.")
    model: Path = Field(description="Its `.onnx` file; its `.onnx.json` lies beside it.")
    speaker: int | None = Field(default=None, ge=0, description="Speaker of a voice that has several.")


class VitsSettings(_BaseVoiceSettings):
    """A VITS model of coqui-tts."""

    kind: Literal["vits"] = Field(description="A VITS model of coqui-tts.")
    model: str = Field(
        description="A folder with its `config.json` and `.pth` file, or the name of a model that coqui-tts "
        "has downloaded already (`tts_models/de/thorsten/vits`)."
    )
    language: str = Field(pattern=r"^[a-z]{2,3}$", description="BCP-47 primary subtag of what it speaks.")
    speaker: str | None = Field(default=None, description="Speaker of a model that has several, by name.")


BaseVoiceSettings = Annotated[HibariSettings | PiperSettings | VitsSettings, Field(discriminator="kind")]


class OpenVoiceConfig(EngineConfig):
    """Settings of the OpenVoice engine."""

    slots: int = Field(default=4, ge=1, le=1024, description="Utterances one replica works on at once.")
    model_dir: Path | None = Field(
        default=None,
        description="Folder with `converter/config.json` and `converter/checkpoint.pth`; `openvoice` in the "
        "models folder if left out.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto (a GPU if there is one), cpu, cuda or cuda:N.",
    )
    precision: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="Arithmetic of the converter; 16 bits only on a GPU."
    )
    threads: int = Field(default=1, ge=1, le=256, description="CPU threads of the converter and of hibari.")
    rows_per_pass: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Utterances that go through the converter together; if left out one on a CPU, where more "
        "gain nothing, and all on a GPU.",
    )
    base_voices: tuple[BaseVoiceSettings, ...] = Field(
        default=(HibariSettings(kind="hibari"),),
        min_length=1,
        description="What says the text before it is given the enrolled voice's colour; docs/openvoice.md.",
    )
    cache_dir: Path | None = Field(
        default=None,
        description="Where colours of base voices are kept; `~/.cache/voice-clone/openvoice` if left out.",
    )
