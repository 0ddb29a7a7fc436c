"""`python choices.py FOLDER`: what most samples of an item say, and what the verifier chooses of them, beside one sample.

FOLDER is what `posttrain eval … --best-of N --verifier V --out FOLDER` fills.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

from make_data import HERE, QUICKSTART

from posttrain.evidence import EvalReport
from posttrain.files import read_json_lines
from posttrain.grading.answers import reference_answer
from posttrain.report.intervals import wilson


def kind(question: str, answer: str) -> str:
    a, op, b = re.fullmatch(r"(\d+)([+-])(\d+)\n", question).groups()
    problem = QUICKSTART.Problem(int(a), op, int(b))
    if answer == str(problem.answer):
        return "right"
    return "carry forgotten" if answer == str(problem.slip) else "otherwise wrong"


def main() -> None:
    folder = Path(sys.argv[1])
    items = EvalReport.load(folder / "sums-gate").items
    seen = {one["id"]: one for one in json.loads((folder / "best-of-sums-gate.json").read_text("utf-8"))["items"]}
    asked = {row["id"]: row["prompt"] for _, row in read_json_lines(HERE / "evals" / "sums.jsonl")}
    found: dict[str, list[str]] = {"sample": [], "majority": [], "verifier": []}
    for item in items:
        answers, said = [reference_answer(text) for text in item.completions], seen[item.id]["verifier"]
        best = max(range(len(answers)), key=lambda place: -1.0 if said[place] is None else said[place])
        found["sample"] += [kind(asked[item.id], answer) for answer in answers]
        found["majority"].append(kind(asked[item.id], Counter(answers).most_common(1)[0][0]))
        found["verifier"].append(kind(asked[item.id], answers[best]))
    for name, kinds in found.items():
        counts = Counter(kinds)
        shares = (f"{what} {counts[what] / len(kinds):.1%}" for what in ("right", "carry forgotten", "otherwise wrong"))
        within = wilson(counts["right"], len(items)) if len(kinds) == len(items) else None
        print(
            f"{name:8}  {', '.join(shares)}" + (f"; right within {within.low:.1%}–{within.high:.1%}" if within else "")
        )


if __name__ == "__main__":
    main()
