"""Kernels that score tokens straight from hidden states, without logits in memory: a row each, and where it fits.

Such a kernel has no bias and no soft cap. Where no row fits, `logprobs.py` goes by chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

_NO_TARGET = -100
_HOPPER = (9, 0)

FusedScores = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None]]
"""Of (hidden_MD, weight_VD, targets_M, temperature, with_entropy): log-prob and entropy of each token."""


class FusedHead(NamedTuple):
    fits: Callable[[Tensor], bool]
    """Whether this machine runs it on such hidden states, faster than by chunks."""
    scores: FusedScores


def fused_head(hidden_MD: Tensor, bias: Tensor | None, softcap: float | None) -> FusedScores | None:
    """The first kernel of the table that takes this head, or None."""
    if bias is not None or softcap is not None or not len(hidden_MD):
        return None
    return next((head.scores for head in FUSED_HEADS.values() if head.fits(hidden_MD)), None)


def _liger_fits(hidden_MD: Tensor) -> bool:
    """On other cards Liger goes by chunks too, with the head's gradient added up in bf16, so ours are taken there."""
    if not hidden_MD.is_cuda or hidden_MD.dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(hidden_MD.device) == _HOPPER and _has_liger()


@lru_cache(maxsize=1)
def _has_liger() -> bool:
    return all(find_spec(name) is not None for name in ("liger_kernel", "triton", "cutlass"))


def liger_scores(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Source: Liger-Kernel, fused linear scaled cross entropy (CuTe, SM90)."""
    function: Any = import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    found: Any = function.apply(
        hidden_MD.contiguous(), weight_VD.contiguous(), targets_M, temperature, _NO_TARGET, 1, with_entropy
    )
    return (-found[0], found[1].float()) if with_entropy else (-found, None)


FUSED_HEADS: Mapping[str, FusedHead] = {"liger": FusedHead(_liger_fits, liger_scores)}
"""In order of preference."""
