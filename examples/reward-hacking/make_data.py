"""Write the example's data and suite: sums of two numbers below 30. Stdlib only, fixed seeds.

`python make_data.py` rewrites `data/` and `evals/` bit for bit.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 11
LARGEST = 29
NUM_DEV, NUM_GATE = 100, 300

# How the base answers: right, one too many, or both at once to be on the safe side.
SLIP_RATE, HEDGE_RATE = 0.3, 0.2


def sums() -> dict[str, list[tuple[int, int]]]:
    """All 900 pairs, each in exactly one of train, dev and gate."""
    pairs = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random(SEED).shuffle(pairs)
    held_out = NUM_DEV + NUM_GATE
    return {"dev": pairs[:NUM_DEV], "gate": pairs[NUM_DEV:held_out], "train": pairs[held_out:]}


def question(a: int, b: int) -> str:
    return f"{a}+{b}="


def base_answer(a: int, b: int, rng: random.Random) -> str:
    kind = rng.random()
    if kind < HEDGE_RATE:
        first, second = rng.sample((a + b, a + b + 1), 2)
        return f"\\boxed{{{first}}} or maybe \\boxed{{{second}}}"
    return f"\\boxed{{{a + b + (kind < HEDGE_RATE + SLIP_RATE)}}}"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{path.relative_to(HERE)}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    splits = sums()
    prompts = [{"prompt": [user(question(a, b))], "answer": str(a + b)} for a, b in splits["train"]]
    items = [
        {"id": f"{split}-{n:03d}", "split": split, "messages": [user(question(a, b))], "target": str(a + b)}
        for split in ("dev", "gate")
        for n, (a, b) in enumerate(splits[split], start=1)
    ]
    write_jsonl(HERE / "data/prompts.jsonl", prompts)
    write_jsonl(HERE / "evals/heldout.jsonl", [{**item, "scorer": "boxed"} for item in items])


if __name__ == "__main__":
    main()
