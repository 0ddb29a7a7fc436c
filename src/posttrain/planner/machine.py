"""How much memory this machine can still give, and how fast its processor is; no torch."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from posttrain.planner.parts import PUBLISHED, Device

ON_CPU = replace(
    PUBLISHED,
    matmul=0.6,
    attention=0.15,
    pointwise=60.0,
    vocabulary=60.0,
    decode_flops=0.3,
    decode_step_s=1e-3,
    layer_call_s=5e-4,
)
"""Shares of float32 rates as numpy reaches them, and what torch's calls cost; of our own engine and loops on small models."""
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int | None:
    """Free memory of the host or of the container, whichever is less; None where the system does not tell."""
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = _read(cgroup / "memory.max"), _read(cgroup / "memory.current")
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _read(path: Path) -> int | None:
    """A number in a file; None if it is absent or says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def probe_cpu(seconds: float = 0.4) -> Device:
    """Measure this processor: float32 matrix products for compute, a large copy for bandwidth."""
    size = 768
    left = np.ones((size, size), dtype=np.float32)
    flops = 2.0 * size**3 * _rate(lambda: left @ left, seconds / 2)
    source = np.ones(16 << 20, dtype=np.float32)
    target = np.empty_like(source)
    bandwidth = 2.0 * source.nbytes * _rate(lambda: np.copyto(target, source), seconds / 2)
    memory = available_bytes() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        "cpu",
        float(memory),
        bandwidth,
        flops,
        bandwidth,
        host_link=bandwidth,
        source="measured",
        bytes_per_value=4,
        rates=ON_CPU,
    )


def _rate(call: object, seconds: float) -> float:
    """Calls per second, the first one left out."""
    assert callable(call)
    call()
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        call()
        count += 1
    return count / elapsed
