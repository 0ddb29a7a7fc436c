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
        specs = sorted({spec for spec in (verifier, *graders) if spec is not None})
        own_options = {verifier: options}
        seen = {spec: _scores(spec, suite, items, texts, scorers, own_options.get(spec)) for spec in specs}
    chosen_by = seen[verifier] if verifier else own
    by_name = {f"{suite.scorer} (suite)": own, **{spec: seen[spec] for spec in graders}}
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
    options: Mapping[str, str] | None,
) -> list[float | None]:
    """Of each text. Raises: EvalError where none could be scored."""
    if spec in SCORERS:
        found = [SCORERS[spec](text, item.target, item.columns) for item, text in zip(items, texts, strict=True)]
        reasons = [None] * len(found)
    else:
        judged = replace(suite, items=tuple(replace(item, scorer=spec) for item in suite.items))
        pairs = scorers(judged, items, texts, options)
        found, reasons = [score for score, _ in pairs], [reason for _, reason in pairs]
    if all(score is None for score in found):
        why = next((reason for reason in reasons if reason), "it gives no score")
        raise EvalError(f"suite {suite.name}: {spec} could score none of {len(found)} answers: {why}")
    return found
