"""Time to the same accuracy: the quickstart's three stages through posttrain and through TRL's three trainers.

    python bench/time_to_accuracy.py --seeds 1 2 3      the table of docs/performance.md
    python bench/time_to_accuracy.py --quick            three steps a stage: to see that it runs

Model, data, reward and every hyperparameter are those of examples/quickstart; each stage starts from the model the same side made
before. A stage is a process of its own, and the sides take turns. All models are evaluated by our evaluator on the same held-out
items. Finished stages are kept under bench/out/ and not run again, so a run that was cut goes on; one with other settings is made
beside it. `--doc` writes the table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sections
import workload
from stage_posttrain import QUICKSTART, pipeline_of
from turns import busy_seconds, own_seconds
from vs_trl import QUIET, environment

if TYPE_CHECKING:
    from posttrain.evidence import EvalReport
    from posttrain.report.intervals import Interval

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STAGES = ("sft", "dpo", "grpo")
SIDES = {"ours": "stage_posttrain.py", "trl": "stage_trl.py"}
SUITES = ("heldout", "clean")
SAME_LOSS = 1e-4
"""Relative difference of the first SFT loss: both sides see the same batch with the same weights."""


@dataclass(frozen=True)
class Options:
    seeds: tuple[int, ...]
    threads: int
    max_steps: int
    split: str
    folder: Path


@dataclass(frozen=True)
class Done:
    """A finished stage of one side. Seconds: `call_s` of the training call, `process_s` of the whole process."""

    record: Mapping[str, Any]
    model: Path
    reports: Mapping[str, EvalReport]

    def __getitem__(self, name: str) -> Any:
        return self.record[name]


Runs = dict[tuple[int, str, str], Done]
"""(seed, side, stage) → what it did."""


def run_all(options: Options) -> Runs:
    """Every stage of every seed, the sides taking turns."""
    runs: Runs = {}
    for number, seed in enumerate(options.seeds):
        before = {side: ("base", str(QUICKSTART / "base")) for side in SIDES}
        for place, stage in enumerate(STAGES):
            # Each side is as often the first as the other.
            turn = list(SIDES) if (number + place) % 2 == 0 else list(SIDES)[::-1]
            for side in turn:
                done = run_stage(seed, side, stage, before[side], options)
                runs[seed, side, stage] = done
                before[side] = (done["finished"], str(done.model))
        check_first_loss(runs[seed, "ours", "sft"], runs[seed, "trl", "sft"])
    return runs


def run_stage(seed: int, side: str, stage: str, before: tuple[str, str], options: Options) -> Done:
    """Run it, or take over what an earlier start finished from the same model with the same settings."""
    folder = options.folder / f"seed-{seed}" / f"{side}-{STAGES.index(stage) + 1}-{stage}"
    job = {
        "kind": stage, "model": before[1], "seed": seed, "folder": str(folder), "max_steps": options.max_steps,
        "parent": before[0], "threads": options.threads,
    }  # fmt: skip
    return run_job(f"seed {seed} {stage} {side}", SIDES[side], job, options)


def run_job(title: str, script: str, job: Mapping[str, Any], options: Options) -> Done:
    """Run `script` on it and evaluate its model, unless the same job was finished before."""
    asked = from_root(job)
    folder, record = kept_run(Path(job["folder"]), asked)
    if record is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        record = {"job": asked, **timed(script, {**job, "folder": str(folder)}, folder, options)}
        (folder / "done.json").write_text(json.dumps(record, indent=1))
    done = Done(record, folder / "model", evaluated(folder / "model", folder / "evals", options))
    shown = ", ".join(f"{name} {report.mean:.3f}" for name, report in done.reports.items())
    print(f"{title}: call {done['call_s']:.1f} s, process {done['process_s']:.1f} s, "
          f"others' CPUs {done['others_cpus']:.2f}; {shown}", file=sys.stderr, flush=True)  # fmt: skip
    if done["others_cpus"] > QUIET:
        print("  warning: others used the machine; the ratio is less certain", file=sys.stderr)
    return done


def kept_run(folder: Path, asked: Mapping[str, Any]) -> tuple[Path, dict[str, Any] | None]:
    """Where `asked` was finished, and its record; else where it may run: in `folder`, or beside it where another job is finished there."""
    place, free, number = folder, None, 1
    while place.exists():
        kept = place / "done.json"
        record = json.loads(kept.read_text()) if kept.exists() else None
        if record is not None and record["job"] == asked:
            return place, record
        free = free or (place if record is None else None)
        number += 1
        place = folder.with_name(f"{folder.name}.{number}")
    return free or place, None


def from_root(job: Mapping[str, Any]) -> dict[str, Any]:
    """With paths as they are from the repository's root, so that a checkout that was moved knows what it finished."""
    root = json.dumps(f"{ROOT}/")[1:-1]
    return json.loads(json.dumps(job).replace(root, ""))


