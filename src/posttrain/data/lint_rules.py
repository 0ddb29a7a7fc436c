"""The table of lints: what each looks for, above which share of rows it refuses, and whether its rows can be taken out.

A rule is a pure function of a `LintInput`; it yields the offending rows. Reports and cleaning are in `lint`.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from posttrain.data import overlap, render
from posttrain.data.formats import Noun, StageKind
from posttrain.data.template import added_tokens, end_of_turn, render_text, render_with
from posttrain.errors import DataError
from posttrain.types import Example, LabelledCompletion, Message, Origin, PreferencePair, Prompt, Text, TokenSeq

GOLD_COLUMNS = ("answer", "gold", "target", "solution", "ground_truth", "label", "expected")
NEAR_ROWS = 50_000
"""Near-duplicates are looked for among so many first rows."""
SAMPLED_ROWS = 500
"""Rows of which the template is checked."""

Offence = tuple[Origin, str]


@dataclass(frozen=True, slots=True)
class LintInput:
    """Rows as parsed (`nouns`) and as rendered (`rendered`, one tuple of sequences per row that was kept).

    `suites` are the prompts of each eval suite; `parse_gold` gives `None` for a gold answer the reward cannot read;
    `own_template` is the tokenizer's template where another one is used.
    """

    stage: StageKind
    nouns: Sequence[Noun]
    rendered: Sequence[tuple[TokenSeq, ...]]
    tokenizer: Any
    sequence_len: int
    train_on: render.TrainOn = "assistant"
    eval_nouns: Sequence[Noun] = ()
    suites: Mapping[str, Sequence[str]] = field(default_factory=dict)
    parse_gold: Callable[[Prompt], Any] | None = None
    own_template: str | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """`refuse_above` is a share of the rows, `None` only reports; `removable` says `--write-clean` takes them out."""

    meaning: str
    stages: tuple[StageKind, ...]
    refuse_above: float | None
    removable: bool
    check: Callable[[LintInput], Iterable[Offence]]


# --- texts of a row ------------------------------------------------------------------------------------------------


def text_of(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(m["content"] for m in text)


def prompt_of(noun: Noun) -> str:
    if isinstance(noun, Example):
        return noun.prompt if not noun.messages else "\n".join(_others(noun.messages))
    return text_of(noun.prompt)


def answers_of(noun: Noun) -> tuple[str, ...]:
    if isinstance(noun, Example):
        spoken = [m["content"] for m in noun.messages if m["role"] == "assistant"]
        return tuple(spoken) if noun.messages else (noun.completion,)
    if isinstance(noun, PreferencePair):
        return (text_of(noun.chosen), text_of(noun.rejected))
    return (text_of(noun.completion),) if isinstance(noun, LabelledCompletion) else ()


def whole(noun: Noun) -> str:
    return "\n".join((prompt_of(noun), *answers_of(noun)))


def _others(messages: Sequence[Message]) -> list[str]:
    return [m["content"] for m in messages if m["role"] != "assistant"]


def _messages(noun: Noun) -> tuple[Message, ...]:
    """The conversation a row renders; () for text."""
    if isinstance(noun, Example):
        return noun.messages
    if isinstance(noun.prompt, str):
        return ()
    if isinstance(noun, Prompt):
        return noun.prompt
    answer = noun.chosen if isinstance(noun, PreferencePair) else noun.completion
    return (*noun.prompt, *answer) if not isinstance(answer, str) else noun.prompt


# --- repetition ----------------------------------------------------------------------------------------------------


def _duplicates(given: LintInput) -> Iterator[Offence]:
    nouns = _one_per_row(given.nouns)
    for later, first in overlap.exact_duplicates([whole(noun) for noun in nouns]):
        yield nouns[later].origin, f"same as {nouns[first].origin}"


def _near_duplicates(given: LintInput) -> Iterator[Offence]:
    nouns = _one_per_row(given.nouns)[:NEAR_ROWS]
    for later, earlier, score in overlap.near_duplicates([whole(noun) for noun in nouns]):
        yield nouns[later].origin, f"{score:.0%} like {nouns[earlier].origin}"


def _eval_overlap(given: LintInput) -> Iterator[Offence]:
    held_out = {overlap.normalized(prompt_of(n) or whole(n)): n.origin for n in given.eval_nouns}
    for noun in _one_per_row(given.nouns):
        at = held_out.get(overlap.normalized(prompt_of(noun) or whole(noun)))
        if at is not None:
            yield noun.origin, f"same prompt as {at}"


def _contamination(given: LintInput) -> Iterator[Offence]:
    nouns = _one_per_row(given.nouns)
    for row, suite in overlap.contaminated([(prompt_of(n), whole(n)) for n in nouns], given.suites):
        yield nouns[row].origin, f"holds a prompt of suite {suite}"


def _one_per_row(nouns: Sequence[Noun]) -> list[Noun]:
    """A pair that was unpaired for KTO gives two nouns of one row: they are no duplicates of each other."""
    seen: dict[tuple[Origin, bool], Noun] = {}
    for noun in nouns:
        label = noun.label if isinstance(noun, LabelledCompletion) else True
        seen.setdefault((noun.origin, label), noun)
    return list(seen.values())


# --- template ------------------------------------------------------------------------------------------------------


def _round_trip(given: LintInput) -> Iterator[Offence]:
    """White space is not compared: some decoders move it."""
    for noun in islice(given.nouns, SAMPLED_ROWS):
        if not _messages(noun):
            continue
        text = render_text(given.tokenizer, _messages(noun), noun.tools)
        ids = given.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if "".join(given.tokenizer.decode(ids).split()) != "".join(text.split()):
            yield noun.origin, "decoding the row's tokens gives another text"


def _drift(given: LintInput) -> Iterator[Offence]:
    if not given.own_template or given.own_template == given.tokenizer.chat_template:
        return
    for noun in islice(given.nouns, SAMPLED_ROWS):
        messages = _messages(noun)
        if not messages:
            continue
        try:
            theirs = render_with(given.own_template, given.tokenizer, messages, noun.tools)
        except DataError:
            theirs = None
        if theirs != render_text(given.tokenizer, messages, noun.tools):
            yield noun.origin, "the tokenizer's own template renders this row differently"


def _control_tokens(given: LintInput) -> Iterator[Offence]:
    special = [t for t in added_tokens(given.tokenizer) if t in set(given.tokenizer.all_special_tokens)]
    for noun in given.nouns:
        found = next((t for m in _messages(noun) for t in special if t in m["content"]), None)
        if found:
            yield noun.origin, f"the text of a message holds {found}, which becomes a control token"


# --- masks and lengths ---------------------------------------------------------------------------------------------


def _nothing_trained(given: LintInput) -> Iterator[Offence]:
    for seqs in given.rendered:
        if not all(seq.num_loss_tokens for seq in seqs):
            yield _at(seqs), "no token of this row is trained"


def _prompt_trained(given: LintInput) -> Iterator[Offence]:
    if given.train_on == "all":
        return
    nouns = {noun.origin: noun for noun in given.nouns}
    for seqs in given.rendered:
        noun = nouns.get(_at(seqs))
        if noun is None:
            continue
        asked = _others(_messages(noun)) or [prompt_of(noun)]
        said = "\n".join(answers_of(noun))
        for seq in seqs:
            trained = given.tokenizer.decode([i for i, on in zip(seq.ids, seq.loss_mask, strict=True) if on])
            found = next((text for text in asked if len(text) >= 12 and text in trained and text not in said), None)
            if found:
                yield _at(seqs), f"the mask trains the prompt: {found[:40]!r}"
                break


def _no_end(given: LintInput) -> Iterator[Offence]:
    ends = _ends(given.tokenizer)
    for seqs in given.rendered:
        for seq in seqs:
            trained = [i for i, on in zip(seq.ids, seq.loss_mask, strict=True) if on]
            if trained and trained[-1] not in ends and len(seq.ids) < given.sequence_len:
                yield (
                    _at(seqs),
                    "the last trained token is neither EOS nor an end of turn, so a model never learns to stop",
                )
                break


def _truncated(given: LintInput) -> Iterator[Offence]:
    ends = _ends(given.tokenizer)
    for seqs in given.rendered:
        if any(len(seq.ids) >= given.sequence_len and not ends & set(seq.ids[-2:]) for seq in seqs):
            yield _at(seqs), f"the answer is cut at sequence_len={given.sequence_len}"


def _ends(tokenizer: Any) -> set[int]:
    texts = {tokenizer.eos_token, end_of_turn(tokenizer)} - {None, ""}
    return {tokenizer.convert_tokens_to_ids(text) for text in texts}


def _length_outliers(given: LintInput) -> Iterator[Offence]:
    """Beyond six robust standard deviations of the log length, and four times longer or eight times shorter."""
    lengths = [max(len(seq.ids) for seq in seqs) for seqs in given.rendered]
    if len(lengths) < 20:
        return
    logs = [math.log(max(1, n)) for n in lengths]
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in logs)
    for seqs, length, log in zip(given.rendered, lengths, logs, strict=True):
        far = log - middle
        if abs(far) > 6 * spread and (far > math.log(4) or far < -math.log(8)):
            yield _at(seqs), f"{length} tokens, the median is {math.exp(middle):.0f}"


def _at(seqs: tuple[TokenSeq, ...]) -> Origin:
    return seqs[0].origin or Origin("?", 0)


# --- pairs and golds -----------------------------------------------------------------------------------------------


def _pairs(given: LintInput) -> list[PreferencePair]:
    return [noun for noun in given.nouns if isinstance(noun, PreferencePair)]


def _pair_alike(given: LintInput) -> Iterator[Offence]:
    for pair in _pairs(given):
        chosen, rejected = answers_of(pair)
        if overlap.normalized(chosen) == overlap.normalized(rejected):
            yield pair.origin, "chosen and rejected differ in case or white space only"


def _pair_contradicts(given: LintInput) -> Iterator[Offence]:
    """Later rows that turn an earlier preference round, and labels that disagree."""
    better: defaultdict[str, dict[tuple[str, str], Origin]] = defaultdict(dict)
    labels: dict[tuple[str, str], tuple[bool, Origin]] = {}
    for noun in given.nouns:
        prompt = overlap.normalized(prompt_of(noun))
        if isinstance(noun, PreferencePair):
            chosen, rejected = (overlap.normalized(answer) for answer in answers_of(noun))
            at = better[prompt].get((rejected, chosen))
            if at is not None:
                yield noun.origin, f"prefers the answer that {at} rejects"
            better[prompt].setdefault((chosen, rejected), noun.origin)
        elif isinstance(noun, LabelledCompletion):
            answer = overlap.normalized(text_of(noun.completion))
            label, at = labels.setdefault((prompt, answer), (noun.label, noun.origin))
            if label != noun.label:
                yield noun.origin, f"labels an answer {noun.label} that {at} labels {label}"


def _pair_length(given: LintInput) -> Iterator[Offence]:
    """All rows of the longer side's kind, if chosen answers are longer (or shorter) in nine of ten pairs or more."""
    pairs = [(pair, *map(len, answers_of(pair))) for pair in _pairs(given)]
    longer = [pair for pair, chosen, rejected in pairs if chosen > rejected]
    shorter = [pair for pair, chosen, rejected in pairs if chosen < rejected]
    for side, name in ((longer, "longer"), (shorter, "shorter")):
        if len(pairs) >= 20 and len(side) >= 0.9 * len(pairs):
            yield from ((pair.origin, f"chosen is {name} than rejected") for pair in side)


