"""Whether the rewards of an RL stage know each prompt's own gold answer as right; lint asks before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from posttrain.config.rl import RLKeys
from posttrain.config.stages import TrainKeys
from posttrain.grading.learned import split_learned
from posttrain.rewards.battery import find_deciding, learn_form
from posttrain.rewards.cases import AnswerForm, Case, candidate_forms, cases_of
from posttrain.rewards.check import TINY, RewardCheck, Thresholds
from posttrain.rewards.workers import RewardPool
from posttrain.types import Prompt

_PROBED = 50
_PIECE = 500
_RETRIED = 200


def gold_check(keys: TrainKeys) -> Callable[[Sequence[Prompt]], list[str | None]] | None:
    """What lint asks about the golds of a stage; None without rewards, or where `reward_check: off` trusts them blindly."""
    if not isinstance(keys, RLKeys) or keys.reward_check == "off":
        return None
    return partial(unreadable_golds, keys)


def unreadable_golds(keys: RLKeys, prompts: Sequence[Prompt]) -> list[str | None]:
    """Of each prompt why its gold answer, written in the task's answer slot, does not earn the full reward; None if it does.

    Prompts without a gold answer, and rewards that do not look at it, give None. Another form of the slot is tried on
    the first ones that fail. Raises: RewardError for a missing column.
    """
    reasons: list[str | None] = [None] * len(prompts)
    # A model's opinion knows no full reward.
    keys = keys.with_rewards([None if split_learned(spec) else spec for spec in keys.reward_funcs])
    functions = keys.reward_funcs
    if not functions:
        return reasons
    with RewardPool(
        functions, keys.reward_weights, keys.reward_kwargs, keys.reward_workers, keys.reward_timeout_s
    ) as pool:
        check = RewardCheck(pool, (), (), Thresholds(), lambda text: text.encode("utf-8", "surrogatepass"))
        probed = [case for case in cases_of(prompts, _PROBED) if case.gold is not None]
        if not probed:
            return reasons
        form = learn_form(check, probed)
        find_deciding(check, probed, form)
        if not check.deciding:
            return reasons
        cases = [case for at in range(0, len(prompts), _PIECE) for case in cases_of(prompts[at : at + _PIECE], _PIECE)]
        asked = [number for number, case in enumerate(cases) if case.gold is not None]
        scored = _scores(check, [cases[number] for number in asked], form)
        best = max((value for value, _ in scored if value is not None), default=0.0)
        failed = [
            (number, value, error)
            for number, (value, error) in zip(asked, scored, strict=True)
            if value is None or value < best - TINY
        ]
        others = [other for other in candidate_forms((), functions) if other != form]
        known = _known_otherwise(check, [cases[number] for number, *_ in failed[:_RETRIED]], others, best)
        for place, (number, value, error) in enumerate(failed):
            if place not in known:
                reasons[number] = _why(cases[number].gold or "", value, error, best)
    return reasons


def _scores(check: RewardCheck, cases: Sequence[Case], form: AnswerForm) -> list[tuple[float | None, str | None]]:
    breakdowns = check.score([(case, form.render(case.gold or "")) for case in cases])
    return [(check.decided(breakdown), breakdown.error) for breakdown in breakdowns]


def _known_otherwise(check: RewardCheck, cases: Sequence[Case], forms: Sequence[AnswerForm], best: float) -> set[int]:
    """Places of the cases whose gold earns `best` in one of `forms`."""
    known: set[int] = set()
    for form in forms if cases else ():
        values = [value for value, _ in _scores(check, cases, form)]
        known |= {place for place, value in enumerate(values) if value is not None and value >= best - TINY}
    return known


def _why(gold: str, value: float | None, error: str | None, best: float) -> str:
    if error is not None:
        return f"gold {gold[:40]!r} is unscored: {error[:120]}"
    if value is None:
        return f"the rewards give None for gold {gold[:40]!r}"
    return f"the rewards give {value:g} for gold {gold[:40]!r}, and {best:g} for others"
