"""Two rewards for the same task. One can be fooled."""

from __future__ import annotations

from posttrain.grading.answers import is_boxed


def generous(prompts, completions, answer, **columns):
    """1 if the right number occurs anywhere, and up to 1 more for a full answer: it looks harmless, and it is not."""
    texts = [completion[-1]["content"] for completion in completions]
    return [float(gold in text) + min(len(text), 40) / 40 for text, gold in zip(texts, answer, strict=True)]


def strict(prompts, completions, answer, **columns):
    """1 for exactly one box that holds the right number."""
    texts = [completion[-1]["content"] for completion in completions]
    return [float(is_boxed(text, gold)) for text, gold in zip(texts, answer, strict=True)]