def timed(script: str, job: Mapping[str, Any], folder: Path, options: Options) -> dict[str, Any]:
    """Run the side's script and wait for it."""
    # Nothing that an earlier run has tokenised is found again, on neither side.
    variables = environment(options.threads) | {"XDG_CACHE_HOME": str(folder / "cache")}
    busy, own, start = busy_seconds(), own_seconds(), time.perf_counter()
    with (folder / "log.txt").open("wb") as log:
        status = subprocess.run(
            [sys.executable, str(HERE / script), json.dumps(job)], env=variables, stdout=log, stderr=log, check=False
        ).returncode  # fmt: skip
    process_s = time.perf_counter() - start
    if status:
        raise SystemExit(f"{script} ended with status {status}:\n{(folder / 'log.txt').read_text()[-3000:]}")
    others = ((busy_seconds() - busy) - (own_seconds() - own)) / process_s
    finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    stage = json.loads((folder / "stage.json").read_text())
    return stage | {"process_s": process_s, "others_cpus": max(0.0, others), "finished": finished}


def evaluated(
    model: Path, folder: Path, options: Options, others: Mapping[str, Path] | None = None
) -> dict[str, EvalReport]:
    """Our evaluator on the quickstart's suites, or on `others` in their places; a report that is already there is taken over. Not timed."""
    from transformers.utils.logging import disable_progress_bar

    from posttrain.config.stages import ModelKeys
    from posttrain.evals.suite import load_suite
    from posttrain.recipes.measure.evaluate import evaluate

    disable_progress_bar()
    suites = pipeline_of(0).evals
    paths = others or {name: Path(suites[name].path) for name in SUITES}
    asked = [(load_suite(name, path), suites[name]) for name, path in paths.items()]
    return evaluate(ModelKeys(base_model=str(model), device="cpu"), asked, options.split, folder)


def check_first_loss(ours: Done, trl: Done) -> None:
    """The same batch and weights must give the same loss, or the bench compares two different things."""
    mine, theirs = ours["losses"][0], trl["losses"][0]
    if not math.isclose(mine, theirs, rel_tol=SAME_LOSS):
        raise SystemExit(f"the first SFT step has loss {mine:.6f} here and {theirs:.6f} in TRL, on the same batch")


# --- the table -----------------------------------------------------------------------------------------------------


def render(runs: Runs, options: Options) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    machine = f"{os.cpu_count()} CPUs, {options.threads} threads, float32"
    others = max(done["others_cpus"] for done in runs.values())
    lines = [
        f"{packages}; {machine}; seeds {', '.join(map(str, options.seeds))}; others used up to {others:.2f} CPUs.",
        "",
        "| stage | training call, ours | TRL | ratio (min–max) | whole process, ratio (min–max) | accuracy, ours | TRL | difference (95 %) |",
        "|---|---|---|---|---|---|---|---|",
        *(stage_line(stage, (stage,), runs, options) for stage in STAGES),
        stage_line("**all three**", STAGES, runs, options),
        "",
        "| seed | final accuracy, ours | TRL | difference (95 %) | clean, ours | TRL | ratio of time, training calls | whole processes |",
        "|---|---|---|---|---|---|---|---|",
        *(seed_line(seed, runs) for seed in options.seeds),
    ]
    return "\n".join(lines)


