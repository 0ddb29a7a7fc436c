"""The quickstart's reward, wrong at planted rates. It runs in worker processes, as any reward does."""

from __future__ import annotations

from hashlib import sha256

from posttrain.grading.answers import is_boxed


def flipped(prompts, completions, answer, false_positive=0.0, false_negative=0.0, **columns):
    """`correct` of the quickstart, but so large a share of wrong answers is paid, and of right ones not."""
    rates = {False: false_positive, True: false_negative}
    paid = []
    for prompt, completion, gold in zip(prompts, completions, answer, strict=True):
        question, text = prompt[-1]["content"], completion[-1]["content"]
        right = is_boxed(text, gold)
        paid.append(float(right != (place(question, text) < rates[right])))
    return paid


def place(question: str, text: str) -> float:
    """From 0 to 1, by the digest alone: the same answer is judged the same whenever it is given."""
    return int.from_bytes(sha256(f"{question}\n{text}".encode("utf-8", "surrogatepass")).digest()[:6]) / 2**48
