"""`python show.py RUN`: the reward and the held-out accuracy of a run's RL stage, and a late sample."""

import sys
from pathlib import Path

from posttrain.files import read_json_lines

SUITE_STEPS = 10
WINDOW = 5


def main() -> None:
    (stage,) = Path(sys.argv[1]).glob("stages/*-grpo")
    reports = [report for _, report in read_json_lines(stage / "metrics.jsonl")]
    print(f"step   reward (mean of {WINDOW} steps)   held-out accuracy")
    for number, report in enumerate(reports):
        if "eval_score" in report and report["step"] % SUITE_STEPS == 0:
            recent = [r["reward"] for r in reports[max(0, number + 1 - WINDOW) : number + 1]]
            print(f"{report['step']:4d}   {sum(recent) / len(recent):22.2f}   {report['eval_score']:17.2f}")
    *_, (_, sample) = read_json_lines(stage / "samples.jsonl")
    print(
        f"a sample of step {sample['step']}: {sample['prompt']} → {sample['completion']!r}, reward {sample['reward']:.2f}\n"
    )


if __name__ == "__main__":
    main()
