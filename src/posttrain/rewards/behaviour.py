"""How the rewards behave: towards policies that do not read, lengths, missing references, repeats, hangs, and this policy."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import RewardError
from posttrain.rewards import measures
from posttrain.rewards.cases import AnswerForm, Case, Setting, case_kind, same_meaning
from posttrain.rewards.check import TINY, MutationResult, RewardCheck
from posttrain.rewards.library import GOLD_COLUMNS
from posttrain.rewards.workers import TIMED_OUT, RewardPool
from posttrain.types import RewardBreakdown

_PROBES = Path(__file__).with_name("probe_rewards.py")
_PROBE_SPECS = tuple(f"{_PROBES}:{name}" for name in ("hanging", "crashing", "unreachable"))
_PROBE_TEXTS = ("a", "hang", "crash", "outage", "b")
_MIN_PROBE_TIMEOUT_S = 0.5
_ROUND_TRIPS = 20
"""What a probe's deadline is, in round trips of a call that does nothing."""
_PROBE_TRIES = 3


def measure_policies(check: RewardCheck, setting: Setting, separated: bool) -> None:
    """What a policy earns that does not read the question, and which of them earns most."""
    form, cases = setting.form, setting.cases[:4] if case_kind(setting.cases) == "code" else setting.cases
    policies = {
        "empty": [""] * len(cases),
        "shortest": ["."] * len(cases),
        "longest": ["Let me think. " * 200] * len(cases),
        "echo": [case.question for case in cases],
        "format only": [form.render("") if form.before else form.around(" ")] * len(cases),
        "constant": [form.render("1")] * len(cases),
    }
    if setting.golds:
        policies["modal answer"] = [form.render(setting.modal)] * len(cases)
    chance = {
        "modal answer": sum(same_meaning(setting.modal, c.gold or "") for c in cases) / len(cases)
        if setting.golds
        else 0.0,
        "constant": sum(c.gold is not None and same_meaning("1", c.gold) for c in cases) / len(cases),
    }
    earned: dict[str, float] = {}
    policy_mean = measures.mean(
        [v for v in check.values([(check.cases[s.case], s.text) for s in check.samples]) if v is not None]
    )
    for name, texts in policies.items():
        mean = measures.mean([v or 0.0 for v in check.values(list(zip(cases, texts, strict=True)))])
        earned[name] = mean
        allowed = (
            check.wrong_mean + (chance.get(name, 0.0) + check.limits.slack) * check.gap if separated else policy_mean
        )
        if mean > allowed + TINY:
            check.failures.append(f"the policy {name!r} earns {mean:.3f} on average, expected at most {allowed:.3f}")
    best = max(earned, key=lambda name: earned[name])
    check.measures |= {f"policy: {name}": mean for name, mean in earned.items()}
    check.measures[f"best degenerate policy: {best}"] = earned[best]
    if separated and case_kind(cases) != "code":
        _measure_length(check, setting)


def _measure_length(check: RewardCheck, setting: Setting) -> None:
    """Rank correlation of reward and length with correctness held fixed; the padded-wrong mutation is what decides."""
    times = (0, 1, 4, 16)
    for name, answers in {
        "right": [c.gold for c in setting.cases[:8]],
        "wrong": [c.wrong for c in setting.cases[:8]],
    }.items():
        texts = [
            (c, setting.form.around("Well. " * n + setting.form.slot(a)))
            for c, a in zip(setting.cases, answers, strict=False)
            if a
            for n in times
        ]
        pairs = [
            (float(len(t)), b.total) for (_, t), b in zip(texts, check.score(texts), strict=True) if b.total is not None
        ]
        check.measures[f"length correlation, {name}"] = measures.spearman([p[0] for p in pairs], [p[1] for p in pairs])


def check_missing_gold(check: RewardCheck, cases: Sequence[Case], form: AnswerForm, separated: bool) -> None:
    """A row whose reference is missing or None must be unscored, not 0."""
    if not separated:
        return
    case = cases[0]
    # Of code and JSON, the tests or the schema are the reference.
    names = next(({name} for name in ("tests", "schema") if name in case.columns), set(GOLD_COLUMNS))
    blank = [
        {k: v for k, v in case.columns.items() if k not in names},
        {k: None if k in names else v for k, v in case.columns.items()},
    ]
    bad = [reason for columns in blank if (reason := _scored_without(check, case, form, columns))]
    check.rows.append(MutationResult("None and missing columns", "N", len(blank), len(bad), bad[0] if bad else ""))
    check.failures += bad[:1]


def _scored_without(check: RewardCheck, case: Case, form: AnswerForm, columns: Mapping[str, Any]) -> str | None:
    try:
        result = check.score([(case, form.render(case.gold or ""))], [columns])[0]
    except RewardError:
        return None  # a typed error that names the column: as it should be
    scored = [name for name in check.deciding if result.parts[name] is not None]
    if not scored:
        return None
    return f"reward {scored[0]!r} scores {result.parts[scored[0]]:g} for a row without a reference answer; return None there"


