"""Config → rendered rows: the entry points of the recipes.

Reading, parsing, rendering, overflow, cache and the summary meet here; each does its work in its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from posttrain.config.datasets import DatasetKeys, RowKind
from posttrain.config.process_reward import ProcessRewardModelKeys
from posttrain.config.rl import SamplingKeys
from posttrain.config.stages import ExampleKeys, SFTKeys, TrainKeys
from posttrain.data import cache, render
from posttrain.data.dataset import Dataset, DataSummary, Skipped, SourceSummary, length_percentiles
from posttrain.data.formats import Noun, detect_format, parse_rows
from posttrain.data.gathered import NOTHING_LEFT, Gathered, Joiner, Out, joined
from posttrain.data.parse import IDENTICAL, unpair
from posttrain.data.render import RenderedRow
from posttrain.data.rows import StoredRows
from posttrain.data.sources import Source, content_digest, read_source, short_path
from posttrain.data.stream import first_rows
from posttrain.data.template import template_digest, use_template
from posttrain.errors import DataError
from posttrain.files import digest_json
from posttrain.types import Example, Origin, PreferencePair, Prompt, PromptRow, TokenSeq

TOO_LONG = "longer than sequence_len"
TOO_SHORT = "shorter than min_sample_len"
AGAIN = "the same tokens as an earlier row"
NOTHING = "nothing to train"
TRUNCATED = "truncated to sequence_len"
SPLIT = "cut into rows of sequence_len"
BLANK = "blank lines"
INVENTED = "rows with null fields that nested Parquet types had added, taken out"
IN_PIECES = "prompt and answer tokenised apart (a token would have straddled the edge)"
STEPS_CUT = "steps cut off by max_completion_length"
SEPARATED = "steps with the step_separator inside, which are several where answers are scored"
DROPPED = "earlier turns whose thinking the template leaves out"
REWRITTEN = "turns as the template writes them inside the conversation, otherwise than alone"
_ROWS_AT_ONCE = 2048
"""Rows that are text and tokens at once, on their way to the cache."""


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


@dataclass(frozen=True, slots=True)
class RowPlan:
    """How one stage's rows are made. `extra` and `restore` take a row to JSON and back, for the cache."""

    kind: RowKind
    draft: Callable[[Any, Any], list[RenderedRow]]
    build: Callable[[Any, tuple[TokenSeq, ...]], Any]
    extra: Callable[[Any], Any]
    restore: Callable[[tuple[TokenSeq, ...], Any, Origin], Any]
    limit: int
    overflow: str
    min_sample_len: int
    deduplicate: bool
    keys: dict[str, Any]
    trains: bool = True
    is_wrapped: bool = False
    """Whether the rows of a source are joined, and cut every `limit` tokens."""
    first: int | None = None
    """Only so many rows of each source; they are read as from a stream, and kept in no cache."""
    limit_name: str = "sequence_len"


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
        lambda tok, noun: render.draft_example(tok, noun, train_on),
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
        lambda tok, noun: render.draft_prompt(tok, _offering(noun, tools)),
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
        lambda tok, noun: render.draft_steps(tok, noun, form),
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
        nouns += _expanded(parse_rows(rows, found.name, source)[0], kind)
    return nouns


# --- the one way through -------------------------------------------------------------------------------------------


def _limits(keys: TrainKeys, limit: int, **more: Any) -> dict[str, Any]:
    chosen = {name: getattr(keys, name) for name in ("overflow", "min_sample_len", "deduplicate")}
    return {"limit": limit, **chosen, "keys": {"sequence_len": keys.sequence_len, **chosen, **more}}


def _load(plan: RowPlan, keys: TrainKeys, tokenizer: Any, given: Sequence[DatasetKeys] | None) -> Dataset[Any]:
    sources = list(keys.datasets if given is None else given)
    use_template(tokenizer, keys.chat_template, keys.chat_template_kwargs)
    weights = tuple(source.weight for source in sources)
    key = None if plan.first else _cache_key(plan, sources, tokenizer)
    found, status = cache.lookup(key) if key else (None, f"none: the first {plan.first:,} rows of a stream")
    if found is None:
        with cache.alone(key) if key else nullcontext():
            if key:  # who had to wait finds it now
                found, status = cache.lookup(key)
            if found is None:
                found, why_not_kept = _tokenized(plan, sources, tokenizer, key)
                status += why_not_kept
    return _restored(plan, found, sources, weights, status)


