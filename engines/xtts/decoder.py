"""One step of XTTS's GPT for all live utterances, over a static attention cache.

Every utterance has a slot: a fixed place in the cache, from column 0 on. XTTS adds learned positions to its
input, so nothing is padded and nothing moves when others come and go. The hidden state that predicts a token
is the latent the vocoder speaks that token from; coqui-tts computes it a second time after decoding.

On a CPU each row attends to its own columns only: no work for padding, and sums that no other row can change.
On CUDA all slots are computed in every step with shapes that never change, which a CUDA graph needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engines.linear import Linear, Precision, activation_type, make_linear, row_floor

_Norm = tuple[Tensor, Tensor, float]


@dataclass(frozen=True, slots=True)
class _Layer:
    before_attention: _Norm
    before_perceptron: _Norm
    query_key_value: Linear
    attention_out: Linear
    perceptron_in: Linear
    perceptron_out: Linear


class Decoder:
    """The GPT with a cache of ``slots``. One thread at a time."""

    def __init__(
        self,
        gpt: Any,
        slots: int,
        columns: int,
        precision: Precision,
        device: torch.device,
        *,
        static: bool,
        graphs: bool = False,
    ) -> None:
        """``gpt``: coqui-tts's ``GPT``, float32 on the CPU. ``columns``: longest prompt and speech in tokens.

        ``static``: compute all slots in every step; ``graphs``: and replay that as a CUDA graph.
        """
        self._device, self._type = device, activation_type(precision)
        self._width, self._heads = gpt.model_dim, gpt.heads
        self._head_width = gpt.model_dim // gpt.heads
        self.vocabulary: int = gpt.num_audio_tokens
        self.start_token: int = gpt.start_audio_token
        self.stop_token: int = gpt.stop_audio_token
        self.max_tokens: int = gpt.max_gen_mel_tokens
        self._text_ends = (gpt.start_text_token, gpt.stop_text_token)

        def linear(weight: Tensor, bias: Tensor) -> Linear:
            return make_linear(weight, bias, precision, device)

        def norm(module: torch.nn.LayerNorm) -> _Norm:
            return self._own(module.weight), self._own(module.bias), module.eps

        # GPT-2 keeps its weights as [in, out].
        self._layers = [
            _Layer(
                norm(block.ln_1),
                norm(block.ln_2),
                linear(block.attn.c_attn.weight.t(), block.attn.c_attn.bias),
                linear(block.attn.c_proj.weight.t(), block.attn.c_proj.bias),
                linear(block.mlp.c_fc.weight.t(), block.mlp.c_fc.bias),
                linear(block.mlp.c_proj.weight.t(), block.mlp.c_proj.bias),
            )
            for block in gpt.gpt.h
        ]
        self._last_norms = norm(gpt.gpt.ln_f), norm(gpt.final_norm)
        self._head = linear(gpt.mel_head.weight, gpt.mel_head.bias)
        self._token_embedding = self._own(gpt.mel_embedding.weight)
        self._token_position = self._own(gpt.mel_pos_embedding.emb.weight)
        self._text_embedding = self._own(gpt.text_embedding.weight)
        self._text_position = self._own(gpt.text_pos_embedding.emb.weight)

        shape = (len(self._layers), slots, self._heads, columns, self._head_width)
        # zero_ touches every page: memory that is not there is missed now and not in the middle of a speech.
        self._keys = torch.empty(shape, dtype=self._type, device=device).zero_()
        self._values = torch.empty(shape, dtype=self._type, device=device).zero_()
        self._filled = [0] * slots
        self._static = _StaticStep(self, slots, graphs) if static else None
        self._row_floor = 1 if self._static else self._least_rows(slots)

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._device, self._type).contiguous()

    def _least_rows(self, slots: int) -> int:
        layer = self._layers[0]
        into_width = (layer.query_key_value, layer.attention_out, layer.perceptron_in, self._head)
        shapes = [*((linear, self._width) for linear in into_width), (layer.perceptron_out, 4 * self._width)]
        return row_floor(shapes, slots, self._type, self._device)

    def begin(self, slot: int, text_tokens: Sequence[int], latents: Tensor) -> tuple[Tensor, Tensor]:
        """Put a prompt into ``slot``: voice ``latents`` [32, width], text, start token.

        Returns logits [vocabulary] of the first audio token and its latent [width].
        """
        start, stop = self._text_ends
        text = torch.tensor([start, *text_tokens, stop], device=self._device)
        x = torch.cat(
            [
                latents.to(self._device, self._type),
                self._text_embedding[text] + self._text_position[: len(text)],
                (self._token_embedding[self.start_token] + self._token_position[0])[None],
            ]
        )
        length = len(x)
        for number, layer in enumerate(self._layers):
            query, key, value = self._query_key_value(layer, x)
            self._keys[number, slot, :, :length] = key
            self._values[number, slot, :, :length] = value
            attended = functional.scaled_dot_product_attention(
                query[None], key[None], value[None], is_causal=True
            )
            x = self._after_attention(layer, x, attended[0].transpose(0, 1))
        self._filled[slot] = length
        logits, latent = self._ends(self._padded(x[-1:]))
        return logits[0], latent[0]

    def step(
        self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Append one token to each of ``slots``; ``positions`` count the audio tokens of each from 1.

        Returns logits [n, vocabulary] and latents [n, width] of the tokens that follow.
        """
        filled = [self._filled[slot] for slot in slots]
        for slot in slots:
            self._filled[slot] += 1
        if self._static is not None:
            return self._static.step(slots, tokens, positions, filled)
        x = self._token_embedding[torch.tensor(tokens)] + self._token_position[torch.tensor(positions)]
        x = self._padded(x)
        attended = torch.zeros(len(x), self._heads, self._head_width, dtype=self._type)
        for number, layer in enumerate(self._layers):
            query, key, value = self._query_key_value(layer, x)
            for row, (slot, column) in enumerate(zip(slots, filled, strict=True)):
                keys, values = self._keys[number, slot], self._values[number, slot]
                keys[:, column], values[:, column] = key[:, row], value[:, row]
                seen = slice(0, column + 1)
                attended[row] = functional.scaled_dot_product_attention(
                    query[None, :, row : row + 1], keys[None, :, seen], values[None, :, seen]
                )[0, :, 0]
            x = self._after_attention(layer, x, attended)
        logits, latents = self._ends(x)
        return logits[: len(slots)], latents[: len(slots)]

    def _padded(self, x: Tensor) -> Tensor:
        """``x`` [n, width] with rows nobody looks at, so that its products have the bits of a batch."""
        missing = self._row_floor - len(x)
        return functional.pad(x, (0, 0, 0, missing)) if missing > 0 else x

    def _query_key_value(self, layer: _Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each [heads, n, head width]."""
        joint = layer.query_key_value(_normalised(x, layer.before_attention))
        query, key, value = joint.view(len(x), 3, self._heads, self._head_width).permute(1, 2, 0, 3).unbind(0)
        return query, key, value

    def _after_attention(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        """``attended``: [n, heads, head width]."""
        x = x + layer.attention_out(attended.reshape(len(x), self._width))
        inner = functional.gelu(
            layer.perceptron_in(_normalised(x, layer.before_perceptron)), approximate="tanh"
        )
        return x + layer.perceptron_out(inner)

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for norm in self._last_norms:
            x = _normalised(x, norm)
        return self._head(x), x


class _StaticStep:
    """The step over all slots at once, in buffers that stay where they are."""

    def __init__(self, decoder: Decoder, slots: int, graphs: bool) -> None:
        self._decoder = decoder
        device = decoder._device
        self._rows = torch.arange(slots, device=device)
        self._columns = torch.arange(decoder._keys.shape[3], device=device)
        # Token, position and column to write. Free slots write into column 0, which a prompt overwrites.
        self._inputs = torch.zeros(3, slots, dtype=torch.long, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs = self._forward()
        if graphs:
            self._capture()

    def _capture(self) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._outputs = self._forward()
        self._graph = graph

    def step(
        self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int], filled: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        inputs = torch.zeros(self._inputs.shape, dtype=torch.long)
        inputs[:, list(slots)] = torch.tensor([list(tokens), list(positions), list(filled)])
        self._inputs.copy_(inputs)
        if self._graph is None:
            self._outputs = self._forward()
        else:
            self._graph.replay()
        live = torch.tensor(slots, device=self._inputs.device)
        logits, latents = self._outputs
        return logits[live], latents[live]

    def _forward(self) -> tuple[Tensor, Tensor]:
        decoder = self._decoder
        tokens, positions, filled = self._inputs
        x = decoder._token_embedding[tokens] + decoder._token_position[positions]
        seen = (self._columns <= filled[:, None])[:, None, None]
        for number, layer in enumerate(decoder._layers):
            query, key, value = decoder._query_key_value(layer, x)
            keys, values = decoder._keys[number], decoder._values[number]
            keys[self._rows, :, filled] = key.transpose(0, 1)
            values[self._rows, :, filled] = value.transpose(0, 1)
            attended = functional.scaled_dot_product_attention(
                query.transpose(0, 1)[:, :, None], keys, values, attn_mask=seen
            )
            x = decoder._after_attention(layer, x, attended[:, :, 0])
        return decoder._ends(x)


def _normalised(x: Tensor, norm: _Norm) -> Tensor:
    weight, bias, epsilon = norm
    return functional.layer_norm(x, (x.shape[-1],), weight, bias, epsilon)
