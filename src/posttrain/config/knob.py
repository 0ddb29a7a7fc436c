"""One way to declare a key: its default, its meaning, its range and what other tools call it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Keys(BaseModel):
    """Base of every group of keys: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def knob(default: Any, meaning: str, *, also: str = "", example: Any = None, **constraints: Any) -> Any:
    """A key; `...` as default makes it required.

    `also` lists other tools' names for it, as in `"cutoff_len (LLaMA-Factory), max_length (TRL)"`; such a name is read
    as this key. `example` is shown in messages where the default would not help.
    """
    if isinstance(default, list | dict):
        constraints["default_factory"] = lambda: type(default)(default)
    elif default is not ...:
        constraints["default"] = default
    extra = {name: value for name, value in (("also", also), ("example", example)) if value not in ("", None)}
    return Field(description=meaning, json_schema_extra=extra or None, **constraints)
