"""XTTS-v2 checkpoints with random weights, in the genuine format: the published files, read by the same code.

``python -m tests.checkpoints.xtts FOLDER [--size full]``. They make noise, not speech; the stop token comes
after about ``stop_after`` audio tokens. HiFi-GAN and speaker encoder have the published size in both, which
coqui-tts fixes; a tiny GPT is 4 layers of width 64.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from engines.coqui import prepare_coqui

_MARKS = [
    "en", "es", "fr", "de", "it", "pt", "pl", "tr", "ru", "nl", "cs", "ar", "zh-cn", "hu", "ko", "ja", "hi",
]  # fmt: skip
_SENTENCES = [
    "the birch canoe slid on the smooth planks, and two blue fish swam in the tank.",
    "der schnelle braune fuchs springt über den faulen hund. größe, äpfel, öl.",
    "le vif renard brun saute par-dessus le chien paresseux; où êtes-vous? ça va.",
    "el veloz zorro marrón salta sobre el perro. ¿cómo estás? ¡muy bien, señor!",
    "ni3hao3,jin1tian1tian1qi4hen3hao3. wo3men5yi4qi3qu4gong1yuan2ba5.",
    "konnichiha, genki desu ka. annyeonghaseyo. zażółć gęślą jaźń. příliš žluťoučký kůň.",
    "съешь же ещё этих мягких булок. árvíztűrő tükörfúrógép. مرحبا كيف حالك. नमस्ते आप कैसे हैं",
]


@dataclass(frozen=True, slots=True)
class Size:
    """Dimensions of a GPT."""

    layers: int
    width: int
    heads: int
    text_tokens: int


TINY = Size(4, 64, 4, 400)
FULL = Size(30, 1024, 16, 6681)


def write_checkpoint(
    folder: Path, size: Size = TINY, *, stop_after: int = 40, seed: int = 0, legacy: bool = False
) -> Path:
    """Write ``config.json``, ``model.pth``, ``vocab.json`` and ``speakers_xtts.pth`` into ``folder``.

    ``legacy``: with a pickled configuration in ``model.pth``, as the file of 2023 has it.
    """
    prepare_coqui("xtts")
    from TTS.tts.configs.xtts_config import XttsArgs, XttsAudioConfig, XttsConfig

    folder.mkdir(parents=True, exist_ok=True)
    _write_vocabulary(folder / "vocab.json", size.text_tokens)
    arguments = XttsArgs(
        gpt_number_text_tokens=size.text_tokens,
        gpt_start_text_token=None,
        gpt_stop_text_token=None,
        gpt_num_audio_tokens=1026,
        gpt_start_audio_token=1024,
        gpt_stop_audio_token=1025,
        gpt_use_perceiver_resampler=True,
        gpt_max_audio_tokens=605,
        gpt_layers=size.layers,
        gpt_n_model_channels=size.width,
        gpt_n_heads=size.heads,
        decoder_input_dim=size.width,
    )
    # What the published config.json has.
    config = XttsConfig(
        model_args=arguments,
        audio=XttsAudioConfig(),
        temperature=0.75,
        repetition_penalty=5.0,
        top_k=50,
        top_p=0.85,
        gpt_cond_len=30,
        gpt_cond_chunk_len=4,
        max_ref_len=30,
    )
    config.save_json(str(folder / "config.json"))
    state = _random_state(folder, size, stop_after, seed)
    if legacy:
        _save_legacy(folder / "model.pth", state, config)
    else:
        torch.save({"model": state, "config": config.to_dict()}, folder / "model.pth")
    speakers = {}
    for number, name in enumerate(("Random Ana", "Random Ben")):
        noise = torch.Generator().manual_seed(100 + number)
        embedding = torch.nn.functional.normalize(torch.randn(1, 512, generator=noise))[..., None]
        latents = 0.5 * torch.randn(1, 32, size.width, generator=noise)
        speakers[name] = {"gpt_cond_latent": latents, "speaker_embedding": embedding}
    torch.save(speakers, folder / "speakers_xtts.pth")
    return folder


def _write_vocabulary(file: Path, tokens: int) -> None:
    """A BPE tokenizer with the special tokens of the published one, and exactly ``tokens`` tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[STOP]", "[UNK]", "[SPACE]", "[START]", *(f"[{mark}]" for mark in _MARKS)]
    trainer = trainers.BpeTrainer(
        vocab_size=tokens, special_tokens=special, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for number in range(tokens - len(vocabulary)):
        vocabulary[f"filler{number}"] = len(vocabulary)
    file.write_text(json.dumps(content, ensure_ascii=False))


def _random_state(folder: Path, size: Size, stop_after: int, seed: int) -> dict[str, torch.Tensor]:
    from TTS.tts.configs.xtts_config import XttsConfig
    from TTS.tts.layers.xtts.tokenizer import VoiceBpeTokenizer
    from TTS.tts.models.xtts import Xtts

    config = XttsConfig()
    config.load_json(str(folder / "config.json"))
    tokenizer = VoiceBpeTokenizer(vocab_file=folder / "vocab.json")
    config.model_args.gpt_start_text_token = tokenizer.tokenizer.token_to_id("[START]")
    config.model_args.gpt_stop_text_token = tokenizer.tokenizer.token_to_id("[STOP]")
    torch.manual_seed(seed)
    network: Any = Xtts(config)
    gpt = network.gpt
    with torch.no_grad():
        # A direction that grows in the input with the position, and that the stop token listens to.
        direction = torch.randn(size.width)
        direction -= direction.mean()
        direction /= direction.norm()
        positions = gpt.mel_pos_embedding.emb.weight
        ramp = (torch.arange(len(positions)) / stop_after).pow(4).clamp(max=4.0)
        positions += (0.12 * math.sqrt(size.width) * ramp)[:, None] * direction
        gpt.mel_head.weight[gpt.stop_audio_token] = 4.0 * direction
        gpt.mel_head.bias[gpt.stop_audio_token] = -6.0
        # Untrained, HiFi-GAN is almost silent.
        network.hifigan_decoder.waveform_decoder.conv_post.weight *= 8.0
        network.mel_stats.copy_(1.0 + 0.1 * torch.rand(80))
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def _save_legacy(file: Path, state: dict[str, torch.Tensor], config: Any) -> None:
    import TTS.tts.models.xtts as old_home
    from TTS.tts.configs.xtts_config import XttsArgs, XttsAudioConfig

    homes = {kind: kind.__module__ for kind in (XttsArgs, XttsAudioConfig)}
    try:
        for kind in homes:
            kind.__module__ = old_home.__name__
        torch.save({"model": state, "config": config}, file)
    finally:
        for kind, home in homes.items():
            kind.__module__ = home


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--stop-after", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    write_checkpoint(
        asked.folder, FULL if asked.size == "full" else TINY, stop_after=asked.stop_after, seed=asked.seed
    )
