"""The reward of the quickstart: copy this file and change what counts as right."""

from __future__ import annotations

from posttrain.grading.answers import is_boxed


def correct(prompts, completions, answer, **columns):
    """1.0 for exactly one `\\boxed{…}` that holds the answer, 0.0 otherwise; None (unscored) without an answer.

    `is_boxed` is strict on purpose: hedges, retractions, answers only inside `<think>` and two different boxes are
    wrong. `posttrain rewards check pipeline.yaml` tries all of them on this function before RL may start.
    """
    texts = [completion[-1]["content"] for completion in completions]
    return [None if gold is None else float(is_boxed(text, gold)) for text, gold in zip(texts, answer, strict=True)]
