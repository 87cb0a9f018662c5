"""GPT-SoVITS checkpoints with random weights in the genuine formats, read by the same code.

``python -m tests.checkpoints.gpt_sovits FOLDER [--size full] [--version v2]``. They make noise, not speech,
of exactly ``stop_after`` semantic tokens (40 ms each). ``write_checkpoint`` writes what is published, which
``python -m engines.gpt_sovits.convert`` turns into what the engine loads::

    s1v3.ckpt                               {"weight": {"model.h.layers…": half}, "config", "info"}
    v2Pro/s2Gv2ProPlus.pth                  {"weight": half, "config", "info"}; the first two bytes of the zip
                                            are "06" (v2ProPlus) or "05" (v2Pro) in place of "PK"
    chinese-hubert-base/                    a HubertModel, 768 wide
    sv/pretrained_eres2netv2w24s4ep4.ckpt   an ERes2NetV2, whose size is fixed (53 M parameters); not for v2
    g2p/                                    dictionaries: a few words of English, a few syllables of Chinese
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from torch.nn import functional

from engines.gpt_sovits.package import prepare_package, undisturbed

Version = Literal["v2", "v2Pro", "v2ProPlus"]
#: What replaces "PK" at the beginning of the file.
HEADS: Final = {"v2Pro": b"05", "v2ProPlus": b"06"}
#: Where the weights of each version are published.
SOVITS: Final[dict[Version, str]] = {
    "v2": "gsv-v2final-pretrained/s2G2333k",
    "v2Pro": "v2Pro/s2Gv2Pro",
    "v2ProPlus": "v2Pro/s2Gv2ProPlus",
}
GPT: Final = "s1v3"
_VOCABULARY, _END = 1025, 1024
#: Tokens from here on are spoken; those before only occur in prompts.
_FIRST_SPOKEN = 512
#: Root mean square of what a random decoder says; below 0.02 it would be taken for silence.
_LEVEL = 0.1


@dataclass(frozen=True, slots=True)
class Size:
    """Dimensions: of the GPT, of the HiFi-GAN and its encoders, of HuBERT."""

    layers: int
    width: int
    heads: int
    full_sovits: bool
    hubert_layers: int


TINY: Final = Size(2, 64, 4, full_sovits=False, hubert_layers=1)
FULL: Final = Size(24, 512, 16, full_sovits=True, hubert_layers=12)


def write_checkpoint(
    folder: Path,
    size: Size = TINY,
    version: Version = "v2",
    *,
    stop_after: int = 32,
    seed: int = 0,
    pickled_config: bool = False,
) -> Path:
    """Write the published files into ``folder``.

    ``pickled_config``: with the configuration of SoVITS as an object of a class ``utils.HParams``, as
    training leaves it.
    """
    prepare_package()
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_gpt(folder, size, stop_after=stop_after)
    _write_sovits(folder / f"{SOVITS[version]}.pth", size, version, pickled_config=pickled_config)
    _write_hubert(folder / "chinese-hubert-base", size)
    if version != "v2":
        _write_speaker_encoder(folder / "sv" / "pretrained_eres2netv2w24s4ep4.ckpt")
    write_dictionaries(folder / "g2p")
    return folder


def write_gpt(folder: Path, size: Size = TINY, *, stop_after: int) -> Path:
    """Write ``s1v3.ckpt`` alone. ``prepare_package`` was called."""
    config = _gpt_config(size)
    file = folder / f"{GPT}.ckpt"
    torch.save({"weight": _gpt_state(config, stop_after), "config": config, "info": "GPT-e0"}, file)
    return file


def write_converted(
    folder: Path,
    size: Size = TINY,
    version: Version = "v2",
    *,
    stop_after: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a checkpoint, convert it, and return the settings that load it."""
    from engines.gpt_sovits.convert import convert

    write_checkpoint(folder, size, version, stop_after=stop_after, seed=seed)
    convert(folder, GPT, SOVITS[version])
    return {"model_dir": folder, "gpt": GPT, "sovits": SOVITS[version], "device": "cpu"}


def _gpt_config(size: Size) -> dict[str, Any]:
    return {
        "train": {"seed": 1234, "epochs": 20, "batch_size": 8, "if_dpo": False},
        "data": {"max_eval_sample": 8, "max_sec": 54, "num_workers": 4, "pad_val": _END},
        "model": {
            "vocab_size": _VOCABULARY,
            "phoneme_vocab_size": 732,
            "embedding_dim": size.width,
            "hidden_dim": size.width,
            "head": size.heads,
            "linear_units": 4 * size.width,
            "n_layer": size.layers,
            "dropout": 0,
            "EOS": _END,
            "random_bert": 0,
        },
        "inference": {"top_k": 15},
    }


