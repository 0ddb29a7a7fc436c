"""How often do the health rules see a fault, how late, and how often do they cry wolf? Real tiny runs, faults injected.

    python bench/health/detection.py --phase tune          # the seeds that thresholds were chosen on
    python bench/health/detection.py --phase test --doc    # the seeds that are reported; writes docs/failure-modes.md

Runs are kept in bench/out/health and not repeated. Actions are `log`, so a run goes to its end; the rules with their
default thresholds are then applied to its step reports, as the loop would have applied them.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import judge
import task
import torch
from cases import CASES, HEALTHY, Case, values_of
from run import train

from posttrain.errors import PosttrainError
from posttrain.files import read_json, read_json_lines, write_json

SEEDS = {
    "tune": {"sft": range(1000, 1012), "dpo": range(1000, 1012), "grpo": range(1000, 1012), "fault": range(1000, 1002)},
    "test": {"sft": range(2000, 2020), "dpo": range(2000, 2020), "grpo": range(2000, 2020), "fault": range(2000, 2004)},
}
"""Healthy runs by stage, and runs of each fault."""
RESULTS = task.OUT / "detection.json"
FORK = multiprocessing.get_context("fork")


def plan(phase: str) -> Iterator[tuple[Case, int]]:
    """Every fault once, all healthy runs, then the faults again: a bench stopped early has as many runs of each fault."""
    seeds = SEEDS[phase]
    faults = [(case, seed) for seed in seeds["fault"] for case in CASES if case.name != HEALTHY]
    healthy = [(case, seed) for case in CASES if case.name == HEALTHY for seed in seeds[case.kind]]
    once = sum(case.name != HEALTHY for case in CASES)
    yield from [*faults[:once], *sorted(healthy, key=lambda pair: pair[1]), *faults[once:]]


def path_of(phase: str, case: Case, seed: int) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in case.name)
    return task.OUT / phase / f"{case.kind}-{name}-{seed}.json"


def run_case(case: Case, seed: int, model: Path, path: Path) -> None:
    """In a process of its own: a patch dies with it."""
    folder = path.with_suffix(".run")
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(1)
    started, ended = time.monotonic(), "done"
    if case.patch is not None:
        case.patch()
    try:
        train(case.kind, folder, values_of(case, seed, model))
    except PosttrainError as error:
        ended = f"stopped: {error}"
    record = {"kind": case.kind, "case": case.name, "seed": seed, "ended": ended}
    record |= {"wall_s": time.monotonic() - started, "cpu_s": time.process_time(), "reports": reports_of(folder)}
    write_json(path, record)
    shutil.rmtree(folder)


def reports_of(folder: Path) -> list[dict[str, Any]]:
    """The logged step reports; what was not finite is text, since strict JSON has no NaN."""
    lines = [row for _, row in read_json_lines(folder / "metrics.jsonl")]
    return [
        {name: value for name, value in line.items() if isinstance(value, (int, float))}
        | dict.fromkeys(line.get("nonfinite", ()), "nan")
        for line in lines
    ]


def collect(phase: str, until: float) -> None:
    model = task.prepare()
    (task.OUT / phase).mkdir(parents=True, exist_ok=True)
    for case, seed in plan(phase):
        path = path_of(phase, case, seed)
        if path.exists():
            continue
        if time.time() > until:
            print("out of time: start again to go on")
            return
        child = FORK.Process(target=run_case, args=(case, seed, model, path))
        child.start()
        child.join()
        said = f"{read_json(path)['wall_s']:.0f} s" if path.exists() else f"died with exit code {child.exitcode}"
        print(f"{phase} {case.kind} {case.name} {seed}: {said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=sorted(SEEDS), required=True)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so long")
    parser.add_argument("--judge-only", action="store_true", help="judge the runs that are there")
    parser.add_argument("--doc", action="store_true", help="write the table to docs/failure-modes.md")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("POSTTRAIN_CACHE", str(task.OUT / "cache"))
    torch.set_num_threads(1)
    if not options.judge_only:
        collect(options.phase, time.time() + 60 * options.minutes)
    runs = [read_json(path) for path in sorted((task.OUT / options.phase).glob("*.json"))]
    results = (read_json(RESULTS) if RESULTS.exists() else {}) | {options.phase: judge.judged(runs)}
    # Both phases in one file, with their seeds: thresholds are chosen on the one and reported on the other.
    write_json(RESULTS, results)
    tuned = results.get("tune", {}) if options.phase == "test" else {}
    text = judge.render(results[options.phase], tuned, [case for case in CASES if case.name != HEALTHY])
    print(text)
    if options.doc:
        judge.write_doc(text)


if __name__ == "__main__":
    main()
