"""What a judge is asked about a completion, and what its answers come to. Pure: who is asked, and how, is not known here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.errors import RewardError
from posttrain.grading.answers import visible
from posttrain.rewards.learned import ASKED, FAILED, Opinion

_WORDS = {"a": 1.0, "b": 0.0, "tie": 0.5}
_COLUMN = re.compile(r"\{(\w+)\}")


class NothingToJudgeError(RewardError):
    """A row lacks what its judge is to read."""


@dataclass(frozen=True, slots=True)
class JudgeQuestion:
    """One thing that the judge is asked about a completion. In the `swapped` order of a comparison the completion is B."""

    text: str
    weight: float = 1.0
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class JudgeReply:
    """One answer of the judge, or why there is none: it was refused, or `unanswered`. `tokens` were read and written for it, now or when it was `cached`. `cut` at its longest."""

    text: str | None
    error: str | None = None
    tokens: int = 0
    cached: bool = False
    unanswered: bool = False
    cut: bool = False


@dataclass(frozen=True)
class VerdictForm:
    """How a judge is asked and read. `criteria` are texts with weights, `against` a column; a template of none asks one question."""

    template: str
    pattern: re.Pattern[str]
    scale: tuple[float, float]
    criteria: tuple[tuple[str, float], ...] = ()
    against: str | None = None

    def questions(self, prompt: str, completion: str, columns: Mapping[str, Any]) -> list[JudgeQuestion]:
        """Raises: RewardError for a column that the dataset lacks, NothingToJudgeError for one that the row does."""
        low, high = self.scale
        known = {**columns, "prompt": prompt, "completion": completion, "low": f"{low:g}", "high": f"{high:g}"}
        if self.against is not None:
            other = _filled(f"{{{self.against}}}", known)
            return [
                JudgeQuestion(_filled(self.template, known | {"a": completion, "b": other})),
                JudgeQuestion(_filled(self.template, known | {"a": other, "b": completion}), swapped=True),
            ]
        if not self.criteria:
            return [JudgeQuestion(_filled(self.template, known))]
        return [JudgeQuestion(_filled(self.template, known | {"criterion": _filled(text, known)}), weight) for text, weight in self.criteria]  # fmt: skip

    def read(self, reply: JudgeReply, question: JudgeQuestion) -> tuple[float | None, str | None]:
        """The verdict as 0 to 1, or why there is none."""
        if reply.text is None:
            return None, reply.error
        found = [match.casefold().rstrip(".,;:!") for match in self.pattern.findall(visible(reply.text) or "")]
        values = {self._value(verdict) for verdict in found}
        if len(values) != 1:
            what = f"{len(values)} verdicts that differ" if found else "no verdict"
            return None, f"{what} in the judge's answer {' '.join(reply.text.split())[-120:]!r}"
        (value,) = values
        if value is None:
            return None, f"the verdict {found[0][:40]!r} is none; expected {self._expected()}"
        return (1.0 - value if question.swapped else value), None

    def _value(self, verdict: str) -> float | None:
        if self.against is not None:
            return _WORDS.get(verdict)
        low, high = self.scale
        number, out_of, best = verdict.partition("/")
        try:
            number, best = float(number), float(best) if out_of else high
        except ValueError:
            return None
        if best != high:  # 4/5 is no 4 of 10
            return None
        return (number - low) / (high - low) if low <= number <= high else None

    def _expected(self) -> str:
        low, high = self.scale
        return "A, B or tie" if self.against is not None else f"a number from {low:g} to {high:g}"

    def opinion(self, asked: Sequence[tuple[JudgeQuestion, Sequence[JudgeReply]]]) -> Opinion:
        """Of the answers to all questions about one completion. One question without any verdict leaves it without a value."""
        values: list[float | None] = []
        counts = {ASKED: 0.0, FAILED: 0.0, "cached": 0.0, "tokens": 0.0}
        error: str | None = None
        for question, replies in asked:
            read = [self.read(reply, question) for reply in replies]
            verdicts = [value for value, _ in read if value is not None]
            values.append(sum(verdicts) / len(verdicts) if verdicts else None)
            error = error or next((why for value, why in read if not verdicts and value is None), None)
            counts[ASKED] += len(replies)
            counts[FAILED] += len(replies) - len(verdicts)
            counts["cached"] += sum(reply.cached for reply in replies)
            counts["tokens"] += sum(reply.tokens for reply in replies)
        if self.against is not None:
            first, second = values
            flipped = first is not None and second is not None and (first - 0.5) * (second - 0.5) < 0
            # A share of the verdicts, of which each comparison has two.
            counts["order_flips"] = float(flipped) * counts[ASKED]
            values = [0.5, 0.5] if flipped else values
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return Opinion(None, error, counts)
        weights = [question.weight for question, _ in asked]
        return Opinion(sum(v * w for v, w in zip(known, weights, strict=True)) / sum(weights), None, counts)


def _filled(template: str, values: Mapping[str, Any]) -> str:
    """Names in braces by their values, once: what a completion holds is not filled in. Raises: RewardError, NothingToJudgeError."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in values:
            present = ", ".join(sorted(values))
            raise RewardError(
                f"judge: its prompt names {{{name}}}, and the dataset has no such column; it has {present}"
            )
        if values[name] is None:
            raise NothingToJudgeError(f"the row has no `{name}`")
        return str(values[name])

    return _COLUMN.sub(value, template)
