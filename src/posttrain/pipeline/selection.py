"""Which attempt or stage goes on, and on which items that is chosen.

A gate with `on_fail: retry`, or under `stop_when: gate_passes`, chooses among candidates. It does so on the split `dev`,
and the gate's own split is opened once, for the verdict on what was chosen. Where a suite has no such split, every
attempt is a look at the same items, and alpha is spent over the looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from posttrain.config.pipeline import GateKeys, OnFailKeys, PipelineKeys, SuiteKeys
from posttrain.evals.suite import Suite
from posttrain.gate.spec import SELECTION_SPLIT, GateSpec
from posttrain.pipeline.state import RunState

Suites = Mapping[str, tuple[Suite, SuiteKeys]]


def gate_after(keys: PipelineKeys, index: int) -> GateKeys | None:
    """The gate after a stage: its own, or the pipeline's after the last one (under `gate_passes` after each); none after a reward model."""
    if keys.stages[index - 1].keys.is_reward_model:
        return None
    own = keys.stages[index - 1].keys.gate
    if own is not None:
        return own
    return keys.gate if index == len(keys.stages) or keys.stop_when == "gate_passes" else None


def is_probing(keys: PipelineKeys, index: int) -> bool:
    """Whether this gate only asks if the next stage is needed."""
    return keys.stop_when == "gate_passes" and index < len(keys.stages) and keys.stages[index - 1].keys.gate is None


def chooses(keys: PipelineKeys, gate: GateKeys) -> bool:
    """Whether a gate may judge several candidates in one run."""
    many = keys.stop_when == "gate_passes" and gate is keys.gate and len(keys.stages) > 1
    return many or isinstance(gate.on_fail, OnFailKeys)


def without_dev(gate: GateKeys, suites: Suites) -> list[str]:
    """Suites of the gate that have no items to choose on apart from those of its verdict."""
    if gate.split == SELECTION_SPLIT:
        return list(GateSpec.from_keys(gate).suites)
    return [name for name in GateSpec.from_keys(gate).suites if not suites[name][0].sizes(SELECTION_SPLIT)[0]]


def spec_of(keys: PipelineKeys, gate: GateKeys, suites: Suites) -> GateSpec:
    """What the gate asks, alpha spent over its looks where it has to choose on the items of its verdict."""
    spec = GateSpec.from_keys(gate)
    return replace(spec, spend=True) if chooses(keys, gate) and without_dev(gate, suites) else spec


def splits_between(keys: PipelineKeys, suites: Suites) -> dict[str, list[str]]:
    """Split → suites on which each stage's model is scored. Where something is chosen it is `dev`, if there is one."""
    verdict = keys.gate.split if keys.gate is not None else "gate"
    gates = [gate_after(keys, index) for index in range(1, len(keys.stages) + 1)]
    chosen = any(gate is not None and chooses(keys, gate) for gate in gates)
    found: dict[str, list[str]] = {}
    for name, (suite, _) in suites.items():
        dev = chosen and suite.sizes(SELECTION_SPLIT)[0] > 0
        found.setdefault(SELECTION_SPLIT if dev else verdict, []).append(name)
    return found


def loop_back(keys: PipelineKeys, state: RunState, index: int, gate: GateKeys) -> tuple[RunState, int] | None:
    """The stage to run again, its changed keys noted in the state; None if there is no rule or it is used up."""
    rule = gate.on_fail
    used = state.retries.get(str(index), 0)
    if not isinstance(rule, OnFailKeys) or used >= rule.times:
        return None
    place = rule.retry if isinstance(rule.retry, int) else [s.kind for s in keys.stages].index(rule.retry) + 1
    changed = dict(rule.with_)
    if used or not changed:
        # With the same keys and the same seed a retry would only give the same model again.
        changed.setdefault("seed", keys.stages[place - 1].keys.seed + used + 1)
    retries = {**state.retries, str(index): used + 1}
    return replace(state, retries=retries, changes={**state.changes, str(place): changed}), place