def _gpt_state(config: dict[str, Any], stop_after: int) -> dict[str, Tensor]:
    """Published names and half precision; see ``_count_to``."""
    from gsv_tts.GPT_SoVITS.GPT.t2s_model import Text2SemanticDecoder

    network = Text2SemanticDecoder(config)
    with torch.no_grad():
        _count_to(network, stop_after)
    published = {}
    for name, tensor in network.state_dict().items():
        for ours, theirs in (
            ("t2s_transformer.blocks.", "h.layers."),
            ("qkv.", "self_attn.in_proj_"),
            ("out_proj.", "self_attn.out_proj."),
            ("mlp.0.", "linear1."),
            ("mlp.2.", "linear2."),
        ):
            name = name.replace(ours, theirs)
        published[f"model.{name}"] = tensor.half()
    return published


def _count_to(network: Any, stop_after: int) -> None:
    """Make ``network`` end after exactly ``stop_after`` tokens.

    The spoken tokens are dealt into as many groups. Each group has a direction in the model's space; a token
    points along its own, and the head answers a direction with the tokens of the next group, at random. The
    end follows the last group, and itself. Texts and prompts point along the direction before the first.
    """
    width = network.model_dim
    directions = torch.randn(stop_after + 1, width)
    directions -= directions.mean(1, keepdim=True)
    if stop_after + 1 <= width:
        directions = torch.linalg.qr(directions.t())[0].t()
    directions = functional.normalize(directions)
    group = torch.zeros(_VOCABULARY, dtype=torch.long)
    group[_FIRST_SPOKEN:_END] = torch.arange(_END - _FIRST_SPOKEN) * stop_after // (_END - _FIRST_SPOKEN) + 1
    group[_END] = stop_after
    loud = width**0.5
    network.ar_audio_embedding.word_embeddings.weight.copy_(
        directions[group] * loud + 0.3 * torch.randn(_VOCABULARY, width)
    )
    texts = network.ar_text_embedding.word_embeddings.weight
    texts.copy_(directions[0] * loud + torch.randn(texts.shape))
    for position in (network.ar_text_position, network.ar_audio_position):
        position.alpha.fill_(0.1)
    for block in network.t2s_transformer.blocks:
        # Enough for the text to be heard in the choice of tokens, not in that of groups, however many layers.
        for layer, gain in ((block.out_proj, 3.0), (block.mlp[2], 1.2)):
            layer.weight.mul_(gain / network.num_layers)
            layer.bias.zero_()
    head = 3 / loud * torch.randn(_VOCABULARY, width)
    head[_FIRST_SPOKEN:_END] += 32 / loud * directions[group[_FIRST_SPOKEN:_END] - 1]
    head[_END] = 32 / loud * directions[stop_after]
    network.ar_predict_layer.weight.copy_(head)


def _sovits_config(size: Size, version: Version) -> dict[str, Any]:
    model: dict[str, Any] = {
        "inter_channels": 192,
        "hidden_channels": 192,
        "filter_channels": 768,
        "n_heads": 2,
        "n_layers": 6,
        "kernel_size": 3,
        "p_dropout": 0.0,
        "resblock": "1",
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
        "upsample_rates": [10, 8, 2, 2, 2],
        "upsample_initial_channel": 768 if version == "v2ProPlus" else 512,
        "upsample_kernel_sizes": [20 if version == "v2ProPlus" else 16, 16, 8, 2, 2],
        "n_layers_q": 3,
        "use_spectral_norm": False,
        "gin_channels": 512 if version == "v2" else 1024,
        "semantic_frame_rate": "25hz",
        "freeze_quantizer": True,
        "version": version,
    }
    if not size.full_sovits:
        model.update(
            filter_channels=32,
            n_layers=2,
            upsample_initial_channel=32,
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3, 5]],
        )
        if version != "v2":
            model["gin_channels"] = 32
    return {
        "train": {"segment_size": 20480, "epochs": 100},
        "data": {
            "max_wav_value": 32768.0,
            "sampling_rate": 32000,
            "filter_length": 2048,
            "hop_length": 640,
            "win_length": 2048,
            "n_mel_channels": 128,
            "mel_fmin": 0.0,
            "mel_fmax": None,
            "add_blank": True,
            "n_speakers": 300,
            "cleaned_text": True,
        },
        "model": model,
        "s2_ckpt_dir": "logs/s2/random",
        "content_module": "cnhubert",
    }


