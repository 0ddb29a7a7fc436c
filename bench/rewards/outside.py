"""falsepass and reward-doctor over the library's rewards: python bench/rewards/outside.py

Prints what each of them finds. What is found and left is in `REFUSED` and `LEFT`; tests/rewards/test_outside.py holds that
there is nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from reward_doctor import audit
from reward_doctor.corpus import ALL_CASES

from posttrain.rewards.library import REWARDS

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
NUMBERS = [str(3 * n + 11) for n in range(12)]
HINTS = {
    "boxed": "Put the answer in \\boxed{}.", "math_equivalence": "Put the answer in \\boxed{}.", "number": "End with #### and the answer.",
    "choice": "Options: A, B, C, D. End with 'Answer:' and the letter.", "exact": "Reply with the answer alone.", "json_schema": "Reply with JSON.",
    "code_tests": "Write the Python function.",
}  # fmt: skip
"""Reward → what its prompt asks for. Rewards of form alone have no right and wrong for these tools to compare."""


STRICT = ("eq.frac.unreduced", "eq.frac.repeating", "eq.radical.latex", "eq.wrap.parens", "eq.bool.case", "eq.bool.punct", "eq.choice.case", "eq.text.article")  # fmt: skip
OTHER_SLOTS = ("fmt.think_tags", "fmt.markdown_heading", "fmt.answer_label", "fmt.final_answer_label", "fmt.code_block")
NO_ALGEBRA = ("eq.radical.spacing", "eq.pi.symbol", "eq.wrap.equals", "eq.choice.parens")
REFUSED: dict[str, frozenset[str]] = {
    "boxed": frozenset(STRICT + OTHER_SLOTS + NO_ALGEBRA),
    "math_equivalence": frozenset(STRICT + OTHER_SLOTS) - {"eq.radical.latex"},
    "number": frozenset((*STRICT, *NO_ALGEBRA, "eq.wrap.boxed", "fmt.chain_of_thought", "fmt.markdown_heading", "fmt.multiline_latex", "fmt.trailing_prose")),
}  # fmt: skip
"""Reward → right answers of reward-doctor's corpus that it refuses: docs/rewards.md gives the reason of each."""

LEFT: dict[str, frozenset[str]] = {
    "choice": frozenset({"P2/answer_case_swapped", "P2/sentence_after"}),
    "exact": frozenset({"P2/sentence_after", "P2/trailing_period_inside_slot"}),
    "json_schema": frozenset({"P2/sentence_after", "P2/trailing_period_inside_slot"}),
    "code_tests": frozenset({"P2/sentence_after", "P2/trailing_period_inside_slot"}),
}
"""Reward → what falsepass finds and is left: docs/rewards.md gives the reason of each."""


def rows_for(name: str) -> list[dict[str, object]]:
    """A dataset of this reward's task."""
    if name == "json_schema":
        return [_row(name, n, json.dumps({"n": int(gold)}), schema=SCHEMA) for n, gold in enumerate(NUMBERS)]
    if name == "code_tests":
        return [_row(name, n, f"def f(x):\n    return x + {n}", tests=[{"call": "f", "args": [1], "expected": 1 + n}, {"call": "f", "args": [9], "expected": 9 + n}]) for n in range(4)]  # fmt: skip
    golds = list("ABCDABCDABCD") if name == "choice" else NUMBERS
    return [_row(name, n, gold) for n, gold in enumerate(golds)]


def _row(name: str, number: int, gold: str, **columns: object) -> dict[str, object]:
    return {
        "prompt": f"Question {number} of the {name} kind, about Tom's pens. {HINTS[name]}",
        "answer": gold,
        **columns,
    }


def falsepass(name: str) -> list[str]:
    """`probe/variant: text` of every known-bad completion that is paid, known-good one that is not, or unstable score."""
    with tempfile.TemporaryDirectory() as folder:
        audited = Path(folder)
        (audited / "rewards.py").write_text(f"from posttrain.rewards.library import {name}\n")
        (audited / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_for(name)))
        settings = {"id": name, "framework": "reward", "task": str(audited / "rewards.py"), "dataset": str(audited / "data.jsonl"), "functions": [name]}  # fmt: skip
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        (audited / "env.toml").write_text("\n".join(["[env]", *lines]) + "\n")
        command = [sys.executable, "-m", "falsepass.runner", str(audited), "-n", "4" if name == "code_tests" else "12", "--jobs", "1"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode:
            raise RuntimeError(f"falsepass ended with {done.returncode}: {done.stderr[-2000:]}")
        results = json.loads((audited / "probe-results.json").read_text())["results"]
    return sorted({f"{r['probe']}/{r['variant']}" for r in results if not r["passed"] and r["expected"] != "lazy"})


def _in_slot(name: str) -> Callable[[str, str], float | None]:
    """The reward on bare answers too: those of the corpus that have no slot are put into this reward's."""
    before, _, after = (REWARDS[name].slot or "ANSWER").partition("ANSWER")
    bare = {(case.completion, case.reference) for case in ALL_CASES if case.category in ("equivalence", "distinction")}

    def reward(completion: str, reference: str) -> float | None:
        framed = (completion, reference) in bare and before.strip() not in completion
        text = before + completion.strip() + after if framed else completion
        return REWARDS[name].fn(["?"], [text], answer=[reference])[0]

    reward.__name__ = name
    return reward


def reward_doctor(name: str) -> tuple[list[str], list[str], list[str]]:
    """Wrong completions accepted, right ones refused, and cases that raised, by id."""
    found = audit(_in_slot(name))
    return tuple(
        [outcome.case.id for outcome in some] for some in (found.false_positives, found.false_negatives, found.errors)
    )  # type: ignore[return-value]


def main() -> None:
    for name in ("boxed", "math_equivalence", "number", "choice", "exact"):
        accepted, refused, raised = reward_doctor(name)
        print(f"reward-doctor {name}: accepted {accepted}, refused {refused}, raised {raised}")
    for name in HINTS:
        print(f"falsepass {name}: {falsepass(name)}", flush=True)


if __name__ == "__main__":
    main()
