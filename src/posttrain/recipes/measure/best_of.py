"""`posttrain eval --best-of N --verifier V`: the samples of an eval report as a verifier and further graders see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace

from posttrain.errors import EvalError
from posttrain.evals.best_of import VerifiedItem
from posttrain.evals.suite import Item, Suite
from posttrain.evidence import EvalReport
from posttrain.grading.scorers import SCORERS
from posttrain.recipes.measure.evaluate import OwnScorers


def verified_items(
    report: EvalReport,
    suite: Suite,
    verifier: str | None,
    graders: Sequence[str],
    options: Mapping[str, str] | None = None,
) -> list[VerifiedItem]:
    """Every item's samples by `verifier` (the suite's own scorer where none is named), that scorer, and each of `graders`.

    A name is a scorer, `file.py:function`, `model:FOLDER` or `judge:FILE.yaml` (whole paths); `options` are the verifier's. Raises: EvalError, ConfigError.
    """
    if len(report.items[0].completions) != len(report.items[0].scores):
        raise EvalError(
            f"suite {suite.name}: its items are ranked choices, which nobody samples; --best-of needs sampled answers"
        )
    asked = {item.id: item for item in suite.items}
    items = [asked[record.id] for record in report.items for _ in record.completions]
    texts = [text for record in report.items for text in record.completions]
    own = [score for record in report.items for score in record.scores]
    with closing(OwnScorers()) as scorers:
        chosen_by = _scores(verifier, suite, items, texts, scorers, options or {}) if verifier else own
        # A grader that is the verifier too is asked once; with options of the verifier's it is another.
        seen = {
            spec: chosen_by if spec == verifier and not options else _scores(spec, suite, items, texts, scorers, {})
            for spec in graders
        }
    by_name = {f"{suite.scorer} (suite)": own, **seen}
    found, start = list[VerifiedItem](), 0
    for record in report.items:
        end = start + len(record.completions)
        graded = {name: tuple(scores[start:end]) for name, scores in by_name.items()}
        found.append(VerifiedItem(record.id, tuple(chosen_by[start:end]), graded, record.cluster))
        start = end
    return found


def _scores(
    spec: str,
    suite: Suite,
    items: Sequence[Item],
    texts: Sequence[str],
    scorers: OwnScorers,
    options: Mapping[str, str],
) -> list[float | None]:
    """Of each text. Raises: EvalError where none could be scored."""
    if spec in SCORERS:
        found = [SCORERS[spec](text, item.target, item.columns) for item, text in zip(items, texts, strict=True)]
        reasons = [None] * len(found)
    else:
        own = tuple(replace(item, scorer=spec, scorer_kwargs=options) for item in suite.items)
        pairs = scorers(replace(suite, items=own), items, texts)
        found, reasons = [score for score, _ in pairs], [reason for _, reason in pairs]
    if all(score is None for score in found):
        why = next((reason for reason in reasons if reason), "it gives no score")
        raise EvalError(f"suite {suite.name}: {spec} could score none of {len(found)} answers: {why}")
    return found
