"""OpenVoice v2 checkpoints in the genuine format: ``python -m tests.checkpoints.openvoice KIND DIRECTORY``.

``tiny``     random weights, 1 M parameters: sounds, but says nothing. For tests.
``full``     random weights in the published sizes, 33 M parameters, 131 MB. For benchmarks.
``spoken``   weights worked out so that the words of the base voice come through, see ``write_spoken``.

Names and shapes in the files are those of the published ones: ``weight_g`` and ``weight_v`` for a layer with
weight norm, the weights under ``model``, tone colours float32 [1, channels, 1].
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engines.coqui import prepare_coqui
from engines.openvoice.checkpoint import _model_config

#: ``converter/config.json`` as published.
FULL: dict[str, Any] = {
    "_version_": "v2",
    "data": {
        "sampling_rate": 22050,
        "filter_length": 1024,
        "hop_length": 256,
        "win_length": 1024,
        "n_speakers": 0,
    },
    "model": {
        "zero_g": True,
        "inter_channels": 192,
        "hidden_channels": 192,
        "filter_channels": 768,
        "n_heads": 2,
        "n_layers": 6,
        "kernel_size": 3,
        "p_dropout": 0.1,
        "resblock": "1",
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
        "upsample_rates": [8, 8, 2, 2],
        "upsample_initial_channel": 512,
        "upsample_kernel_sizes": [16, 16, 4, 4],
        "gin_channels": 256,
        "contentvec_final_proj": False,
    },
}
#: Root mean square of what a random decoder says to speech; it would be near silence otherwise.
_LEVEL = 0.1
#: Carriers of the vocoder, 86.1 Hz apart.
_CARRIERS = 88
_BASE_SPEAKERS = ("en-newest", "en-us", "fr")


def write_tiny(directory: Path, seed: int = 0) -> Path:
    """A small model with random weights; returns ``directory``."""
    sizes = {
        "inter_channels": 16,
        "hidden_channels": 16,
        "filter_channels": 32,
        "n_layers": 1,
        "resblock_kernel_sizes": [3, 5],
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
        "upsample_initial_channel": 32,
        "gin_channels": 32,
    }
    return _write(directory, _sized(sizes), _randomise(seed))


def write_full_size(directory: Path, seed: int = 0) -> Path:
    """A model of the published size with random weights; returns ``directory``."""
    return _write(directory, FULL, _randomise(seed))


def write_spoken(directory: Path, seed: int = 0) -> Path:
    """A model through which the words of the base voice come, robotic but clear; returns ``directory``.

    It is a channel vocoder, with weights worked out instead of learned:

    * the posterior encoder averages the magnitudes around each multiple of 86.1 Hz (once in a hop of 256
      samples). Its WaveNet passes them on: the first gate is always open and works in the linear part of
      tanh, the other layers add nothing. The result is the mean of the posterior; its spread is small and
      constant;
    * the couplings of the flow hear nothing but the tone colour: taking away that of the source and adding
      that of the target shifts the magnitudes a little, differently for every pair of voices;
    * the decoder adds up cosines at those frequencies. A hop holds a whole number of periods of each, so
      a frame is a fixed sum of 256 samples, made at once by the first layer and dealt out by the upsampling
      layers (64 channels of 8, 8 of 64 …). Each value travels as itself and as its negative, since
      leaky_relu(x) - leaky_relu(-x) is a multiple of x; residual blocks add nothing.

    The reference encoder is random. What is spoken has the envelope of the source, and a pitch of 86.1 Hz.
    """
    sizes = {
        "inter_channels": _CARRIERS,
        "hidden_channels": _CARRIERS,
        # Nothing is asked of the residual blocks: the cheapest there are.
        "resblock": "2",
        "resblock_kernel_sizes": [1],
        "resblock_dilation_sizes": [[1, 1]],
        "gin_channels": 32,
    }
    return _write(directory, _sized(sizes), _vocoder(seed))


def _sized(sizes: dict[str, Any]) -> dict[str, Any]:
    described = copy.deepcopy(FULL)
    described["model"].update(sizes)
    return described


def _write(directory: Path, described: dict[str, Any], fill: Callable[[Any], None]) -> Path:
    """The files of a model of these sizes, its weights set by ``fill``."""
    from TTS.vc.models.openvoice import OpenVoice

    converter = directory / "converter"
    converter.mkdir(parents=True, exist_ok=True)
    (converter / "config.json").write_text(json.dumps(described, indent=2))
    model = OpenVoice(_model_config(converter / "config.json")).eval()
    with torch.no_grad():
        fill(model)
    weights = {"model": _published_names(model.state_dict()), "iteration": 0, "optimizer": None}
    torch.save(weights, converter / "checkpoint.pth")
    tone_colours = directory / "base_speakers" / "ses"
    tone_colours.mkdir(parents=True, exist_ok=True)
    for name in _BASE_SPEAKERS:
        torch.save(torch.randn(1, described["model"]["gin_channels"], 1), tone_colours / f"{name}.pth")
    return directory


def _published_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` with the names that the two parts of a normalised weight had when these were published."""
    names = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
    published = {}
    for name, tensor in state.items():
        for new, old in names.items():
            name = name.replace(new, old)
        published[name] = tensor.clone()
    return published


