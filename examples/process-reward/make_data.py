"""Write the example's rows and its suite: sums of the quickstart worked out in columns, one digit fact a step. Stdlib only, fixed seeds.

`python make_data.py` rewrites `data/` and `evals/` bit for bit. The splits are the quickstart's: the rated rows that are held out, and the
questions of the suite, are about operands that stand in no row that is trained on.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
SEED = 77
NUM_SFT, NUM_STEPS, NUM_HELD_OUT, NUM_ASKED = 3000, 4000, 500, 400
SLIP_RATE = 0.6
"""Of the demonstrations with a carry or a borrow, the share that forgets it: most of what imitation then answers to such a problem is wrong."""
OFF_RATE = 0.15
"""Of the other rated rows, the share in which a result is off by one or two."""


def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_data", HERE.parent / "quickstart" / "make_data.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUICKSTART = quickstart()


def worked(
    a: int, op: str, b: int, carries: bool, off: int | None = None, rng: random.Random | None = None
) -> list[str]:
    """The steps of an answer: units, tens, box. `carries` says whether the tens step counts one more or less; step `off` has a wrong result.

    34+17 is 4+7=11, 3+1+1=5, \\boxed{51}; 34-17 is 14-7=7, 3-1-1=1, \\boxed{17}; with the carry forgotten the second step is 3+1=4.
    """

    def result(value: int, step: int) -> int:
        if step != off or rng is None:
            return value
        return rng.choice([near for near in (value - 2, value - 1, value + 1, value + 2) if near >= 0])

    (tens_a, units_a), (tens_b, units_b) = divmod(a, 10), divmod(b, 10)
    one = f"{op}1" if carries else ""
    if op == "+":
        units = result(units_a + units_b, 0)
        tens = result(tens_a + tens_b + carries, 1)
    else:
        units_a += 10 * (units_a < units_b)
        units = result(units_a - units_b, 0)
        tens = result(max(0, tens_a - tens_b - carries), 1)
    boxed = result(10 * tens + units % 10, 2)
    return [f"{units_a}{op}{units_b}={units}", f"{tens_a}{op}{tens_b}{one}={tens}", f"\\boxed{{{boxed}}}"]


def asked(problem) -> str:
    return f"{problem.a}{problem.op}{problem.b}\n"


def needs_one(problem) -> bool:
    """Whether there is a carry or a borrow."""
    return problem.slip != problem.answer


def demonstration(problem, rng: random.Random) -> dict:
    carries = needs_one(problem) and rng.random() >= SLIP_RATE
    steps = worked(problem.a, problem.op, problem.b, carries)
    return {"prompt": asked(problem), "completion": "\n".join(steps)}


def rated(problem, rng: random.Random) -> dict:
    """Steps as such a policy says them, of which one may be wrong. What follows a wrong step is wrong too, as the answer is."""
    forgets = needs_one(problem) and rng.random() < SLIP_RATE
    off = rng.randrange(3) if not forgets and rng.random() < OFF_RATE else None
    first_wrong = 1 if forgets else off
    steps = worked(problem.a, problem.op, problem.b, needs_one(problem) and not forgets, off, rng)
    labels = [first_wrong is None or place < first_wrong for place in range(3)]
    return {"prompt": asked(problem), "completions": steps, "labels": labels}


def item(problem, number: int) -> dict:
    return {"id": f"sum-{number:03d}", "prompt": asked(problem), "target": str(problem.answer), "scorer": "boxed"}


def write(name: str, rows: list[dict]) -> None:
    path = HERE / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{name}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    splits = QUICKSTART.split_problems()
    for name, row, split, number in (
        ("data/sft.jsonl", demonstration, "train", NUM_SFT),
        ("data/steps.jsonl", rated, "train", NUM_STEPS),
        ("data/held-out-steps.jsonl", rated, "gate", NUM_HELD_OUT),
    ):
        rng = random.Random(f"{SEED}-{name}")
        write(name, [row(problem, rng) for problem in QUICKSTART.draw(splits[split], number, rng)])
    suite = QUICKSTART.draw(splits["gate"], NUM_ASKED, random.Random(f"{SEED}-evals"))
    write("evals/sums.jsonl", [item(problem, number) for number, problem in enumerate(suite, start=1)])


if __name__ == "__main__":
    main()