def measure_determinism(check: RewardCheck, form: AnswerForm) -> None:
    """The same completions alone, together, shuffled, and in processes with another hash seed: equal each time."""
    few = 1 if case_kind(check.cases) == "code" else 3
    texts = [(c, form.render(a)) for c in check.cases[:few] for a in (c.gold, c.wrong) if a is not None]
    texts += [(check.cases[s.case], s.text) for s in check.samples[: few + 1]]
    texts = texts or [(c, form.render("1")) for c in check.cases[:few]]
    expected = check.score(texts)
    seconds: list[float] = []
    num_different = num_late = 0
    shuffler, main_pool = random.Random(0), check.pool

    def differs(order: Sequence[int]) -> int:
        nonlocal num_late
        pairs = [(expected[i], b) for i, b in zip(order, check.score([texts[i] for i in order]), strict=True)]
        late = [pair for pair in pairs if any(map(_is_late, pair))]
        num_late += len(late)
        return sum(not check.same(*pair) for pair in pairs if pair not in late)

    for _ in range(check.limits.repeats):
        for place in range(len(texts)):
            start = time.perf_counter()
            num_different += differs([place])
            seconds.append(time.perf_counter() - start)
        num_different += differs(range(len(texts)))
        num_different += differs(shuffler.sample(range(len(texts)), len(texts)))
    with main_pool.twin(hash_seed=12345) as check.pool:
        num_different += sum(differs(range(len(texts))) for _ in range(check.limits.repeats))
    check.pool = main_pool
    check.measures |= {
        "determinism differences": num_different, "latency_p50_s": measures.percentile(seconds, 0.5), "latency_p99_s": measures.percentile(seconds, 0.99),
        "latency_max_s": max(seconds),
    }  # fmt: skip
    if num_late:
        check.warnings.append(
            f"{num_late} repeated scores {TIMED_OUT} reward_timeout_s={main_pool.timeout_s:g}: the reward is too slow for it, or this "
            "machine too busy to tell"
        )
    if num_different:
        check.failures.append(
            f"{num_different} scores changed over {check.limits.repeats} repeats each alone, batched, shuffled and under another hash seed; rewards must be deterministic"
        )
    if check.measures["latency_p99_s"] > main_pool.timeout_s / 2:
        check.warnings.append(
            f"a completion takes {check.measures['latency_p99_s']:.2f} s to score (p99), close to reward_timeout_s={main_pool.timeout_s:g}"
        )


def measure_kill(check: RewardCheck) -> None:
    """A reward that hangs, one that dies and one that is out of reach, in the same workers.

    Each must cost its own completion only, within the deadline, and leave it unscored instead of 0. Where the machine is
    too busy for harmless calls to meet the deadline, nothing is known: that is no failure.
    """
    workers, memory = check.pool.num_workers, check.pool.memory_bytes
    with RewardPool(_PROBE_SPECS, num_workers=workers, memory_bytes=memory, timeout_s=60.0) as pool:
        for _ in range(_PROBE_TRIES):
            pool.timeout_s = max(_MIN_PROBE_TIMEOUT_S, _ROUND_TRIPS * _round_trip_s(pool))
            start = time.perf_counter()
            scored = pool.score(["p"] * len(_PROBE_TEXTS), _PROBE_TEXTS, {})
            wall_s = time.perf_counter() - start
            if not any(_is_late(scored[place]) for place in (0, 4)):
                check.measures["kill_wall_s"] = wall_s
                check.failures += _kill_failures(scored)
                return
    check.warnings.append(
        f"this machine is too busy to tell whether a reward that hangs costs its own completion only: calls that do nothing "
        f"{TIMED_OUT} {pool.timeout_s:.1f} s, {_PROBE_TRIES} times"
    )


def _round_trip_s(pool: RewardPool) -> float:
    """The slowest of three."""
    seconds: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        pool.score(["p"], ["a"], {})
        seconds.append(time.perf_counter() - start)
    return max(seconds)


def _kill_failures(scored: Sequence[RewardBreakdown]) -> list[str]:
    got = [breakdown.total is not None for breakdown in scored]
    if got == [True, False, False, False, True]:
        return []
    return [
        f"a hanging, a crashing and an unreachable reward did not cost exactly their own completions (scored: {got})"
    ]


def _is_late(breakdown: RewardBreakdown) -> bool:
    return TIMED_OUT in (breakdown.error or "")


def forecast_signal(check: RewardCheck) -> None:
    if not check.samples:
        check.warnings.append("no completions sampled from the policy: no forecast of groups without signal")
        return
    groups: dict[int, list[float]] = defaultdict(list)
    scored = check.score([(check.cases[s.case], s.text) for s in check.samples])
    for sample, breakdown in zip(check.samples, scored, strict=True):
        if breakdown.total is not None:
            groups[sample.case].append(breakdown.total)
    right_from = check.wrong_mean + check.gap / 2 if check.deciding else None
    forecast = measures.group_forecast(groups, right_from)
    check.measures |= {f"forecast: {name}": value for name, value in forecast.items()}
    if forecast and forecast["frac_reward_zero_std"] == 1.0:
        check.warnings.append(
            f"in all {forecast['num_groups']:.0f} sampled groups every completion has the same reward: RL would get no signal"
        )
