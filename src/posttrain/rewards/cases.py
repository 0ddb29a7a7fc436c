"""The labelled cases a reward is checked on, and the form in which this task writes its answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.files import digest_json
from posttrain.grading.answers import is_boxed, is_last_number, last_number, reference_answer
from posttrain.grading.equality import equal_values
from posttrain.grading.numbers import normalise, parse_quantity
from posttrain.rewards.library import REWARDS, golds_of
from posttrain.types import Prompt


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt with its columns, its reference answer where there is one, and a wrong answer of the same kind."""

    prompt: Any
    columns: Mapping[str, Any]
    gold: str | None
    wrong: str | None

    @property
    def question(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content") or "")


@dataclass(frozen=True, slots=True)
class PolicySample:
    """A completion that the starting policy wrote for case number `case`."""

    case: int
    text: str


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How an answer stands in a completion: `<think>…</think>`, then `before`, the answer, `after`."""

    think: bool
    before: str
    after: str

    def slot(self, answer: str) -> str:
        return self.before + answer + self.after

    def render(self, answer: str, reasoning: str = "Let me see.") -> str:
        return self.around(self.slot(answer), reasoning)

    def around(self, visible: str, reasoning: str = "Let me see.") -> str:
        return f"<think>{reasoning}</think>{visible}" if self.think else visible


_FORMS: dict[str, tuple[str, str]] = {
    "\\boxed{": ("\\boxed{", "}"),
    "####": ("#### ", ""),
    "<answer>": ("<answer>", "</answer>"),
    "Answer:": ("Answer: ", ""),
    "```": ("```python\n", "\n```"),
}
"""What is seen in completions → what stands before and after the answer."""


def candidate_forms(samples: Sequence[PolicySample], specs: Sequence[str]) -> list[AnswerForm]:
    """Forms to try, the likeliest first: that of the samples, that of the library rewards, then the common ones."""
    seen = [form for mark, form in _FORMS.items() if 2 * sum(mark in s.text for s in samples) > max(len(samples), 1)]
    library = [REWARDS[spec].slot for spec in specs if spec in REWARDS]
    seen += [(slot.partition("ANSWER")[0], slot.partition("ANSWER")[2]) for slot in library if slot]
    think = 2 * sum("</think>" in s.text for s in samples) > len(samples) if samples else "think_format" in specs
    slots = list(dict.fromkeys([*seen, *_FORMS.values(), ("", "")]))
    return [AnswerForm(flag, *slot) for flag in (think, not think) for slot in slots]


def cases_of(prompts: Sequence[Prompt], limit: int = 50) -> tuple[Case, ...]:
    """The first `limit` prompts as cases. A wrong answer is another row's gold, or a number that is off."""
    rows = prompts[:limit]
    names = sorted({name for row in rows for name in row.columns})
    columns = {name: [row.columns.get(name) for row in rows] for name in names}
    golds = [
        reference_answer(g) if g is not None and "tests" not in columns else g for g in golds_of(columns, len(rows))
    ]
    cases: list[Case] = []
    for index, row in enumerate(rows):
        given = {name: columns[name][index] for name in names}
        cases.append(Case(row.prompt, given, golds[index], _wrong_for(index, golds, given)))
    return tuple(cases)


def function_name(columns: Mapping[str, Any]) -> str:
    """The function that a row's unit tests call."""
    tests = columns.get("tests") or []
    tests = json.loads(tests) if isinstance(tests, str) else tests
    return next((str(test["call"]) for test in tests if "call" in test), "solution")


def same_meaning(one: str, other: str) -> bool:
    """Whether an eval takes the two for the same answer: 0.5 and 1/2, 5 and 5 cm, √12 and 2√3."""
    return equal_values(one, other) or equal_values(other, one)


def _wrong_for(index: int, golds: Sequence[str | None], columns: Mapping[str, Any]) -> str | None:
    gold = golds[index]
    if "tests" in columns:
        return f"def {function_name(columns)}(*args):\n    return None"
    if gold is None:
        return None
    quantity = parse_quantity(normalise(gold), lowest_terms=False)
    if quantity is not None and quantity.value.denominator == 1 and not quantity.unit:
        return str(quantity.value + 7)
    if len(gold) == 1 and gold.isalpha():
        return "B" if gold != "B" else "A"
    others = (g for g in [*golds[index + 1 :], *golds[:index]] if g is not None and not same_meaning(g, gold))
    return next(others, "no such answer")


def cases_digest(cases: Sequence[Case], samples: Sequence[PolicySample]) -> str:
    body = [[repr(c.prompt), {k: repr(v) for k, v in c.columns.items()}, c.gold] for c in cases]
    return digest_json([body, [[s.case, s.text] for s in samples]])


def surely_wrong(text: str, gold: str) -> bool:
    """Whether an independent, lenient reading finds no trace of the gold: then the completion is a natural wrong answer."""
    if is_boxed(text, gold, equal_values) or is_last_number(text, gold):
        return False
    number = parse_quantity(normalise(gold), lowest_terms=False)
    if number is None:
        return normalise(gold) not in text
    return last_number(text) is not None


@dataclass(frozen=True)
class Setting:
    """What the mutations may use: the cases with golds, how answers are written, and what other answers there are."""

    cases: tuple[Case, ...]
    form: AnswerForm
    golds: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, cases: Sequence[Case], form: AnswerForm) -> Setting:
        return cls(tuple(cases), form, tuple(dict.fromkeys(c.gold for c in cases if c.gold is not None)))

    @property
    def modal(self) -> str:
        return Counter(c.gold for c in self.cases if c.gold is not None).most_common(1)[0][0]

    def others(self, case: Case) -> list[str]:
        return [gold for gold in self.golds if case.gold is None or not same_meaning(gold, case.gold)]


def is_quantity(gold: str) -> bool:
    return parse_quantity(normalise(gold), lowest_terms=False) is not None


def case_kind(cases: Sequence[Case]) -> str:
    """`code`, `json`, `number`, `choice` or `text`: which mutations make sense."""
    if any("tests" in case.columns for case in cases):
        return "code"
    if any("schema" in case.columns for case in cases):
        return "json"
    golds = [case.gold for case in cases if case.gold is not None]
    if golds and all(is_quantity(gold) for gold in golds):
        return "number"
    return "choice" if golds and all(len(gold) == 1 and gold.isupper() for gold in golds) else "text"
