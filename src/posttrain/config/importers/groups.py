"""Generation batches of TRL's GRPO, by whichever tool's keys: completions per device there, prompts and optimizer steps here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.config.importers.fates import ImportDraft, show_short

_BY_TOKENS_OF_ALL = ("dapo", "cispo")
"""Losses that TRL divides by the tokens of a generation batch."""


@dataclass(frozen=True, slots=True)
class Devices:
    """Rows of a micro-batch, the key that says so, and how many micro-batches a step has."""

    rows_key: str
    rows: int
    accumulated: int

    @property
    def rows_per_step(self) -> int:
        return self.rows * self.accumulated


def generation_batches(
    draft: ImportDraft, given: Mapping[str, Any], devices: Devices, before: str = "", group: int = 8
) -> None:
    """Put `num_prompts_per_step` and `steps_per_generation`. The keys in `given` are named with `before`; `group` is its tool's `num_generations`.

    A micro-batch of TRL holds completions, `generation_batch_size` counts those of all processes; where it is silent, a
    generation batch is as many micro-batches as are accumulated, which is one optimizer step.
    """
    sizes = {key: _size(draft, before + key, given.get(key)) for key in ("num_generations", "generation_batch_size", "steps_per_generation")}  # fmt: skip
    group, steps = sizes["num_generations"] or group, sizes["steps_per_generation"] or devices.accumulated
    total = sizes["generation_batch_size"] or steps * devices.rows
    said = "generation_batch_size" if sizes["generation_batch_size"] else "steps_per_generation"
    key = before + said if sizes[said] else devices.rows_key
    if total % group == 0 and total < devices.rows_per_step and devices.rows_per_step % total == 0:
        _several_in_a_step(draft, key, total, group, devices.rows_per_step)
        return
    if total % group or total % devices.rows_per_step:
        why = f"{total} completions are no whole groups of {group} and whole steps of {devices.rows_per_step} rows"
        draft.refuse(key, why, f"set {before}num_generations to a divisor of both")
        return
    of_all = said == "generation_batch_size" and bool(sizes[said])
    note = f"{total} completions in groups of {group}" if of_all else f"{total} completions of one process in groups of {group}; multiply it by the number of processes"  # fmt: skip
    draft.put("num_prompts_per_step", total // group, key, note)
    per_step = "in optimizer steps here" + ("; divide it by the number of processes" if of_all else "")
    draft.put("steps_per_generation", total // devices.rows_per_step, key, per_step)
    for name in ("generation_batch_size", "steps_per_generation"):
        if name in given and before + name not in draft.came_from.values():
            draft.leave(before + name, "num_prompts_per_step and steps_per_generation say it")


def _several_in_a_step(draft: ImportDraft, key: str, total: int, group: int, rows_per_step: int) -> None:
    """Generation batches that are smaller than a step: the same policy samples them, so here they are one."""
    several = f"{rows_per_step // total} generation batches of a step"
    odd = [name for name, plain in (("scale_rewards", ("group", "none")), ("num_iterations", (1,))) if draft.keys.get(name, plain[0]) not in plain]  # fmt: skip
    for name in odd:
        why = f"{several} with {name}: {draft.keys[name]} come to something else than one of all its rows"
        draft.refuse(key, why, f"let a generation batch be a step, or leave {name} at its default")
    if odd:
        return
    note = f"{several} are sampled as one here: {rows_per_step} completions of one process in groups of {group}; multiply it by the number of processes"  # fmt: skip
    draft.put("num_prompts_per_step", rows_per_step // group, key, note)
    draft.put("steps_per_generation", 1, key)
    loss = draft.keys.get("loss_type", "dapo")
    if loss in _BY_TOKENS_OF_ALL:
        draft.change(key, f"{loss} is a mean over the tokens of the step here, and there the mean of the means of its generation batches")  # fmt: skip


def _size(draft: ImportDraft, key: str, value: Any) -> int:
    """A whole number from 1 on; 0 where nothing is said, and where it is none, which is refused."""
    try:
        number = 0 if value is None else int(value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number < 0 or (value is not None and (number == 0 or isinstance(value, bool) or number != float(value))):
        draft.refuse(key, f"{show_short(value)} is no size", "give a whole number from 1 on, or take it out")
        return 0
    return number
