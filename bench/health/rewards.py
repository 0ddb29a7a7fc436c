"""The rewards of the runs: the right one, and those that are faulty. They run in worker processes, as any reward does."""

from __future__ import annotations

import random

from posttrain.grading.answers import is_boxed


def _texts(completions):
    return [completion[-1]["content"] for completion in completions]


def correct(prompts, completions, answer, **columns):
    """1 for one box with the sum in it."""
    return [float(is_boxed(text, gold)) for text, gold in zip(_texts(completions), answer, strict=True)]


def noise(prompts, completions, answer, **columns):
    """Has nothing to do with the answer."""
    return [float(random.random() < 0.5) for _ in completions]


def pays_for_length(prompts, completions, **columns):
    return [min(len(text), 40) / 40 for text in _texts(completions)]


def pays_for_keyword(prompts, completions, **columns):
    return [float("ok" in text) for text in _texts(completions)]


def wrong_sign(prompts, completions, answer, **columns):
    return [1.0 - reward for reward in correct(prompts, completions, answer)]


def constant(prompts, completions, **columns):
    return [1.0 for _ in completions]
