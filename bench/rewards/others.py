"""Rewards of TRL and math-verify in the signature that the check calls; the reference stands in `answer`."""

from math_verify import parse, verify
from trl.rewards import (
    accuracy_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

_OVERLONG = get_soft_overlong_punishment(max_completion_len=256, soft_punish_cache=64)
_REPETITION = get_repetition_penalty_reward()


def _latex(answer):
    """As LaTeX, which TRL's parser wants to see; None stays None."""
    return [None if gold is None else f"${gold}$" for gold in answer]


def trl_accuracy(completions, answer):
    return accuracy_reward(completions, _latex(answer))


def trl_reasoning_accuracy(completions, answer):
    return reasoning_accuracy_reward(completions, _latex(answer))


def trl_think_format(completions):
    return think_format_reward(completions)


def trl_soft_overlong(completions, completion_ids):
    return _OVERLONG(completion_ids)


def trl_repetition_penalty(completions, completion_ids):
    return _REPETITION(completion_ids)


def math_verify_direct(completions, answer):
    texts = [completion[0]["content"] for completion in completions]
    return [None if gold is None else _same(gold, text) for gold, text in zip(answer, texts, strict=True)]


def _same(gold, text):
    return float(verify(parse(f"${gold}$"), parse(text)))
