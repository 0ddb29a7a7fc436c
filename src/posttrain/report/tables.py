"""The rows of every table on the page, from the records of a run. Pure: records in, rows of text and numbers out."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.evidence import EvalReport, ItemRecord
from posttrain.files import read_json_lines
from posttrain.names import LM_EVAL, QUESTIONS
from posttrain.report import words
from posttrain.report.intervals import Interval, difference_interval, score_interval
from posttrain.report.records import EvalKey, GateRecord, RunRecord, StageRecord

MAX_BETTER, MAX_WORSE, MAX_STILL_WRONG = 3, 2, 1
MAX_MASK_EXAMPLES = 2
MAX_SAMPLES = 3
_CLIP_CHARS = 1200


@dataclass(frozen=True, slots=True)
class SuiteRow:
    """One suite: each model's score (None where it was not evaluated), and the change between the two that are compared."""

    suite: str
    split: str
    num_items: int
    engines: tuple[str, ...]
    """What answered, where it was not the embedded engine alone."""
    share: bool
    scores: tuple[Interval | None, ...]
    compared: tuple[str, str] | None
    change: Interval | None


@dataclass(frozen=True, slots=True)
class CostRow:
    """What a stage took, and what it gave on each suite over the model before it."""

    stage: StageRecord
    gains: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PairedSample:
    """The same item answered by the first and the last model."""

    change: str
    prompt: str
    before: str
    after: str
    scores: tuple[float, float]


@dataclass(frozen=True, slots=True)
class FindingRow:
    stage: str
    rule: str
    severity: str
    steps: str
    times: int
    message: str
    action: str
    evidence: str


@dataclass(frozen=True, slots=True)
class MaskExample:
    """A training example cut where the loss mask changes: (text, trained)."""

    origin: str
    segments: tuple[tuple[str, bool], ...] = field(default=())


def before_after(run: RunRecord) -> list[SuiteRow]:
    return [_suite_row(run, key) for key in run.suites]


def _suite_row(run: RunRecord, key: EvalKey) -> SuiteRow:
    reports = {model: run.evals[model].get(key) for model in run.models}
    present = [report for report in reports.values() if report is not None]
    compared = run.compared(key)
    first, last = (run.evals[model][key] for model in compared) if compared else (present[-1], present[-1])
    return SuiteRow(
        suite=key[0],
        split=key[1],
        num_items=len(last.items),
        engines=_engines(present),
        share=words.is_share(*present),
        scores=tuple(None if report is None else score_interval(report) for report in reports.values()),
        compared=compared,
        change=difference_interval(first, last) if compared else None,
    )


def _engines(reports: list[EvalReport]) -> tuple[str, ...]:
    names = {report.engine for report in reports}
    return () if names == {""} else tuple(sorted(name or "the embedded engine" for name in names))


def costs(run: RunRecord) -> list[CostRow]:
    return [CostRow(stage, tuple(_gains(run, place))) for place, stage in enumerate(run.stages)]


@dataclass(frozen=True, slots=True)
class Total:
    """What the whole run took; `eval_s` is what its evaluations took, None where none is known."""

    train_s: float
    tokens: int
    steps: int
    eval_s: float | None


def total(run: RunRecord) -> Total:
    reports = [report for suites in run.evals.values() for report in suites.values()]
    return Total(
        train_s=sum(stage.wall_s or 0.0 for stage in run.stages),
        tokens=sum(stage.tokens or 0 for stage in run.stages),
        steps=sum(stage.steps or 0 for stage in run.stages),
        eval_s=sum(report.wall_s for report in reports) if reports else None,
    )


def _gains(run: RunRecord, place: int) -> Iterator[tuple[str, str]]:
    """Per suite, the stage's model against the nearest earlier one that was evaluated on it."""
    earlier = [*[stage.name for stage in run.stages[:place]][::-1], "base"]
    for key, report in run.evals.get(run.stages[place].name, {}).items():
        before = next((run.evals[name][key] for name in earlier if key in run.evals.get(name, {})), None)
        if before is not None:
            yield key[0], words.change(difference_interval(before, report), words.is_share(before, report))


