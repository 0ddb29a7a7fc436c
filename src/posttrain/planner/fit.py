"""Whether a plan fits, and if not the smallest change that makes it fit: each is planned before it is proposed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

from posttrain.files import size_text
from posttrain.planner.memory import HELD, MemoryPlan, estimate_memory
from posttrain.planner.workload import Workload


def fits(plan: MemoryPlan, available: int) -> bool:
    """Whether it fits even when every row is as long as `sequence_len`."""
    return plan.total_bytes <= available


def cannot_fit(plan: MemoryPlan, available: int) -> bool:
    """Whether it is too large whatever the data: a reason to refuse before any work."""
    return plan.floor_bytes > available


def shortfall(plan: MemoryPlan, available: int, model: str, where: str = "this machine") -> str:
    """One clear line: what it needs, what there is, and the smallest change that would fit."""
    certain = cannot_fit(plan, available)
    largest = sorted(plan.parts.items(), key=lambda part: -part[1])[:3]
    shares = ", ".join(f"{name} {size_text(size)}" for name, size in largest)
    says, needs = ("does not fit", plan.floor_bytes) if certain else ("may not fit", plan.total_bytes)
    how = "whatever the data" if certain else "when rows are as long as sequence_len"
    return (
        f"{model} ({plan.shape.num_params / 1e9:.1f}B) {says}: {_method(plan.workload)} needs {size_text(needs)} {how} "
        f"({shares}) and {where} has {size_text(available)} free; {_remedy(plan, available)}"
    )


def overrun(plan: MemoryPlan, held: Mapping[str, int], needed: int, available: int, where: str) -> str:
    """Why a stage ran out of memory: which term of its plan was most too small, and the smallest change that fits.

    `held`: bytes of the terms of `HELD` as they were; what else was `needed` is activations, logits and caches.
    """
    planned = {name: sum(plan.part(part) for part in parts) for name, parts in HELD.items()}
    planned["activations, logits and caches"] = plan.passing_bytes
    found = {**held, "activations, logits and caches": needed - sum(held.values())}
    worst = max(found, key=lambda name: found[name] - planned[name])
    counts = f"the plan counted {size_text(planned[worst])} for {worst}, and {size_text(found[worst])} were needed"
    if found[worst] <= planned[worst]:
        counts = f"no term was larger than planned, and the plan counted {size_text(plan.total_bytes)} in all"
    # What was larger than planned stays so after a change: in proportion where it passes, by its size where it is held.
    passing = max(1.0, found["activations, logits and caches"] / max(1, planned["activations, logits and caches"]))
    extra = sum(max(0, held[name] - planned[name]) for name in held)
    return f"{where} has {size_text(available)}; {counts}; {_remedy(plan, available - extra, passing)}"


def _method(workload: Workload) -> str:
    return {"none": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}.get(workload.adapter, workload.adapter)


_CHANGES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("gradient_checkpointing: true", {"gradient_checkpointing": True}, 2),
    ("gradient_checkpointing: offload", {"gradient_checkpointing": "offload"}, 3),
    ("per_device_train_batch_size: 1", {"per_device_train_batch_size": 1}, 2),
    ("rollout_batch_size: 8", {"rollout_batch_size": 8}, 2),
    ("adapter: lora", {"adapter": "lora"}, 3),
    ("adapter: qlora", {"adapter": "qlora", "load_in_4bit": True, "load_in_8bit": False}, 6),
    ("layer_offloading: true", {"layer_offloading": True}, 7),
    ("sequence_len: 512", {"sequence_len": 512}, 9),
)
"""What is proposed, and how much it changes: the first only time, the last what is learned. Copying layers costs more time than 4 bits cost in what is learned."""
_OF_A_GPU = ("gradient_checkpointing: offload", "layer_offloading: true")
_ORDER = {"none": 0, "lora": 1, "qlora": 2}
_MOST_SHARDS = 4096


def _remedy(plan: MemoryPlan, available: int, passing: float = 1.0) -> str:
    """The set of changes that changes least of all that make it fit; or more processes that share the model.

    `passing`: what activations, logits and caches were found to need, over what is planned for them.
    """

    def total(some: MemoryPlan) -> int:
        return some.total_bytes + int((passing - 1.0) * some.passing_bytes)

    least = plan
    for chosen in _proposals(plan):
        smaller = _changed(plan, [change for _, change, _ in chosen])
        least = min(least, smaller, key=total)
        if total(smaller) <= available:
            also = f"; or with {shards} processes" if (shards := _shards_that_fit(plan, available, total)) else ""
            return f"it would fit with {', '.join(text for text, *_ in chosen)} ({size_text(total(smaller))}){also}"
    shards = _shards_that_fit(least, available, total)
    more = f"with all that, {shards} processes would do; else " if shards else ""
    return f"no setting makes it fit (at least {size_text(total(least))}): {more}use a smaller base_model or a larger machine"


def _proposals(plan: MemoryPlan) -> list[tuple[tuple[str, dict[str, Any], int], ...]]:
    """Sets of changes, those that change least first."""
    workload = plan.workload
    found = [row for row in _CHANGES if _is_smaller(workload, row[1]) and not (workload.on_cpu and row[0] in _OF_A_GPU)]
    found += _of_rollout(workload, plan.shards)
    sets = [chosen for count in range(1, len(found) + 1) for chosen in combinations(found, count)]
    apart = [chosen for chosen in sets if _go_together(plan, [change for _, change, _ in chosen])]
    return sorted(apart, key=lambda chosen: sum(cost for *_, cost in chosen))


def _of_rollout(workload: Workload, shards: int) -> list[tuple[str, dict[str, Any], int]]:
    """What of `rollout` costs only time."""
    rollout = workload.rollout
    rows: list[tuple[str, dict[str, Any], int]] = []
    if rollout.is_ahead:
        rows.append(("rollout.max_staleness: 0", {"rollout": replace(rollout, max_staleness=0)}, 2))
    elif rollout.takes_copy(shards):
        rows.append(("rollout.transfer: shared", {"rollout": replace(rollout, transfer="shared")}, 4))
    if rollout.replicas > 1:
        rows.append(("rollout.replicas: 1", {"rollout": replace(rollout, replicas=1)}, 1))
    return rows


def _go_together(plan: MemoryPlan, changes: list[dict[str, Any]]) -> bool:
    """Whether no key is changed twice, and a stage with them would not be refused."""
    named = [next(iter(change)) for change in changes]
    after = replace(plan.workload, **{name: value for change in changes for name, value in change.items()})
    adapted, as_written = after.adapter != "none", after.torch_compile is not True
    offloads = (
        adapted and bool(after.gradient_checkpointing) and plan.shards == 1 and as_written and not after.load_in_8bit
    )
    return (
        len(set(named)) == len(named)
        and (offloads or not after.layer_offloading)
        and (as_written or not after.load_in_4bit)
    )


def _is_smaller(workload: Workload, change: Mapping[str, Any]) -> bool:
    """Whether the key is not that small already."""
    (name, value), *_ = change.items()
    if name == "adapter":
        return _ORDER[value] > _ORDER[workload.adapter]
    now = getattr(workload, name)
    if isinstance(now, (bool, str)):
        return now != value and now != "offload"
    return now > value


def _changed(plan: MemoryPlan, changes: list[dict[str, Any]]) -> MemoryPlan:
    together = {name: value for change in changes for name, value in change.items()}
    return estimate_memory(plan.shape, replace(plan.workload, **together), plan.shards)


def _shards_that_fit(plan: MemoryPlan, available: int, total: Any) -> int:
    """The smallest doubling of processes, where the plan knows of several; 0 if none does."""
    shards = plan.shards
    while 1 < shards < _MOST_SHARDS:
        shards *= 2
        if total(estimate_memory(plan.shape, plan.workload, shards)) <= available:
            return shards
    return 0
