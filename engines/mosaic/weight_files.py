"""The model files of this engine, each checked against its SHA-256 before it is used."""

from __future__ import annotations

from pathlib import Path

from engines.weight_file import WeightFile

_WEIGHTS = Path(__file__).parent / "weights"

SPEAKER_ENCODER = WeightFile(
    _WEIGHTS / "speaker_encoder.safetensors",
    "95cd96d575d7691143e761724a7cce75ca7d0d4427b15c205a95743ed1cb95fb",
    "the package voice-clone-tts",
)
PHONE_PROJECTION = WeightFile(
    _WEIGHTS / "phone_projection.safetensors",
    "09c7a665c97df70db8d15739d6978472d7dbb96ba6bd763456f302170d2316c7",
    "the package voice-clone-tts",
)
