"""How the rewards behave: towards policies that do not read, lengths, missing references, repeats, hangs, and this policy."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from posttrain.errors import RewardError
from posttrain.rewards import measures
from posttrain.rewards.cases import AnswerForm, Case, Setting, kind_of, without_gold
from posttrain.rewards.check import TINY, Check
from posttrain.rewards.library import GOLD_COLUMNS
from posttrain.rewards.workers import RewardPool
from posttrain.types import RewardBreakdown

_PROBES = Path(__file__).with_name("probe_rewards.py")
_PROBE_TIMEOUT_S = 0.5


def measure_policies(check: Check, setting: Setting, separated: bool) -> None:
    """What a policy earns that does not read the question."""
    form, cases = setting.form, setting.cases[:4] if kind_of(setting.cases) == "code" else setting.cases
    policies = {
        "empty": [""] * len(cases),
        "shortest": ["."] * len(cases),
        "longest": ["Let me think. " * 200] * len(cases),
        "echo": [case.question for case in cases],
        "format only": [form.render("") if form.before else form.around(" ")] * len(cases),
    }
    if setting.golds:
        policies["modal answer"] = [form.render(setting.modal)] * len(cases)
    chance = max((sum(c.gold == setting.modal for c in cases) / len(cases) for _ in setting.golds[:1]), default=0.0)
    policy_mean = measures.mean(
        [v for v in check.values([(check.cases[s.case], s.text) for s in check.samples]) if v is not None]
    )
    for name, texts in policies.items():
        mean = measures.mean([v or 0.0 for v in check.values(list(zip(cases, texts, strict=True)))])
        check.measures[f"policy: {name}"] = mean
        allowed = (
            check.wrong_mean + ((chance if name == "modal answer" else 0.0) + check.limits.slack) * check.gap
            if separated
            else policy_mean
        )
        if mean > allowed + TINY:
            check.failures.append(f"the policy {name!r} earns {mean:.3f} on average, expected at most {allowed:.3f}")
    if separated and kind_of(cases) != "code":
        _measure_length(check, setting)


def _measure_length(check: Check, setting: Setting) -> None:
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


def check_missing_gold(check: Check, cases: Sequence[Case], form: AnswerForm, separated: bool) -> None:
    """A row without a reference must be unscored, not 0."""
    if not separated:
        return
    case = cases[0]
    if "tests" in case.columns or "schema" in case.columns:
        return  # there the tests or the schema are the reference
    texts = [(case, form.render(case.gold or ""))]
    blank = [without_gold(case.columns), {k: None if k in GOLD_COLUMNS else v for k, v in case.columns.items()}]
    for columns in blank:
        try:
            result = check.score(texts, [columns])[0]
        except RewardError:
            continue  # a typed error that names the column: as it should be
        if scored := [name for name in check.deciding if result.parts[name] is not None]:
            check.failures.append(
                f"reward {scored[0]!r} scores {result.parts[scored[0]]:g} for a row without a reference answer; return None there"
            )
            return


def measure_determinism(check: Check, form: AnswerForm) -> None:
    """The same completions one by one, together, shuffled, and in processes with another hash seed: equal each time."""
    texts = [(c, form.render(a)) for c in check.cases[:3] for a in (c.gold, c.wrong) if a is not None]
    texts += [(check.cases[s.case], s.text) for s in check.samples[:4]]
    texts = texts or [(c, form.render("1")) for c in check.cases[:3]]
    expected = check.score(texts)
    seconds: list[float] = []
    num_different = 0
    shuffler, main_pool = random.Random(0), check.pool
    for repeat in range(check.limits.repeats - 1):
        if repeat % 3 == 0:
            got: list[RewardBreakdown] = []
            for text in texts:
                start = time.perf_counter()
                got += check.score([text])
                seconds.append(time.perf_counter() - start)
        else:
            order = list(range(len(texts)))
            if repeat % 3 == 1:
                shuffler.shuffle(order)
            answers = check.score([texts[i] for i in order])
            got = [answers[order.index(i)] for i in range(len(texts))]
        num_different += sum(a != b for a, b in zip(got, expected, strict=True))
    with main_pool.twin(hash_seed=12345) as check.pool:
        num_different += sum(a != b for a, b in zip(check.score(texts), expected, strict=True))
    check.pool = main_pool
    check.measures |= {
        "determinism differences": num_different, "latency_p50_s": measures.percentile(seconds, 0.5), "latency_p99_s": measures.percentile(seconds, 0.99),
        "latency_max_s": max(seconds),
    }  # fmt: skip
    if num_different:
        check.failures.append(
            f"{num_different} scores changed over {check.limits.repeats} repeats (alone, batched, shuffled, other hash seed); rewards must be deterministic"
        )
    if check.measures["latency_p99_s"] > main_pool.timeout_s / 2:
        check.warnings.append(
            f"a completion takes {check.measures['latency_p99_s']:.2f} s to score (p99), close to reward_timeout_s={main_pool.timeout_s:g}"
        )


def measure_kill(check: Check) -> None:
    """A hanging and a crashing reward in the same workers: each must cost its own completion only, within the deadline."""
    specs = [f"{_PROBES}:hanging", f"{_PROBES}:crashing"]
    with RewardPool(
        specs, timeout_s=_PROBE_TIMEOUT_S, num_workers=check.pool.num_workers, memory_bytes=check.pool.memory_bytes
    ) as pool:
        start = time.perf_counter()
        got = [b.total is not None for b in pool.score(["p"] * 4, ["a", "hang", "crash", "b"], {})]
        check.measures["kill_wall_s"] = time.perf_counter() - start
    if got != [True, False, False, True]:
        check.failures.append(
            f"a hanging and a crashing reward did not cost exactly their own completions (scored: {got})"
        )


def forecast_signal(check: Check) -> None:
    if not check.samples:
        check.warnings.append("no completions sampled from the policy: no forecast of groups without signal")
        return
    groups: dict[int, list[float]] = defaultdict(list)
    scored = check.score([(check.cases[s.case], s.text) for s in check.samples])
    for sample, breakdown in zip(check.samples, scored, strict=True):
        if breakdown.total is not None:
            groups[sample.case].append(breakdown.total)
    forecast = measures.group_forecast(groups)
    check.measures |= {f"forecast: {name}": value for name, value in forecast.items()}
    if forecast and forecast["frac_reward_zero_std"] == 1.0:
        check.warnings.append(
            f"in all {forecast['num_groups']:.0f} sampled groups every completion has the same reward: RL would get no signal"
        )
