"""A head that multiplies in float32, whatever the rest of the model computes in."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from posttrain.errors import ModelError


class Float32Head(torch.nn.Linear):
    """The logits of a policy and of what samples from it differ least where no product of theirs is rounded to 16 bits.

    Source: ScaleRL, arXiv 2510.13786; MiniMax-M1, arXiv 2506.13585. The weights stay as they are.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def put_head_in_float32(model: torch.nn.Module) -> None:
    """Raises: ModelError."""
    plain_head(model).__class__ = Float32Head


def plain_head(model: torch.nn.Module) -> torch.nn.Linear:
    """Raises: ModelError for a head that is no plain matrix: under an adapter, or quantised."""
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if type(head) is not torch.nn.Linear:
        raise ModelError(
            f"cast_lm_head_to_fp32: true with a head that is {type(head).__name__}, expected a plain matrix; leave the head out of lora_target and "
            "lora_modules_to_save, or set cast_lm_head_to_fp32: false"
        )
    return head
