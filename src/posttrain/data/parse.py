"""One row → one noun (`Example`, `PreferencePair`, …), a counted skip, or an error.

Malformed rows are errors. A skip has one of the documented reasons below. Knows no tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.messages import describe_value, parse_messages, parse_tools
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
)

Fields = Mapping[str, Any]

NO_ASSISTANT = "no assistant turn"
EMPTY = "empty completion"
IDENTICAL = "identical chosen and rejected"


@dataclass(frozen=True, slots=True)
class Skip:
    """A row that is left out, and why."""

    origin: Origin
    reason: str


def parse_chat(row: Fields, origin: Origin) -> Example | Skip:
    return _conversation(parse_messages(row.get("messages"), origin, "messages"), row, origin)


def parse_sharegpt(row: Fields, origin: Origin) -> Example | Skip:
    messages = parse_messages(row.get("conversations"), origin, "conversations")
    system = _optional_text(row, "system", origin)
    if system and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    return _conversation(messages, row, origin)


def parse_alpaca(row: Fields, origin: Origin) -> Example | Skip:
    """`instruction` and `input` are joined by a newline; `history` is a list of [user, assistant] turns, not trained."""
    answer: Message = {"role": "assistant", "content": _text(row, "output", origin)}
    return _conversation((*_alpaca_turns(row, origin), answer), row, origin)


def parse_alpaca_preference(row: Fields, origin: Origin) -> PreferencePair | Skip:
    """The conversation of an alpaca row, with two answers as text."""
    answers = {
        name: ({"role": "assistant", "content": _text(row, name, origin)},) if row.get(name) is not None else None
        for name in ("chosen", "rejected")
    }
    kept = {name: value for name, value in row.items() if name not in ("conversations", *answers)}
    return parse_preference({**kept, "prompt": _alpaca_turns(row, origin), **answers}, origin)


def _alpaca_turns(row: Fields, origin: Origin) -> tuple[Message, ...]:
    """All before the answer."""
    question = "\n".join(
        part for part in (_text(row, "instruction", origin), _optional_text(row, "input", origin)) if part
    )
    system = _optional_text(row, "system", origin)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn in row.get("history") or ():
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(part, str) for part in turn):
            raise DataError(f"{origin}: `history` holds {describe_value(turn)}; expected [user text, assistant text]")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1], "weight": 0}]
    return (*messages, {"role": "user", "content": question})


def parse_completion(row: Fields, origin: Origin) -> Example | Skip:
    prompt, completion = _text_or_messages(row, "prompt", origin), _text_or_messages(row, "completion", origin)
    if isinstance(prompt, str) and isinstance(completion, str):
        return Example(origin, prompt=prompt, completion=completion) if completion else Skip(origin, EMPTY)
    prompt, completion = _both_messages(prompt, completion, "completion", origin)
    return _conversation((*_untrained(prompt), *completion), row, origin)


def parse_text(row: Fields, origin: Origin) -> Example | Skip:
    text = _text(row, "text", origin)
    return Example(origin, completion=text) if text else Skip(origin, EMPTY)


def parse_preference(row: Fields, origin: Origin) -> PreferencePair | Skip:
    """Without `prompt`, it is the common beginning of both answers: of the messages, or of the text up to a word end."""
    chosen, rejected = _text_or_messages(row, "chosen", origin), _text_or_messages(row, "rejected", origin)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(f"{origin}: one of `chosen` and `rejected` is text, the other messages; expected both alike")
    if chosen == rejected:
        return Skip(origin, IDENTICAL)
    prompt = _preference_prompt(row, chosen, origin)
    if prompt is None:
        prompt, chosen, rejected = _implicit_prompt(chosen, rejected, origin)
    elif not isinstance(prompt, str) or not isinstance(chosen, str):
        prompt, chosen = _both_messages(prompt, chosen, "chosen", origin)
        _, rejected = _both_messages(prompt, rejected, "rejected", origin)
    if _is_empty(chosen) or _is_empty(rejected):
        return Skip(origin, EMPTY)
    margin, weight = _number(row, "margin", origin, 0.0), _number(row, "weight", origin, 1.0)
    if weight < 0:
        raise DataError(f"{origin}: `weight` is {weight:g}; expected 0 or more")
    return PreferencePair(origin, prompt, chosen, rejected, parse_tools(row.get("tools"), origin), margin, weight)


_MEANS = {"margin": "by how much the chosen answer is better", "weight": "how much the pair counts"}


def _number(row: Fields, name: str, origin: Origin, default: float) -> float:
    """`default` where the row has none."""
    value = row.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(
            f"{origin}: `{name}` is {describe_value(value)}; expected a number, {_MEANS[name]}; "
            "rename the column if it means something else"
        )
    return float(value)


def parse_kto(row: Fields, origin: Origin) -> LabelledCompletion | Skip:
    label = LABELS.get(str(row.get("label")).strip().lower())
    if label is None:
        raise DataError(f"{origin}: `label` is {describe_value(row.get('label'))}; expected true (desirable) or false")
    prompt, completion = _labelled_texts(row, origin)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        prompt, completion = _both_messages(prompt, completion, "completion", origin)
    if _is_empty(completion):
        return Skip(origin, EMPTY)
    return LabelledCompletion(origin, prompt, completion, label, parse_tools(row.get("tools"), origin))


def parse_alpaca_kto(row: Fields, origin: Origin) -> LabelledCompletion | Skip:
    """The conversation of an alpaca row, whose answer has a label."""
    answer: Message = {"role": "assistant", "content": _text(row, "output", origin)}
    kept = {name: row.get(name) for name in ("label", "tools")}
    return parse_kto({**kept, "prompt": _alpaca_turns(row, origin), "completion": (answer,)}, origin)


def _labelled_texts(row: Fields, origin: Origin) -> tuple[Text, Text]:
    """`prompt` and `completion`, or `messages`, whose last turn is the completion."""
    if row.get("completion") is not None or row.get("messages") is None:
        return _text_or_messages(row, "prompt", origin), _text_or_messages(row, "completion", origin)
    messages = parse_messages(row["messages"], origin, "messages")
    return messages[:-1], messages[-1:]


LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def parse_stepwise(row: Fields, origin: Origin) -> SteppedCompletion | Skip:
    """TRL's stepwise supervision: `prompt`, `completions` (its steps) and `labels`, one for each step."""
    prompt = _text_or_messages(row, "prompt", origin)
    if not isinstance(prompt, str) and (not prompt or prompt[-1]["role"] == "assistant"):
        raise DataError(
            f"{origin}: `prompt` has no question at its end; expected a user turn there, and the answer in `completions`"
        )
    steps, labels = _list(row, "completions", origin), _list(row, "labels", origin)
    if len(steps) != len(labels):
        raise DataError(
            f"{origin}: {len(steps)} `completions` and {len(labels)} `labels`; expected a label for each step"
        )
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, str) or not step.strip():
            raise DataError(
                f"{origin}: step {number} of `completions` is {describe_value(step)}; expected text; take an empty step out, with its label"
            )
    rated = tuple(_step_label(label, number, origin) for number, label in enumerate(labels, start=1))
    return (
        SteppedCompletion(origin, prompt, tuple(steps), rated, parse_tools(row.get("tools"), origin))
        if steps
        else Skip(origin, EMPTY)
    )