def _gold_missing(given: LintInput) -> Iterator[Offence]:
    """Where some row has a gold answer, every row should."""
    prompts = [noun for noun in given.nouns if isinstance(noun, Prompt)]
    named = [name for name in GOLD_COLUMNS if any(not _is_blank(p.columns.get(name)) for p in prompts)]
    for prompt in prompts:
        if named and all(_is_blank(prompt.columns.get(name)) for name in named):
            yield prompt.origin, f"no gold answer in {' or '.join(f'`{name}`' for name in named)}"


def _gold_unreadable(given: LintInput) -> Iterator[Offence]:
    if given.parse_gold is None:
        return
    for noun in given.nouns:
        if isinstance(noun, Prompt) and given.parse_gold(noun) is None:
            yield noun.origin, "the reward cannot read the gold answer"


def _is_blank(value: Any) -> bool:
    return value is None or (
        isinstance(value, (str, list, dict)) and not (value.strip() if isinstance(value, str) else value)
    )


_ALL: tuple[StageKind, ...] = ("sft", "dpo", "kto", "grpo")
_TRAINED: tuple[StageKind, ...] = ("sft", "dpo", "kto")

RULES: dict[str, Rule] = {
    "duplicate": Rule("the same row again", _ALL, 0.5, True, _duplicates),
    "near_duplicate": Rule("almost the same row again", _ALL, None, True, _near_duplicates),
    "eval_overlap": Rule("the prompt is in eval_datasets", _ALL, 0.01, True, _eval_overlap),
    "contamination": Rule("a prompt of an eval suite", _ALL, 0.01, True, _contamination),
    "template_round_trip": Rule("text → tokens → text is not the same text", _ALL, 0.1, False, _round_trip),
    "template_drift": Rule("the given chat template is not the tokenizer's", _ALL, None, False, _drift),
    "control_tokens": Rule("control tokens inside a message", _ALL, None, True, _control_tokens),
    "nothing_trained": Rule("nothing is trained", _TRAINED, 0.0, True, _nothing_trained),
    "prompt_trained": Rule("the prompt is trained", _TRAINED, 0.0, True, _prompt_trained),
    "no_end": Rule("no end of turn or EOS is trained", _TRAINED, 0.5, False, _no_end),
    "truncated": Rule("the answer is cut", _TRAINED, 0.2, True, _truncated),
    "length_outlier": Rule("far longer or shorter than the others", _ALL, None, False, _length_outliers),
    "pair_alike": Rule("chosen and rejected are alike", ("dpo",), 0.2, True, _pair_alike),
    "contradiction": Rule("preferences contradict", ("dpo", "kto"), 0.05, True, _pair_contradicts),
    "length_bias": Rule("length alone tells chosen from rejected", ("dpo",), None, False, _pair_length),
    "gold_missing": Rule("no gold answer", ("grpo",), 0.05, True, _gold_missing),
    "gold_unreadable": Rule("the reward cannot read the gold answer", ("grpo",), 0.05, True, _gold_unreadable),
}