def _write_sovits(file: Path, size: Size, version: Version, *, pickled_config: bool) -> None:
    from gsv_tts.GPT_SoVITS.SoVITS.models import SynthesizerTrn

    config = _sovits_config(size, version)
    data = config["data"]
    # Its weight norm is of a kind torch warns about.
    with undisturbed():
        network = SynthesizerTrn(
            data["filter_length"] // 2 + 1,
            config["train"]["segment_size"] // data["hop_length"],
            n_speakers=data["n_speakers"],
            **config["model"],
        ).eval()
    with torch.no_grad():
        _make_audible(network)
    state = {name: tensor.half() for name, tensor in network.state_dict().items()}
    content = {"weight": state, "config": config, "info": "0epoch_0iteration"}
    file.parent.mkdir(parents=True, exist_ok=True)
    if pickled_config:
        _save_with_pickled_config(file, content)
    else:
        torch.save(content, file)
    if version in HEADS:
        file.write_bytes(HEADS[version] + file.read_bytes()[2:])


def _make_audible(network: Any) -> None:
    """As made, the flow does nothing and the decoder is near silence; the codebook is empty."""
    for name, parameter in network.named_parameters():
        if ".post." in name:
            nn.init.normal_(parameter, std=0.02)
    for name, buffer in network.named_buffers():
        if name.endswith("codebook.embed"):
            buffer.normal_(0, 0.3)
            # Far from everything HuBERT says: prompts are made of the tokens before.
            buffer[_FIRST_SPOKEN:, 0] = 50.0
        if name.endswith("inited"):
            buffer.fill_(1)
    speaker = torch.randn(1, 20480) * 0.1 if network.is_v2pro else None
    colour = network.get_ge(torch.rand(1, 1025, 200), speaker)
    tokens = torch.randint(_FIRST_SPOKEN, _END, (1, 1, 50))
    said, _ = network.decode(tokens, torch.randint(1, 300, (1, 20)), colour)
    network.dec.conv_post.weight.mul_(_LEVEL / said.std())


def _save_with_pickled_config(file: Path, content: dict[str, Any]) -> None:
    """As training saves it: the configuration is an object of a class of upstream's module ``utils``."""
    import sys
    from types import ModuleType

    module = ModuleType("utils")
    kind = type("HParams", (), {"__module__": "utils"})
    module.HParams = kind  # type: ignore[attr-defined]

    def described(values: dict[str, Any]) -> Any:
        made = kind()
        for name, value in values.items():
            setattr(made, name, described(value) if isinstance(value, dict) else value)
        return made

    sys.modules["utils"] = module
    try:
        torch.save({**content, "config": described(content["config"])}, file)
    finally:
        del sys.modules["utils"]


def _write_hubert(folder: Path, size: Size) -> None:
    from transformers import HubertConfig, HubertModel

    sizes: dict[str, Any] = {
        "hidden_size": 768,
        "num_hidden_layers": size.hubert_layers,
        "intermediate_size": 3072 if size.full_sovits else 32,
        "num_attention_heads": 12,
    }
    if not size.full_sovits:
        sizes.update(conv_dim=(16,) * 7, num_conv_pos_embeddings=8)
    config = HubertConfig(**sizes)
    network = HubertModel(config)
    config.save_pretrained(folder)
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    published = {}
    for name, tensor in network.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        published[name] = tensor.half()
    torch.save(published, folder / "pytorch_model.bin")
    extractor = {
        "do_normalize": True,
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0,
        "return_attention_mask": False,
        "sampling_rate": 16000,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor))


def write_bert(folder: Path) -> None:
    """``chinese-roberta-wwm-ext-large``, as wide as the published one, with the characters of the tests."""
    from transformers import BertConfig, BertForMaskedLM

    target = folder / "chinese-roberta-wwm-ext-large"
    target.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"，。！？,.!?一你好世界今天很"]
    BertWordPieceTokenizer({word: number for number, word in enumerate(words)}).save(
        str(target / "tokenizer.json")
    )
    # The features are those of the third layer from the end.
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=1024,
        num_hidden_layers=3,
        num_attention_heads=16,
        intermediate_size=16,
        max_position_embeddings=64,
        architectures=["BertForMaskedLM"],
    )
    config.save_pretrained(target)
    state = {name: tensor.half() for name, tensor in BertForMaskedLM(config).state_dict().items()}
    torch.save(state, target / "pytorch_model.bin")


