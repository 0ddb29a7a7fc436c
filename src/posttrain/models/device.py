"""Where tensors live and in which precision: chosen here and nowhere else."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from posttrain.config.stages import ModelKeys
from posttrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Placement:
    """A device and, where bf16 is on, the autocast dtype; masters stay in float32."""

    device: torch.device
    autocast_dtype: torch.dtype | None

    def autocast(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)


def place(keys: ModelKeys) -> Placement:
    """Raises: ConfigError if a device is asked for that this machine does not have."""
    has_cuda = torch.cuda.is_available()
    if keys.device == "cuda" and not has_cuda:
        raise ConfigError("device: cuda, but torch sees no CUDA device here; set device: auto or cpu")
    kind = "cuda" if has_cuda and keys.device != "cpu" else "cpu"
    index = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", index) if kind == "cuda" else torch.device("cpu")
    # `auto` must not turn a CPU run into half precision: it is slower than float32 on CPUs without bf16 units.
    wanted = kind == "cuda" and torch.cuda.is_bf16_supported() if keys.bf16 == "auto" else keys.bf16
    return Placement(device, torch.bfloat16 if wanted else None)
