"""Do the rewards tell right from wrong, and do they still when the answer is rewritten or faked?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from posttrain.rewards import measures
from posttrain.rewards.cases import AnswerForm, Case, Setting, candidate_forms, case_kind, surely_wrong
from posttrain.rewards.check import TINY, MutationResult, RewardCheck
from posttrain.rewards.library import gold_column
from posttrain.rewards.mutations import MUTATIONS, Mutation
from posttrain.types import RewardBreakdown


def learn_form(check: RewardCheck, cases: Sequence[Case]) -> AnswerForm:
    """The form in which the reference answers score best; at a tie the one the samples have."""
    forms = candidate_forms(check.samples, check.pool.specs)
    probed = cases[:2] if case_kind(cases) == "code" else cases[:8]
    if not probed:
        return forms[0]
    values = check.values([(case, form.render(case.gold or "")) for form in forms for case in probed])
    totals = [sum(v or 0.0 for v in values[i * len(probed) : (i + 1) * len(probed)]) for i in range(len(forms))]
    return forms[max(range(len(forms)), key=lambda i: (totals[i], -i))]


def find_deciding(check: RewardCheck, cases: Sequence[Case], form: AnswerForm) -> None:
    """Which rewards change when the answer does, or when the reference does."""
    probed = [case for case in cases[:16] if case.wrong is not None]
    right = check.score([(case, form.render(case.gold or "")) for case in probed])
    wrong = check.score([(case, form.render(case.wrong or "")) for case in probed])
    changed = [dict(c.columns) | {gold_column(c.columns) or "": c.wrong} for c in probed]
    swapped = check.score([(c, form.render(c.gold or "")) for c in probed], changed)
    pairs = [(a, b) for a, *others in zip(right, wrong, swapped, strict=True) for b in others]
    check.deciding = tuple(name for name in check.judged if any(a.parts[name] != b.parts[name] for a, b in pairs))


def _natural_wrong(check: RewardCheck) -> list[tuple[Case, str]]:
    found = [(check.cases[s.case], s.text) for s in check.samples]
    return [(case, text) for case, text in found if case.gold is not None and surely_wrong(text, case.gold)]


def measure_separation(check: RewardCheck, cases: Sequence[Case], form: AnswerForm) -> None:
    natural = _natural_wrong(check)
    made = [(case, form.render(case.wrong)) for case in cases if case.wrong is not None]
    right = [v for v in check.values([(case, form.render(case.gold or "")) for case in cases]) if v is not None]
    wrong = [v for v in check.values([*made, *natural]) if v is not None]
    best = max(right, default=0.0)
    found = check.measures
    found["recall"] = sum(v >= best - TINY for v in right) / len(cases)
    found["auc"], found["separation"] = measures.auc(right, wrong), measures.separation(right, wrong)
    found["gold_mean"], found["wrong_mean"], found["num_natural_wrong"] = (
        measures.mean(right),
        measures.mean(wrong),
        len(natural),
    )
    check.gap, check.wrong_mean = max(found["gold_mean"] - found["wrong_mean"], 0.0), found["wrong_mean"]
    if found["recall"] < check.limits.recall:
        check.failures.append(
            f"only {found['recall']:.0%} of the reference answers, written as {form.render('ANSWER')!r}, earn the full reward {best:g}; "
            f"expected at least {check.limits.recall:.0%}"
        )
    if not found["auc"] >= check.limits.auc:
        check.failures.append(
            f"AUC of reference against wrong answers is {found['auc']:.3f}, expected at least {check.limits.auc}"
        )
    if not natural:
        check.warnings.append("no wrong answers sampled from the policy; made-up ones were used instead")


# --- mutations -----------------------------------------------------------------------------------------------------


def run_mutations(
    check: RewardCheck,
    setting: Setting,
    kind: str,
    separated: bool,
    kinds: Sequence[str] = ("E", "Z", "N"),
    bombs: bool = True,
) -> None:
    """A row per mutation. `bombs=False` leaves out those that run until they are stopped."""
    usable = [m for m in MUTATIONS if kind in m.tasks and (separated or m.kind == "N" or kind == "code")]
    usable = [m for m in usable if m.kind in kinds and (bombs or not m.bomb)]
    work: list[tuple[Mutation, Case, str]] = []
    for mutation in usable:
        cases = [case for case in setting.cases if case.gold is not None or mutation.kind == "N" or kind == "code"]
        few = 1 if mutation.once else 2 if kind == "code" else check.limits.mutation_cases
        for case in cases[:few]:
            work += [(mutation, case, text) for text in dict.fromkeys(mutation.make(case, setting))]
    cases = list({id(case): case for _, case, _ in work}.values())
    right = [(case, setting.form.render(case.gold)) for case in cases if case.gold is not None]
    golds = _best_per_case(check, right, check.decided)
    made = [(c, text) for c in cases if c.wrong for text in (setting.form.render(c.wrong), setting.form.slot(c.wrong))]
    wrongs = _best_per_case(check, made, check.value)
    scored = check.score([(case, text) for _, case, text in work])
    found: dict[str, list[str]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    for (mutation, case, text), breakdown in zip(work, scored, strict=True):
        counts[mutation.name] += 1
        value, wrong = check.value(breakdown), wrongs.get(id(case), check.wrong_mean)
        if mutation.kind == "E":
            decided = check.decided(breakdown)
            bad = decided is None or decided < golds[id(case)] - TINY
        else:
            bad = (
                value is not None
                and value > wrong + check.limits.slack * check.gap + TINY
                and (separated or mutation.kind == "Z")
            )
            bad = bad or (mutation.kind == "N" and breakdown.error is not None)
        if bad:
            found[mutation.name].append(f"{breakdown.error or f'{value:g}'} for {text[:120]!r}")
    for mutation in usable:
        bad = found[mutation.name]
        if counts[mutation.name]:
            check.rows.append(
                MutationResult(mutation.name, mutation.kind, counts[mutation.name], len(bad), bad[0] if bad else "")
            )
    _judge_mutations(check)


def _best_per_case(
    check: RewardCheck, texts: Sequence[tuple[Case, str]], read: Callable[[RewardBreakdown], float | None]
) -> dict[int, float]:
    best: dict[int, float] = {}
    for (case, _), breakdown in zip(texts, check.score(texts), strict=True):
        if (value := read(breakdown)) is not None:
            best[id(case)] = max(value, best.get(id(case), -math.inf))
    return best


_MEANING = {"E": "lose reward though they are right", "Z": "earn more than a wrong answer", "N": "are not survived"}


def _judge_mutations(check: RewardCheck) -> None:
    equal = [row for row in check.rows if row.kind == "E"]
    if equal:
        check.measures["mutation_recall"] = 1 - sum(r.violations for r in equal) / sum(r.num for r in equal)
    check.measures["false_passes"] = sum(row.violations for row in check.rows if row.kind == "Z")
    for row in check.rows:
        tolerated = (1 - check.limits.recall) * row.num if row.kind == "E" else 0
        if row.violations > tolerated:
            check.failures.append(
                f"{row.name}: {row.violations} of {row.num} texts {_MEANING[row.kind]}; first: {row.example}"
            )
