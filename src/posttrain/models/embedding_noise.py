"""NEFTune: noise on the embeddings of a training forward. Source: Jain et al. 2023, arXiv 2310.05914, algorithm 1.

Differs from transformers and TRL, whose length is that of the padded or packed batch: here it is that of the row itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def noisy_embeddings(model: Any, alpha: float, position_ids_N: Tensor) -> Iterator[None]:
    """Inside, a training forward's embeddings have uniform noise within ± alpha / sqrt(length · width) added.

    Rows stand one after the other, and each begins at position 0. Neither scoring nor validation sees noise.
    """
    if not alpha or not model.training or not torch.is_grad_enabled():
        yield
        return
    length_N = row_lengths(position_ids_N)

    def add(module: Any, inputs: Any, output_1ND: Tensor) -> Tensor:
        width = output_1ND.shape[-1]
        bound_N = alpha / torch.sqrt(length_N.to(output_1ND.device, torch.float32) * width)
        noise_1ND = torch.empty_like(output_1ND).uniform_(-1, 1)
        return output_1ND + noise_1ND * bound_N[None, :, None].to(output_1ND.dtype)

    hook = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def row_lengths(position_ids_N: Tensor) -> Tensor:
    """Tokens of the row that each token stands in, its last one counted, which is no input. Shape: [N]."""
    row_N = (position_ids_N == 0).cumsum(0) - 1
    return torch.bincount(row_N)[row_N] + 1
