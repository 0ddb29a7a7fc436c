"""`plan --probe`: the rates of this machine as torch reaches them, in well under two minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from posttrain.planner.machine import ON_CPU, available_bytes
from posttrain.planner.parts import DEVICES, PUBLISHED, Device

_CALLS_OF_A_LAYER = 60
"""Operations that a decoder layer's forward pass calls."""


def probe(seconds: float = 6.0) -> Device:
    """A GPU where there is one, else the processor. Matrix products, a copy, a link, and what a small call costs."""
    import torch

    return _probe_gpu(torch, seconds) if torch.cuda.is_available() else _probe_processor(torch, seconds)


def _probe_processor(torch: Any, seconds: float) -> Device:
    size, third = 512, seconds / 3
    left, right = torch.randn(size, size), torch.randn(size, size)
    flops = 2.0 * size**3 * _rate(lambda: left @ right, third)
    source = torch.ones(16 << 20)
    target = torch.empty_like(source)
    bandwidth = 2.0 * source.nbytes * _rate(lambda: target.copy_(source), third)
    small = torch.ones(64, requires_grad=True)
    call_s = 1 / _rate(lambda: small * 2, third)
    # The products were measured, so what is reached of them is most.
    rates = replace(ON_CPU, matmul=0.9, layer_call_s=_CALLS_OF_A_LAYER * call_s)
    return Device(
        "cpu",
        float(available_bytes() or 0),
        bandwidth,
        flops,
        bandwidth,
        host_link=bandwidth,
        source="probed",
        bytes_per_value=4,
        rates=rates,
    )


def _probe_gpu(torch: Any, seconds: float) -> Device:
    """Never run by this project's tests, which have no GPU. Two GPUs measure their link, one its way to the host."""
    size, quarter = 8192, seconds / 4
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    sync = torch.cuda.synchronize
    flops = 2.0 * size**3 * _rate(lambda: (left @ left, sync()), quarter)
    source = torch.ones(256 << 20, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    bandwidth = 2.0 * source.nbytes * _rate(lambda: (target.copy_(source), sync()), quarter)
    other = torch.empty(256 << 20, device="cuda:1" if torch.cuda.device_count() > 1 else "cpu", dtype=torch.uint8)
    link = source.nbytes * _rate(lambda: (other.copy_(source), sync()), quarter)
    pinned = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    host_link = source.nbytes * _rate(lambda: (target.copy_(pinned, non_blocking=True), sync()), quarter)
    known = next(
        (d for name, d in DEVICES.items() if name in torch.cuda.get_device_name().lower().replace(" ", "")), None
    )
    # Shares in the table are of data-sheet rates; these rates are what is reached of them.
    rates = replace(
        PUBLISHED,
        matmul=1.0,
        attention=min(1.0, PUBLISHED.attention / PUBLISHED.matmul),
        decode_bandwidth=0.8,
        host_copy=1.0,
    )
    memory = float(torch.cuda.get_device_properties(0).total_memory)
    return Device(
        torch.cuda.get_device_name(),
        memory,
        bandwidth,
        flops,
        link,
        host_link,
        known.reached if known else 1.0,
        "probed",
        rates=rates,
    )


def _rate(call: Callable[[], object], seconds: float) -> float:
    """Calls per second, the first one left out."""
    call()
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds or not count:
        call()
        count += 1
    return count / elapsed
