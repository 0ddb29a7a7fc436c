"""What may be written to a terminal."""

from __future__ import annotations

import os
import re
import traceback

import typer

from posttrain.errors import PosttrainError
from posttrain.uris import without_secrets

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    r"""`text` with every control character but newline and tab written out (`\x1b`), so that a terminal obeys none of them."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def error_message(error: PosttrainError) -> str:
    """What the user reads of an error that he can fix: no control characters, no password."""
    text = printable(without_secrets(str(error)))
    lines = text.splitlines()
    return f"error: {text}" if len(lines) <= 1 else "error:\n" + "\n".join(f"  {line}" for line in lines)


def tell_error(error: PosttrainError, by: str = "") -> None:
    """The error in hand on stderr; its traceback too where that is asked for."""
    if os.environ.get("POSTTRAIN_DEBUG") == "1":
        traceback.print_exc()
    typer.echo(by + error_message(error), err=True)
