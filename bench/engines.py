"""Does RL learn as much from another rollout engine? The quickstart's GRPO stage with vLLM and with the embedded engine.

    python bench/engines.py --seeds 1 2 3 --doc      the table of docs/performance.md
    python bench/engines.py --quick                  one seed, three steps a stage: to see that it runs

SFT and DPO are trained once; each seed then trains GRPO from that model with each engine, in processes of their own that take
turns. All models answer the same held-out items through the embedded engine. A seed is the unit of the interval: both engines
draw other tokens from it, so that runs of one seed are no more alike than runs of two. Finished stages are kept under bench/out/.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import sections
import workload
from posttrain.report.intervals import t_interval
from posttrain.rollout.vllm.options import installed
from stage_posttrain import QUICKSTART
from time_to_accuracy import Done, Options, run_job

ENGINES = ("embedded", "vllm")
START_SEED = 42
AIM = -2.0
"""Points that the other engine may be behind, in the mean over seeds."""

Runs = Mapping[tuple[int, str], Done]
"""(seed, engine) → its GRPO stage."""


@dataclass(frozen=True)
class Difference:
    """Points of accuracy, vLLM less embedded: mean over seeds and its 95 % interval, seeds being independent."""

    mean: float
    low: float
    high: float


def run_all(options: Options) -> Runs:
    model = QUICKSTART / "base"
    for kind in ("sft", "dpo"):
        model = run_stage(kind, START_SEED, "embedded", model, options).model
    runs: dict[tuple[int, str], Done] = {}
    for number, seed in enumerate(options.seeds):
        # Each engine is as often the first as the other.
        for engine in ENGINES if number % 2 == 0 else ENGINES[::-1]:
            runs[seed, engine] = run_stage("grpo", seed, engine, model, options)
    return runs


def run_stage(kind: str, seed: int, engine: str, model: Path, options: Options) -> Done:
    job = {
        "kind": kind, "model": str(model), "seed": seed, "max_steps": options.max_steps, "threads": options.threads,
        "folder": str(options.folder / f"{kind}-{seed}-{engine}"), "set": [f"grpo.rollout.engine={engine}"],
    }  # fmt: skip
    return run_job(f"{kind} seed {seed} {engine}", "stage_posttrain.py", job, options)


def difference(runs: Runs, seeds: Sequence[int]) -> Difference:
    found = t_interval([100 * (accuracy(runs[seed, "vllm"]) - accuracy(runs[seed, "embedded"])) for seed in seeds])
    return Difference(found.mean, found.low, found.high)


def accuracy(done: Done) -> float:
    return done.reports["heldout"].mean


def render(runs: Runs, options: Options) -> str:
    found = difference(runs, options.seeds)
    lines = [
        f"torch {version('torch')}, vLLM {installed()}; float32; {options.threads} thread(s); GRPO from one SFT and DPO model, 120 steps of 64 completions.",
        "",
        "| seed | heldout, embedded | vLLM | difference | clean, embedded | vLLM | training call, embedded | vLLM |",
        "|---|---|---|---|---|---|---|---|",
        *(seed_line(seed, runs) for seed in options.seeds),
        "",
        f"Mean difference over {len(options.seeds)} seeds **{found.mean:+.1f} points** (95 % interval over seeds {found.low:+.1f} "
        f"to {found.high:+.1f}); the aim is {AIM:+.0f} or more.",
    ]
    return "\n".join(lines)


def seed_line(seed: int, runs: Runs) -> str:
    pair = [runs[seed, engine] for engine in ENGINES]
    heldout = [100 * accuracy(done) for done in pair]
    clean = [100 * done.reports["clean"].mean for done in pair]
    cells = [
        str(seed), *(f"{value:.1f}" for value in heldout), f"{heldout[1] - heldout[0]:+.1f}",
        *(f"{value:.1f}" for value in clean), *(f"{done['call_s']:.0f} s" for done in pair),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    arguments = parse()
    name = "engines-quick" if arguments.quick else "engines"
    folder = workload.OUT / name
    if arguments.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    options = Options(
        seeds=tuple(arguments.seeds[:1] if arguments.quick else arguments.seeds), threads=arguments.threads,
        max_steps=3 if arguments.quick else 0, split="dev" if arguments.quick else "gate", folder=folder,
    )  # fmt: skip
    text = render(run_all(options), options)
    print(text)
    if arguments.doc:
        sections.write("engines", text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of both engines' processes")
    parser.add_argument("--quick", action="store_true", help="one seed, three steps a stage: to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="run finished stages again")
    parser.add_argument("--doc", action="store_true", help="write the table into docs/performance.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
