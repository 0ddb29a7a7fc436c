"""Write the example's pairs: a right sum beside one that the base of `../reward-hacking` may say. Stdlib only, fixed seeds.

`python make_data.py` rewrites `data/` bit for bit. The sums of the held-out pairs stand in no pair that is trained on, and in no prompt.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
TASK = HERE.parent / "reward-hacking"
SEED = 12
NUM_PAIRS_EACH = 4


def boxed(number: int) -> str:
    return f"\\boxed{{{number}}}"


def worse(right: int, rng: random.Random) -> str:
    """Off by a little, or both at once to be on the safe side."""
    wrong = max(0, right + rng.choice((-2, -1, 1, 1, 2))) if right else 1
    if rng.random() < 0.5:
        return boxed(wrong)
    first, second = rng.sample((right, wrong), 2)
    return f"{boxed(first)} or maybe {boxed(second)}"


def pair(question: str, right: int, rng: random.Random) -> dict:
    def say(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    bad = worse(right, rng)
    return {
        "prompt": say("user", question),
        "chosen": say("assistant", boxed(right)),
        "rejected": say("assistant", bad),
    }


def read(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(name: str, rows: list[dict]) -> None:
    path = HERE / "data" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"data/{name}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    rng = random.Random(SEED)
    prompts = read(TASK / "data/prompts.jsonl")
    items = read(TASK / "evals/heldout.jsonl")
    trained = [(row["prompt"][0]["content"], int(row["answer"])) for row in prompts] * NUM_PAIRS_EACH
    held_out = [(item["messages"][0]["content"], int(item["target"])) for item in items]
    write("pairs.jsonl", [pair(question, right, rng) for question, right in trained])
    write("held-out-pairs.jsonl", [pair(question, right, rng) for question, right in held_out])


if __name__ == "__main__":
    main()
