import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from posttrain.evidence import EvalReport, ItemRecord

BENCH = Path(__file__).parents[2] / "bench" / "gate"


def _report(
    scores: Sequence[float | Sequence[float]],
    model: str,
    *,
    suite: str = "heldout",
    split: str = "gate",
    clusters: Sequence[str | None] | None = None,
) -> EvalReport:
    samples = [tuple(score) if isinstance(score, Sequence) else (float(score),) for score in scores]
    items = tuple(
        ItemRecord(
            id=f"q{row}", prompt_digest=f"p{row}", scores=values, cluster=None if clusters is None else clusters[row]
        )
        for row, values in enumerate(samples)
    )
    return EvalReport(suite, split, f"digest of {suite}", model, "exact", items)


@pytest.fixture
def report() -> Callable[..., EvalReport]:
    return _report


@pytest.fixture
def binary_pair(report) -> Callable[..., tuple[EvalReport, EvalReport]]:
    """Candidate and baseline with `good` gains, `bad` losses, and the rest of `n` right on both sides."""

    def build(good: int, bad: int, n: int, suite: str = "heldout") -> tuple[EvalReport, EvalReport]:
        same = n - good - bad
        candidate = [1] * good + [0] * bad + [1] * same
        baseline = [0] * good + [1] * bad + [1] * same
        return report(candidate, "model-c", suite=suite), report(baseline, "model-b", suite=suite)

    return build


@pytest.fixture
def bench(monkeypatch) -> Callable[[str], ModuleType]:
    """A module of `bench/gate`, by name; its enumerations stay cached between tests."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module