def headline(run: RunRecord) -> str:
    """The verdict in one or two sentences, with the interval in words."""
    parts = [words.STATUS[run.status]] if run.status in words.STATUS else []
    gate = run.final_gate
    if gate is not None:
        parts.append(f"The model {words.VERDICT.get(words.verdict_of(gate.verdict), 'has an unknown verdict')}.")
    main = _main_test(gate)
    rows = before_after(run)
    if main is not None:
        share = all(row.share for row in rows if row.suite == main["suite"])
        parts.append(
            words.gain_sentence(
                main["suite"],
                main["baseline_mean"],
                main["candidate_mean"],
                main.get("low"),
                main.get("high"),
                share,
                num_items=main["num_clusters"] or main["num_items"],
            )
        )
    elif shown := [row for row in rows if row.change is not None]:
        row = shown[0]
        assert row.change is not None and row.compared is not None
        means = {model: score.mean for model, score in zip(run.models, row.scores, strict=True) if score is not None}
        before, after = (means[model] for model in row.compared)
        low, high = row.change.low, row.change.high
        parts.append(
            words.gain_sentence(row.suite, before, after, low, high, row.share, num_items=row.change.num_items)
        )
    elif gate is None:
        parts.append("No model was compared with another, so this run says nothing about improvement.")
    if run.registered:
        parts.append(
            f"It is registered as “{run.registered.get('name')}” version {run.registered.get('version')}{words.alias_of(run.registered)}."
        )
    return " ".join(parts)


def _main_test(gate: GateRecord | None) -> Mapping[str, Any] | None:
    """The first primary, else the first guard, whose numbers are known."""
    tests = (
        []
        if gate is None
        else [
            t
            for t in gate.verdict.get("tests") or []
            if t.get("baseline_mean") is not None and t.get("candidate_mean") is not None
        ]
    )
    return min(tests, key=lambda test: test.get("role") != "primary", default=None)


def tests_by_unit(gate: GateRecord, shares: Mapping[str, bool]) -> list[tuple[bool, list[Mapping[str, Any]]]]:
    """The tests on shares (True), then those in score units: a table has one unit. Limits are no tests: they have a list."""
    tests = [test for test in gate.verdict.get("tests") or [] if test.get("role") != "limit"]
    units = [(unit, [test for test in tests if shares.get(test["suite"], True) is unit]) for unit in (True, False)]
    return [(unit, found) for unit, found in units if found]


def paired_samples(run: RunRecord) -> list[PairedSample]:
    """A few items that the second of the compared models answers better than the first, worse, and still wrong; always the same."""
    shown: list[PairedSample] = []
    main = _main_test(run.final_gate) or {}
    for key in sorted(run.suites, key=lambda key: key[0] != main.get("suite")):
        having = [run.evals[model][key] for model in run.compared(key) or ()]
        if having and words.is_share(*having):
            prompts = _prompts(run, key)
            shown = list(_pairs(having[0], having[-1], prompts))
        if shown:
            break
    return shown


def _pairs(first: EvalReport, last: EvalReport, prompts: Mapping[str, str]) -> Iterator[PairedSample]:
    before = {item.id: item for item in first.items}
    pairs = [
        (before[item.id], item)
        for item in last.items
        if item.id in before and item.completions and before[item.id].completions
    ]
    kinds = (
        ("better", MAX_BETTER, lambda old, new: new.score > old.score),
        ("worse", MAX_WORSE, lambda old, new: new.score < old.score),
        ("still wrong", MAX_STILL_WRONG, lambda old, new: old.score == new.score == 0.0),
    )
    for name, most, matches in kinds:
        for old, new in [pair for pair in pairs if matches(*pair)][:most]:
            yield PairedSample(
                name, prompts.get(new.id, f"item {new.id}"), _answer(old), _answer(new), (old.score, new.score)
            )


def _answer(item: ItemRecord) -> str:
    return clip(item.completions[0])


def _prompts(run: RunRecord, key: EvalKey) -> dict[str, str]:
    """Prompts by item id, from the suite's file if it is still where the config says; of a task of lm-eval, as they were asked."""
    suite, split = key
    evals = run.config.get("evals")
    entry = evals.get(suite) if isinstance(evals, Mapping) else None
    named = str(entry.get("path", "") if isinstance(entry, Mapping) else entry or "")
    path = Path(named)
    if named.startswith(LM_EVAL):
        asked = run.folder.glob(f"evals/*/{glob.escape(f'{suite}-{split}')}/{QUESTIONS}")
        path = min(asked, default=path)
    if not path.is_file():
        return {}
    try:
        rows = list(read_json_lines(path))
    except DataError:  # the file as it is today is no part of the run: its items go by their ids
        return {}
    prompts = {
        str(row.get("id", number)): clip(
            transcript(row.get("prompt") or row.get("messages") or row.get("question") or "")
        )
        for number, row in rows
    }
    return {identifier: prompt for identifier, prompt in prompts.items() if prompt}


