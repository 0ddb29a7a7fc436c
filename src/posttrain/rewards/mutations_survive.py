"""N: texts that must be scored without an error."""

from __future__ import annotations

from posttrain.rewards.cases import same_meaning
from posttrain.rewards.mutation import ANY, Make, Mutation

_HOSTILE = (
    "nan", "NaN", "inf", "-inf", "1e999", "-0", "True", "9" * 5000, "0." + "0" * 5000 + "1", "1/0", "\\frac{1}{0}",
    "9^{9^{9}}", "9^{9^{9^{9}}}", "9**9**9", "(1+x)^{3000}", "1000000!", "\\sqrt{" * 50 + "2" + "}" * 50, "\\int_0^1 x^x dx",
)  # fmt: skip


def _answers(*answers: str) -> Make:
    """Those that do not happen to be right: -0 is 0."""
    return lambda case, setting: [
        setting.form.render(answer) for answer in answers if case.gold is None or not same_meaning(answer, case.gold)
    ]


SURVIVE = (
    Mutation("NaN, infinity, huge numbers, power towers", "N", (*ANY, "code", "json"), _answers(*_HOSTILE), once=True),
    Mutation(
        "nested braces", "N", (*ANY, "code", "json"),
        lambda c, s: ["{" * 100_000, "\\boxed{" * 100_000, "\\boxed{" * 100_000 + "}" * 100_000, "[" * 100_000, s.form.render("(" * 100_000)], once=True,
    ),
    Mutation("a megabyte of text", "N", (*ANY, "code", "json"), lambda c, s: ["a" * 1_000_000, " " * 1_000_000, s.form.render("1" * 1_000_000), "ab " * 333_333], once=True),
    Mutation("surrogates and control characters", "N", (*ANY, "code", "json"), lambda c, s: ["\ud800\udfff", s.form.render("\udc80"), "\x00\x01\x7f", s.form.render("\u202e42\u202c")], once=True),
)  # fmt: skip
