"""What a chat template writes between two turns of the policy, as ids that continue the ids of the turns before them.

The turns that were sampled are never rendered: words stand in for them, and only what comes behind the last of these words, and
behind the end of its turn, is taken. So no token that the policy sampled is ever written another way.

What tools and the environment say is text, whatever it says: the text of a control token in it is cut into two, which are tokenised apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, pairwise
from typing import Any

from posttrain.data.forms import fit
from posttrain.data.render import continuation_ids
from posttrain.data.template import added_tokens, control_tokens, end_of_turn, render_text
from posttrain.errors import DataError
from posttrain.types import Message

_WORD = "posttrainturn{}q"
_CUT = "posttraincut{}q"


@dataclass(frozen=True, slots=True)
class SampledCall:
    """A call of a tool as the policy wrote it: the name it gave, and the id that its answer goes by."""

    name: str
    id: str


def stand_in(number: int, calls: Sequence[SampledCall]) -> Message:
    """What is rendered in place of the policy's turn `number`."""
    word = _WORD.format(number)
    if not calls:
        return {"role": "assistant", "content": word}
    written = [
        {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": {"about": word if call is calls[-1] else "x"}}}
        for call in calls
    ]  # fmt: skip
    return {"role": "assistant", "content": "", "tool_calls": written}


def ids_between(
    tokenizer: Any, conversation: Sequence[Message], tools: Sequence[Any], number: int, sampled: Sequence[int]
) -> list[int]:
    """Ids behind the turn `number` of the policy, which `sampled` holds, up to where it speaks again.

    `conversation` has a `stand_in` for each turn of the policy; behind the last one stand the replies.
    Raises: DataError where the template does not write these replies, or not where they can be told from the turn.
    """
    word = _WORD.format(number)
    cut_here = next(mark for n in count() if (mark := _CUT.format(n)) not in str(conversation))
    turn = max(place for place, message in enumerate(conversation) if message["role"] == "assistant")
    behind_turn = [_cut_message(tokenizer, message, cut_here) for message in conversation[turn:]]
    fitted = fit(tokenizer, [*conversation[:turn], *behind_turn], tools, True)
    whole = fitted.text
    until = render_text(tokenizer, fitted.messages[: turn + 1], fitted.tools)
    if whole.count(word) != 1 or until.count(word) != 1:
        raise DataError(
            f"the chat template writes a turn {whole.count(word)} times, so what stands behind it cannot be told; set `chat_template`"
        )
    before, _, behind = whole.partition(word)
    cut = _end_of_turn(tokenizer, behind, until.partition(word)[2], sampled)
    return continuation_ids(tokenizer, before + word + behind[:cut], behind[cut:].split(cut_here))


def text_pieces(tokenizer: Any, text: str) -> list[str]:
    """`text` cut behind the first character of each control token's text in it, so that none becomes the token."""
    found = _control_texts(control_tokens(tokenizer))
    cuts = [match.start() + 1 for match in found.finditer(text)] if found else []
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


@lru_cache(maxsize=16)
def _control_texts(controls: Sequence[str]) -> re.Pattern[str] | None:
    """Finds where one of them begins, overlapping ones too. A token of one character cannot be cut."""
    long = [re.escape(token) for token in controls if len(token) > 1]
    return re.compile(f"(?={'|'.join(long)})") if long else None


def _cut_message(tokenizer: Any, message: Message, mark: str) -> Message:
    """`message` with `mark` where its text, and the names that the policy gave to tools, are to be cut."""

    def cut(text: str) -> str:
        return mark.join(text_pieces(tokenizer, text))

    changed = {**message, **{key: cut(message[key]) for key in ("content", "name") if key in message}}
    if "tool_calls" in message:
        changed["tool_calls"] = [
            {**call, "function": {**call["function"], "name": cut(call["function"]["name"])}}
            for call in message["tool_calls"]
        ]
    return changed


def _end_of_turn(tokenizer: Any, behind: str, alone: str, sampled: Sequence[int]) -> int:
    """Where in `behind`, what follows a turn's last word, the turn ends as it was sampled; `alone` follows where the turn is the last.

    That is behind the token that ended it. A template may want another end there, which is then what it writes next.
    """
    added = added_tokens(tokenizer)
    own = behind[
        : next(
            (at for at, (a, b) in enumerate(zip(behind, alone, strict=False)) if a != b), min(len(behind), len(alone))
        )
    ]
    last, *earlier = [str(tokenizer.convert_ids_to_tokens(token)) for token in reversed(sampled[-2:])]
    straddling = [at for at in range(max(0, len(own) - 40), len(own)) if behind.startswith(added, at)]
    if straddling and not own.endswith(added):
        longest = next(token for token in added if behind.startswith(token, straddling[-1]))
        own = own[: straddling[-1]] if straddling[-1] + len(longest) > len(own) else own
    if last in added and last in own:
        return own.index(last) + len(last)
    if last in added and behind.startswith(last, len(own)):
        return len(own) + len(last)
    end, bare = end_of_turn(tokenizer), own.rstrip()
    if end and end in own:
        return own.index(end)
    ends_with = next((token for token in added if bare.endswith(token)), "")
    return len(bare) if ends_with in (last, *earlier) else len(bare) - len(ends_with)
