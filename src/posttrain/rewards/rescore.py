"""Stored rollouts under other rewards: what would have been paid, and what of that a policy would have seen. No model, no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from posttrain.errors import RewardError
from posttrain.files import digest_json, read_json, write_atomic, write_json
from posttrain.rewards.measures import mean, spearman, std
from posttrain.rewards.workers import RewardPool
from posttrain.types import RewardBreakdown

SCORED = "scored"
"""Where a stage keeps what was rewarded, a file a call."""
_ALIKE = 1e-9
_PARTS = 3
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ScoredCall:
    """The completions of one call of the rewards, before `step`, with what they were paid then. Columns are by name, a value a completion."""

    step: int
    prompts: Sequence[Any]
    completions: Sequence[Any]
    columns: Mapping[str, Sequence[Any]]
    totals: Sequence[float | None]

    def save(self, folder: Path) -> None:
        """Once: the same completions that are scored again after a kill have the same name."""
        body = {
            "prompts": self.prompts,
            "completions": self.completions,
            "columns": dict(self.columns),
            "totals": self.totals,
        }
        name = digest_json([self.prompts, self.completions, self.columns.get("completion_ids")]).removeprefix(
            "sha256:"
        )[:16]
        if not any(folder.glob(f"*-{name}.json")):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"{self.step:08d}-{name}.json", body)

    @classmethod
    def load(cls, path: Path) -> ScoredCall:
        """Raises: RewardError for a file that is damaged."""
        try:
            return cls(int(path.name[:8]), **read_json(path))
        except (OSError, ValueError, TypeError) as error:
            raise RewardError(
                f"{path}: these rollouts cannot be read ({error}); delete the file to do without them"
            ) from None


@dataclass(frozen=True, slots=True)
class Rescored:
    """One completion: where it stands, what it was paid and what it would be."""

    step: int
    group: int
    prompt: Any
    completion: Any
    before: float | None
    after: float | None
    error: str | None = None


def find_calls(run: Path) -> Iterator[ScoredCall]:
    """Of a stage's folder, or of all RL stages of a run, in order. Raises: RewardError where none were kept."""
    folders = [folder for folder in (run / SCORED, *sorted(run.glob(f"stages/*/{SCORED}"))) if folder.is_dir()]
    paths = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    if not paths:
        raise RewardError(f"{run} kept no rollouts; expected the folder of a run or a stage with keep_rollouts: true")
    return map(ScoredCall.load, paths)


def paid_anew(calls: Iterator[ScoredCall], pool: RewardPool) -> list[Rescored]:
    """Every completion scored anew, as training would: by the same calls."""
    found: list[Rescored] = []
    number = 0
    for call in calls:
        scored = iter(
            zip(pool.score(call.prompts, call.completions, call.columns), call.completions, call.totals, strict=True)
        )
        for _, group in groupby(range(len(call.prompts)), key=lambda place: _question(call, place)):
            for place in group:
                breakdown, completion, before = next(scored)
                found.append(_one(call, number, place, completion, before, breakdown))
            number += 1
    return found


def _question(call: ScoredCall, place: int) -> str:
    columns = {name: values[place] for name, values in call.columns.items() if name != "completion_ids"}
    return json.dumps([call.prompts[place], columns], sort_keys=True)


def _one(call: ScoredCall, group: int, place: int, completion: Any, before: float | None, now: RewardBreakdown) -> Rescored:  # fmt: skip
    return Rescored(call.step, group, call.prompts[place], completion, before, now.total, now.error)


# --- what changed --------------------------------------------------------------------------------------------------


def what_changed(rows: Sequence[Rescored]) -> dict[str, list[float]]:
    """Measure → its value over all rollouts, then in each third of the steps."""
    steps = sorted({row.step for row in rows})
    cuts = [steps[len(steps) * part // _PARTS :][0] for part in range(_PARTS)] if len(steps) >= _PARTS else []
    parts = [[row for row in rows if sum(row.step >= cut for cut in cuts) == n + 1] for n in range(len(cuts))]
    columns = [_measures(part) for part in (rows, *parts)]
    return {name: [column[name] for column in columns] for name in columns[0]}


def _measures(rows: Sequence[Rescored]) -> dict[str, float]:
    both = [(row.before, row.after) for row in rows if row.before is not None and row.after is not None]
    before, after = [b for b, _ in both], [a for _, a in both]
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row.group)]
    paired = [[(r.before, r.after) for r in g if r.before is not None and r.after is not None] for g in groups]
    paired = [pairs for pairs in paired if pairs]
    signs = [sign for pairs in paired for sign in _signs(pairs)]
    return {
        "rollouts": float(len(rows)),
        "unscored before": sum(row.before is None for row in rows) / len(rows),
        "unscored after": sum(row.after is None for row in rows) / len(rows),
        "mean before": mean(before),
        "mean after": mean(after),
        "std before": std(before),
        "std after": std(after),
        "paid otherwise": mean([float(abs(b - a) > _ALIKE) for b, a in both]),
        "rank correlation": spearman(before, after),
        "groups without spread before": mean([float(_flat([b for b, _ in pairs])) for pairs in paired]),
        "groups without spread after": mean([float(_flat([a for _, a in pairs])) for pairs in paired]),
        "groups with another best": mean([float(_other_best(pairs)) for pairs in paired]),
        "advantages of the other sign": mean([float(one * other < 0) for one, other in signs]),
    }


def _flat(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= _ALIKE


def _other_best(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether none of those that were best is best now."""
    before, after = max(b for b, _ in pairs), max(a for _, a in pairs)
    return not any(b >= before - _ALIKE and a >= after - _ALIKE for b, a in pairs)


def _signs(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Reward less the group's mean, before and after; what is within rounding of it has no sign."""
    centres = mean([b for b, _ in pairs]), mean([a for _, a in pairs])

    def sign(value: float) -> float:
        return 0.0 if abs(value) <= _ALIKE else value

    return [(sign(b - centres[0]), sign(a - centres[1])) for b, a in pairs]


def largest_changes(rows: Sequence[Rescored]) -> list[Rescored]:
    """The completions whose reward moved most."""
    moved = [
        row for row in rows if row.before is not None and row.after is not None and abs(row.before - row.after) > _ALIKE
    ]
    return sorted(moved, key=lambda row: -abs((row.after or 0.0) - (row.before or 0.0)))[:_SHOWN]


def write_rescored(rows: Sequence[Rescored], path: Path) -> None:
    """A line a completion."""
    lines = [
        {"step": row.step, "group": row.group, "prompt": row.prompt, "completion": row.completion, "before": row.before,
         "after": row.after, "error": row.error}
        for row in rows
    ]  # fmt: skip
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
