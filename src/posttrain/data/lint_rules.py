"""The table of lints: what each looks for, above which share of rows it refuses, and whether its rows can be taken out.

A rule is a pure function of a `LintInput`; it yields the offending rows. Reports and cleaning are in `lint`.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.config.datasets import RowKind
from posttrain.data import overlap
from posttrain.data.formats import Noun
from posttrain.data.forms import fit
from posttrain.data.gathered import NOTHING_LEFT
from posttrain.data.lint_input import (
    CODE_GOLD_ROWS,
    DECODED_ROWS,
    SAMPLED_ROWS,
    LintInput,
    answers_of,
    messages_of,
    origin_of,
    others_of,
    plain_text,
    prompt_of,
    spread,
    whole,
)
from posttrain.data.parse import EMPTY, IDENTICAL, NO_ASSISTANT
from posttrain.data.rendered import NOTHING, TOO_LONG
from posttrain.data.template import added_tokens, end_of_turn, render_text, render_with
from posttrain.errors import DataError
from posttrain.types import LabelledCompletion, Origin, PreferencePair, Prompt, TokenSeq

GOLD_COLUMNS = ("answer", "gold", "target", "solution", "ground_truth", "label", "expected")
NEAR_ROWS = 50_000
"""Near-duplicates are looked for among so many first rows."""

Offence = tuple[Origin, str]
Action = Literal["warn", "refuse"]


@dataclass(frozen=True, slots=True)
class LintRule:
    """`limit` is the share of rows above which `action` is taken; `removable` says `--write-clean` takes them out.

    `looks_at` gives the rows that are looked at, where that is not all of them: the share is of these.
    """

    meaning: str
    rows: tuple[RowKind, ...]
    action: Action
    limit: float
    removable: bool
    check: Callable[[LintInput], Iterable[Offence]]
    looks_at: Callable[[LintInput], Sequence[Any]] | None = None


# --- repetition ----------------------------------------------------------------------------------------------------


def _duplicates(given: LintInput) -> Iterator[Offence]:
    rows = given.rows
    for later, first in overlap.exact_duplicates(given.words("whole", whole)):
        yield rows[later].origin, f"same as {rows[first].origin}"


def _first_rows(given: LintInput) -> list[Noun]:
    return given.rows[:NEAR_ROWS]


def _near_duplicates(given: LintInput) -> Iterator[Offence]:
    rows = given.rows
    for later, earlier, score in overlap.near_duplicates(given.words("whole", whole)[:NEAR_ROWS]):
        yield rows[later].origin, f"{score:.0%} like {rows[earlier].origin}"


def _asked(noun: Noun) -> str:
    return prompt_of(noun) or whole(noun)


def _eval_overlap(given: LintInput) -> Iterator[Offence]:
    held_out = {overlap.normalized(_asked(noun)): noun.origin for noun in given.eval_nouns}
    for noun in given.rows if held_out else ():
        at = held_out.get(overlap.normalized(_asked(noun)))
        if at is not None:
            yield noun.origin, f"same prompt as {at}"


def _contamination(given: LintInput) -> Iterator[Offence]:
    rows = given.rows
    texts = zip(given.words("prompt", prompt_of), given.words("whole", whole), strict=True)
    for row, suite in overlap.contaminated(list(texts), given.suites) if given.suites else ():
        yield rows[row].origin, f"holds a prompt of suite {suite}"


# --- template ------------------------------------------------------------------------------------------------------


def _conversations(given: LintInput) -> list[Noun]:
    return spread([noun for noun in given.nouns if messages_of(noun)], SAMPLED_ROWS)


def _rendered(given: LintInput, noun: Noun) -> str:
    fitted = fit(given.tokenizer, messages_of(noun), noun.tools, isinstance(noun, Prompt))
    return render_text(given.tokenizer, fitted.messages, fitted.tools)


def _round_trip(given: LintInput) -> Iterator[Offence]:
    """White space is not compared: some decoders move it."""
    for noun in _conversations(given):
        text = _rendered(given, noun)
        ids = given.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if "".join(given.tokenizer.decode(ids).split()) != "".join(text.split()):
            yield noun.origin, "decoding the row's tokens gives another text"


def _drift(given: LintInput) -> Iterator[Offence]:
    if not given.own_template or given.own_template == given.tokenizer.chat_template:
        return
    for noun in _conversations(given):
        try:
            theirs = render_with(given.own_template, given.tokenizer, messages_of(noun), noun.tools)
        except DataError:
            theirs = None
        if theirs != _rendered(given, noun):
            yield noun.origin, "the tokenizer's own template renders this row differently"


def _control_tokens(given: LintInput) -> Iterator[Offence]:
    special = [t for t in added_tokens(given.tokenizer) if t in set(given.tokenizer.all_special_tokens)]
    for noun in given.nouns:
        found = next((t for m in messages_of(noun) for t in special if t in m["content"]), None)
        if found:
            yield noun.origin, f"the text of a message holds {found}, which becomes a control token"


# --- masks and lengths ---------------------------------------------------------------------------------------------


def _left_out(given: LintInput, *reasons: str) -> Iterator[Offence]:
    for reason in reasons:
        yield from ((at, f"left out: {reason}") for at in given.skipped.get(reason, ()))


def _nothing_trained(given: LintInput) -> Iterator[Offence]:
    yield from _left_out(given, NOTHING, NOTHING_LEFT, NO_ASSISTANT, EMPTY)
    for seqs in given.rendered:
        if not all(seq.num_loss_tokens for seq in seqs):
            yield origin_of(seqs), "no token of this row is trained"


def _too_long(given: LintInput) -> Iterator[Offence]:
    return _left_out(given, TOO_LONG)


def _decoded(given: LintInput) -> list[tuple[TokenSeq, ...]]:
    return spread(given.rendered, DECODED_ROWS)


def _prompt_trained(given: LintInput) -> Iterator[Offence]:
    if given.train_on == "all":
        return
    nouns = {noun.origin: noun for noun in given.nouns}
    for seqs in _decoded(given):
        noun = nouns.get(origin_of(seqs))
        if noun is None:
            continue
        asked = others_of(messages_of(noun)) or [prompt_of(noun)]
        said = "\n".join(answers_of(noun))
        for seq in seqs:
            trained = given.tokenizer.decode([i for i, on in zip(seq.ids, seq.loss_mask, strict=True) if on])
            found = next((text for text in asked if len(text) >= 12 and text in trained and text not in said), None)
            if found:
                yield origin_of(seqs), f"the mask trains the prompt: {found[:40]!r}"
                break


def _no_end(given: LintInput) -> Iterator[Offence]:
    ends = _ends(given.tokenizer)
    for seqs in given.rendered:
        for seq in seqs:
            last = next((i for i, on in zip(reversed(seq.ids), reversed(seq.loss_mask), strict=True) if on), None)
            if last is not None and last not in ends and len(seq.ids) < given.sequence_len:
                yield (
                    origin_of(seqs),
                    "the last trained token is neither EOS nor an end of turn, so a model never learns to stop",
                )
                break


def _truncated(given: LintInput) -> Iterator[Offence]:
    ends = _ends(given.tokenizer)
    for seqs in given.rendered:
        if any(len(seq.ids) >= given.sequence_len and not ends & set(seq.ids[-2:]) for seq in seqs):
            yield origin_of(seqs), f"the answer is cut at sequence_len={given.sequence_len}"


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
    deviation = 1.4826 * statistics.median(abs(x - middle) for x in logs)
    for seqs, length, log in zip(given.rendered, lengths, logs, strict=True):
        far = log - middle
        if abs(far) > 6 * deviation and (far > math.log(4) or far < -math.log(8)):
            yield origin_of(seqs), f"{length} tokens, the median is {math.exp(middle):.0f}"


_OPENED = (("```", "```"), ("<think>", "</think>"), ("<answer>", "</answer>"), ("\\begin{", "\\end{"))
_BOX_TO_THE_END = re.compile(r"\\boxed\{[^{}]*\Z")


def _unfinished(given: LintInput) -> Iterator[Offence]:
    """Only what is surely open: prose that stops in the middle is not told from prose without a full stop."""
    for noun in given.nouns:
        answer = _wanted_answer(noun)
        mark = next((opening for opening, closing in _OPENED if _is_open(answer, opening, closing)), None)
        mark = mark or ("\\boxed{" if _BOX_TO_THE_END.search(answer) else None)
        if mark:
            yield noun.origin, f"the answer opens {mark} and never closes it"


def _wanted_answer(noun: Noun) -> str:
    """The answer a model is drawn to: the last turn, the chosen one, a desirable one."""
    if isinstance(noun, LabelledCompletion) and not noun.label:
        return ""
    answers = answers_of(noun)
    return (answers[0] if isinstance(noun, PreferencePair) else answers[-1]) if answers else ""


def _is_open(text: str, opening: str, closing: str) -> bool:
    if opening == closing:
        return text.count(opening) % 2 == 1
    return text.count(opening) > text.count(closing)


# --- pairs and golds -----------------------------------------------------------------------------------------------


def _pairs(given: LintInput) -> list[PreferencePair]:
    return [noun for noun in given.nouns if isinstance(noun, PreferencePair)]


def _pair_alike(given: LintInput) -> Iterator[Offence]:
    yield from _left_out(given, IDENTICAL)
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
            answer = overlap.normalized(plain_text(noun.completion))
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


def _with_golds(given: LintInput) -> list[Prompt]:
    prompts = [noun for noun in given.nouns if isinstance(noun, Prompt)]
    are_programs = any("tests" in prompt.columns for prompt in prompts[:1])
    return spread(prompts, CODE_GOLD_ROWS if are_programs else given.gold_rows)


def _gold_unreadable(given: LintInput) -> Iterator[Offence]:
    if given.check_golds is None:
        return
    prompts = _with_golds(given)
    for prompt, reason in zip(prompts, given.check_golds(prompts), strict=True):
        if reason is not None:
            yield prompt.origin, reason


def _is_blank(value: Any) -> bool:
    return value is None or (
        isinstance(value, (str, list, dict)) and not (value.strip() if isinstance(value, str) else value)
    )


_ALL: tuple[RowKind, ...] = ("examples", "pairs", "labels", "steps", "prompts")
_ENDED: tuple[RowKind, ...] = ("examples", "pairs", "labels")
_TRAINED: tuple[RowKind, ...] = (*_ENDED, "steps")

RULES: dict[str, LintRule] = {
    "duplicate": LintRule("the same row again", _ALL, "refuse", 0.5, True, _duplicates),
    "near_duplicate": LintRule("almost the same row again", _ALL, "warn", 0.0, True, _near_duplicates, _first_rows),
    "eval_overlap": LintRule("the prompt is in eval_datasets", _ALL, "refuse", 0.01, True, _eval_overlap),
    "contamination": LintRule("a prompt of an eval suite", _ALL, "refuse", 0.01, True, _contamination),
    "template_round_trip": LintRule("text → tokens → text is not the same text", _ALL, "refuse", 0.1, False, _round_trip, _conversations),
    "template_drift": LintRule("the given chat template is not the tokenizer's", _ALL, "warn", 0.0, False, _drift, _conversations),
    "control_tokens": LintRule("control tokens inside a message", _ALL, "warn", 0.0, True, _control_tokens),
    "nothing_trained": LintRule("nothing is trained", _TRAINED, "refuse", 0.5, True, _nothing_trained),
    "too_long": LintRule("longer than sequence_len", _ALL, "refuse", 0.5, True, _too_long),
    "prompt_trained": LintRule("the prompt is trained", _ENDED, "refuse", 0.0, True, _prompt_trained, _decoded),
    "no_end": LintRule("no end of turn or EOS is trained", _ENDED, "refuse", 0.5, False, _no_end),
    "truncated": LintRule("the answer is cut by sequence_len", _ENDED, "refuse", 0.2, True, _truncated),
    "unfinished": LintRule("the answer was cut before it came here", _ENDED, "warn", 0.0, True, _unfinished),
    "length_outlier": LintRule("far longer or shorter than the others", _ALL, "warn", 0.0, False, _length_outliers),
    "pair_alike": LintRule("chosen and rejected are alike", ("pairs",), "refuse", 0.2, True, _pair_alike),
    "contradiction": LintRule("preferences contradict", ("pairs", "labels"), "refuse", 0.05, True, _pair_contradicts),
    "length_bias": LintRule("length alone tells chosen from rejected", ("pairs",), "warn", 0.0, False, _pair_length),
    "gold_missing": LintRule("no gold answer", ("prompts",), "refuse", 0.05, True, _gold_missing),
    "gold_unreadable": LintRule("the rewards do not know the gold answer as right", ("prompts",), "refuse", 0.05, True, _gold_unreadable, _with_golds),
}  # fmt: skip
"""Name → lint. `limit` and `action` are the defaults of the key `lint`."""
