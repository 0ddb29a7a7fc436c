"""Two reports on the same items become paired differences, or a reason why they cannot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from posttrain.evidence import EvalReport, ItemRecord
from posttrain.gate.distributions import Floats, Ints


class PairingError(Exception):
    """The two reports do not measure the same thing; the message says where they part."""


@dataclass(frozen=True, slots=True)
class PairedItems:
    """Scores of both models on the same items, in the order of the item ids."""

    candidate: Floats
    baseline: Floats
    clusters: Ints | None
    num_clusters: int
    binary: bool

    @property
    def differences(self) -> Floats:
        return self.candidate - self.baseline

    @property
    def discordant(self) -> tuple[int, int]:
        """Items only the candidate got right, items only the baseline got right."""
        difference = self.differences
        return int(np.sum(difference > 0)), int(np.sum(difference < 0))


def pair(candidate: EvalReport, baseline: EvalReport, split: str) -> PairedItems:
    """Pair by item id and prompt digest. Raises: PairingError."""
    _same_measurement(candidate, baseline, split)
    left, right = _by_id(candidate, "candidate"), _by_id(baseline, "baseline")
    _same_items(left, right)
    return pair_items(left, right)


def pair_items(candidate: Mapping[str, ItemRecord], baseline: Mapping[str, ItemRecord]) -> PairedItems:
    """Pair records that are known to be of the same items, by item id."""
    ids = sorted(candidate)
    clusters, num_clusters = _clusters([candidate[name].cluster for name in ids])
    return PairedItems(
        candidate=np.array([candidate[name].score for name in ids], dtype=np.float64),
        baseline=np.array([baseline[name].score for name in ids], dtype=np.float64),
        clusters=clusters,
        num_clusters=num_clusters,
        binary=all(_is_binary(side[name]) for side in (candidate, baseline) for name in ids),
    )


def _same_measurement(candidate: EvalReport, baseline: EvalReport, split: str) -> None:
    for what, left, right in (
        ("suite digest", candidate.suite_digest, baseline.suite_digest),
        ("split", candidate.split, baseline.split),
        ("scorer", candidate.scorer, baseline.scorer),
    ):
        if left != right:
            raise PairingError(f"{what} differs: candidate {left}, baseline {right}; evaluate both on the same suite")
    if candidate.engine != baseline.engine:
        engines = f"candidate {candidate.engine or 'embedded'}, baseline {baseline.engine or 'embedded'}"
        raise PairingError(f"engine differs: {engines}; evaluate both with the same one (eval_rollout)")
    if candidate.split != split:
        raise PairingError(f"reports are on split {candidate.split!r}, the gate decides on {split!r}")
    if candidate.model_digest == baseline.model_digest:
        raise PairingError(f"candidate and baseline are the same model, {candidate.model_digest}")


def _by_id(report: EvalReport, side: str) -> Mapping[str, ItemRecord]:
    if not report.items:
        raise PairingError(f"the {side}'s report has no items")
    repeated = [name for name, count in Counter(item.id for item in report.items).items() if count > 1]
    if repeated:
        raise PairingError(f"duplicate item ids in the {side}'s report: {_some(repeated)}")
    failed = [item.id for item in report.items if item.error is not None]
    if failed:
        raise PairingError(f"{len(failed)} items of the {side} ended in an error: {_some(failed)}")
    broken = [item.id for item in report.items if not item.scores or not all(map(math.isfinite, item.scores))]
    if broken:
        raise PairingError(f"{len(broken)} items of the {side} have no finite score: {_some(broken)}")
    return {item.id: item for item in report.items}


def _same_items(left: Mapping[str, ItemRecord], right: Mapping[str, ItemRecord]) -> None:
    lonely = sorted(left.keys() ^ right.keys())
    if lonely:
        raise PairingError(f"{len(lonely)} items are in one report only: {_some(lonely)}")
    for what, names in (
        ("prompt digest", [name for name in left if left[name].prompt_digest != right[name].prompt_digest]),
        ("cluster", [name for name in left if left[name].cluster != right[name].cluster]),
        ("number of samples", [name for name in left if len(left[name].scores) != len(right[name].scores)]),
    ):
        if names:
            raise PairingError(f"{len(names)} items differ in their {what}: {_some(sorted(names))}")


def _clusters(names: list[str | None]) -> tuple[Ints | None, int]:
    """Cluster index per item; an item without one stands alone. None if no two items share a cluster."""
    keys = [("item", str(row)) if name is None else ("cluster", name) for row, name in enumerate(names)]
    index = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    if len(index) == len(keys):
        return None, len(keys)
    return np.array([index[key] for key in keys], dtype=np.int64), len(index)


def _is_binary(item: ItemRecord) -> bool:
    return len(item.scores) == 1 and item.scores[0] in (0.0, 1.0)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown}, …"
