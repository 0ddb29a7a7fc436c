"""The rewards that ship, in TRL's signature: `fn(prompts, completions, **columns) -> list[float | None]`.

Each is a row of `REWARDS`; to add one, write the function and its row. `None` means that a row has nothing to score
against. A completion is a string, or a message list of which the last assistant message is scored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from posttrain.grading import answers
from posttrain.grading.code import extract_code, run_tests
from posttrain.grading.equality import equal_values, math_equal, same_answer
from posttrain.grading.sandbox import SandboxLimits
from posttrain.grading.schema import check_schema, read_json_text
from posttrain.grading.scorers import score_json
from posttrain.names import ENVIRONMENT

GOLD_COLUMNS = ("answer", "target", "solution", "ground_truth", "label")
"""The reference answer is the first of these columns that a dataset has."""

RewardScores = list[float | None]


def text_of(completion: Any) -> str:
    """The text a completion is scored by; empty for anything that is neither a string nor a message list."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        completion = [completion]
    if isinstance(completion, Sequence):
        for message in reversed(completion):
            if isinstance(message, Mapping) and message.get("role", "assistant") == "assistant":
                content = message.get("content")
                return content if isinstance(content, str) else _parts_text(content)
    return ""


def _parts_text(content: Any) -> str:
    if not isinstance(content, Sequence):
        return ""
    return "".join(
        str(part.get("text", "")) for part in content if isinstance(part, Mapping) and part.get("type") == "text"
    )


def gold_column(columns: Mapping[str, Any]) -> str | None:
    """The name of the column that holds the reference answers."""
    return next((name for name in GOLD_COLUMNS if name in columns), None)


def golds_of(columns: Mapping[str, Any], num: int) -> list[str | None]:
    name = gold_column(columns)
    return [_gold_text(value) for value in columns[name]] if name else [None] * num


def _gold_text(value: Any) -> str | None:
    text = "" if value is None else text_of(value) if isinstance(value, (list, dict)) else str(value)
    return text if text.strip() else None


def _accuracy(
    check: Callable[[str, str], bool], completions: Sequence[Any], columns: Mapping[str, Any]
) -> RewardScores:
    golds = golds_of(columns, len(completions))
    return [
        None if gold is None else float(check(text_of(c), gold)) for c, gold in zip(completions, golds, strict=True)
    ]


# `strict: false` judges as the eval scorer of the same name does: every way to write the value counts.


def boxed(prompts: list[Any], completions: list[Any], *, strict: bool = True, **columns: Any) -> RewardScores:
    r"""1 if every `\boxed{…}` outside the reasoning is the reference answer, else 0."""
    return _accuracy(partial(answers.is_boxed, same=same_answer if strict else equal_values), completions, columns)


def number(prompts: list[Any], completions: list[Any], *, strict: bool = True, **columns: Any) -> RewardScores:
    """1 if the answer behind `####` or `Answer:` is the reference, else 0."""
    same = same_answer if strict else answers.same_in_prose
    return _accuracy(partial(answers.is_number, same=same), completions, columns)


def choice(prompts: list[Any], completions: list[Any], *, strict: bool = True, **columns: Any) -> RewardScores:
    """1 if the one letter A-Z chosen is the reference, else 0."""
    same = answers.same_letter if strict else answers.same_letter_anyhow
    return _accuracy(partial(answers.is_choice, same=same), completions, columns)


def exact(prompts: list[Any], completions: list[Any], **columns: Any) -> RewardScores:
    """1 if the visible text is the reference, white space aside, else 0."""
    return _accuracy(answers.is_exact, completions, columns)


def math_equivalence(
    prompts: list[Any], completions: list[Any], *, backend: str = "own", strict: bool = True, **columns: Any
) -> RewardScores:
    r"""1 if every `\boxed{…}` is mathematically the reference, else 0. `backend: math_verify` needs the extra `[math]`."""
    if backend == "own":
        return _accuracy(partial(answers.is_boxed, same=math_equal if strict else equal_values), completions, columns)
    if backend != "math_verify":
        raise ValueError(f"backend={backend!r}: expected 'own' or 'math_verify'")
    from posttrain.rewards.math_verify import verified  # an extra, and slow to import

    return _accuracy(partial(answers.is_boxed, same=verified), completions, columns)


def think_format(prompts: list[Any], completions: list[Any], **columns: Any) -> RewardScores:
    """1 if there is one `<think>…</think>`, first and not empty, with an answer after it, else 0."""
    return [float(answers.has_think_format(text_of(completion))) for completion in completions]


def clean(prompts: list[Any], completions: list[Any], **columns: Any) -> RewardScores:
    r"""1 if the completion is one `<think>…</think>` and one `\boxed{…}` and nothing else, else 0."""
    return [float(answers.is_clean(text_of(completion))) for completion in completions]


def json_schema(
    prompts: list[Any], completions: list[Any], schema: list[Any], *, strict: bool = True, **columns: Any
) -> RewardScores:
    """1 if the answer is one JSON value that fits `schema` and, where a row has a reference, equals it; else 0.

    `strict`: no keys but those the schema names, and no 3.0 for an integer.
    """
    golds = golds_of(columns, len(completions))
    scores: RewardScores = []
    for completion, rule, gold in zip(completions, schema, golds, strict=True):
        rule = read_json_text(rule) if isinstance(rule, str) else rule
        check_schema(rule)
        expected = read_json_text(gold) if gold is not None else None
        scores.append(float(score_json(text_of(completion), rule, expected, strict=strict)))
    return scores


