"""Where tensors live and in which precision: chosen here and nowhere else."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

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


def place(keys: ModelKeys, frozen: torch.dtype | None = None) -> Placement:
    """Where to run. `frozen` is the dtype in the file of a base that an adapter is trained on.

    Raises: ConfigError if a device is asked for that this machine does not have.
    """
    has_cuda = torch.cuda.is_available()
    if keys.device == "cuda" and not has_cuda:
        raise ConfigError("device: cuda, but torch sees no CUDA device here; set device: auto or cpu")
    kind = "cuda" if has_cuda and keys.device != "cpu" else "cpu"
    index = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", index) if kind == "cuda" else torch.device("cpu")
    # On a CPU `auto` never takes precision away: only a base that is bf16 as it is may be computed with in bf16.
    wanted = has_bf16(kind) and (kind == "cuda" or frozen == torch.bfloat16) if keys.bf16 == "auto" else keys.bf16
    return Placement(device, torch.bfloat16 if wanted else None)


def has_bf16(kind: str) -> bool:
    """Whether this machine multiplies in bf16 itself; a CPU that does not emulates it, an order of magnitude slower."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    traits = torch.cpu.get_capabilities()
    return any(traits.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"))


def weight_dtype(keys: ModelKeys, placement: Placement, stored: torch.dtype, *, trainable: bool) -> torch.dtype:
    """The dtype that a model's weights are held in, given that of its file.

    What is trained is float32. A frozen base keeps its file's dtype where that is what is computed with, so that no
    step mixes dtypes: under autocast, or alone (no adapter) on a machine that has the arithmetic.
    """
    if placement.autocast_dtype is not None:
        return torch.float32 if trainable and keys.adapter == "none" else stored
    if trainable or keys.bf16 is False:
        return torch.float32
    kind = placement.device.type
    native = has_bf16(kind) if stored == torch.bfloat16 else kind == "cuda"
    return stored if native else torch.float32


def uploaded(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The values there, without waiting for what the device is computing, as `torch.tensor(…, device=…)` would."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def release_cached() -> None:
    """What torch keeps of a card for itself is free for other processes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory_metrics() -> dict[str, float]:
    """The peak; of a GPU also what its allocator holds of it at most, and how often it had to clear its cache to go on."""
    metrics = {"memory_peak_bytes": peak_memory_bytes()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        metrics["memory_reserved_bytes"] = float(torch.cuda.max_memory_reserved())
        metrics["memory_alloc_retries"] = float(torch.cuda.memory_stats().get("num_alloc_retries", 0))
    return metrics


def peak_memory_bytes() -> float:
    """The most memory that this process has held so far: of its GPU where it has one in use, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
