"""What a process that computes on a CPU keeps of the memory that it frees."""

from __future__ import annotations

import ctypes
import os

import torch

_THRESHOLD = 128 << 10
_M_MMAP_THRESHOLD = -3
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Of torch, which reads it when it first allocates."""


def give_back_freed() -> None:
    """Return every freed block above 128 KiB to the system at once, where glibc is asked for memory and the user has not tuned it.

    glibc maps such blocks only until it has freed one, and keeps them from then on: layers that are gathered and let go of
    in turn pile up to more than the model. Huge pages make up for a part of the time that new mappings cost.
    """
    libc = ctypes.CDLL(None)
    tuned = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
    if _HUGE_PAGES not in os.environ:
        os.environ[_HUGE_PAGES] = "1"
        torch.empty(1)
        del os.environ[_HUGE_PAGES]  # children are nobody's ranks