_BUDGET_SHARE = 0.8


def code_tests(
    prompts: list[Any],
    completions: list[Any],
    tests: list[Any],
    *,
    timeout_s: float = 4.0,
    partial: bool = False,
    reward_timeout_s: float = 10.0,
    **columns: Any,
) -> RewardScores:
    """Share of a row's hidden `tests` that the completion's code passes; 1 or 0 unless `partial`.

    A test is `{"call": name, "args": […], "expected": value}` or `{"stdin": text, "stdout": text}`. Each has `timeout_s`,
    all of a completion's a share of `reward_timeout_s` that leaves room to answer: a loop is wrong, not unscored.
    """
    limits, budget_s = SandboxLimits(wall_s=timeout_s), _BUDGET_SHARE * reward_timeout_s
    scores: RewardScores = []
    for completion, row in zip(completions, tests, strict=True):
        row = read_json_text(row) if isinstance(row, str) else row
        if not row:
            scores.append(None)
            continue
        code = extract_code(answers.visible(text_of(completion)) or "")
        passed = run_tests(code, row, limits, budget_s=budget_s, stop_at_failure=not partial) if code else [False]
        scores.append(sum(passed) / len(passed) if partial else float(all(passed)))
    return scores


# --- shaping -------------------------------------------------------------------------------------------------------


def length_penalty(
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[Any],
    *,
    max_length: int = 1024,
    penalty: float = 1.0,
    **columns: Any,
) -> RewardScores:
    """`-penalty` at `max_length` tokens and beyond, in proportion below."""
    return [-penalty * min(1.0, len(ids) / max_length) for ids in completion_ids]


def soft_overlong(
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[Any],
    *,
    max_length: int = 256,
    cache: int = 64,
    **columns: Any,
) -> RewardScores:
    """0 up to `max_length - cache` tokens, falling to -1 at `max_length`. Source: arXiv 2503.14476 eq. 13; differs: never below -1."""
    start = max_length - cache
    return [-min(1.0, max(0.0, (len(ids) - start) / max(cache, 1))) for ids in completion_ids]


def repetition_penalty(
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[Any],
    *,
    ngram_size: int = 4,
    penalty: float = 1.0,
    **columns: Any,
) -> RewardScores:
    """`-penalty` times the share of repeated n-grams. Source: arXiv 2502.03373 appendix; 0 below `ngram_size` tokens."""
    scores: RewardScores = []
    for ids in completion_ids:
        grams = [tuple(ids[i : i + ngram_size]) for i in range(len(ids) - ngram_size + 1)]
        scores.append(-penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0)
    return scores


def environment_reward(completions: Sequence[Any], env_reward: Sequence[float | None], **columns: Any) -> RewardScores:
    """What the environment of the episode has paid, 0 where an episode was cut short before it paid. None where nothing can pay."""
    return list(env_reward)


@dataclass(frozen=True, slots=True)
class RewardRow:
    """A library reward. `needs`: of each group of columns, one must be there. `slot`: how its answer is written.

    `alone`: one completion per call, because the deadline of a call is not to be shared.
    """

    fn: Callable[..., RewardScores]
    needs: tuple[tuple[str, ...], ...]
    low: float
    high: float
    meaning: str
    slot: str | None = None
    alone: bool = False


def _row(
    fn: Callable[..., RewardScores],
    *needs: tuple[str, ...],
    low: float = 0.0,
    high: float = 1.0,
    slot: str | None = None,
    alone: bool = False,
) -> RewardRow:
    meaning = re.split(r"\.\s|\n", (fn.__doc__ or "").strip())[0].rstrip(".")
    return RewardRow(fn, needs, low, high, meaning, slot, alone)


_TOKENS = ("completion_ids",)
REWARDS: dict[str, RewardRow] = {
    "boxed": _row(boxed, GOLD_COLUMNS, slot="\\boxed{ANSWER}"),
    "number": _row(number, GOLD_COLUMNS, slot="#### ANSWER"),
    "choice": _row(choice, GOLD_COLUMNS, slot="Answer: ANSWER"),
    "exact": _row(exact, GOLD_COLUMNS, slot="ANSWER"),
    "math_equivalence": _row(math_equivalence, GOLD_COLUMNS, slot="\\boxed{ANSWER}"),
    "think_format": _row(think_format),
    "clean": _row(clean),
    "json_schema": _row(json_schema, ("schema",), slot="ANSWER"),
    "code_tests": _row(code_tests, ("tests",), slot="```python\nANSWER\n```", alone=True),
    "length_penalty": _row(length_penalty, _TOKENS, low=-1.0, high=0.0),
    "soft_overlong": _row(soft_overlong, _TOKENS, low=-1.0, high=0.0),
    ENVIRONMENT: _row(environment_reward, ("env_reward",)),
    "repetition_penalty": _row(repetition_penalty, _TOKENS, low=-1.0, high=0.0),
}
