"""Matrix products of the decode step, such that a row's result does not depend on the rows beside it.

BLAS libraries choose their kernel by the number of rows, and kernels sum in different orders: an utterance
would sound slightly different alone and in a batch, and after some tokens quite different. oneDNN's prepacked
kernels give equal bits from a few rows on; ``row_floor`` finds out from how many, on the weights at hand.

``int8`` quantises weights per output channel and activations per row, as they come. The usual dynamic
quantisation takes one scale for the whole batch, which would tie its rows together. Sums of products are
whole numbers and so the same in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Precision = Literal["fp32", "bf16", "fp16", "int8"]
Linear = Callable[[Tensor], Tensor]
"""[n, in] -> [n, out]."""

_TYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,
}
#: Greatest magnitude of a quantised activation; they are stored with this zero point.
_INT8_ZERO = 128
#: Without VNNI, two products are added in 16 bits before they are widened: half the range cannot overflow.
_INT8_RANGE_VNNI, _INT8_RANGE = 127, 63


def activation_type(precision: Precision) -> torch.dtype:
    """Type of everything between the matrix products, and of the attention cache."""
    return _TYPES[precision]


def make_linear(weight: Tensor, bias: Tensor, precision: Precision, device: torch.device) -> Linear:
    """``x @ weight.T + bias`` for ``weight`` [out, in] and ``bias`` [out]."""
    if precision == "int8":
        return _Int8Linear(weight, bias)
    kind = activation_type(precision)
    weight, bias = weight.to(device, kind).contiguous(), bias.to(device, kind)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return _PackedLinear(weight, bias)
    return lambda x: functional.linear(x, weight, bias)


class _PackedLinear:
    """Weights in oneDNN's own layout."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


class _Int8Linear:
    """int8 weights, float32 in and out."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        weight = weight.float()
        self._scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
        # Contiguous: the packing reads memory as it lies, and GPT-2's weights come transposed.
        quantised = (weight / self._scale[:, None]).round().to(torch.int8).contiguous()
        self._weight = torch.ops.onednn.qlinear_prepack(quantised, None)
        self._zero = torch.zeros(len(bias), dtype=torch.long)
        self._bias = bias.float()
        self._range = _INT8_RANGE_VNNI if _has_vnni() else _INT8_RANGE

    def __call__(self, x: Tensor) -> Tensor:
        scale = (x.abs().amax(1, keepdim=True) / self._range).clamp(min=1e-12)
        quantised = (x / scale).round_().add_(_INT8_ZERO).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            quantised, 1.0, _INT8_ZERO, self._weight, self._scale, self._zero,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return torch.addcmul(self._bias, product, scale)


def _has_vnni() -> bool:
    supported: bool = torch.cpu._is_vnni_supported()
    return supported


def row_floor(
    linears: Sequence[tuple[Linear, int]], rows: int, kind: torch.dtype, device: torch.device
) -> int:
    """Fewest rows to compute at once for a row to be the same alone and among up to ``rows``.

    ``linears``: each with the width of its input. In the worst case ``rows`` itself: always a full batch.
    """
    generator = torch.Generator().manual_seed(0)
    floor = 1
    for linear, width in linears:
        x = torch.randn(rows, width, generator=generator).to(device, kind)
        full = linear(x)
        if not torch.equal(linear(x.flip(0).contiguous()).flip(0), full):
            raise AssertionError("the place of a row in its batch changes its result")
        for count in range(rows - 1, floor - 1, -1):
            if not torch.equal(linear(x[:count].contiguous()), full[:count]):
                floor = count + 1
                break
    return floor
