"""The quickstart's reward, in TRL's signature: one score per completion; dataset columns arrive by keyword."""

import re

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def correct(prompts, completions, answer, **kwargs) -> list[float]:
    """1.0 for exactly one box that holds the right integer, else 0.0."""
    # The whole list of boxes is compared: a second box is a second guess, and hedging must not pay.
    texts = [messages[-1]["content"] for messages in completions]
    return [float(BOXED.findall(text) == [target]) for text, target in zip(texts, answer, strict=True)]
