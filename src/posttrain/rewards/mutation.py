"""What a mutation is, and the ways in which their texts are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from posttrain.grading.numbers import normalise, parse_quantity
from posttrain.rewards.cases import Case, Setting

Make = Callable[[Case, Setting], list[str]]
ANY = ("number", "choice", "text")
BOXED = "\\boxed{"


@dataclass(frozen=True, slots=True)
class Mutation:
    """`once`: one case is enough, because the text is costly or does not depend on the case. `bomb`: takes the whole deadline."""

    name: str
    kind: Literal["E", "Z", "N"]
    tasks: tuple[str, ...]
    make: Make
    once: bool = False
    bomb: bool = False


def slots(*answers: Callable[[str], str | None]) -> Make:
    """The gold rewritten, each in the task's own slot."""

    def make(case: Case, setting: Setting) -> list[str]:
        rewritten = [answer(case.gold or "") for answer in answers]
        return [setting.form.render(text) for text in rewritten if text is not None]

    return make


def fixed(*texts: str) -> Make:
    return lambda case, setting: list(texts)


def boxed_only(make: Make) -> Make:
    return lambda case, setting: make(case, setting) if setting.form.before == BOXED else []


def plain_number(gold: str) -> Fraction | None:
    """The number that a reference without a unit is."""
    quantity = parse_quantity(normalise(gold), lowest_terms=False)
    return quantity.value if quantity is not None and not quantity.unit else None