def _step_label(label: Any, number: int, origin: Origin) -> float:
    value = LABELS.get(label.strip().lower()) if isinstance(label, str) else label
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
        raise DataError(
            f"{origin}: label {number} of `labels` is {describe_value(label)}; expected true (the step is right) or false, or the "
            "share of its continuations that end right, from 0 to 1"
        )
    return float(value)


def _list(row: Fields, column: str, origin: Origin) -> list[Any]:
    value = row.get(column)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{origin}: `{column}` is {describe_value(value)}; expected a list, one entry for each step")
    return list(value)


RESERVED_COLUMNS = {"prompts", "completions", "self"}
"""What a reward is called with beside the columns, so no column can have these names."""


def parse_prompt(row: Fields, origin: Origin) -> Prompt:
    """`prompt` (text or messages), or `messages`; every other column but `tools` goes to the reward functions."""
    column = "prompt" if row.get("prompt") is not None else "messages"
    prompt = (
        _text_or_messages(row, column, origin)
        if column == "prompt"
        else parse_messages(row.get(column), origin, column)
    )
    if not prompt:
        raise DataError(f"{origin}: `{column}` is empty; expected a question to answer")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{origin}: `{column}` ends with an assistant turn; expected a user or tool turn to answer; "
            "remove that turn (its text can be a column of its own, such as `answer`)"
        )
    columns = {key: value for key, value in row.items() if key not in (column, "tools")}
    for name in RESERVED_COLUMNS & set(columns):
        raise DataError(
            f"{origin}: the column `{name}` has the name of a reward function's own argument; expected another one; "
            f"rename it (`columns: {{my_{name}: {name}}}`)"
        )
    return Prompt(origin, prompt, columns, parse_tools(row.get("tools"), origin))


