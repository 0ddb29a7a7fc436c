"""What the machine can do: matrix products at a model's own shapes, and memory traffic. Both are medians of a few runs.

python bench/machine_rates.py      GFLOP/s of `F.linear`, of a transposed and of a prepacked weight
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

_RUNS = 3
_MOST_ROWS = 4096
"""Rows beyond which a product's rate no longer changes; more would only cost time."""
_COPY_BYTES = 1 << 28


def matmul_rate(shapes: dict[tuple[int, int], int], rows: int) -> float:
    """FLOP/s of `rows` rows through float32 linears; `shapes` is (inputs, outputs) → how many."""
    flops = seconds = 0.0
    for (inputs, outputs), count in shapes.items():
        flops += count * 2.0 * inputs * outputs
        seconds += count * _seconds_per_row(inputs, outputs, max(1, min(rows, _MOST_ROWS)))
    return flops / seconds


@lru_cache(maxsize=512)
def _seconds_per_row(inputs: int, outputs: int, rows: int) -> float:
    """The faster of `F.linear` and oneDNN on a prepacked weight, where torch has it: the machine's rate, not a kernel's."""
    return min(median_seconds(kernel) for kernel in kernels(inputs, outputs, rows).values()) / rows


def kernels(inputs: int, outputs: int, rows: int) -> dict[str, Callable[[], Any]]:
    """Ways to multiply `rows` rows by one weight in float32."""
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    transposed = weight.t().contiguous()
    found: dict[str, Callable[[], Any]] = {
        "F.linear": lambda: torch.nn.functional.linear(x, weight),
        "transposed": lambda: x @ transposed,
    }
    ops: Any = torch.ops.mkldnn
    if hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise"):
        packed = ops._reorder_linear_weight(weight, rows)
        found["prepacked"] = lambda: ops._linear_pointwise(x, packed, None, "none", [], "")
    return found


@lru_cache(maxsize=1)
def memory_rate() -> float:
    """Bytes/s of the faster of reading a large array and copying it (which reads and writes)."""
    source = torch.ones(_COPY_BYTES // 4)
    target = torch.empty_like(source)
    return max(
        _COPY_BYTES / median_seconds(source.sum), 2 * _COPY_BYTES / median_seconds(lambda: target.copy_(source))
    )  # fmt: skip


@torch.no_grad()
def median_seconds(work: Callable[[], Any]) -> float:
    """One run warms up. Short work is repeated, so that the clock's own cost does not count."""
    start = time.perf_counter()
    work()
    repeats = max(1, min(100, round(2e-3 / max(1e-7, time.perf_counter() - start))))
    runs: list[float] = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        runs.append((time.perf_counter() - start) / repeats)
    return statistics.median(runs)


def main() -> None:
    print(f"memory: {memory_rate() / 1e9:.1f} GB/s; {torch.get_num_threads()} threads")
    for inputs, outputs in ((256, 768), (768, 256), (256, 4096), (512, 1536), (512, 32000)):
        for rows in (1500, 32, 8, 1):
            rates = {
                name: 2e-9 * rows * inputs * outputs / median_seconds(kernel)
                for name, kernel in kernels(inputs, outputs, rows).items()
            }
            shown = "  ".join(f"{name} {rate:6.1f}" for name, rate in rates.items())
            print(f"{rows:>5} rows × {inputs} → {outputs:<6} {shown}  GFLOP/s")


if __name__ == "__main__":
    main()
