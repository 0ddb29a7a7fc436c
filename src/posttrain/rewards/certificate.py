"""Runs the rewards as training will run them, on cases whose right scores are known, and certifies them or says why not.

The verdict is bound by digest to the reward code, its dependencies, its options, the case set and this configuration.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import RewardError
from posttrain.files import digest_file, digest_json
from posttrain.rewards.battery import find_deciding, learn_form, measure_separation, run_mutations
from posttrain.rewards.behaviour import (
    check_missing_gold,
    forecast_signal,
    measure_determinism,
    measure_kill,
    measure_policies,
)
from posttrain.rewards.cases import AnswerForm, Case, PolicySample, Setting, case_kind, cases_digest
from posttrain.rewards.check import MutationResult, RewardCheck, Thresholds
from posttrain.rewards.fooling import check_learned
from posttrain.rewards.library import GOLD_COLUMNS
from posttrain.rewards.workers import RewardPool


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a check found. `partial`: right and wrong could not be told apart, and all else passed."""

    verdict: Literal["pass", "fail", "partial"]
    reward_digest: str
    cases_digest: str
    config: Mapping[str, Any]
    mutations: tuple[MutationResult, ...]
    measures: Mapping[str, float]
    failures: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    check_digest: str = ""

    def matches(self, reward_digest: str) -> bool:
        """Whether RL with these rewards may start on this certificate."""
        return self.verdict != "fail" and self.reward_digest == reward_digest

    @property
    def digest(self) -> str:
        """Digest of what was found; how long things took is not part of it."""
        body = self.to_json()
        body["measures"] = {name: value for name, value in body["measures"].items() if not name.endswith("_s")}
        return digest_json(body)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; infinite measures are written as text."""
        body = asdict(self)
        body["measures"] = {name: (v if math.isfinite(v) else str(v)) for name, v in self.measures.items()}
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Certificate:
        fields: dict[str, Any] = {name: value for name, value in body.items() if name != "digest"}
        fields["mutations"] = tuple(MutationResult(**row) for row in body["mutations"])
        fields["measures"] = {name: float(value) for name, value in body["measures"].items()}
        fields["failures"], fields["warnings"] = tuple(body["failures"]), tuple(body["warnings"])
        return cls(**fields)


def _check_digest() -> str:
    names = (
        "certificate.py",
        "mutation.py",
        "mutations.py",
        "mutations_code.py",
        "mutations_equal.py",
        "mutations_survive.py",
        "cases.py",
        "measures.py",
        "check.py",
        "fooling.py",
        "battery.py",
        "behaviour.py",
    )
    return digest_json({name: digest_file(Path(__file__).with_name(name)) for name in names})


def check_rewards(
    pool: RewardPool,
    cases: Sequence[Case],
    samples: Sequence[PolicySample] = (),
    *,
    thresholds: Thresholds | None = None,
    tokenize: Callable[[str], Sequence[int]] | None = None,
) -> Certificate:
    """Certify the rewards of a started `pool` on `cases`, with completions sampled from the starting policy.

    `tokenize` gives `completion_ids`, for rewards that look at lengths; without it they are bytes.
    Raises: RewardError when there is nothing to check on, or the rewards break their contract.
    """
    if not cases:
        raise RewardError("no cases to check the rewards on; expected at least one prompt in datasets")
    limits = thresholds or Thresholds()
    check = RewardCheck(pool, cases, samples, limits, tokenize or (lambda text: text.encode("utf-8", "surrogatepass")))
    only_models = pool.learned == set(pool.names)
    separated = False if only_models else _check_functions(check)
    accurate = check_learned(check) if check.pool.learned else True
    measure_determinism(check, check.form or AnswerForm(False, "", ""))
    measure_kill(check)
    forecast_signal(check)
    told_apart = accurate and (separated or only_models)
    verdict = "fail" if check.failures else "pass" if told_apart else "partial"
    config = {
        "rewards": list(pool.names), "weights": list(pool.weights), "kwargs": {k: dict(v) for k, v in pool.kwargs.items()}, "timeout_s": pool.timeout_s,
        "num_cases": len(cases), "num_samples": len(samples), "task": case_kind(check.cases), "form": asdict(check.form) if check.form else None, "thresholds": asdict(limits),
        "python": platform.python_version(),
    }  # fmt: skip
    return Certificate(
        verdict=verdict,
        reward_digest=pool.digest,
        cases_digest=cases_digest(cases, samples),
        config=config,
        mutations=tuple(check.rows),
        measures={name: float(value) for name, value in check.measures.items()},
        failures=tuple(check.failures),
        warnings=tuple(check.warnings),
        check_digest=_check_digest(),
    )


def _check_functions(check: RewardCheck) -> bool:
    """The battery, on what is no model's opinion; whether right and wrong could be told apart."""
    check.asks_models = False
    with_gold = [case for case in check.cases if case.gold is not None]
    form = check.form = learn_form(check, with_gold)
    if with_gold:
        find_deciding(check, with_gold, form)
    separated = bool(check.deciding)
    if separated:
        measure_separation(check, with_gold, form)
    elif with_gold:
        check.warnings.append(
            "the rewards do not look at the reference answers, so right and wrong could not be told apart"
        )
    else:
        check.warnings.append(f"no column {' or '.join(GOLD_COLUMNS)}: nothing to tell right from wrong by")
    run_mutations(check, Setting.of(check.cases, form), case_kind(check.cases), separated)
    measure_policies(check, Setting.of(check.cases, form), separated)
    check_missing_gold(check, with_gold, form, separated)
    check.asks_models = True
    return separated