def training_samples(stage: StageRecord) -> list[Mapping[str, Any]]:
    """First, middle and last sampled completion of a stage."""
    count = len(stage.samples)
    places = sorted({0, count // 2, count - 1}) if count else []
    return [
        {
            "step": stage.samples[place].get("step"),
            "prompt": clip(transcript(stage.samples[place].get("prompt"))),
            "completion": clip(transcript(stage.samples[place].get("completion"))),
            "reward": stage.samples[place].get("reward"),
        }
        for place in places[:MAX_SAMPLES]
    ]


def findings(run: RunRecord) -> list[FindingRow]:
    """One row per stage and rule, hard ones first."""
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for stage in run.stages:
        for event in stage.findings:
            grouped.setdefault((stage.name, str(event.get("rule"))), []).append(event)
    rows = [_finding_row(stage, rule, events) for (stage, rule), events in grouped.items()]
    order = {"hard": 0, "soft": 1, "info": 2}
    return sorted(rows, key=lambda row: order.get(row.severity, 3))


def _finding_row(stage: str, rule: str, events: list[Mapping[str, Any]]) -> FindingRow:
    first, last = events[0], events[-1]
    steps = str(first.get("step")) if len(events) == 1 else f"{first.get('step')}–{last.get('step')}"
    evidence = ", ".join(f"{name} = {_number(value)}" for name, value in (last.get("evidence") or {}).items())
    return FindingRow(
        stage,
        rule,
        str(last.get("severity")),
        steps,
        len(events),
        str(last.get("message", "")),
        str(last.get("action", "")),
        evidence,
    )


def mask_examples(run: RunRecord) -> list[tuple[str, MaskExample]]:
    """Rendered training examples of each stage, where its data summary has any."""
    found: list[tuple[str, MaskExample]] = []
    for stage in run.stages:
        for example in list(stage.data.get("examples") or [])[:MAX_MASK_EXAMPLES]:
            parsed = mask_example(example)
            if parsed.segments:
                found.append((stage.name, parsed))
    return found


def mask_example(example: Any) -> MaskExample:
    """Takes `segments` ([text, trained] pairs or {text, trained}), or `tokens` beside `loss_mask`."""
    if not isinstance(example, Mapping):
        return MaskExample("")
    if "tokens" in example and "loss_mask" in example:
        pieces = list(zip(example["tokens"], example["loss_mask"], strict=False))
    else:
        pieces = [
            (p.get("text", ""), p.get("trained", False)) if isinstance(p, Mapping) else tuple(p)
            for p in example.get("segments") or []
        ]
    merged: list[tuple[str, bool]] = []
    for text, trained in pieces:
        if merged and merged[-1][1] == bool(trained):
            merged[-1] = (merged[-1][0] + str(text), bool(trained))
        else:
            merged.append((str(text), bool(trained)))
    return MaskExample(str(example.get("origin", "")), tuple(merged))


def flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as dotted names and text, for a two-column table."""
    rows: list[tuple[str, str]] = []
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            rows += flatten(inner, f"{prefix}{name}.")
        elif isinstance(inner, list) and any(isinstance(x, (Mapping, list)) for x in inner):
            rows.append((f"{prefix}{name}", f"{len(inner)} entries"))
        elif inner is not None:
            rows.append((f"{prefix}{name}", ", ".join(map(str, inner)) if isinstance(inner, list) else _number(inner)))
    return rows


def transcript(value: Any) -> str:
    """A prompt or completion as text; of a conversation, each turn on its own line."""
    if isinstance(value, list):
        return "\n".join(
            f"{m.get('role', '')}: {m.get('content', '')}" if isinstance(m, Mapping) else str(m) for m in value
        )
    return "" if value is None else str(value)


def clip(text: str) -> str:
    return text if len(text) <= _CLIP_CHARS else f"{text[:_CLIP_CHARS]} … ({len(text) - _CLIP_CHARS} more characters)"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
