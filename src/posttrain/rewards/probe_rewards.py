"""Rewards that misbehave on purpose: the check runs them to see that a hang, a crash and an outage cost one completion each."""

from __future__ import annotations

import os
import time
from typing import Any


def hanging(prompts: list[Any], completions: list[Any]) -> list[float]:
    while "hang" in completions:
        time.sleep(0.05)
    return [1.0] * len(completions)


def crashing(prompts: list[Any], completions: list[Any]) -> list[float]:
    if "crash" in completions:
        os._exit(11)
    return [1.0] * len(completions)


def unreachable(prompts: list[Any], completions: list[Any]) -> list[float]:
    """What a reward does whose judge or database is down."""
    if "outage" in completions:
        raise ConnectionError("connection refused")
    return [1.0] * len(completions)
