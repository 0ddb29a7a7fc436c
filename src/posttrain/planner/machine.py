"""How much memory this machine can still give, and how fast its processor is; no torch."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from posttrain.planner.steptime import Device

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
        train_mfu=0.35,
        decode_mfu=0.35,
        overhead_s=2e-3,
        bytes_per_value=4,
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
