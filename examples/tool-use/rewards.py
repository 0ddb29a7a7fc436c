"""What an episode is paid for: the answer that it ends with. How it was found, and with which calls, earns nothing."""

from __future__ import annotations

from posttrain.grading.answers import is_boxed


def correct(prompts, completions, answer, **columns):
    """1 for exactly one box that holds the right number, in the last turn; 0 otherwise; None (unscored) without an answer."""
    texts = [completion[-1]["content"] for completion in completions]
    return [None if gold is None else float(is_boxed(text, gold)) for text, gold in zip(texts, answer, strict=True)]
