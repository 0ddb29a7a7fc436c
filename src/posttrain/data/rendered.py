"""What becomes of the rows of a source: drafted, tokenised, and kept or left out with the reason.

Knows nothing of files or the cache; `RowPlan` says how the rows of one kind of stage are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from posttrain.config.datasets import DatasetKeys, RowKind
from posttrain.data import cache, render
from posttrain.data.dataset import Skipped, SourceSummary, length_percentiles
from posttrain.data.formats import Detector, Noun, detect_format, parse_rows
from posttrain.data.gathered import NOTHING_LEFT, Gathered, Joiner, Out, joined
from posttrain.data.opened import ROWS_OF_PART, OpenSource, RowPart
from posttrain.data.parse import IDENTICAL, Skip, unpair
from posttrain.data.render import RenderedRow
from posttrain.data.shelf import Rendered, Shelf
from posttrain.data.sources import Source, SourceRow, short_path
from posttrain.errors import DataError
from posttrain.types import Example, Origin, PreferencePair, TokenSeq

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


Draft = Callable[[Any, Any], list[RenderedRow]]
"""(tokenizer, a row's noun) → its texts with what is trained in them. Other processes are sent it: no function within a function."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """How one stage's rows are made. `extra` and `restore` take a row to JSON and back, for the cache."""

    kind: RowKind
    draft: Draft
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


@dataclass(frozen=True, slots=True)
class Survey:
    """What a first pass over a source found: the format of all its rows, and in how many parts they come."""

    source: OpenSource
    format: str
    name: str
    num_parts: int


def surveyed(source: OpenSource, kind: RowKind) -> Survey:
    """Read and parse every row, and keep none: a row in which something is wrong is known before the first is tokenised. Raises: DataError."""
    detector, num_parts = Detector(kind, source.keys.type), 0
    for part in source.parts():
        num_parts += 1
        detector.add(part.rows)
        if part.rows:
            parse_rows(part.rows, detector.name, source.keys)
    return Survey(source, str(detector.found()), detector.name, num_parts)


def render_source(plan: RowPlan, found: Survey, tokenizer: Any, into: Gathered, shelf: Shelf) -> None:
    """Take all rows of a source, part after part; those of a plan that wraps are blocks. Raises: DataError."""
    joiner = Joiner(into, plan.limit) if plan.is_wrapped else None
    keep = into.keep if joiner is None else joiner.add
    for part in found.source.parts():
        _take(plan, found.source.keys, found.name, part, tokenizer, into, keep, shelf)
        if joiner is not None:
            joiner.cut()
    if joiner is not None:
        joiner.cut(is_last=True)
    found.source.refuse_changed()


def render_rows(
    plan: RowPlan, source: DatasetKeys, read: Source, tokenizer: Any, into: Gathered, *, join: bool = False
) -> str:
    """The same of rows that were read; `join` where they are all. Returns the format. Raises: DataError."""
    found = detect_format(read.rows, plan.kind, source.type)
    joiner = Joiner(into, plan.limit) if plan.is_wrapped and join else None
    keep = into.keep if joiner is None else joiner.add
    into.notes[INVENTED] += read.invented_nulls
    into.notes[BLANK] += len(read.blank_lines)
    for at in range(0, len(read.rows), ROWS_OF_PART):
        part = RowPart(read.rows[at : at + ROWS_OF_PART], [], 0)
        _take(plan, source, found.name, part, tokenizer, into, keep, Shelf(None))
    if joiner is not None:
        joiner.cut(is_last=True)
    return str(found)


def _take(
    plan: RowPlan,
    source: DatasetKeys,
    name: str,
    part: RowPart,
    tokenizer: Any,
    into: Gathered,
    keep: Out,
    shelf: Shelf,
) -> None:
    into.num_read += len(part.rows)
    into.notes[INVENTED] += part.invented_nulls
    into.notes[BLANK] += len(part.blank_lines)
    nouns, skips = nouns_of(part.rows, name, source, plan.kind)
    for skip in skips:
        into.skip(skip.reason, skip.origin)
    rendered = shelf.next([noun.origin for noun in nouns], lambda: tokenized(plan.draft, nouns, tokenizer))
    into.notes.update(rendered.notes)
    for noun, seqs in zip(nouns, rendered.rows, strict=True):
        _keep(plan, into, noun, seqs, keep)


def nouns_of(rows: Sequence[SourceRow], name: str, source: DatasetKeys, kind: RowKind) -> tuple[list[Noun], list[Skip]]:
    """The rows of a part, and what was left out of them. Raises: DataError."""
    parsed, skips = parse_rows(rows, name, source)
    return expanded(parsed, kind), skips


def tokenized(draft: Draft, nouns: Sequence[Noun], tokenizer: Any) -> Rendered:
    """Raises: DataError."""
    drafts = [draft(tokenizer, noun) for noun in nouns]
    found = render.tokenize(tokenizer, list(chain(*drafts)))
    stepped = [
        (draft.steps, seq) for draft, seq in zip(chain(*drafts), found.seqs, strict=True) if draft.steps is not None
    ]
    notes = {
        IN_PIECES: found.split,
        REWRITTEN: sum(draft.rewritten for draft in chain(*drafts)),
        DROPPED: sum(draft.dropped for draft in chain(*drafts)),
        STEPS_CUT: sum(len(steps.texts) - seq.num_loss_tokens for steps, seq in stepped),
        SEPARATED: sum(steps.form.separator in text for steps, _ in stepped for text in steps.texts),
    }
    seqs = iter(found.seqs)
    return Rendered([tuple(next(seqs) for _ in group) for group in drafts], notes)


def expanded(nouns: list[Noun], kind: RowKind) -> list[Noun]:
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


def source_summary(source: DatasetKeys, found: str, digest: str, part: Gathered) -> SourceSummary:
    """What became of the rows that were taken; `digest` is of what was read."""
    return SourceSummary(
        path=short_path(source.path),
        format=found,
        rows_read=part.num_read,
        rows_kept=part.num_rows,
        skipped={
            reason: Skipped(len(at), tuple(str(o) for o in at[:3]), tuple(o.line for o in at))
            for reason, at in part.skipped.items()
        },
        tokens=sum(part.lengths),
        loss_tokens=part.loss_tokens,
        lengths=length_percentiles(part.lengths),
        digest=digest,
        notes={note: count for note, count in part.notes.items() if count},
        weight=source.weight,
    )
