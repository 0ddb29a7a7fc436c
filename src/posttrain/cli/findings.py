"""One line of what `posttrain doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "broken"]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`note` is worth knowing; `broken` must be mended, and `text` says how."""

    name: str
    status: Status
    text: str


def plain_name(package: str) -> str:
    return package.lower().replace("_", "-")
