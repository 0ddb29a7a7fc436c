"""Config → rendered rows: the entry points of the recipes.

Reading, parsing, rendering, overflow, cache and the summary meet here; each does its work in its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.config.datasets import DatasetKeys, RowKind
from posttrain.config.process_reward import ProcessRewardModelKeys
from posttrain.config.rl import SamplingKeys
from posttrain.config.stages import ExampleKeys, SFTKeys, TrainKeys
from posttrain.data import cache, render
from posttrain.data.dataset import Dataset, DataSummary, Skipped, SourceSummary
from posttrain.data.dealt import deal_of, dealt
from posttrain.data.formats import Noun, detect_format, parse_rows
from posttrain.data.gathered import Gathered
from posttrain.data.opened import OpenSource, read_source
from posttrain.data.rendered import RowPlan, Survey, expanded, render_rows, render_source, source_summary, surveyed
from posttrain.data.rows import StoredRows
from posttrain.data.shelf import Shelf
from posttrain.data.sources import short_path
from posttrain.data.stream import first_rows
from posttrain.data.template import template_digest, use_template
from posttrain.errors import DataError
from posttrain.files import digest_json
from posttrain.types import Origin, Prompt, PromptRow, TokenSeq


class PairRow(NamedTuple):
    """Both answers with their prompt; `margin` and `weight` as the row's columns of these names have them."""

    chosen: TokenSeq
    rejected: TokenSeq
    margin: float = 0.0
    weight: float = 1.0


class StepRow(NamedTuple):
    """An answer in steps: marked is the last token of each, in whose order the labels stand."""

    seq: TokenSeq
    labels: tuple[float, ...]


ComparedRow = tuple[TokenSeq, TokenSeq, float]
LabelledRow = tuple[TokenSeq, bool]


def load_sft(keys: TrainKeys, tokenizer: Any, sources: Sequence[DatasetKeys] | None = None) -> Dataset[TokenSeq]:
    """Raises: DataError. `sources` replaces `keys.datasets`, as for `keys.eval_datasets`; in RL they are `keys.ptx_datasets`.

    Of a stage that streams these are the first rows: what is shown and checked before training.
    """
    plan = sft_plan(keys)
    return _load(replace(plan, first=keys.rows_looked_at if sources is None else None), keys, tokenizer, sources)


def sft_plan(keys: TrainKeys) -> RowPlan:
    train_on = keys.train_on if isinstance(keys, ExampleKeys) else "assistant"
    is_wrapped = isinstance(keys, SFTKeys) and keys.is_wrapped
    return RowPlan(
        "examples",
        partial(render.draft_example, train_on=train_on),
        build=lambda _, seqs: seqs[0],
        extra=lambda row: None,
        restore=lambda seqs, extra, origin: seqs[0],
        **_limits(keys, keys.sequence_len, train_on=train_on, is_wrapped=is_wrapped),
        is_wrapped=is_wrapped,
    )


def load_preference(keys: TrainKeys, tokenizer: Any, sources: Sequence[DatasetKeys] | None = None) -> Dataset[PairRow]:
    """Preferences. Raises: DataError."""
    plan = RowPlan(
        "pairs",
        render.draft_pair,
        build=lambda noun, seqs: PairRow(seqs[0], seqs[1], noun.margin, noun.weight),
        extra=lambda row: None if row == (*row[:2], 0.0, 1.0) else [row.margin, row.weight],
        restore=lambda seqs, extra, origin: PairRow(seqs[0], seqs[1], *map(float, extra or ())),
        **_limits(keys, keys.sequence_len),
    )
    return _load(plan, keys, tokenizer, sources)


def load_comparisons(
    keys: TrainKeys, tokenizer: Any, sources: Sequence[DatasetKeys] | None = None
) -> Dataset[ComparedRow]:
    """Rows (chosen, rejected, margin), each answer with its prompt. Raises: DataError."""
    plan = RowPlan(
        "pairs",
        render.draft_pair,
        build=lambda noun, seqs: (seqs[0], seqs[1], noun.margin),
        extra=lambda row: row[2],
        restore=lambda seqs, extra, origin: (seqs[0], seqs[1], float(extra)),
        **_limits(keys, keys.sequence_len, margins=True),
    )
    return _load(plan, keys, tokenizer, sources)


def load_kto(keys: TrainKeys, tokenizer: Any, sources: Sequence[DatasetKeys] | None = None) -> Dataset[LabelledRow]:
    """Rows (sequence, desirable); a preference pair gives two, chosen first. Raises: DataError."""
    plan = RowPlan(
        "labels",
        render.draft_labelled,
        build=lambda noun, seqs: (seqs[0], noun.label),
        extra=lambda row: row[1],
        restore=lambda seqs, extra, origin: (seqs[0], bool(extra)),
        **_limits(keys, keys.sequence_len),
    )
    return _load(plan, keys, tokenizer, sources)


