"""How cost grows with sequence length, batch, group and model size, and how much of the machine is used.

    python bench/scaling.py            some minutes with two threads on a quiet machine
    python bench/scaling.py --quick    two short lengths of each work: to see that it runs

A curve changes one size and keeps the others. Its exponent is the slope of log cost over log size, by least squares. MFU is the
arithmetic that the work needs over the measured rate of float32 products of the same shapes; MBU of decoding is the bytes
it must read over the measured memory rate. Prints the tables and writes `bench/out/scaling.json`; `--doc` also writes docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import machine_rates
import sections
import workload
from scaling_points import SIZES, WORKS, Point, Size, gemm_rows, linears_of, measure, shape_of
from turns import busy_seconds, own_seconds
from vs_trl import QUIET

STEPS = 3
AXES = {"length": "sequence length", "batch": "batch", "group": "group G", "model": "model size"}
TRAINED, RL = Size(), Size(batch=2)
CURVES = {
    ("sft", "length"): (TRAINED, (32, 64, 128, 256, 512, 1024)),
    ("sft", "batch"): (TRAINED, (1, 2, 4, 8, 16, 32)),
    ("sft", "model"): (TRAINED, tuple(SIZES)),
    ("dpo", "length"): (TRAINED, (32, 64, 128, 256, 512, 1024)),
    ("dpo", "batch"): (TRAINED, (1, 2, 4, 8, 16)),
    ("dpo", "model"): (TRAINED, tuple(SIZES)),
    ("rollouts", "length"): (RL, (32, 64, 128, 256, 512)),
    ("rollouts", "batch"): (RL, (1, 2, 4, 8, 16)),
    ("rollouts", "group"): (RL, (2, 4, 8, 16, 32)),
    ("rollouts", "model"): (RL, tuple(SIZES)),
    ("grpo", "length"): (RL, (32, 64, 128, 256, 512)),
    ("grpo", "batch"): (RL, (1, 2, 4, 8, 16)),
    ("grpo", "group"): (RL, (2, 4, 8, 16, 32)),
    ("grpo", "model"): (RL, tuple(SIZES)),
}
"""(work, axis) → what is kept, and the values of the axis."""


@dataclass(frozen=True)
class Measured:
    """A point with the machine's rates beside it. `x` is the axis as a number: tokens, rows, G or weights."""

    x: float
    point: Point
    mfu: float
    mbu: float | None


def curve(work: str, axis: str, steps: int, quick: bool, known: dict[tuple[str, Size], Point]) -> list[Measured]:
    kept, values = CURVES[work, axis]
    return [measured(work, axis, replace(kept, **{axis: value}), steps, known) for value in (values[:2] if quick else values)]  # fmt: skip


def measured(work: str, axis: str, size: Size, steps: int, known: dict[tuple[str, Size], Point]) -> Measured:
    """Curves cross in one point, which is measured once."""
    if (work, size) not in known:
        known[work, size] = measure(work, size, steps)
    point = known[work, size]
    matmul = machine_rates.matmul_rate(linears_of(size.model), gemm_rows(work, size))
    mbu = None if point.bytes_rate is None else point.bytes_rate / machine_rates.memory_rate()
    x = weights_of(size.model) if axis == "model" else getattr(size, axis)
    return Measured(x, point, point.flops_rate / matmul, mbu)


def weights_of(model: str) -> int:
    """Weights a token is multiplied with."""
    return sum(inputs * outputs * count for (inputs, outputs), count in linears_of(model).items())


def exponent(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Slope of log y over log x by least squares, and its standard error (NaN for two points)."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    spread = sum((a - mean_u) ** 2 for a in u)
    slope = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread
    if len(u) < 3:
        return slope, math.nan
    residual = sum((b - mean_v - slope * (a - mean_u)) ** 2 for a, b in zip(u, v, strict=True))
    return slope, math.sqrt(residual / (len(u) - 2) / spread)


# --- the tables ----------------------------------------------------------------------------------------------------


def render(curves: dict[tuple[str, str], list[Measured]], threads: int, others: float) -> str:
    import torch

    shape = shape_of(TRAINED.model)
    lines = [
        f"torch {torch.__version__}, {os.cpu_count()} CPUs, {threads} threads, float32; median of {STEPS} steps; others used "
        f"{others:.2f} CPUs. Unless it is the axis: {shape.linear_params / 1e6:.1f} M weights in linears and a head of "
        f"{shape.vocab * shape.hidden / 1e6:.1f} M; 128 tokens; 4 rows or pairs; for RL 2 prompts × 8 completions. Prompts take a quarter "
        "of an SFT row, half of a pair's sequences, 64 tokens in RL.",
        "", "| work | axis | points | cost over the first point's | exponent | cost per unit, last over first | MFU, % | MBU, % |",
        "|---|---|---|---|---|---|---|---|",
        *(line(work, axis, points) for (work, axis), points in curves.items()),
    ]  # fmt: skip
    return "\n".join(lines)


def line(work: str, axis: str, points: Sequence[Measured]) -> str:
    first, last = points[0], points[-1]
    slope, error = exponent([p.x for p in points], [p.point.seconds for p in points])
    per_unit = (last.point.seconds / last.x) / (first.point.seconds / first.x)
    cells = [
        WORKS[work].title, AXES[axis], listed(short(p.x) for p in points),
        listed(f"{p.point.seconds / first.point.seconds:.3g}" for p in points),
        f"**{slope:.2f}**" + ("" if math.isnan(error) else f" ± {error:.2f}"), f"{per_unit:.2f}×",
        listed(f"{100 * p.mfu:.0f}" for p in points),
        listed(f"{100 * p.mbu:.0f}" for p in points if p.mbu is not None),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def listed(values: Iterator[str]) -> str:
    return " · ".join(values)


def short(x: float) -> str:
    return f"{x / 1e6:.1f} M" if x >= 1e5 else f"{x:g}"


@contextmanager
def own_cache() -> Iterator[None]:
    """Tokenised rows of this bench do not stay in the user's cache."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        yield


def main() -> None:
    arguments = parse()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    logging.getLogger("posttrain").setLevel(logging.ERROR)
    known: dict[tuple[str, Size], Point] = {}
    curves: dict[tuple[str, str], list[Measured]] = {}
    busy, own, start = busy_seconds(), own_seconds(), time.perf_counter()
    wanted = arguments.work or list(WORKS)
    with own_cache():
        for work, axis in CURVES:
            if work in wanted and (axis == "length" or not arguments.quick):
                curves[work, axis] = curve(work, axis, 1 if arguments.quick else STEPS, arguments.quick, known)
                print(f"{line(work, axis, curves[work, axis])}  [{time.perf_counter() - start:.0f} s]", file=sys.stderr, flush=True)  # fmt: skip
    others = max(0.0, (busy_seconds() - busy) - (own_seconds() - own)) / (time.perf_counter() - start)
    if others > QUIET:
        print(f"warning: others used {others:.2f} CPUs; the numbers are less certain", file=sys.stderr)
    text = render(curves, arguments.threads, others)
    print(text)
    record = [{"work": work, "axis": axis, "points": [asdict(p) for p in points]} for (work, axis), points in curves.items()]  # fmt: skip
    (workload.OUT / "scaling.json").write_text(json.dumps({"others_cpus": others, "curves": record}, indent=1))
    if arguments.doc:
        sections.write("scaling", text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="append", choices=list(WORKS), help="only this work; may be repeated")
    parser.add_argument("--quick", action="store_true", help="two lengths of each work, one step each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--doc", action="store_true", help="write the table into docs/performance.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
