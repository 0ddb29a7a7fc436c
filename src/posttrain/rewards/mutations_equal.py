"""E: ways to write the right answer that must keep its reward."""

from __future__ import annotations

import re
from collections.abc import Callable

from posttrain.rewards.cases import Case, Setting
from posttrain.rewards.mutation import ANY, Mutation, boxed_only, plain_number, slots


def _as_fraction(pattern: str) -> Callable[[str], str | None]:
    def rewrite(gold: str) -> str | None:
        value = plain_number(gold)
        if value is None or value.denominator == 1:
            return None
        return pattern.format(sign="-" if value < 0 else "", num=abs(value.numerator), den=value.denominator)

    return rewrite


def _as_decimal(gold: str) -> str | None:
    value = plain_number(gold)
    if value is None or value.denominator == 1:
        return None
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return f"{float(value):.12f}".rstrip("0") if rest == 1 else None


def _with_thousands(gold: str) -> str | None:
    value = plain_number(gold)
    return f"{value.numerator:,}" if value is not None and value.denominator == 1 and abs(value) >= 1000 else None


def _in_text(gold: str) -> str | None:
    return f"\\text{{{gold}}}" if re.fullmatch(r"[-A-Za-z0-9 .,/]+", gold) else None


def _with_units(case: Case, setting: Setting) -> list[str]:
    match = re.fullmatch(r"(-?[0-9.]+)\s*([A-Za-z]+)", case.gold or "")
    if match is None:
        return []
    number, unit = match.groups()
    return [
        setting.form.render(text)
        for text in (f"{number} {unit}", f"{number}\\text{{ {unit}}}", f"{number}\\,\\mathrm{{{unit}}}")
    ]


EQUAL = (
    Mutation("whitespace", "E", ANY, slots(lambda g: f" {g} ", lambda g: f"{g}  ")),
    Mutation(
        "fraction and decimal", "E", ("number",),
        slots(_as_fraction("{sign}{num}/{den}"), _as_fraction("{sign}\\frac{{{num}}}{{{den}}}"), _as_fraction("{sign}\\dfrac{{{num}}}{{{den}}}"), _as_decimal),
    ),
    Mutation("thousands separators", "E", ("number",), slots(_with_thousands)),
    Mutation("text wrapper", "E", ANY, boxed_only(slots(_in_text))),
    Mutation("nested boxes", "E", ANY, boxed_only(slots(lambda g: f"\\boxed{{{g}}}"))),
    Mutation("units of the gold", "E", ANY, _with_units),
    Mutation(
        "prose before the slot", "E", ANY,
        lambda c, s: [s.form.around(f"The final answer is:\n{s.form.slot(c.gold or '')}")] if s.form.before else [],
    ),
)  # fmt: skip