def load_prompts(
    keys: SamplingKeys, tokenizer: Any, sources: Sequence[DatasetKeys] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Dataset[PromptRow]:  # fmt: skip
    """Rows (prompt, its ids), `tools` beside those of the row, at most sequence_len - max_completion_length long; truncation keeps the end.

    Raises: DataError.
    """
    limit = keys.sequence_len - keys.max_completion_length
    if limit < 1:
        raise DataError(
            f"sequence_len={keys.sequence_len} leaves no room for a prompt beside max_completion_length="
            f"{keys.max_completion_length}; raise sequence_len or lower max_completion_length"
        )
    plan = RowPlan(
        "prompts",
        partial(_draft_offering, tools=tuple(tools)),
        build=lambda noun, seqs: (_offering(noun, tools), seqs[0].ids),
        extra=lambda row: [row[0].prompt, dict(row[0].columns), list(row[0].tools)],
        restore=_restore_prompt,
        **_limits(
            keys, limit, max_completion_length=keys.max_completion_length, **({"tools": list(tools)} if tools else {})
        ),
        trains=False,
        limit_name="sequence_len - max_completion_length",
    )
    return _load(plan, keys, tokenizer, sources)


def load_steps(
    keys: ProcessRewardModelKeys, tokenizer: Any, sources: Sequence[DatasetKeys] | None = None
) -> Dataset[StepRow]:
    """Answers in steps. Raises: DataError."""
    form = render.StepForm(keys.step_separator, keys.max_completion_length)
    plan = RowPlan(
        "steps",
        partial(render.draft_steps, form=form),
        # Of a row that was cut, those whose steps are still whole.
        build=lambda noun, seqs: StepRow(seqs[0], noun.labels[: seqs[0].num_loss_tokens]),
        extra=lambda row: list(row.labels),
        restore=lambda seqs, extra, origin: StepRow(seqs[0], tuple(map(float, extra))),
        **_limits(
            keys, keys.sequence_len, step_separator=form.separator, max_completion_length=form.max_completion_length
        ),
    )
    return _load(plan, keys, tokenizer, sources)


LOADERS: dict[RowKind, Callable[..., Dataset[Any]]] = {
    "examples": load_sft,
    "pairs": load_preference,
    "labels": load_kto,
    "steps": load_steps,
    "prompts": load_prompts,
}
"""Kind of rows → its entry point."""


def read_nouns(sources: Sequence[DatasetKeys], kind: RowKind, first: int | None = None) -> list[Noun]:
    """The parsed rows, unrendered (for lint and for showing); the `first` of each source, or all. Raises: DataError."""
    nouns: list[Noun] = []
    for source in sources:
        rows = (read_source(source) if first is None else first_rows(source, first)).rows
        found = detect_format(rows, kind, source.type)
        nouns += expanded(parse_rows(rows, found.name, source)[0], kind)
    return nouns


# --- the one way through -------------------------------------------------------------------------------------------


def _limits(keys: TrainKeys, limit: int, **more: Any) -> dict[str, Any]:
    chosen = {name: getattr(keys, name) for name in ("overflow", "min_sample_len", "deduplicate")}
    return {"limit": limit, **chosen, "keys": {"sequence_len": keys.sequence_len, **chosen, **more}}


def _load(plan: RowPlan, keys: TrainKeys, tokenizer: Any, given: Sequence[DatasetKeys] | None) -> Dataset[Any]:
    sources = list(keys.datasets if given is None else given)
    use_template(tokenizer, keys.chat_template, keys.chat_template_kwargs)
    if plan.first is not None:
        found, status = _first_rows(plan, sources, tokenizer), f"none: the first {plan.first:,} rows of a stream"
        return _restored(plan, found, sources, status)
    opened = [OpenSource(source) for source in sources]
    key = _cache_key(plan, opened, tokenizer)
    found, status = cache.lookup(key)
    if found is None:
        with cache.alone(key):
            found, status = cache.lookup(key)  # who had to wait finds it now
            if found is None:
                found, how = _tokenized(plan, opened, tokenizer, key, keys.dataset_num_proc)
                status += how
    return _restored(plan, found, sources, status)


def _first_rows(plan: RowPlan, sources: Sequence[DatasetKeys], tokenizer: Any) -> cache.Cached:
    """Raises: DataError."""
    summaries: list[SourceSummary] = []
    seen: set[bytes] = set()
    with cache.RowWriter(None) as writer:
        for source in sources:
            read = first_rows(source, plan.first or 0)
            part = Gathered(lambda seqs, row: writer.add(seqs, plan.extra(row)), seen)
            found = render_rows(plan, source, read, tokenizer, part, join=True)
            summaries.append(source_summary(source, found, read.digest, part))
        return writer.read(_facts(summaries))


def _tokenized(
    plan: RowPlan, sources: Sequence[OpenSource], tokenizer: Any, key: cache.CacheKey, num_processes: int
) -> tuple[cache.Cached, str]:
    """The rows as the next start will find them, and in words why it will not and what an earlier one had left. Raises: DataError."""
    surveys = [surveyed(source, plan.kind) for source in sources]
    summaries: list[SourceSummary] = []
    seen: set[bytes] = set()
    with _shelf(plan, surveys, tokenizer, key.shelf, num_processes) as shelf, cache.RowWriter(key) as writer:
        for survey in surveys:
            part = Gathered(lambda seqs, row: writer.add(seqs, plan.extra(row)), seen)
            render_source(plan, survey, tokenizer, part, shelf)
            summaries.append(source_summary(survey.source.keys, survey.format, survey.source.digest, part))
        found = writer.read(_facts(summaries))
    shelf.clear()
    return found, shelf.found_text + writer.why_not_kept


@contextmanager
def _shelf(
    plan: RowPlan, surveys: Sequence[Survey], tokenizer: Any, folder: Path, num_processes: int
) -> Generator[Shelf]:
    """Where the parts are kept on their way; of a single one nothing is, and nobody else makes it. Raises: ConfigError."""
    num_parts = sum(survey.num_parts for survey in surveys)
    if num_parts < 2 or num_processes < 2:
        yield Shelf(folder if num_parts > 1 else None)
        return
    with dealt(deal_of(surveys, plan.kind, plan.draft, tokenizer, folder), num_processes, num_parts) as shelf:
        yield shelf


def _facts(summaries: Sequence[SourceSummary]) -> dict[str, Any]:
    _refuse_nothing(summaries)
    return {
        "summaries": [asdict(summary) for summary in summaries],
        "sizes": [summary.rows_kept for summary in summaries],
    }


def _refuse_nothing(summaries: Sequence[SourceSummary]) -> None:
    """A source that gives no row is an error: a mixture without it is not what was asked for."""
    for summary in summaries:
        if not summary.rows_kept:
            reasons = "; ".join(f"{s.count} {reason} (first {s.first[0]})" for reason, s in summary.skipped.items())
            raise DataError(
                f"{summary.path}: none of {summary.rows_read} rows can be used: {reasons}; "
                "expected at least one row with something to train; fix the rows, `type`, `train_on` or `sequence_len`"
            )


# --- cache ---------------------------------------------------------------------------------------------------------


def _cache_key(plan: RowPlan, sources: Sequence[OpenSource], tokenizer: Any) -> cache.CacheKey:
    asked = [source.keys.model_dump(exclude={"weight", "eval_name", "val_size"}) for source in sources]
    return cache.CacheKey(
        place=[plan.kind, [source.keys.path for source in sources]],
        contents=digest_json([source.digest for source in sources]),
        template=template_digest(tokenizer),
        tokenizer=cache.tokenizer_digest(tokenizer),
        code=cache.cache_code_digest(),
        keys={**plan.keys, "datasets": [{k: v for k, v in entry.items() if k != "path"} for entry in asked]},
    )


def _restored(plan: RowPlan, found: cache.Cached, sources: Sequence[DatasetKeys], status: str) -> Dataset[Any]:
    sizes = tuple(found.facts["sizes"])
    summaries = tuple(
        _restored_summary(raw, source) for raw, source in zip(found.facts["summaries"], sources, strict=True)
    )
    weights = tuple(source.weight for source in sources)
    rows = StoredRows(found, plan.restore, [short_path(source.path) for source in sources], sizes)
    digest = digest_json([found.facts["rows_digest"], sizes, weights])
    return Dataset(rows, DataSummary(summaries, status), digest, sizes, weights)


def _restored_summary(raw: dict[str, Any], source: DatasetKeys) -> SourceSummary:
    skipped = {
        reason: Skipped(s["count"], tuple(s["first"]), tuple(s["lines"])) for reason, s in raw["skipped"].items()
    }
    return SourceSummary(**{**raw, "skipped": skipped, "weight": source.weight, "path": short_path(source.path)})


def _draft_offering(tokenizer: Any, prompt: Prompt, tools: Sequence[Mapping[str, Any]]) -> list[render.RenderedRow]:
    return render.draft_prompt(tokenizer, _offering(prompt, tools))


def _offering(prompt: Prompt, tools: Sequence[Mapping[str, Any]]) -> Prompt:
    """The prompt with tools that it does not name itself. Raises: DataError for a text, in which no tools can be written."""
    if tools and isinstance(prompt.prompt, str):
        raise DataError(
            f"{prompt.origin}: the prompt is a text, and tools are offered in a chat; write it as messages, or leave `tools` out"
        )
    return replace(prompt, tools=(*prompt.tools, *tools)) if tools else prompt


def _restore_prompt(seqs: tuple[TokenSeq, ...], extra: Any, origin: Origin) -> PromptRow:
    prompt, columns, tools = extra
    return Prompt(origin, prompt if isinstance(prompt, str) else tuple(prompt), columns, tuple(tools)), seqs[0].ids
