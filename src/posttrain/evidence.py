"""What is kept as proof: items scored, reports, verdicts, decisions, registry entries. Frozen, plain Python, no torch."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, cast

from posttrain.files import canonical_json, digest_json, read_json_lines, write_folder


@dataclass(frozen=True, slots=True)
class ItemRecord:
    """One item of a suite, scored: one score per sample. `prompt_digest` is what pairs two models' records."""

    id: str
    prompt_digest: str
    scores: tuple[float, ...]
    cluster: str | None = None
    completions: tuple[str, ...] = ()
    finishes: tuple[str, ...] = ()
    num_tokens: tuple[int, ...] = ()
    error: str | None = None

    @property
    def score(self) -> float:
        """Mean over the samples."""
        return sum(self.scores) / len(self.scores) if self.scores else math.nan

    def to_json(self) -> dict[str, Any]:
        """The fields as they are: `asdict` would copy each of a large report's values, and there is nothing nested."""
        return {name: getattr(self, name) for name in _ITEM_FIELDS}


_ITEM_FIELDS = tuple(one.name for one in fields(ItemRecord))


@dataclass(frozen=True, slots=True)
class EvalReport:
    """One model on one split of one suite, with every item kept.

    `suite_digest` covers the items, the scorer's code and the decoding parameters.
    """

    suite: str
    split: str
    suite_digest: str
    model_digest: str
    scorer: str
    items: tuple[ItemRecord, ...]
    decoding: Mapping[str, Any] = field(default_factory=dict[str, Any])
    wall_s: float = 0.0
    engine: str = ""
    """Name and version of what sampled the answers; empty for the embedded engine."""

    @property
    def mean(self) -> float:
        return sum(item.score for item in self.items) / len(self.items) if self.items else math.nan

    @property
    def digest(self) -> str:
        """Digest of what was measured; the time it took is not part of it."""
        return digest_json([self._header(), [item.to_json() for item in self.items]])

    def _header(self) -> dict[str, Any]:
        names = ("suite", "split", "suite_digest", "model_digest", "scorer")
        header = {name: getattr(self, name) for name in names} | {"decoding": dict(self.decoding)}
        return header | ({"engine": self.engine} if self.engine else {})

    def save(self, folder: Path) -> None:
        """Write `report.json` and `items.jsonl` into `folder`, all or nothing."""

        def fill(temporary: Path) -> None:
            header = self._header() | {"wall_s": self.wall_s, "mean": self.mean, "digest": self.digest}
            (temporary / "report.json").write_text(json.dumps(header, indent=2))
            lines = (canonical_json(item.to_json()) + "\n" for item in self.items)
            (temporary / "items.jsonl").write_text("".join(lines), encoding="utf-8", errors="surrogatepass")

        write_folder(folder, fill)

    @classmethod
    def load(cls, folder: Path) -> EvalReport:
        """Raises: ValueError if there is no report in it, or the items are not those it was written with."""
        header: Any = json.loads((Path(folder) / "report.json").read_text())
        try:
            expected = header.pop("digest")
            header.pop("mean")
        except (AttributeError, TypeError, KeyError) as error:
            raise ValueError(f"{Path(folder) / 'report.json'} holds no report") from error
        items = tuple(ItemRecord(**_tuples(row)) for _, row in read_json_lines(Path(folder) / "items.jsonl"))
        report = cls(items=items, **header)
        if report.digest != expected:
            raise ValueError(
                f"{folder}: items.jsonl does not match report.json (got {report.digest}, expected {expected})"
            )
        return report


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(cast("list[Any]", value)) if isinstance(value, list) else value for key, value in record.items()}


class Verdict(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    INVALID = "INVALID"

    @property
    def exit_code(self) -> int:
        return {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 2, "INVALID": 3}[self.value]


@dataclass(frozen=True, slots=True)
class TestResult:
    """One guard or primary, decided: it passes only if `bound` clears `line`. A limit has the two means and the line.

    `estimate` is the mean paired difference candidate - baseline, signed so that larger is better; `low`/`high` its
    two-sided 95 % interval; `bound` its one-sided 1 - alpha lower bound; `line` is -margin or +min_delta.
    """

    role: Literal["guard", "primary", "limit"]
    suite: str
    method: str
    num_items: int
    num_clusters: int
    baseline_mean: float
    candidate_mean: float
    estimate: float
    low: float
    high: float
    bound: float
    line: float
    p_value: float
    verdict: Verdict
    reason: str
    discordant: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """The decision on exactly one candidate against exactly one baseline, recomputable from the stored items."""

    verdict: Verdict
    reason: str
    candidate_digest: str
    baseline_digest: str
    spec_digest: str
    alpha: float
    tests: tuple[TestResult, ...]
    report_digests: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])

    @property
    def digest(self) -> str:
        return digest_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain values; a number that is not finite becomes null."""
        return _finite(asdict(self))


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person decided on a verdict that waited, and why."""

    verdict_digest: str
    accepted: bool
    by: str
    reason: str
    at: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def approvers(decisions: Iterable[Decision], verdict_digest: str) -> list[str]:
    """Who accepted exactly this verdict: each person once, however often and in whatever case the name was written."""
    found: dict[str, str] = {}
    for decision in decisions:
        if decision.accepted and decision.verdict_digest == verdict_digest:
            found.setdefault(_person(decision.by), decision.by)
    return list(found.values())


def _person(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).split()).casefold()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in cast("dict[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in cast("list[Any]", value)]
    return value.value if isinstance(value, StrEnum) else value


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    name: str
    version: int
    digest: str
    path: Path
    manifest: str
    """Digest of the last stage's manifest."""
    aliases: Sequence[str] = ()
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
