"""Answer checks that rewards and evals share: completion text and reference in, right or wrong out.

An answer counts only outside the reasoning, outside code fences and comments, and only if it is the one answer given:
every slot must say the reference, and the words around it must not take it back. Every check takes any string, is
linear in it and never raises.
"""

from __future__ import annotations

import re
from collections import deque

from posttrain.grading.equality import equal_values, same_answer
from posttrain.grading.numbers import MINUS_SIGNS, normalise, parse_quantity, same_quantity
from posttrain.grading.sequences import Same
from posttrain.grading.slots import Slot, boxes, later_claims, lines, taken_back, think_tags, visible, without_comments

_MAX_REFERENCE_CHARS = 100_000
# An answer given more often, or followed by more text than this, is a loop and not an answer.
_MAX_SLOTS, _MAX_TAIL_CHARS, _MAX_PROSE_CHARS = 32, 20_000, 300


def reference_answer(target: str) -> str:
    r"""The answer inside a reference solution: behind its last `####`, or in its last `\boxed{…}`, or all of it."""
    text = target[-_MAX_REFERENCE_CHARS:]
    if "####" in text:
        return text.rpartition("####")[2].strip()
    found = boxes(text)
    return found[-1].content.strip() if found else text.strip()


def answer_text(text: str) -> str | None:
    """The part of a completion in which an answer counts; None when its reasoning is malformed."""
    shown = visible(text)
    return None if shown is None else without_comments(shown)


def _one_answer(shown: str, slots: list[Slot], reference: str, same: Same) -> bool:
    if not 1 <= len(slots) <= _MAX_SLOTS or len(shown) - slots[-1].end > _MAX_TAIL_CHARS or taken_back(shown, slots):
        return False
    contents = {slot.content.strip() for slot in slots}
    if not all(same(content, reference) for content in contents):
        return False
    return all(same(claim.rstrip(".,!"), reference) for claim in dict.fromkeys(later_claims(shown, slots)))


def is_boxed(text: str, target: str, same: Same = same_answer) -> bool:
    r"""Whether every `\boxed{…}` of the answer says `target`, and there is one. An empty box, as in "I use \boxed{}", says nothing."""
    shown = answer_text(text)
    slots = (boxes(shown) if shown is not None else None) or []
    said = [slot for slot in slots if slot.content.strip()]
    return len(slots) <= _MAX_SLOTS and _one_answer(shown or "", said, reference_answer(target), same)


def is_number(text: str, target: str, same: Same = same_answer) -> bool:
    """Whether the answer behind `####` or `Answer:` is `target`, or the whole visible text is."""
    return _in_line(text, reference_answer(target), same)


_IN_PROSE = re.compile(r"([^A-Za-z]{1,80}?)\**[,;]?\s+\(?[A-Za-z][^0-9%=]{0,200}")
_HEDGE = re.compile(
    r"\b(?:or|and|not|to|percent|times|hundred|thousand|million|billion|half|dozen)\b|n't", re.IGNORECASE
)


def same_in_prose(answer: str, reference: str) -> bool:
    """`equal_values`, and a number at the start of a sentence that has no other: `$18 per day` for `18`.

    `18!` is 18 with emphasis: an answer is a value, not a factorial to be computed.
    """
    if equal_values(answer, reference) or equal_values(answer.rstrip("! \t"), reference):
        return True
    match = _IN_PROSE.fullmatch(answer.strip()[:_MAX_PROSE_CHARS])
    wanted = parse_quantity(normalise(reference), lowest_terms=False)
    if match is None or wanted is None or (wanted.unit and not wanted.is_measured) or _HEDGE.search(answer):
        return False
    return equal_values(match[1], str(wanted.value))


def _in_line(text: str, reference: str, same: Same) -> bool:
    shown = answer_text(text)
    if shown is None:
        return False
    slots = lines(shown) or [Slot(0, len(shown), shown)]
    return _one_answer(shown, slots, reference, same)