def _randomise(seed: int) -> Callable[[Any], None]:
    def fill(model: Any) -> None:
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            # As made, the couplings of the flow do nothing, and the decoder says the same to everything.
            if ".post." in name or name in ("dec.conv_pre.weight", "dec.conv_post.weight"):
                parameter.normal_(0, 1 / parameter[0].numel() ** 0.5)
            elif name.startswith("dec.") and name.endswith("original0"):
                parameter.fill_(1.2)
            elif name.startswith("dec.") and name.endswith("bias"):
                parameter.mul_(0.1)
        channels = model.args.gin_channels
        speech_like = torch.rand(1, model.spec_channels, 64) * 4
        voice = {"g_src": torch.zeros(1, channels, 1), "g_tgt": torch.ones(1, channels, 1)}
        said = model.inference(speech_like, voice)["model_outputs"]
        model.dec.conv_post.weight.mul_(_LEVEL / said.std())

    return fill


def _vocoder(seed: int) -> Callable[[Any], None]:
    def fill(model: Any) -> None:
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.startswith(("enc_q.", "dec.", "flow.")):
                # A layer with weight norm has gain 0 and any direction.
                parameter.fill_(1.0 if name.endswith("weight.original1") else 0.0)
        _fill_posterior(model.enc_q)
        for name, parameter in model.flow.named_parameters():
            if "cond_layer" in name or "res_skip_layers" in name:
                parameter.normal_(0, 1)
            elif ".post.weight" in name:
                parameter.normal_(0, 5e-4)
        # As made, it tells hardly any two voices apart.
        model.ref_enc.proj.weight.mul_(300)
        _fill_decoder(model.dec)

    return fill


def _fill_posterior(encoder: Any) -> None:
    """The mean of channel c is the magnitude around the c-th carrier, as the amplitude of a cosine."""
    bins = torch.arange(encoder.pre.weight.shape[1], dtype=torch.float32)
    carriers = 4.0 * torch.arange(1, _CARRIERS + 1)
    triangle = (1 - (bins[None] - carriers[:, None]).abs() / 8).clamp_min(0)
    # A cosine of amplitude a has a magnitude of 256 a in a Hann window of 1024.
    encoder.pre.weight[:_CARRIERS, :, 0] = triangle / 256 / 2
    small, channels = 0.05, encoder.hidden_channels
    gate = torch.zeros_like(encoder.enc.in_layers[0].weight)
    identity = torch.arange(_CARRIERS)
    gate[identity, identity, gate.shape[2] // 2] = small
    _set_weight(encoder.enc.in_layers[0], gate)
    encoder.enc.in_layers[0].bias[channels:] = 20.0
    passing = torch.zeros_like(encoder.enc.res_skip_layers[0].weight)
    passing[channels + identity, identity, 0] = 1 / small
    _set_weight(encoder.enc.res_skip_layers[0], passing)
    encoder.proj.weight[identity, identity, 0] = 1.0
    # exp(-7) of amplitude is the spread of every channel.
    encoder.proj.bias[encoder.proj.bias.shape[0] // 2 :] = -7.0


def _fill_decoder(decoder: Any) -> None:
    hop = 256
    time = torch.arange(hop) / hop
    order = torch.arange(1, _CARRIERS + 1, dtype=torch.float32)
    # Phases of Schroeder: the sum of many cosines without a peak.
    phase = -torch.pi * order * (order - 1) / _CARRIERS
    cosines = torch.cos(2 * torch.pi * order[None] * time[:, None] + phase[None])
    # From frame to frame amplitudes fade over: each sample looks at its own frame and the nearer neighbour.
    after = (time - 0.5).clamp_min(0)[:, None]
    before = (0.5 - time).clamp_min(0)[:, None]
    for tap, weight in ((2, before), (3, 1 - before - after), (4, after)):
        decoder.conv_pre.weight[:hop, :_CARRIERS, tap] = cosines * weight
        decoder.conv_pre.weight[hop:, :_CARRIERS, tap] = -cosines * weight
    values = hop
    for layer in decoder.ups:
        factor, padding = layer.stride[0], layer.padding[0]
        weight, half_in, half_out = torch.zeros_like(layer.weight), values, values // factor
        for position in range(factor):
            for value in range(half_out):
                # Value number position * half_out + value becomes value number ``value`` at that position.
                source, tap = position * half_out + value, position + padding
                for sign_in, sign_out in ((0, 0), (1, 1)):
                    own, other = sign_in * half_in + source, (1 - sign_in) * half_in + source
                    weight[own, sign_out * half_out + value, tap] = 1 / 1.1
                    weight[other, sign_out * half_out + value, tap] = -1 / 1.1
        _set_weight(layer, weight)
        values = half_out
    decoder.conv_post.weight[0, 0, 3], decoder.conv_post.weight[0, 1, 3] = 0.5, -0.5


def _set_weight(layer: Any, weight: torch.Tensor) -> None:
    """Set the weight of a layer with weight norm; a row of zeros has gain 0, and still needs a direction."""
    layer.weight = weight
    gain, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    direction.masked_fill_(gain == 0, 1.0)


def main() -> None:
    """Write the checkpoint named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    writers = {"tiny": write_tiny, "full": write_full_size, "spoken": write_spoken}
    parser.add_argument("kind", choices=writers)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    prepare_coqui("openvoice")
    writers[arguments.kind](arguments.directory)


if __name__ == "__main__":
    main()