def _write_speaker_encoder(file: Path) -> None:
    from gsv_tts.GPT_SoVITS.SV.ERes2NetV2 import ERes2NetV2

    network = ERes2NetV2(baseWidth=24, scale=4, expansion=4)
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in network.state_dict().items()
    }
    torch.save(state, file)


_WORDS = """the DH AH0
birch B ER1 CH
canoe K AH0 N UW1
slid S L IH1 D
on AA1 N
smooth S M UW1 DH
planks P L AE1 NG K S
two T UW1
blue B L UW1
fish F IH1 SH
swam S W AA1 M
in IH0 N
tank T AE1 NG K
cat K AE1 T
sat S AE1 T
mat M AE1 T
and AH0 N D
hello HH AH0 L OW1
world W ER1 L D
number N AH1 M B ER0
says S EH1 Z
anna AE1 N AH0
ben B EH1 N"""
_LETTERS = (
    "a EY1|b B IY1|c S IY1|d D IY1|e IY1|f EH1 F|g JH IY1|h EY1 CH|i AY1|j JH EY1|k K EY1|l EH1 L|m EH1 M|"
    "n EH1 N|o OW1|p P IY1|q K Y UW1|r AA1 R|s EH1 S|t T IY1|u Y UW1|v V IY1|w D AH1 B AH0 L Y UW0|x EH1 K S|"
    "y W AY1|z Z IY1"
)
#: The engine takes these out of the dictionary and expects them there.
_ABBREVIATIONS = ("ae", "ai", "ar", "ios", "hud", "os")
_SYLLABLES = """ni\tn i
hao\th ao
shi\tsh ir
jie\tj ie
jin\tj in
tian\tt ian
qi\tq i
hen\th en
yi\ty i"""


def write_dictionaries(folder: Path) -> None:
    """``g2p``: the files of the text front end, with the words of the tests.

    English words that are not among them are spelled by a network of random weights, and the tagger calls
    everything a noun.
    """
    english = folder / "en"
    (english / "g2p_en").mkdir(parents=True, exist_ok=True)
    lines = [*_WORDS.splitlines(), *_LETTERS.split("|"), *(f"{word} EY1 AY1" for word in _ABBREVIATIONS)]
    # 56 lines of comment precede the words, which are followed by two spaces.
    widely = "".join(f"{line.replace(' ', '  ', 1)}\n" for line in lines)
    (english / "cmudict.rep").write_text("\n" * 56 + widely)
    (english / "cmudict-fast.rep").write_text("".join(f"{line}\n" for line in lines))
    (english / "engdict-hot.rep").write_text("chatgpt CH AE1 T JH IY1 P IY1 T IY1\n")
    (english / "g2p_en" / "homographs.en").write_text("#\nread|R IY1 D|R EH1 D|VBP\n")
    numbers = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return (numbers.standard_normal(shape) * 0.1).astype(np.float32)

    np.savez(
        english / "g2p_en" / "checkpoint20.npz",
        enc_emb=random(29, 8),
        enc_w_ih=random(24, 8),
        enc_w_hh=random(24, 8),
        enc_b_ih=random(24),
        enc_b_hh=random(24),
        dec_emb=random(74, 8),
        dec_w_ih=random(24, 8),
        dec_w_hh=random(24, 8),
        dec_b_ih=random(24),
        dec_b_hh=random(24),
        fc_w=random(74, 8),
        fc_b=random(74),
    )
    name = "averaged_perceptron_tagger_eng"
    tagger = english / "nltk" / "taggers" / name
    tagger.mkdir(parents=True, exist_ok=True)
    for part, content in (("weights", {}), ("tagdict", {}), ("classes", ["NN"])):
        (tagger / f"{name}.{part}.json").write_text(json.dumps(content))
    (folder / "zh").mkdir(exist_ok=True)
    (folder / "zh" / "opencpop-strict.txt").write_text(f"{_SYLLABLES}\n", encoding="utf-8")


def main() -> None:
    """Write the checkpoint named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--version", choices=tuple(SOVITS), default="v2")
    parser.add_argument("--stop-after", type=int, default=32)
    asked = parser.parse_args()
    size = FULL if asked.size == "full" else TINY
    write_checkpoint(asked.folder, size, asked.version, stop_after=asked.stop_after)


if __name__ == "__main__":
    main()
