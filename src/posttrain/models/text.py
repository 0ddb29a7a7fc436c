"""Token ids to text, with a tokenizer's many signatures hidden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def decoder(tokenizer: Any, *, special: bool = False) -> Callable[[Sequence[int]], str]:
    """Text of token ids; special tokens are left out unless asked for."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=not special)

    return decode
