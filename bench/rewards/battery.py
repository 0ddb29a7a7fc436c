"""The battery of `posttrain rewards check` over other people's rewards, beside ours: python bench/rewards/battery.py

Writes the tables into docs/rewards.md. A mutation counts only where the reward's own description is touched by it;
`NOT_PROMISED` says which are left out for whom, and why.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.rewards.cases import cases_of
from posttrain.rewards.certificate import check_rewards
from posttrain.rewards.check import Thresholds
from posttrain.rewards.workers import RewardPool
from posttrain.types import Origin, Prompt

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "rewards.md"
DEADLINE_S = 30
"""Longer than the timers that TRL and math-verify set themselves, so that those decide."""
START, END = "<!-- battery:start -->", "<!-- battery:end -->"
GOLDS = {
    "number": ["11", "-14", "17", "1200", "3/4", "0", "2.5", "96"],
    "text": [r"2\sqrt{3}", "x^2+1", "(1,2)", r"\frac{\pi}{2}"],
    "choice": list("ABCD"),
    "words": ["Paris", "Rome", "Oslo"],
}
NO_THINK = {"gold only in think", "unclosed or fake think"}
BY_VALUE = {"unevaluated expression", "percent and unit swap"}
NOT_PROMISED: dict[str, tuple[set[str], str]] = {
    "trl_accuracy": (NO_THINK | BY_VALUE, "knows no reasoning tags; compares by value and drops units on purpose"),
    "trl_reasoning_accuracy": (BY_VALUE, "compares by value and drops units on purpose"),
    "math_verify_direct": (NO_THINK | BY_VALUE, "knows no reasoning tags; compares by value"),
}
"""Reward → the mutations that its description does not speak of, and the reason."""

OURS = {"boxed": ("number",), "math_equivalence": ("number", "text"), "number": ("number",), "choice": ("choice",), "exact": ("words",)}  # fmt: skip
ACCURACY = {
    "trl_accuracy": ("number", "text"),
    "trl_reasoning_accuracy": ("number",),
    "math_verify_direct": ("number", "text"),
}
FORM_ONLY = ("think_format", "trl_think_format", "soft_overlong", "trl_soft_overlong", "repetition_penalty", "trl_repetition_penalty")  # fmt: skip


@dataclass
class Result:
    """Counts over the case sets of one reward, by mutation."""

    name: str
    num: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, str] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)

    def rate(self, kind: str) -> str:
        """Violations of a class, without what the reward does not promise."""
        left_out = NOT_PROMISED.get(self.name, (set(), ""))[0]
        names = [name for name, of in self.kinds.items() if of == kind and name not in left_out]
        num, bad = sum(self.num[name] for name in names), sum(self.bad[name] for name in names)
        return f"{bad} of {num}" if num else "–"


def run(name: str, sets: tuple[str, ...]) -> Result:
    result = Result(name)
    spec = f"{HERE / 'others.py'}:{name}" if (HERE / "others.py").read_text().count(f"def {name}(") else name
    for golds in sets:
        prompts = [
            Prompt(Origin(golds, i), ({"role": "user", "content": f"Question {i} of {golds}?"},), {"answer": gold})
            for i, gold in enumerate(GOLDS[golds])
        ]
        with RewardPool([spec], timeout_s=DEADLINE_S) as pool:
            found = check_rewards(pool, cases_of(prompts), thresholds=Thresholds(mutation_cases=4))
        for row in found.mutations:
            result.num[row.name] += row.num
            result.bad[row.name] += row.violations
            result.kinds[row.name] = row.kind
        worst = {k: max(v, result.measures.get(k, v)) for k, v in found.measures.items() if k != "recall"}
        recall = found.measures.get("recall")
        if recall is not None:
            worst["recall"] = min(recall, result.measures.get("recall", recall))
        result.measures |= worst
    return result


def tables(results: list[Result]) -> str:
    lines = [
        "| reward | recall | rewritten golds that lose | cheats that pay | hostile texts not survived | repeats that differ | p50 / p99 |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        recall = f"{r.measures['recall']:.0%}" if "recall" in r.measures else "–"
        latency = f"{1e3 * r.measures['latency_p50_s']:.1f} / {1e3 * r.measures['latency_p99_s']:.0f} ms"
        differing = f"{r.measures['determinism differences']:.0f}"
        lines.append(
            f"| `{r.name}` | {recall} | {r.rate('E')} | {r.rate('Z')} | {r.rate('N')} | {differing} | {latency} |"
        )
    judged = [r for r in results if "Z" in r.kinds.values()]
    names = list(
        dict.fromkeys(name for r in judged for name, kind in r.kinds.items() if any(o.bad[name] for o in judged))
    )
    lines += [
        "",
        "Violations by mutation (those with any; `·` not promised by that reward, `–` makes no text for its cases):",
        "",
    ]
    lines += ["| mutation | " + " | ".join(f"`{r.name}`" for r in judged) + " |", "|---" * (len(judged) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(_cell(r, name) for r in judged) + " |" for name in names]
    lines += [""] + [
        f"- Left out for `{name}`: {', '.join(sorted(out))}: {why}." for name, (out, why) in NOT_PROMISED.items()
    ]
    return "\n".join(lines)


def _cell(result: Result, name: str) -> str:
    if name in NOT_PROMISED.get(result.name, (set(), ""))[0]:
        return "·"
    return f"{result.bad[name]}/{result.num[name]}" if result.num[name] else "–"


def _timed(name: str, sets: tuple[str, ...]) -> Result:
    started = time.monotonic()
    result = run(name, sets)
    print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of rewards")
    parser.add_argument("--jobs", type=int, default=1, help="rewards checked at once; 1 for honest latencies")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/rewards.md")
    arguments = parser.parse_args()
    rows = list(OURS.items()) + list(ACCURACY.items()) + [(name, ("number",)) for name in FORM_ONLY]
    chosen = [row for row in rows if arguments.only is None or row[0] in arguments.only]
    with ThreadPoolExecutor(arguments.jobs) as threads:
        results = list(threads.map(_timed, *zip(*chosen, strict=True)))
    text = tables(results)
    print(text)
    if arguments.write:
        before, _, rest = DOCS.read_text().partition(START)
        DOCS.write_text(f"{before}{START}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
