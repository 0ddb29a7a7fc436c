"""What a verifier's errors cost: the quickstart's RL after SFT, paid by its reward with planted false positives and false negatives.

    python bench/verifier.py --doc      one seed, 40 steps; the table of docs/rewards.md
    python bench/verifier.py --quick    three steps a stage: to see that it runs

SFT is run once a seed and every pair of rates starts from its model. A wrong verdict is a function of the digest of question and answer
(bench/rewards/flipped.py), so the same answer is never judged twice differently. Accuracy is that of our evaluator, whose grader does not err,
on the same held-out items. Finished stages are kept under bench/out/ and not run again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import sections
import workload
from stage_posttrain import QUICKSTART
from staleness import logged
from time_to_accuracy import Done, Options, over_seeds, points, run_job, run_stage, share

if TYPE_CHECKING:
    from posttrain.report.intervals import Interval

HERE = Path(__file__).resolve().parent
DOC = HERE.parent / "docs" / "rewards.md"

Rates = tuple[float, float]
"""Of false positives among wrong answers, of false negatives among right ones."""

RATES: tuple[Rates, ...] = ((0.0, 0.0), (0.2, 0.0), (0.4, 0.0), (0.0, 0.2), (0.0, 0.4), (0.2, 0.2), (0.4, 0.4))


def run_all(options: Options, grpo_steps: int) -> tuple[dict[int, Done], dict[tuple[int, Rates], Done]]:
    """Seed → its SFT; (seed, rates) → RL from there."""
    before = {seed: run_stage(seed, "ours", "sft", ("base", str(QUICKSTART / "base")), options) for seed in options.seeds}  # fmt: skip
    after = {
        (seed, rates): run_rates(rates, seed, (done["finished"], str(done.model)), options, grpo_steps)
        for seed, done in before.items()
        for rates in RATES
    }
    return before, after


def run_rates(rates: Rates, seed: int, before: tuple[str, str], options: Options, grpo_steps: int) -> Done:
    """RL from the model `before` with these rates of error."""
    false_positive, false_negative = rates
    job = {
        "kind": "grpo", "model": before[1], "parent": before[0], "seed": seed, "max_steps": grpo_steps, "threads": options.threads,
        "folder": str(options.folder / f"seed-{seed}" / f"positive-{false_positive:g}-negative-{false_negative:g}"),
        # A reward that errs on purpose has no certificate.
        "set": [
            "grpo.reward_check=off",
            f"grpo.reward_funcs=['{HERE / 'rewards' / 'flipped.py'}:flipped']",
            f"grpo.reward_kwargs={{flipped: {{false_positive: {false_positive:g}, false_negative: {false_negative:g}}}}}",
        ],
    }  # fmt: skip
    return run_job(f"seed {seed} errors {false_positive:g} {false_negative:g}", "stage_posttrain.py", job, options)


def render(before: Mapping[int, Done], after: Mapping[tuple[int, Rates], Done], grpo_steps: int) -> str:
    seeds = f"seed{'s' * (len(before) > 1)} {', '.join(map(str, before))}"
    sft = share(_score(list(before.values())))
    return "\n".join([
        f"{grpo_steps or 'All'} steps; {seeds}; {sft} after SFT.",
        "",
        "| wrong answers paid | right answers not paid | held-out accuracy (95 %) | gained over SFT (95 %) | what the verifier pays, last 10 steps |",
        "|---|---|---|---|---|",
        *(_line(rates, before, after) for rates in dict.fromkeys(rates for _, rates in after)),
    ])  # fmt: skip


def _score(each: Sequence[Done]) -> Interval:
    return over_seeds([done.reports["heldout"] for done in each])


def _line(rates: Rates, before: Mapping[int, Done], after: Mapping[tuple[int, Rates], Done]) -> str:
    each = [after[seed, rates] for seed in before]
    gained = over_seeds([done.reports["heldout"] for done in each], [done.reports["heldout"] for done in before.values()])  # fmt: skip
    paid = statistics.mean(value for done in each for value in logged(done, "reward")[-10:])
    cells = [f"{100 * rates[0]:.0f} %", f"{100 * rates[1]:.0f} %", share(_score(each)), points(gained), f"{paid:.2f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--grpo-steps", type=int, default=40, help="0 leaves it to the pipeline")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--doc", action="store_true", help="write the table into docs/rewards.md")
    asked = parser.parse_args()
    steps, seeds = (3, asked.seeds[:1]) if asked.quick else (asked.grpo_steps, asked.seeds)
    folder = workload.OUT / ("verifier-quick" if asked.quick else "verifier")
    options = Options(tuple(seeds), asked.threads, 3 if asked.quick else 0, "dev" if asked.quick else "gate", folder)
    table = render(*run_all(options, steps), steps)
    print(table)
    if asked.doc:
        sections.write("verifier", table, DOC)


if __name__ == "__main__":
    main()
