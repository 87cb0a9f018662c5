"""One step of the GPT for all live utterances, over a static attention cache.

The model is upstream's ``Text2SemanticDecoder`` (AR/models/t2s_model.py): text and tokens each with sine
positions of their own, normalised after every layer; the text is read in both directions, tokens only back.
Every utterance has a slot: a fixed place in the cache, from column 0 on. Nothing is padded and nothing
moves when others come and go.

On a CPU each row attends to its own columns only: no work for padding, and sums that no other row can
change. On CUDA all slots are computed in every step, over the columns of the smallest bucket that is
enough, in shapes a CUDA graph can replay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engines.contract import ModelCorrupt
from engines.gpt_sovits.checkpoint import GptWeights
from engines.gpt_sovits.text import Phones
from engines.linear import Linear, Precision, activation_type, make_linear, row_floor

_Norm = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Layer:
    query_key_value: Linear
    attention_out: Linear
    after_attention: _Norm
    perceptron_in: Linear
    perceptron_out: Linear
    after_perceptron: _Norm


class Decoder:
    """The GPT with a cache of ``slots``. One thread at a time."""

    def __init__(
        self,
        weights: GptWeights,
        slots: int,
        buckets: Sequence[int],
        precision: Precision,
        device: torch.device,
        *,
        static: bool,
        graphs: bool = False,
    ) -> None:
        """``buckets``: ascending; the last is the longest prompt and speech of an utterance in columns.

        ``static``: compute all slots in every step; ``graphs``: and replay that as CUDA graphs. Raises
        ``ModelCorrupt`` if a tensor is missing.
        """
        self._device, self._type = device, activation_type(precision)
        config, state = weights.config, weights.state
        self._width, self._heads = int(config["hidden_dim"]), int(config["head"])
        self._head_width = self._width // self._heads
        self.vocabulary, self.end_token = int(config["vocab_size"]), int(config["EOS"])
        #: Longest prompt and speech.
        self.columns = buckets[-1]

        def linear(name: str, weight: str = "weight", bias: str | None = "bias") -> Linear:
            matrix = state[f"{name}{weight}"]
            offset = torch.zeros(len(matrix)) if bias is None else state[f"{name}{bias}"]
            return make_linear(matrix, offset, precision, device)

        def norm(name: str) -> _Norm:
            return self._own(state[f"{name}.weight"]), self._own(state[f"{name}.bias"])

        try:
            self._layers = [
                _Layer(
                    linear(f"{layer}self_attn.in_proj_", "weight", "bias"),
                    linear(f"{layer}self_attn.out_proj."),
                    norm(f"{layer}norm1"),
                    linear(f"{layer}linear1."),
                    linear(f"{layer}linear2."),
                    norm(f"{layer}norm2"),
                )
                for layer in (f"h.layers.{number}." for number in range(int(config["n_layer"])))
            ]
            self._head = linear("ar_predict_layer.", bias=None)
            self._bert = (self._own(state["bert_proj.weight"]), self._own(state["bert_proj.bias"]))
            self._text_embedding, self._token_embedding = (
                self._own(state[f"ar_{kind}_embedding.word_embeddings.weight"]) for kind in ("text", "audio")
            )
            positions = _sines(self.columns, self._width)
            self._text_position, self._token_position = (
                self._own(state[f"ar_{kind}_position.alpha"].float().cpu() * positions)
                for kind in ("text", "audio")
            )
        except KeyError as error:
            raise ModelCorrupt(
                f"The GPT weights have no tensor {error}.", next_step="Get the published file again."
            ) from error

        shape = (len(self._layers), slots, self._heads, self.columns, self._head_width)
        # zero_ touches every page: memory that is not there is missed now and not in the middle of a speech.
        # And what was never written must not be NaN, which a mask does not hide.
        self._keys = torch.empty(shape, dtype=self._type, device=device).zero_()
        self._values = torch.empty(shape, dtype=self._type, device=device).zero_()
        self._filled = [0] * slots
        self._static = _StaticStep(self, slots, buckets, graphs) if static else None
        self._row_floor = 1 if self._static else self._least_rows(slots)

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._device, self._type).contiguous()

    def _least_rows(self, slots: int) -> int:
        layer = self._layers[0]
        into_width = (layer.query_key_value, layer.attention_out, layer.perceptron_in, self._head)
        shapes = [*((linear, self._width) for linear in into_width), (layer.perceptron_out, 4 * self._width)]
        return row_floor(shapes, slots, self._type, self._device)

    def begin(self, slot: int, phones: Phones, prompt: Tensor) -> Tensor:
        """Put text and ``prompt`` [n] (semantic tokens, may be empty) into ``slot``.

        Returns logits [vocabulary] of the first token.
        """
        ids = torch.tensor(phones.ids, device=self._device)
        bert = functional.linear(phones.features.to(self._device, self._type), *self._bert)
        text = self._text_embedding[ids] + bert + self._text_position[: len(ids)]
        prompt = prompt.to(self._device)
        x = torch.cat([text, self._token_embedding[prompt] + self._token_position[: len(prompt)]])
        length = len(x)
        seen = torch.ones(length, length, dtype=torch.bool, device=self._device).tril_()
        seen[:, : len(ids)] = True
        for number, layer in enumerate(self._layers):
            query, key, value = self._query_key_value(layer, x)
            self._keys[number, slot, :, :length] = key
            self._values[number, slot, :, :length] = value
            attended = functional.scaled_dot_product_attention(
                query[None], key[None], value[None], attn_mask=seen
            )
            x = self._after_attention(layer, x, attended[0].transpose(0, 1))
        self._filled[slot] = length
        return self._head(self._padded(x[-1:]))[0]

    def step(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Append one token to each of ``slots``; ``positions`` count the tokens of prompt and speech from 0.

        Returns logits [n, vocabulary] of the tokens that follow.
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
        return self._head(x)[: len(slots)]

    def _padded(self, x: Tensor) -> Tensor:
        """``x`` [n, width] with rows nobody looks at, so that its products have the bits of a batch."""
        missing = self._row_floor - len(x)
        return functional.pad(x, (0, 0, 0, missing)) if missing > 0 else x

    def _query_key_value(self, layer: _Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each [heads, n, head width]."""
        joint = layer.query_key_value(x)
        query, key, value = joint.view(len(x), 3, self._heads, self._head_width).permute(1, 2, 0, 3).unbind(0)
        return query, key, value

    def _after_attention(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        """``attended``: [n, heads, head width]."""
        x = _normalised(x + layer.attention_out(attended.reshape(len(x), self._width)), layer.after_attention)
        inner = functional.relu(layer.perceptron_in(x))
        return _normalised(x + layer.perceptron_out(inner), layer.after_perceptron)


class _StaticStep:
    """The step over all slots at once, in buffers that stay where they are."""

    def __init__(self, decoder: Decoder, slots: int, buckets: Sequence[int], graphs: bool) -> None:
        self._decoder, self._buckets = decoder, tuple(buckets)
        device = decoder._device
        self._rows = torch.arange(slots, device=device)
        self._columns = torch.arange(decoder.columns, device=device)
        # Token, position and column to write. Free slots write into column 0, which a prompt overwrites.
        self._inputs = torch.zeros(3, slots, dtype=torch.long, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        if graphs:
            # The greatest first: the others find room in its memory.
            for columns in reversed(self._buckets):
                self._graphs[columns] = self._capture(columns)

    def _capture(self, columns: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward(columns)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._forward(columns)
        return graph, logits

    def step(
        self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int], filled: Sequence[int]
    ) -> Tensor:
        inputs = torch.zeros(self._inputs.shape, dtype=torch.long)
        inputs[:, list(slots)] = torch.tensor([list(tokens), list(positions), list(filled)])
        self._inputs.copy_(inputs)
        columns = next(bucket for bucket in self._buckets if bucket > max(filled))
        captured = self._graphs.get(columns)
        if captured is None:
            logits = self._forward(columns)
        else:
            graph, logits = captured
            graph.replay()
        return logits[torch.tensor(slots, device=self._inputs.device)]

    def _forward(self, columns: int) -> Tensor:
        decoder = self._decoder
        tokens, positions, filled = self._inputs
        x = decoder._token_embedding[tokens] + decoder._token_position[positions]
        seen = (self._columns[:columns] <= filled[:, None])[:, None, None]
        for number, layer in enumerate(decoder._layers):
            query, key, value = decoder._query_key_value(layer, x)
            keys, values = decoder._keys[number], decoder._values[number]
            keys[self._rows, :, filled] = key.transpose(0, 1)
            values[self._rows, :, filled] = value.transpose(0, 1)
            attended = functional.scaled_dot_product_attention(
                query.transpose(0, 1)[:, :, None],
                keys[:, :, :columns],
                values[:, :, :columns],
                attn_mask=seen,
            )
            x = decoder._after_attention(layer, x, attended[:, :, 0])
        return decoder._head(x)


def _normalised(x: Tensor, norm: _Norm) -> Tensor:
    return functional.layer_norm(x, (x.shape[-1],), *norm)


def _sines(count: int, width: int) -> Tensor:
    """Positions [count, width] as upstream's ``SinePositionalEmbedding`` makes them."""
    position = torch.arange(count, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10_000.0) / width))
    sines = torch.zeros(count, width)
    sines[:, 0::2], sines[:, 1::2] = torch.sin(position * rate), torch.cos(position * rate)
    return sines