def _tokenized(
    plan: RowPlan, sources: Sequence[DatasetKeys], tokenizer: Any, key: cache.CacheKey | None
) -> tuple[cache.Cached, str]:
    """The rows as the next start will find them, and why it will not. Raises: DataError."""
    summaries: list[SourceSummary] = []
    seen: set[bytes] = set()
    with cache.RowWriter(key) as writer:
        for source in sources:
            read = read_source(source) if plan.first is None else first_rows(source, plan.first)
            part = Gathered(lambda seqs, row: writer.add(seqs, plan.extra(row)), seen)
            summaries.append(render_rows(plan, source, read, tokenizer, part, join=True))
        _refuse_nothing(summaries)
        facts = {
            "summaries": [asdict(summary) for summary in summaries],
            "sizes": [summary.rows_kept for summary in summaries],
        }
        return writer.read(facts), writer.why_not_kept


def render_rows(
    plan: RowPlan, source: DatasetKeys, read: Source, tokenizer: Any, part: Gathered, *, join: bool = False
) -> SourceSummary:
    """What becomes of the rows that were read; with `join` those of a plan that wraps are blocks. Raises: DataError."""
    found = detect_format(read.rows, plan.kind, source.type)
    parsed, skips = parse_rows(read.rows, found.name, source)
    for skip in skips:
        part.skip(skip.reason, skip.origin)
    part.notes.update(dict.fromkeys((IN_PIECES, REWRITTEN, DROPPED), 0))
    part.notes[INVENTED] = read.invented_nulls
    part.notes[BLANK] = len(read.blank_lines)
    joiner = Joiner(part, plan.limit) if plan.is_wrapped and join else None
    keep = part.keep if joiner is None else joiner.add
    nouns = _expanded(parsed, plan.kind)
    for at in range(0, len(nouns), _ROWS_AT_ONCE):
        _render(plan, part, nouns[at : at + _ROWS_AT_ONCE], tokenizer, keep)
        if joiner is not None:
            joiner.cut(is_last=at + _ROWS_AT_ONCE >= len(nouns))
    return _summary(source, read, str(found), part)


def _render(plan: RowPlan, part: Gathered, nouns: Sequence[Noun], tokenizer: Any, keep: Out) -> None:
    drafts = [plan.draft(tokenizer, noun) for noun in nouns]
    tokenized = render.tokenize(tokenizer, [draft for group in drafts for draft in group])
    part.notes[IN_PIECES] += tokenized.split
    part.notes[REWRITTEN] += sum(draft.rewritten for group in drafts for draft in group)
    part.notes[DROPPED] += sum(draft.dropped for group in drafts for draft in group)
    stepped = [
        (draft.steps, seq) for draft, seq in zip(chain(*drafts), tokenized.seqs, strict=True) if draft.steps is not None
    ]
    part.notes[STEPS_CUT] += sum(len(steps.texts) - seq.num_loss_tokens for steps, seq in stepped)
    part.notes[SEPARATED] += sum(steps.form.separator in text for steps, _ in stepped for text in steps.texts)
    seqs = iter(tokenized.seqs)
    for noun, group in zip(nouns, drafts, strict=True):
        _keep(plan, part, noun, tuple(next(seqs) for _ in group), keep)


def _expanded(nouns: list[Noun], kind: RowKind) -> list[Noun]:
    if kind != "labels":
        return nouns
    return [row for noun in nouns for row in (unpair(noun) if isinstance(noun, PreferencePair) else (noun,))]


def _keep(plan: RowPlan, part: Gathered, noun: Noun, seqs: tuple[TokenSeq, ...], keep: Out) -> None:
    """Take a row, or count why not. Raises: DataError for an over-long row under `overflow: error`."""
    if plan.trains and not all(seq.num_loss_tokens for seq in seqs):
        return part.skip(NOTHING, noun.origin)
    if min(len(seq.ids) for seq in seqs) < plan.min_sample_len:
        return part.skip(TOO_SHORT, noun.origin)
    longest = max(len(seq.ids) for seq in seqs)
    if longest > plan.limit and not plan.is_wrapped:
        if plan.overflow == "split":
            return _keep_pieces(plan, part, noun, seqs[0])
        if plan.overflow == "error":
            raise DataError(
                f"{noun.origin}: {longest} tokens > {plan.limit_name} = {plan.limit}; raise sequence_len, "
                "or set `overflow: drop` or `overflow: truncate`"
            )
        if plan.overflow == "drop":
            return part.skip(TOO_LONG, noun.origin)
        seqs = tuple(_cut(seq, plan.limit, from_start=not plan.trains) for seq in seqs)
        if plan.trains and not all(seq.num_loss_tokens for seq in seqs):
            return part.skip(NOTHING_LEFT, noun.origin)
    if len(seqs) == 2 and seqs[0].ids == seqs[1].ids:
        return part.skip(IDENTICAL, noun.origin)
    if plan.deduplicate and _is_again(part.seen, seqs, plan.extra(plan.build(noun, seqs))):
        return part.skip(AGAIN, noun.origin)
    part.notes[TRUNCATED] += longest > plan.limit and not plan.is_wrapped
    keep(seqs, plan.build(noun, seqs))


