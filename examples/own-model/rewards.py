"""Your reward: one score per completion, in the order given. Every column of the dataset is an argument of its name."""

import re

ANSWER = re.compile(r"^Answer: *(.+?)\.? *$", re.MULTILINE)


def correct(prompts, completions, answer, **columns) -> list[float | None]:
    """1.0 if the text ends with its only line `Answer: …` and that is right, 0.0 if not, None for a row without an answer."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [None if target is None else _score(text, str(target)) for text, target in zip(texts, answer, strict=True)]


def _score(text: str, target: str) -> float:
    found = list(ANSWER.finditer(text.rstrip()))
    # One answer, at the very end: a second one is a second guess, and what follows may take it back.
    return float(len(found) == 1 and found[0].end() == len(text.rstrip()) and found[0][1] == target)
