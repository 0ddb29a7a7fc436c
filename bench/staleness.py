"""What staleness costs and saves: the quickstart's GRPO stage with `rollout.max_staleness` 0, 1, 2 and 4.

    python bench/staleness.py --seeds 1 2 3     the table of docs/scale.md
    python bench/staleness.py --quick           three steps: to see that it runs

Each seed's SFT and DPO are run once, and every bound starts from their model; accuracy is that of our evaluator on the same held-out items.
The embedded engine samples on the cores that train, so time says little here of machines where it has its own. Finished stages are kept
under bench/out/ and not run again; `--doc` writes the table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import sections
from posttrain.files import read_json_lines
from stage_posttrain import QUICKSTART
from time_to_accuracy import Done, Options, over_seeds, points, run_job, run_stage, share

BOUNDS = (0, 1, 2, 4)
HERE = Path(__file__).resolve().parent

Runs = dict[tuple[int, int], Done]
"""(seed, bound) → its GRPO stage."""


def run_all(options: Options, grpo_steps: int) -> Runs:
    runs: Runs = {}
    for number, seed in enumerate(options.seeds):
        before = ("base", str(QUICKSTART / "base"))
        for stage in ("sft", "dpo"):
            done = run_stage(seed, "ours", stage, before, options)
            before = (done["finished"], str(done.model))
        # No bound is always the first on a machine that warms up.
        for bound in BOUNDS if number % 2 == 0 else BOUNDS[::-1]:
            job = {
                "kind": "grpo", "model": before[1], "parent": before[0], "seed": seed, "max_steps": grpo_steps,
                "threads": options.threads, "folder": str(options.folder / f"seed-{seed}" / f"staleness-{bound}"),
                "set": [f"grpo.rollout.max_staleness={bound}"],
            }  # fmt: skip
            runs[seed, bound] = run_job(f"seed {seed} staleness {bound}", "stage_posttrain.py", job, options)
    return runs


def logged(done: Done, name: str) -> list[float]:
    """A metric of each generation batch."""
    rows = [row for _, row in read_json_lines(done.model.parent / "metrics.jsonl")]
    return [row[name] for row in rows if row.get(name) is not None]


def mean(found: Sequence[float]) -> str:
    return f"{statistics.mean(found):.2f}" if found else "–"


def line(bound: int, runs: Runs, seeds: Sequence[int]) -> str:
    each = [runs[seed, bound] for seed in seeds]
    reports = [done.reports["heldout"] for done in each]
    ratio = [done["call_s"] / runs[seed, 0]["call_s"] for seed, done in zip(seeds, each, strict=True)]
    ages, largest, trainer, engine = (
        [value for done in each for value in logged(done, name)]
        for name in (
            "sampling/staleness/mean",
            "sampling/staleness/max",
            "time/trainer_idle",
            "time/engine_idle",
        )
    )
    reward = [value for done in each for value in logged(done, "reward")[-10:]]
    cells = [
        str(bound), share(over_seeds(reports)), " ".join(f"{100 * report.mean:.1f}" for report in reports),
        "–" if bound == 0 else points(over_seeds(reports, [runs[seed, 0].reports["heldout"] for seed in seeds])), mean(reward),
        f"{statistics.median(done['call_s'] for done in each):.0f} s", f"{statistics.median(ratio):.2f}", mean(ages),
        f"{max(largest):.0f}" if largest else "–", mean(trainer), mean(engine),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def render(runs: Runs, options: Options, grpo_steps: int) -> str:
    others = max(done["others_cpus"] for done in runs.values())
    steps = f"{grpo_steps} of its 120 steps" if grpo_steps else "all its steps"
    return "\n".join([
        f"{steps}; seeds {', '.join(map(str, options.seeds))}; {options.threads} threads, float32; others used up to {others:.2f} CPUs.",
        "",
        "| max_staleness | held-out accuracy (95 %) | each seed | less that with 0 (95 %) | reward, last 10 batches | training call, median | of that with 0 | age of tokens, mean | largest | trainer waits | engine waits |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(line(bound, runs, options.seeds) for bound in BOUNDS),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--grpo-steps", type=int, default=0, help="0 leaves it to the pipeline")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--doc", action="store_true", help="write the table into docs/scale.md")
    asked = parser.parse_args()
    steps, seeds = (3, asked.seeds[:1]) if asked.quick else (asked.grpo_steps, asked.seeds)
    folder = HERE / "out" / ("staleness-quick" if asked.quick else "staleness")
    options = Options(tuple(seeds), asked.threads, 3 if asked.quick else 0, "dev" if asked.quick else "gate", folder)
    table = render(run_all(options, steps), options, steps)
    print(table)
    if asked.doc:
        sections.write("staleness", table, sections.DOCS / "scale.md")


if __name__ == "__main__":
    main()
