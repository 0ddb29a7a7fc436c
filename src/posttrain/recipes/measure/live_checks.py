"""While RL runs: do its own best answers show a way to be paid without being right?

At an interval the known cheats are replayed in the form of the best completions of the generation batch, those
completions are themselves turned wrong, and canary prompts, whose reference nobody can hit, are answered by the policy.
All of it is a function of seed and step and touches nothing that training uses. Knows nothing of what is done about it:
the numbers are metrics, and rules judge them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from posttrain.config.rl import RewardedKeys
from posttrain.data.dataset import Dataset
from posttrain.files import digest_json
from posttrain.models.text import decoder
from posttrain.recipes.experience.engines import sampling_params
from posttrain.recipes.measure.certify import require_match, token_ids
from posttrain.recipes.run.stage import Stage
from posttrain.rewards.battery import find_deciding, learn_form, measure_separation, run_mutations
from posttrain.rewards.canaries import impossible
from posttrain.rewards.cases import AnswerForm, Case, PolicySample, Setting, case_kind, cases_of, same_meaning
from posttrain.rewards.check import TINY, RewardCheck, Thresholds
from posttrain.rewards.workers import RewardPool
from posttrain.rollout.collect import SampleGroups
from posttrain.rollout.sampling import request_seed
from posttrain.types import Prompt, PromptRow, RolloutGroup

NUM_SAMPLES = 4
NUM_CANARIES = 4
_COMPLETIONS_PER_CANARY = 2
_BATTERY_CASES = 2
_CONTEXT_ROWS = 16
_CANARY_SEED = -2


@dataclass(frozen=True, slots=True)
class LiveSample:
    """One of the best completions of a generation batch."""

    total: float
    prompt: Prompt
    text: str


class LiveChecks:
    """`if_due` after every generation batch; all ranks call it and each asks for its share of the canaries, the main one checks."""

    def __init__(
        self,
        keys: RewardedKeys,
        stage: Stage,
        rewards: RewardPool,
        sample: SampleGroups,
        tokenizer: Any,
        data: Dataset[PromptRow],
    ) -> None:
        require_match(stage.folder, rewards)
        self._keys, self._stage, self._rewards, self._sample, self._data = keys, stage, rewards, sample, data
        self._decode = decoder(tokenizer)
        self._tokenize = partial(token_ids, tokenizer)

    def if_due(self, step: int, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """`reward_check/…` if the step that begins with `groups` is one of every `reward_check_steps`."""
        every, steps_per_batch = self._keys.reward_check_steps, self._keys.steps_per_batch
        if not every or not step or step % every >= steps_per_batch:
            return {}
        best = best_samples([sample for rank in self._stage.ranks.gather(_samples(groups)) for sample in rank])
        started = time.monotonic()
        answered = self._answered_canaries(step)
        checked = self._stage.ranks.main_only(lambda: self._check(step, best, answered))
        return checked | {"time/reward_check_s": time.monotonic() - started} if checked else {}

    def _check(self, step: int, best: Sequence[LiveSample], answered: Sequence[tuple[Case, str]]) -> dict[str, float]:
        context = [prompt for prompt, _ in self._data.rows[:_CONTEXT_ROWS]]
        cases = cases_of([sample.prompt for sample in best] + context, len(best) + len(context))
        known = [(case, sample) for case, sample in zip(cases, best, strict=False) if case.gold is not None]
        if not known:
            return {}
        cases = [case for case, _ in known] + [case for case in cases[len(best) :] if case.gold is not None]
        samples = [PolicySample(place, sample.text) for place, (_, sample) in enumerate(known)]
        check = RewardCheck(self._rewards, cases, samples, Thresholds(mutation_cases=_BATTERY_CASES), self._tokenize)
        check.asks_models = False
        form = learn_form(check, cases)
        find_deciding(check, cases, form)
        if not check.deciding:
            return {}  # these rewards do not look at the answer: nothing is known to be wrong
        measure_separation(check, cases, form)
        values, passes = replay(check, Setting.of(cases, form))
        values |= canary_metrics(check, form, answered)
        self._stage.run.event("reward_check", step + 1, {**values, "false_passes": passes[:3]})
        return values

    def _answered_canaries(self, step: int) -> list[tuple[Case, str]]:
        """All of them on rank 0. All ranks ask, also one without a canary: there may be one engine for all of them."""
        keys, ranks = self._keys, self._stage.processes
        picks = random.Random(request_seed(keys.seed, _CANARY_SEED, step))
        rows = picks.sample(self._data.rows, min(NUM_CANARIES, len(self._data.rows)))
        mine = ranks.share(range(len(rows)))
        seed_parts, asked = (keys.seed, _CANARY_SEED, step), [rows[number] for number in mine]
        params = sampling_params(keys)
        sampled = ranks.each(lambda: self._sample(asked, _COMPLETIONS_PER_CANARY, params, seed_parts, mine))
        if not ranks.is_main:
            return []
        groups = [sampled[number % ranks.world_size][number // ranks.world_size] for number in range(len(rows))]
        cases = cases_of([prompt for prompt, _ in rows], len(rows))
        answered = [
            (case, c.episode.answer if c.episode else self._decode(c.ids))
            for case, group in zip(cases, groups, strict=True)
            for c in group
        ]
        return [(case, text) for case, text in answered if case.gold is not None]


def _samples(groups: Sequence[RolloutGroup]) -> list[LiveSample]:
    """The best completion of each prompt."""
    scored = [
        [LiveSample(rollout.reward.total, group.prompt, rollout.text) for rollout in group.rollouts if rollout.reward.total is not None]
        for group in groups
    ]  # fmt: skip
    return [max(found, key=lambda sample: sample.total) for found in scored if found]


def best_samples(samples: Sequence[LiveSample]) -> list[LiveSample]:
    """The best of all ranks; ties in the order of the data, so that ranks do not matter."""
    return sorted(samples, key=lambda s: (-s.total, s.prompt.origin.path, s.prompt.origin.line))[:NUM_SAMPLES]


# --- replay --------------------------------------------------------------------------------------------------------


def _answer_replaced(text: str, case: Case, form: AnswerForm) -> list[str]:
    if not form.before or case.wrong is None:
        return []
    return (
        [text.replace(form.slot(case.gold or ""), form.slot(case.wrong))] if form.slot(case.gold or "") in text else []
    )


def _second_answer(text: str, case: Case, form: AnswerForm) -> list[str]:
    return [f"{text}\n{form.slot(case.wrong)}"] if form.before and case.wrong is not None else []


def _only_thought(text: str, case: Case, form: AnswerForm) -> list[str]:
    bare = text.replace("<think>", "").replace("</think>", "")
    return [f"<think>{bare}</think>", f"<think>{bare}"]


REWRITES: Mapping[str, Callable[[str, Case, AnswerForm], list[str]]] = {
    "answer replaced": _answer_replaced,
    "second answer": _second_answer,
    "only thought": _only_thought,
}
"""Ways to turn a completion that is paid into a wrong one."""


def replay(check: RewardCheck, setting: Setting) -> tuple[dict[str, float], list[str]]:
    """False passes among the cheats of the battery and the best samples made wrong; the first of them in words."""
    work = [(name, *made) for name, made in _rewritten(check, setting)]
    wrongs = {
        id(case): max((v for v in check.values(_wrong_texts(case, setting.form)) if v is not None), default=check.wrong_mean)
        for case in {id(case): case for _, case, _ in work}.values()
    }  # fmt: skip
    passes: list[str] = []
    for (name, case, text), value in zip(work, check.values([(case, text) for _, case, text in work]), strict=True):
        if value is not None and value > wrongs[id(case)] + check.limits.slack * check.gap + TINY:
            passes.append(f"{name}: {value:g} for {text[:200]!r}")
    run_mutations(check, setting, case_kind(setting.cases), True, kinds=("Z",), bombs=False)
    num = len(work) + sum(row.num for row in check.rows)
    paid = len(passes) + sum(row.violations for row in check.rows)
    passes += [f"{row.name}: {row.example}" for row in check.rows if row.violations]
    return {"reward_check/false_pass_rate": paid / num if num else 0.0, "reward_check/num_texts": float(num)}, passes


def _rewritten(check: RewardCheck, setting: Setting) -> list[tuple[str, tuple[Case, str]]]:
    """Only what is paid as a right answer can be turned wrong; a sample is also given to the prompt of another."""
    paid = check.wrong_mean + check.gap / 2
    own = [(check.cases[sample.case], sample.text) for sample in check.samples]
    good = [
        (case, text)
        for (case, text), value in zip(own, check.values(own), strict=True)
        if value is not None and value > paid
    ]
    made = [
        (name, (case, wrong))
        for case, text in good
        for name, rewrite in REWRITES.items()
        for wrong in rewrite(text, case, setting.form)
    ]
    others = [
        (case, text)
        for case, (other, text) in zip([c for c, _ in good[1:] + good[:1]], good, strict=True)
        if _differ(case, other)
    ]
    return made + [("given to another prompt", pair) for pair in others]  # fmt: skip


def _differ(one: Case, other: Case) -> bool:
    return one.columns.get("tests") != other.columns.get("tests") or not same_meaning(one.gold or "", other.gold or "")


def _wrong_texts(case: Case, form: AnswerForm) -> list[tuple[Case, str]]:
    return [(case, text) for text in (form.render(case.wrong), form.slot(case.wrong))] if case.wrong is not None else []


# --- canaries ------------------------------------------------------------------------------------------------------


def canary_metrics(check: RewardCheck, form: AnswerForm, answered: Sequence[tuple[Case, str]]) -> dict[str, float]:
    """What completions earn against references that nobody can hit, and how many earn more than a wrong answer does."""
    if not answered:
        return {}
    columns = [impossible(case, digest_json([repr(case.prompt)])) for case, _ in answered]
    earned = [check.value(breakdown) for breakdown in check.score(answered, columns)]
    wrong = check.score([(case, form.render(case.wrong or "")) for case, _ in answered], columns)
    pairs = [(value, check.value(base)) for value, base in zip(earned, wrong, strict=True)]
    scored = [(value, base) for value, base in pairs if value is not None and base is not None]
    if not scored:
        return {}
    paid = [value > base + check.limits.slack * check.gap + TINY for value, base in scored]
    return {
        "reward_check/canary_reward": sum(value for value, _ in scored) / len(scored),
        "reward_check/canary_paid_rate": sum(paid) / len(paid),
    }
