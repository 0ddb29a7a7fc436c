"""Nouns → token sequences with a loss mask.

A noun is first drafted: its whole text and the character spans that are trained. Drafts are tokenised in batches and
the spans become token masks. Masks never look at pad or EOS ids, so EOS stays trained where pad == EOS.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from posttrain.data.forms import fit
from posttrain.data.spans import assistant_spans
from posttrain.data.template import Span, added_tokens
from posttrain.errors import DataError
from posttrain.types import (
    Example,
    LabelledCompletion,
    Message,
    Origin,
    PreferencePair,
    Prompt,
    SteppedCompletion,
    Text,
    TokenSeq,
)

TrainOn = Literal["assistant", "last", "all"]
_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A row as text. `bos` says that the tokenizer's own BOS goes first (a chat template writes its own).

    `rewritten` counts turns that the template writes otherwise than alone, `dropped` those whose thinking it leaves out.
    """

    text: str
    spans: tuple[Span, ...]
    origin: Origin
    bos: bool
    rewritten: int = 0
    dropped: int = 0
    steps: StepsBehind | None = None


@dataclass(frozen=True, slots=True)
class StepForm:
    """How an answer in steps is written: `separator` behind each; what is longer than `max_completion_length` tokens is cut off."""

    separator: str
    max_completion_length: int | None = None


@dataclass(frozen=True, slots=True)
class StepsBehind:
    """Steps that go on behind a row's text. Step and separator are tokenised by themselves, as in TRL; the last token of each is marked."""

    texts: tuple[str, ...]
    form: StepForm


@dataclass(frozen=True, slots=True)
class Tokenized:
    """`split` counts the rows in which a token would have straddled the edge of a span (see `tokenize`)."""

    seqs: list[TokenSeq]
    split: int


def draft_example(tokenizer: Any, example: Example, train_on: TrainOn) -> list[RenderedRow]:
    if not example.messages:
        return [_draft_text(tokenizer, example.prompt, example.completion, example.origin, train_on == "all")]
    turns = [i for i, m in enumerate(example.messages) if m["role"] == "assistant"]
    if train_on == "all":
        return [_draft_whole(tokenizer, example)]
    turns = [i for i in (turns[-1:] if train_on == "last" else turns) if example.messages[i].get("weight", 1)]
    return [_draft_chat(tokenizer, example.messages, example.tools, turns, example.origin)]


def draft_pair(tokenizer: Any, pair: PreferencePair) -> list[RenderedRow]:
    return [
        _draft_answer(tokenizer, pair.prompt, answer, pair.tools, pair.origin)
        for answer in (pair.chosen, pair.rejected)
    ]


def draft_labelled(tokenizer: Any, row: LabelledCompletion) -> list[RenderedRow]:
    return [_draft_answer(tokenizer, row.prompt, row.completion, row.tools, row.origin)]


def draft_steps(tokenizer: Any, row: SteppedCompletion, form: StepForm) -> list[RenderedRow]:
    """The answer that a chat's prompt asks for, or a text's; no turn ends behind it, for the last step ends like every other."""
    (asked,) = draft_prompt(tokenizer, Prompt(row.origin, row.prompt, tools=row.tools))
    return [replace(asked, steps=StepsBehind(row.steps, form))]


def draft_prompt(tokenizer: Any, prompt: Prompt) -> list[RenderedRow]:
    if isinstance(prompt.prompt, str):
        return [RenderedRow(prompt.prompt, (), prompt.origin, bos=True)]
    with _naming(prompt.origin):
        fitted = fit(tokenizer, prompt.prompt, prompt.tools, True)
    return [RenderedRow(fitted.text, (), prompt.origin, bos=False, dropped=fitted.dropped)]