def _keep_pieces(plan: RowPlan, part: Gathered, noun: Noun, seq: TokenSeq) -> None:
    """A text that is longer than the limit, as rows of that length. Raises: DataError for one with a prompt."""
    if not isinstance(noun, Example) or noun.messages or noun.prompt:
        raise DataError(
            f"{noun.origin}: {len(seq.ids)} tokens > {plan.limit_name} = {plan.limit}, and `overflow: split` cuts plain text: "
            "parts of this row would lack its prompt; raise sequence_len, or set `overflow: drop` or `overflow: truncate`"
        )
    if plan.deduplicate and _is_again(part.seen, (seq,), None):
        return part.skip(AGAIN, noun.origin)
    part.keep_blocks(joined([seq], plan.limit))
    part.notes[SPLIT] += 1


def _is_again(seen: set[bytes], seqs: tuple[TokenSeq, ...], extra: Any) -> bool:
    """Whether a row of these tokens, masks and columns has been seen; from now on it has."""
    digest = cache.row_digest(seqs, extra)
    if digest in seen:
        return True
    seen.add(digest)
    return False


def _cut(seq: TokenSeq, limit: int, from_start: bool) -> TokenSeq:
    """The first `limit` tokens; of a prompt the last ones, which the answer follows."""
    taken = slice(-limit, None) if from_start else slice(limit)
    return TokenSeq(seq.ids[taken], seq.loss_mask[taken], seq.origin)


def _summary(source: DatasetKeys, read: Source, found: str, part: Gathered) -> SourceSummary:
    return SourceSummary(
        path=short_path(source.path),
        format=found,
        rows_read=len(read.rows),
        rows_kept=part.num_rows,
        skipped={
            reason: Skipped(len(at), tuple(str(o) for o in at[:3]), tuple(o.line for o in at))
            for reason, at in part.skipped.items()
        },
        tokens=sum(part.lengths),
        loss_tokens=part.loss_tokens,
        lengths=length_percentiles(part.lengths),
        digest=read.digest,
        notes={note: count for note, count in part.notes.items() if count},
        weight=source.weight,
    )


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


def _cache_key(plan: RowPlan, sources: Sequence[DatasetKeys], tokenizer: Any) -> cache.CacheKey:
    asked = [source.model_dump(exclude={"weight", "eval_name", "val_size"}) for source in sources]
    return cache.CacheKey(
        place=[plan.kind, [source.path for source in sources]],
        contents=digest_json([content_digest(source) for source in sources]),
        template=template_digest(tokenizer),
        tokenizer=cache.tokenizer_digest(tokenizer),
        code=cache.cache_code_digest(),
        keys={**plan.keys, "datasets": [{k: v for k, v in entry.items() if k != "path"} for entry in asked]},
    )


def _restored(
    plan: RowPlan, found: cache.Cached, sources: Sequence[DatasetKeys], weights: tuple[float | None, ...], status: str
) -> Dataset[Any]:
    sizes = tuple(found.facts["sizes"])
    summaries = tuple(
        _restored_summary(raw, source) for raw, source in zip(found.facts["summaries"], sources, strict=True)
    )
    rows = StoredRows(found, plan.restore, [short_path(source.path) for source in sources], sizes)
    digest = digest_json([found.facts["rows_digest"], sizes, weights])
    return Dataset(rows, DataSummary(summaries, status), digest, sizes, weights)


def _restored_summary(raw: dict[str, Any], source: DatasetKeys) -> SourceSummary:
    skipped = {
        reason: Skipped(s["count"], tuple(s["first"]), tuple(s["lines"])) for reason, s in raw["skipped"].items()
    }
    return SourceSummary(**{**raw, "skipped": skipped, "weight": source.weight, "path": short_path(source.path)})


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
