"""Linears of a frozen base in 8 bits, multiplied with as what they dequantise to.

LLM.int8 also rounds the inputs, outliers apart, so that no merged model computes what was trained; here only the weights are rounded, on
every device, in training and in evals, and the export is proven as that of 4 bits is.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.autograd._functions import MatMul8bitFp
from bitsandbytes.nn import Linear8bitLt


class DequantizedLinear(Linear8bitLt):
    """As `Linear8bitLt` with `has_fp16_weights=False` after `init_8bit_state`, whose weight is frozen; a backward pass dequantises again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        out: Any = MatMul8bitFp.apply(x.to(dtype), self.weight, None, bias, self.state)
        return out


def dequantized(module: Linear8bitLt) -> torch.Tensor:
    """Its weight as a float32 matrix."""
    weight: Any = module.weight
    scale: Any = module.state.SCB
    return weight.data.float().mul_(scale.unsqueeze(1).mul(1.0 / 127.0))