_LETTER = re.compile(r"\(?([A-Z])\)?[.:]?")
_LETTER_ANYHOW = re.compile(
    r"[\[(*]*([A-Za-z])[\])*.:]*"  # b, (b), **B**
    r"|[\[(*]*([A-Z])(?:[\])*.:,]+|\s+[-–—]|\s+(?=\())\s*(?!.*\b(?:[B-HJ-Z]\b|A\b(?![ ]\w)|or\b|not\b|and\b)).*",  # (B) Paris, B: 12, B (Paris)
    re.DOTALL,
)


def same_letter(answer: str, reference: str) -> bool:
    got, wanted = _LETTER.fullmatch(normalise(answer)), _LETTER.fullmatch(normalise(reference))
    return got is not None and wanted is not None and got.group(1) == wanted.group(1)


def same_letter_anyhow(answer: str, reference: str) -> bool:
    """The letter in either case, with the text of its option or without."""
    got, wanted = _LETTER_ANYHOW.fullmatch(normalise(answer)), _LETTER_ANYHOW.fullmatch(normalise(reference))
    return got is not None and wanted is not None and (got[1] or got[2]).upper() == (wanted[1] or wanted[2]).upper()


def is_choice(text: str, target: str, same: Same = same_letter) -> bool:
    """Whether the one letter chosen (boxed, behind `Answer:`, or all there is) is `target`."""
    shown = answer_text(text)
    if shown is not None and "\\boxed" in shown:
        return is_boxed(text, target, same)
    return _in_line(text, reference_answer(target), same)


def is_exact(text: str, target: str) -> bool:
    """Whether the visible text is `target`, but for the amount of white space. Case counts."""
    shown = visible(text)
    return shown is not None and bool(target.strip()) and shown.split() == target.split()


_LAST_NUMBER = re.compile(
    r"\\[dtc]?frac\{[0-9]{1,300}\}\{[0-9]{1,300}\}"
    r"|(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?|\.[0-9]+"
)
_NO_SIGN_AFTER = re.compile(r"[0-9A-Za-z)\]}]")


def last_number(text: str) -> str | None:
    """The last number as written, with its sign and percent sign; reasoning is looked at only if nothing follows it."""
    for part in (visible(text), text):
        matches = deque(_LAST_NUMBER.finditer(part), maxlen=1) if part else ()
        if part and matches:
            return _signed(part, matches[0])
    return None


def _signed(text: str, match: re.Match[str]) -> str:
    start = match.start()
    signed = start > 0 and text[start - 1] in MINUS_SIGNS and not (start > 1 and _NO_SIGN_AFTER.match(text[start - 2]))
    percent = "%" if text[match.end() : match.end() + 2].lstrip("\\").startswith("%") else ""
    return ("-" if signed else "") + match.group() + percent


def is_last_number(text: str, target: str) -> bool:
    """Whether the last number is `target`, whatever the format: a measure of ability, too lenient for a reward."""
    found = last_number(text)
    wanted = parse_quantity(normalise(reference_answer(target)), lowest_terms=False)
    got = parse_quantity(normalise(found), lowest_terms=False) if found else None
    if got is None or wanted is None:
        return False
    # The unit, if any, stands behind the number and is not looked at; a percent sign is part of it.
    return got.value == wanted.value if "%" not in (got.unit, wanted.unit) else same_quantity(got, wanted)


def has_think_format(text: str) -> bool:
    """One `<think>…</think>` at the start, with something in it and something after it."""
    tags = think_tags(text)
    if [tag[2] for tag in tags] != [False, True] or text[: tags[0][0]].strip():
        return False
    return bool(text[tags[0][1] : tags[1][0]].strip()) and bool(text[tags[1][1] :].strip())


def is_clean(text: str) -> bool:
    r"""One `<think>…</think>`, one `\boxed{…}`, and nothing around them but white space."""
    tags = think_tags(text)
    if [tag[2] for tag in tags] != [False, True] or text[: tags[0][0]].strip():
        return False
    shown = text[tags[1][1] :].strip()
    found = boxes(shown)
    return (
        found is not None
        and len(found) == 1
        and (found[0].start, found[0].end) == (0, len(shown))
        and bool(found[0].content.strip())
    )