def unpair(pair: PreferencePair) -> tuple[LabelledCompletion, LabelledCompletion]:
    """A pair as two KTO rows: the chosen answer is desirable, the rejected one is not."""
    wanted = LabelledCompletion(pair.origin, pair.prompt, pair.chosen, True, pair.tools)
    return wanted, LabelledCompletion(pair.origin, pair.prompt, pair.rejected, False, pair.tools)


# --- parts ---------------------------------------------------------------------------------------------------------


def _conversation(messages: tuple[Message, ...], row: Fields, origin: Origin) -> Example | Skip:
    answers = [m for m in messages if m["role"] == "assistant" and m.get("weight", 1)]
    if not answers:
        return Skip(origin, NO_ASSISTANT)
    if all(_is_empty((answer,)) for answer in answers):
        return Skip(origin, EMPTY)
    return Example(origin, messages=messages, tools=parse_tools(row.get("tools"), origin))


def _untrained(messages: Sequence[Message]) -> list[Message]:
    return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]


def _is_empty(completion: Text) -> bool:
    if isinstance(completion, str):
        return not completion
    return not any(m["content"] or m.get("tool_calls") or m.get("reasoning_content") for m in completion)


def _text(row: Fields, column: str, origin: Origin) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        found = ", ".join(f"`{name}`" for name in row)
        raise DataError(f"{origin}: `{column}` is {describe_value(value)}; expected text; this row has {found}")
    return value


def _optional_text(row: Fields, column: str, origin: Origin) -> str:
    return "" if row.get(column) is None else _text(row, column, origin)


def _text_or_messages(row: Fields, column: str, origin: Origin) -> Text:
    value = row.get(column)
    if isinstance(value, (list, tuple, Mapping)):
        return parse_messages(value, origin, column)
    if isinstance(value, str):
        return value
    raise DataError(f"{origin}: `{column}` is {describe_value(value)}; expected text or a list of {{role, content}}")


def _both_messages(
    prompt: Text, answer: Text, column: str, origin: Origin
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Prompt and answer as messages. A text prompt beside an answer in messages is the user's turn."""
    if isinstance(answer, str):
        answer = ({"role": "assistant", "content": answer},)
    if isinstance(prompt, str):
        prompt = ({"role": "user", "content": prompt},)
    if answer[: len(prompt)] == prompt:  # some sets repeat the prompt in the answer
        answer = answer[len(prompt) :]
    if not answer or answer[0]["role"] != "assistant":
        got = answer[0]["role"] if answer else "nothing"
        raise DataError(f"{origin}: `{column}` begins with {got} after the prompt; expected an assistant turn")
    return prompt, answer


def _preference_prompt(row: Fields, chosen: Text, origin: Origin) -> Text | None:
    if row.get("prompt") is not None:
        prompt = _text_or_messages(row, "prompt", origin)
        # UltraFeedback's shape: the answers are whole conversations and `prompt` repeats the question.
        whole = not isinstance(chosen, str) and chosen[0]["role"] != "assistant"
        return None if whole and isinstance(prompt, str) else prompt
    if row.get("conversations") is not None:
        return parse_messages(row["conversations"], origin, "conversations")
    return None


def _implicit_prompt(chosen: Text, rejected: Text, origin: Origin) -> tuple[Text, Text, Text]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if isinstance(chosen, str):
        # The cut never falls inside a word, and the space before a word belongs to the word.
        while shared and not (chosen[shared - 1 : shared].strip() and chosen[shared : shared + 1].isspace()):
            shared -= 1
    else:
        while shared and chosen[shared - 1]["role"] == "assistant":
            shared -= 1
        if not shared or not all(side[shared:] and side[shared]["role"] == "assistant" for side in (chosen, rejected)):  # type: ignore[index]
            raise DataError(
                f"{origin}: `chosen` and `rejected` do not share a prompt followed by an assistant turn; expected the same "
                "turns first in both, or a column `prompt`"
            )
    return chosen[:shared], chosen[shared:], rejected[shared:]
