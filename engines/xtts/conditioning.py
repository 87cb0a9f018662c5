"""From a recording to a voice: conditioning latents for the GPT and an embedding for the vocoder.

Windowing, resampling and averaging are coqui-tts's own (``Xtts.get_gpt_cond_latents``,
``Xtts.get_speaker_embedding``), driven as its ``get_conditioning_latents`` does for a file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray
from torch import Tensor

from engines.contract import Reference, ReferenceUnusable, Samples
from engines.xtts.model_files import XttsModel

LATENTS, EMBEDDING = "gpt_cond_latent", "speaker_embedding"
#: Rate at which a reference is read; the speaker encoder resamples it again.
_REFERENCE_RATE_HZ = 22_050
#: Peaks below this are silence (-60 dBFS).
_SILENCE_LEVEL = 1e-3


@torch.inference_mode()
def extract_voice(model: XttsModel, reference: Reference, min_reference_s: float) -> dict[str, NDArray[Any]]:
    """Latents [32, width] and embedding [512], float32.

    Uses the first ``max_ref_len`` seconds of each recording: latents of all of them in a row, and the mean of
    their embeddings. Raises ``ReferenceUnusable`` if it is too short or silent.
    """
    if reference.duration_s < min_reference_s:
        raise ReferenceUnusable(
            f"The recording has {reference.duration_s:.1f} s; {min_reference_s} s are needed.",
            next_step="Send a longer one: 6 to 30 seconds are best.",
        )
    if not np.any(np.abs(reference.samples) > _SILENCE_LEVEL):
        raise ReferenceUnusable(
            "The recording is silent.", next_step="Record the speaker again, closer to the microphone."
        )
    config, network = model.config, model.network
    recordings = [_prepared(samples, reference.sample_rate_hz, config) for samples in reference.recordings]
    embeddings = [network.get_speaker_embedding(audio, _REFERENCE_RATE_HZ) for audio in recordings]
    latents = network.get_gpt_cond_latents(
        torch.cat(recordings, dim=1),
        _REFERENCE_RATE_HZ,
        length=config.gpt_cond_len,
        chunk_length=config.gpt_cond_chunk_len,
    )
    return arrays(latents[0], torch.stack(embeddings).mean(0).reshape(-1))


def _prepared(samples: Samples, sample_rate_hz: int, config: Any) -> Tensor:
    """One recording [1, n] as coqui-tts reads it from a file."""
    audio = torch.from_numpy(np.ascontiguousarray(samples, np.float32))[None]
    if sample_rate_hz != _REFERENCE_RATE_HZ:
        audio = torchaudio.functional.resample(audio, sample_rate_hz, _REFERENCE_RATE_HZ)
    audio = audio.clip(-1, 1)[:, : _REFERENCE_RATE_HZ * config.max_ref_len]
    return audio / audio.abs().max() * 0.75 if config.sound_norm_refs else audio


def arrays(latents: Tensor, embedding: Tensor) -> dict[str, NDArray[Any]]:
    """What a ``Conditioning`` holds: ``latents`` [32, width] and ``embedding`` [512]."""
    return {
        LATENTS: latents.detach().float().cpu().contiguous().numpy(),
        EMBEDDING: embedding.detach().float().cpu().contiguous().numpy(),
    }
