"""Write the example's data and its suite: products of two-digit numbers, which the model cannot work out and `tools.calc` can.

`python make_data.py` rewrites `data/` and `evals/` bit for bit. No pair of numbers of the suite is in the data. The transcripts
are flawed on purpose (`FLAWED`), so that RL has something to teach.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

from tools import calc

from posttrain.environments.schema import tool_schema

SEED = 482
HERE = Path(__file__).resolve().parent
NUM_SFT, NUM_PROMPTS, NUM_UNAIDED, NUM_GATE = 1600, 1000, 4000, 300

# By annotator, the share of flawed transcripts. Each wrote half of the wordings, so the habit can be read off the
# question: greedy answers are then as mixed as sampled ones.
FLAWED = {"careful": 0.3, "hasty": 0.9}
WORDINGS = {
    "careful": ("{n} has {a} boxes of {b} {o}. How many?", "{n} buys {a} bags of {b} {o}. How many in all?"),
    "hasty": ("A box has {a} rows of {b} {o}. How many now?", "{n} saw {a} times {b} {o}. How many in total?"),
}
NAMES = ("Tom", "Ana", "Ben", "Mia", "Leo", "Zoe", "Sam", "Eva")
OBJECTS = ("pens", "figs", "nuts", "keys", "cups", "eggs", "cards", "coins")
TOOLS = [tool_schema(calc)]


class Problem(NamedTuple):
    """Two numbers to multiply."""

    a: int
    b: int

    @property
    def answer(self) -> int:
        return self.a * self.b


def ask(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """The question, and the annotator whose wording it is."""
    annotator = rng.choice(list(WORDINGS))
    wording = rng.choice(WORDINGS[annotator])
    return wording.format(n=rng.choice(NAMES), a=problem.a, b=problem.b, o=rng.choice(OBJECTS)), annotator


def said(value: int) -> dict:
    return {"role": "assistant", "content": f"\\boxed{{{value}}}"}


def called(expression: str) -> list[dict]:
    """A call, what the tool answers, and that as the answer."""
    call = {
        "type": "function",
        "id": "call00000",
        "function": {"name": "calc", "arguments": {"expression": expression}},
    }
    answer = {"role": "tool", "tool_call_id": "call00000", "name": "calc", "content": str(calc(expression))}
    return [{"role": "assistant", "content": "", "tool_calls": [call]}, answer, said(calc(expression))]


def flawed(problem: Problem, rng: random.Random) -> list[dict]:
    """A call that adds, or no call and a number out of the air."""
    guess = rng.randrange(10, 100) * rng.randrange(10, 100)
    return called(f"{problem.a}+{problem.b}") if rng.random() < 0.8 else [said(guess)]


def sft_row(problem: Problem, rng: random.Random) -> dict:
    question, annotator = ask(problem, rng)
    is_flawed = rng.random() < FLAWED[annotator]
    answer = flawed(problem, rng) if is_flawed else called(f"{problem.a}*{problem.b}")
    return {"messages": [{"role": "user", "content": question}, *answer], "tools": TOOLS}


def unaided_row(problem: Problem, rng: random.Random) -> dict:
    """Without a tool, and always right: what could be learned by heart."""
    return {"messages": [{"role": "user", "content": ask(problem, rng)[0]}, said(problem.answer)]}


def prompt_row(problem: Problem, rng: random.Random) -> dict:
    return {"prompt": [{"role": "user", "content": ask(problem, rng)[0]}], "answer": str(problem.answer)}


def item(problem: Problem, rng: random.Random) -> dict:
    asked = [{"role": "user", "content": ask(problem, rng)[0]}]
    return {"id": f"{problem.a}x{problem.b}", "messages": asked, "target": str(problem.answer), "scorer": "boxed"}


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path.relative_to(HERE)}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    problems = [Problem(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(SEED).shuffle(problems)
    held_out, trained = problems[:NUM_GATE], problems[NUM_GATE:]
    files = {"sft": (sft_row, NUM_SFT), "prompts": (prompt_row, NUM_PROMPTS), "unaided": (unaided_row, NUM_UNAIDED)}
    for name, (make_row, num) in files.items():
        rng = random.Random(f"{SEED}-{name}")
        write_jsonl(HERE / f"data/{name}.jsonl", [make_row(rng.choice(trained), rng) for _ in range(num)])
    rng = random.Random(f"{SEED}-heldout")
    write_jsonl(HERE / "evals/heldout.jsonl", [item(problem, rng) for problem in held_out])


if __name__ == "__main__":
    main()
