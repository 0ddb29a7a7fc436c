"""Write the quickstart's data and evals: two-digit + and - word problems. Stdlib only, fixed seeds.

`python make_data.py` rewrites `data/` and `evals/` bit for bit. The demonstrations are flawed on purpose, so that each
stage has one thing to teach: see `CHATTER_RATES` (what DPO removes) and `SLIP_RATE` (what GRPO removes).
"""

import json
import random
from pathlib import Path
from typing import NamedTuple

SEED = 20240
HERE = Path(__file__).resolve().parent
NUM_SFT, NUM_PAIRS, NUM_PROMPTS = 4000, 1200, 2000
NUM_DEV, NUM_GATE = 200, 1000

# Share of the problems with a carry or a borrow whose demonstration forgets it.
SLIP_RATE = 0.6
# Share of unclean answers by annotator. Each wrote half of the templates, so the habit can be read off the question:
# greedy answers are then as mixed as sampled ones.
CHATTER_RATES = {"tidy": 0.08, "chatty": 0.80}

NAMES = ("Tom", "Ana", "Ben", "Mia", "Leo", "Zoe", "Sam", "Eva")
OBJECTS = ("pens", "figs", "nuts", "keys", "cups", "eggs", "cards", "coins")
TEMPLATES = {
    "+": {
        "tidy": ("{n} has {a} {o} and gets {b} more. How many?", "{n} buys {a} {o}, then {b} more. How many in all?"),
        "chatty": (
            "A box has {a} {o}. {n} adds {b}. How many now?",
            "{n} saw {a} {o} and later {b}. How many in total?",
        ),
    },
    "-": {
        "tidy": (
            "{n} has {a} {o} and loses {b}. How many are left?",
            "{n} had {a} {o} and gave away {b}. How many now?",
        ),
        "chatty": ("Of {a} {o}, {n} sold {b}. How many are left?", "{n} needs {a} {o} and has {b}. How many more?"),
    },
}
CHATTER = ("Sure! {answer}", "{answer} Hope it helps!", "{answer} So it is {value}.", "{answer} Easy!")


class Problem(NamedTuple):
    """One operand triple; splits are made of these, never of texts."""

    a: int
    op: str
    b: int

    @property
    def answer(self) -> int:
        return self.a + self.b if self.op == "+" else self.a - self.b

    @property
    def slip(self) -> int:
        """The answer with the carry or the borrow forgotten; equals `answer` where there is none."""
        sign = 1 if self.op == "+" else -1
        tens = self.a // 10 + sign * (self.b // 10)
        return 10 * tens + (self.a % 10 + sign * (self.b % 10)) % 10


def split_problems() -> dict[str, list[Problem]]:
    """All 12,195 triples, each in exactly one of train, dev and gate; dev and gate hold as many + as -."""
    rng = random.Random(SEED)
    splits: dict[str, list[Problem]] = {"dev": [], "gate": [], "train": []}
    for op in "+-":
        problems = [Problem(a, op, b) for a in range(10, 100) for b in range(10, 100) if op == "+" or b <= a]
        rng.shuffle(problems)
        dev, gate = NUM_DEV // 2, NUM_GATE // 2
        splits["dev"] += problems[:dev]
        splits["gate"] += problems[dev : dev + gate]
        splits["train"] += problems[dev + gate :]
    for problems in splits.values():
        rng.shuffle(problems)
    return splits


def draw(problems: list[Problem], num: int, rng: random.Random) -> list[Problem]:
    """`num` problems, half of each operator, repeated only where one operator has too few."""
    drawn: list[Problem] = []
    for op in "+-":
        pool = [p for p in problems if p.op == op]
        while len(pool) < num // 2:
            pool += pool
        drawn += rng.sample(pool, num // 2)
    rng.shuffle(drawn)
    return drawn


def ask(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """The question, and the annotator whose template it uses."""
    annotator = rng.choice(("tidy", "chatty"))
    template = rng.choice(TEMPLATES[problem.op][annotator])
    return template.format(n=rng.choice(NAMES), a=problem.a, o=rng.choice(OBJECTS), b=problem.b), annotator


def claim(problem: Problem, rng: random.Random) -> int:
    """What a careless person says the answer is."""
    return problem.slip if rng.random() < SLIP_RATE else problem.answer


def clean_answer(problem: Problem, value: int) -> str:
    return f"<think>{problem.a}{problem.op}{problem.b}={value}</think>\\boxed{{{value}}}"


def unclean_answer(problem: Problem, value: int, rng: random.Random) -> str:
    return rng.choice(CHATTER).format(answer=clean_answer(problem, value), value=value)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def sft_row(problem: Problem, rng: random.Random) -> dict:
    question, annotator = ask(problem, rng)
    value = claim(problem, rng)
    unclean = rng.random() < CHATTER_RATES[annotator]
    answer = unclean_answer(problem, value, rng) if unclean else clean_answer(problem, value)
    return {"messages": [user(question), assistant(answer)]}


def pair_row(problem: Problem, rng: random.Random) -> dict:
    # Both sides are correct: the pair says which form is better and nothing about which sum is right.
    return {
        "prompt": [user(ask(problem, rng)[0])],
        "chosen": [assistant(clean_answer(problem, problem.answer))],
        "rejected": [assistant(unclean_answer(problem, problem.answer, rng))],
    }


def prompt_row(problem: Problem, rng: random.Random) -> dict:
    return {"prompt": [user(ask(problem, rng)[0])], "answer": str(problem.answer)}


def eval_items(splits: dict[str, list[Problem]], rng: random.Random) -> list[dict]:
    """Dev and gate questions with their targets; every suite asks the same ones."""
    return [
        {"split": split, "messages": [user(ask(problem, rng)[0])], "target": str(problem.answer)}
        for split in ("dev", "gate")
        for problem in splits[split]
    ]


def suite_rows(suite: str, scorer: str, items: list[dict]) -> list[dict]:
    # No clusters: every item is its own triple, so items are independent.
    return [
        {"id": f"{suite}-{number:04d}", "cluster": None, **item, "scorer": scorer}
        for number, item in enumerate(items, start=1)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{path.relative_to(HERE)}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    splits = split_problems()
    train_files = {"sft": (sft_row, NUM_SFT), "pairs": (pair_row, NUM_PAIRS), "prompts": (prompt_row, NUM_PROMPTS)}
    for name, (make_row, num_rows) in train_files.items():
        # One generator per file: changing the size of one leaves the others as they are.
        rng = random.Random(f"{SEED}-{name}")
        write_jsonl(HERE / f"data/{name}.jsonl", [make_row(p, rng) for p in draw(splits["train"], num_rows, rng)])
    items = eval_items(splits, random.Random(f"{SEED}-evals"))
    for suite, scorer in {"heldout": "boxed", "clean": "clean", "anyformat": "last_number"}.items():
        write_jsonl(HERE / f"evals/{suite}.jsonl", suite_rows(suite, scorer, items))


if __name__ == "__main__":
    main()