def stage_line(title: str, stages: Sequence[str], runs: Runs, options: Options) -> str:
    """Seconds are medians over the seeds, summed over `stages`; accuracy is that after the last of them."""
    calls, processes = (ratios(name, stages, runs, options) for name in ("call_s", "process_s"))
    seconds = {side: statistics.median(total("call_s", seed, side, stages, runs) for seed in options.seeds) for side in SIDES}  # fmt: skip
    scores = {side: [runs[seed, side, stages[-1]].reports["heldout"] for seed in options.seeds] for side in SIDES}
    cells = [
        title.upper() if title in STAGES else title, f"{seconds['ours']:.0f} s", f"{seconds['trl']:.0f} s", spread(calls), spread(processes),
        *(share(over_seeds(scores[side])) for side in SIDES), points(over_seeds(scores["ours"], scores["trl"])),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def seed_line(seed: int, runs: Runs) -> str:
    from posttrain.report.intervals import difference_interval, score_interval

    ours, trl = (runs[seed, side, STAGES[-1]].reports for side in SIDES)
    difference = difference_interval(trl["heldout"], ours["heldout"])
    assert difference is not None, "both sides are evaluated on the same suite"
    times = [total(name, seed, "trl", STAGES, runs) / total(name, seed, "ours", STAGES, runs) for name in ("call_s", "process_s")]  # fmt: skip
    cells = [
        str(seed), share(score_interval(ours["heldout"])), share(score_interval(trl["heldout"])), points(difference),
        f"{100 * ours['clean'].mean:.1f}", f"{100 * trl['clean'].mean:.1f}", *(f"{ratio:.2f}×" for ratio in times),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def total(name: str, seed: int, side: str, stages: Sequence[str], runs: Runs) -> float:
    return sum(runs[seed, side, stage][name] for stage in stages)


def ratios(name: str, stages: Sequence[str], runs: Runs, options: Options) -> list[float]:
    """TRL's seconds by ours, per seed."""
    return [total(name, seed, "trl", stages, runs) / total(name, seed, "ours", stages, runs) for seed in options.seeds]


def over_seeds(reports: Sequence[EvalReport], baseline: Sequence[EvalReport] | None = None) -> Interval:
    """Mean over seeds and items, or that of the paired difference; the same item under all seeds is one cluster."""
    from posttrain.report.intervals import t_interval

    pairs = zip(reports, baseline or [None] * len(reports), strict=True)
    values: list[float] = []
    clusters: list[str] = []
    for report, other in pairs:
        before = {item.id: item.score for item in other.items} if other else {}
        values += [item.score - before.get(item.id, 0.0) for item in report.items]
        clusters += [item.id for item in report.items]
    return t_interval(values, clusters)


def spread(values: Sequence[float]) -> str:
    return f"**{statistics.median(values):.2f}×** ({min(values):.2f}–{max(values):.2f})"


def share(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} % ({100 * interval.low:.1f}–{100 * interval.high:.1f})"


def points(interval: Interval) -> str:
    return f"{100 * interval.mean:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


def main() -> None:
    arguments = parse()
    name = "time_to_accuracy-quick" if arguments.quick else "time_to_accuracy"
    folder = workload.OUT / name
    if arguments.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    options = Options(
        seeds=tuple(arguments.seeds[:1] if arguments.quick else arguments.seeds), threads=arguments.threads,
        max_steps=3 if arguments.quick else 0, split="dev" if arguments.quick else "gate", folder=folder,
    )  # fmt: skip
    runs = run_all(options)
    text = render(runs, options)
    print(text)
    records = [{"seed": seed, "side": side, "stage": stage, **done.record} for (seed, side, stage), done in runs.items()]  # fmt: skip
    (workload.OUT / f"{name}.json").write_text(json.dumps(records, indent=1))
    if arguments.doc:
        sections.write("time to accuracy", text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of both sides")
    parser.add_argument("--quick", action="store_true", help="one seed, three steps a stage: to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="run finished stages again")
    parser.add_argument("--doc", action="store_true", help="write the tables into docs/performance.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