def chat_ids(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> tuple[int, ...]:
    """Ids of a conversation that is to be answered. The template writes the BOS, so the tokenizer adds none. Raises: DataError."""
    return tuple(_ids(tokenizer, [fit(tokenizer, messages, tools, True).text])[0])


def continuation_ids(tokenizer: Any, before: str, pieces: Sequence[str]) -> list[int]:
    """Ids of `pieces`, each by itself, as they go on behind `before`; what those of `before` are plays no part. Raises: DataError."""
    return [id_ for ids in _continuations(tokenizer, before, pieces, Origin("environment", 1)) for id_ in ids]


def _continuations(tokenizer: Any, before: str, pieces: Sequence[str], origin: Origin) -> Iterable[list[int]]:
    for piece in filter(None, pieces):
        _check_encodable(RenderedRow(piece, (), origin, bos=False))
        yield _continuation(tokenizer, before, piece)
        before += piece


def tokenize(tokenizer: Any, drafts: Sequence[RenderedRow]) -> Tokenized:
    """One sequence per draft.

    A prompt is tokenised alone when it is sampled from, so training must see the same tokens: where the tokens of the
    text before a span are not a prefix of the row's, the row is tokenised in pieces cut at its spans. No token is lost.
    """
    seqs: list[TokenSeq] = []
    split = 0
    for at in range(0, len(drafts), _CHUNK):
        chunk = drafts[at : at + _CHUNK]
        for seq, in_pieces in _tokenize_chunk(tokenizer, chunk):
            seqs.append(seq)
            split += in_pieces
    return Tokenized(seqs, split)


# --- drafts --------------------------------------------------------------------------------------------------------


class _naming:  # noqa: N801 (reads as a statement: with _naming(origin))
    """Put the row's origin before an error's message."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, DataError):
            raise DataError(f"{self.origin}: {error}") from None


def _draft_text(tokenizer: Any, prompt: str, completion: str, origin: Origin, all_trained: bool = False) -> RenderedRow:
    """The completion ends with EOS, once, and EOS is trained: without it a model never stops."""
    eos = tokenizer.eos_token
    if not eos:
        raise DataError("the tokenizer has no EOS token, so text completions would never end; set its eos_token")
    text = prompt + completion + ("" if completion.endswith(eos) else eos)
    return RenderedRow(text, ((0 if all_trained else len(prompt), len(text)),), origin, bos=True)


def _draft_whole(tokenizer: Any, example: Example) -> RenderedRow:
    with _naming(example.origin):
        fitted = fit(tokenizer, example.messages, example.tools)
    return RenderedRow(fitted.text, ((0, len(fitted.text)),), example.origin, bos=False, dropped=fitted.dropped)


def _draft_chat(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], turns: Sequence[int], origin: Origin
) -> RenderedRow:
    with _naming(origin):
        fitted = fit(tokenizer, messages, tools)
        found = assistant_spans(tokenizer, fitted, turns)
    return RenderedRow(found.text, found.spans, origin, bos=False, rewritten=found.rewritten, dropped=fitted.dropped)


def _draft_answer(tokenizer: Any, prompt: Text, answer: Text, tools: Sequence[Any], origin: Origin) -> RenderedRow:
    if isinstance(prompt, str) and isinstance(answer, str):
        return _draft_text(tokenizer, prompt, answer, origin)
    assert not isinstance(prompt, str) and not isinstance(answer, str), "parse makes both text or both messages"
    messages = (*prompt, *answer)
    turns = [i for i in range(len(prompt), len(messages)) if messages[i]["role"] == "assistant"]
    return _draft_chat(tokenizer, messages, tools, turns, origin)


# --- tokens --------------------------------------------------------------------------------------------------------


def _tokenize_chunk(tokenizer: Any, drafts: Sequence[RenderedRow]) -> Iterable[tuple[TokenSeq, bool]]:
    for draft in drafts:
        _check_encodable(draft)
    bos = _bos_prefix(tokenizer)
    encodings = _encode(tokenizer, [draft.text for draft in drafts]) if tokenizer.is_fast else [None] * len(drafts)
    before = sorted({draft.text[:cut] for draft in drafts for cut in _checked_cuts(draft)})
    prefix_ids = dict(zip(before, _ids(tokenizer, before), strict=True))
    for draft, encoding in zip(drafts, encodings, strict=True):
        aligned = encoding is not None and _align(encoding, draft, prefix_ids)
        ids, ranges = aligned or _in_pieces(tokenizer, draft)
        prefix = bos if draft.bos and tuple(ids[: len(bos)]) != bos else ()
        seq = _sequence(prefix, ids, ranges, draft.origin)
        yield seq if draft.steps is None else _with_steps(tokenizer, draft, draft.steps, seq), not aligned


def _with_steps(tokenizer: Any, draft: RenderedRow, steps: StepsBehind, asked: TokenSeq) -> TokenSeq:
    """Example: a question 5 6, steps 7 8 and 9, a separator 1: ids 5 6 7 8 1 9 1, loss_mask F F F F T F T."""
    pieces = [piece for step in steps.texts for piece in (step, steps.form.separator)]
    ids: list[int] = []
    mask: list[bool] = []
    for number, piece in enumerate(_continuations(tokenizer, draft.text, pieces, draft.origin)):
        ids += piece
        mask += [False] * (len(piece) - 1) + [number % 2 == 1] * bool(piece)
    kept = slice(steps.form.max_completion_length)
    return TokenSeq((*asked.ids, *ids[kept]), (*asked.loss_mask, *mask[kept]), draft.origin)


def _sequence(prefix: tuple[int, ...], ids: Sequence[int], ranges: Sequence[Span], origin: Origin) -> TokenSeq:
    mask = [False] * (len(prefix) + len(ids))
    for start, end in ranges:
        mask[len(prefix) + start : len(prefix) + end] = [True] * (end - start)
    return TokenSeq((*prefix, *ids), tuple(mask), origin)


def _checked_cuts(draft: RenderedRow) -> list[int]:
    """Span starts where the prefix is tokenised too. Behind the first, only a space can hide a straddling token:
    tokenizers leave it out of a token's offsets."""
    starts = [start for start, _ in draft.spans if start]
    return [cut for i, cut in enumerate(starts) if i == 0 or draft.text[cut - 1] == " "]


def _align(encoding: Any, draft: RenderedRow, prefix_ids: dict[str, list[int]]) -> tuple[list[int], list[Span]] | None:
    """Token ranges of the spans, or `None` if a token straddles an edge or a prefix has other tokens."""
    ids = encoding.ids
    ranges: list[Span] = []
    for start, end in draft.spans:
        first, last = _token_at(encoding, draft.text, start), _token_at(encoding, draft.text, end)
        if first is None or last is None:
            return None
        ranges.append((first, last))
    checked = set(_checked_cuts(draft))
    for (start, _), (first, _) in zip(draft.spans, ranges, strict=True):
        if start in checked and prefix_ids[draft.text[:start]] != ids[:first]:
            return None
    return ids, ranges


def _token_at(encoding: Any, text: str, cut: int) -> int | None:
    """Index of the first token at or behind character `cut`; `None` if a token straddles it."""
    for position in range(cut, len(text)):
        token = encoding.char_to_token(position)
        if token is not None:
            return token if encoding.token_to_chars(token)[0] >= cut else None
    return len(encoding.ids)


def _in_pieces(tokenizer: Any, draft: RenderedRow) -> tuple[list[int], list[Span]]:
    cuts = sorted({0, len(draft.text), *(edge for span in draft.spans for edge in span)})
    ids: list[int] = []
    at = {0: 0}
    for start, cut in pairwise(cuts):
        ids += _continuation(tokenizer, draft.text[:start], draft.text[start:cut])
        at[cut] = len(ids)
    return ids, [(at[start], at[end]) for start, end in draft.spans]


_CONTEXTS = ("\n", ".", "a")


def _continuation(tokenizer: Any, before: str, piece: str) -> list[int]:
    """Ids of `piece` as it goes on behind `before`.

    SentencePiece tokenizers put a space before every text, which must not come between the two; so the piece is tokenised
    behind a context, whose tokens are taken off again. Behind an added token they do put one, alone as in a whole text.
    """
    alone = _ids(tokenizer, [piece])[0]
    if not before or before.endswith(added_tokens(tokenizer)) or not _adds_a_space(tokenizer):
        return alone
    for context in _CONTEXTS:
        first, both = _ids(tokenizer, [context, context + piece])
        if both[: len(first)] == first and len(both) > len(first):
            return both[len(first) :]
    return alone


def _adds_a_space(tokenizer: Any) -> bool:
    return tokenizer.convert_ids_to_tokens(_ids(tokenizer, ["a"])[0])[0].startswith("▁")


def _encode(tokenizer: Any, texts: list[str]) -> list[Any]:
    batch = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return batch.encodings


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _bos_prefix(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before every text: usually nothing or BOS."""
    plain, full = (tokenizer("a", add_special_tokens=flag, verbose=False)["input_ids"] for flag in (False, True))
    return tuple(full[: full.index(plain[0])]) if plain and plain[0] in full else ()


def _check_encodable(draft: RenderedRow) -> None:
    try:
        draft.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{draft.origin}: the text holds an unpaired surrogate (\\u{ord(draft.text[error.start]):04x}), which is no "
            "character; expected valid Unicode; remove it"
        ) from None
