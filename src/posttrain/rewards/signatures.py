"""Rewards that were written for another tool, called as ours are. Knows nothing of files or workers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.rewards.library import text_of

OF_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
"""What verl calls a reward with, once per completion, and always by name."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """A reward in our signature, the columns it must have (alternatives each), and all that it takes."""

    fn: Callable[..., Any]
    needs: tuple[tuple[str, ...], ...]
    accepts: frozenset[str]


def is_of_verl(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """`compute_score(data_source, solution_str, ground_truth, extra_info)`, or part of it."""
    return "solution_str" in parameters and "completions" not in parameters


def adapted_from_verl(fn: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> Adapted:
    """`fn` with the columns that verl's rows have: `reward_model` holds the `ground_truth`, unless it is a column itself.

    What it returns is a number, or an object with a `score`.
    """
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    taken = [name for name in OF_VERL if takes_all or name in parameters]

    async def scores(completions: Sequence[Any], **columns: Sequence[Any]) -> list[Any]:
        found: list[Any] = []
        for place, completion in enumerate(completions):
            row = {name: values[place] for name, values in columns.items()}
            given = {**row, "solution_str": text_of(completion), "extra_info": dict(row.get("extra_info") or {})}
            if "ground_truth" not in row and "ground_truth" in taken:
                given["ground_truth"] = row["reward_model"]["ground_truth"]
            result = fn(**{name: given[name] for name in taken})
            result = await result if inspect.isawaitable(result) else result
            found.append(result["score"] if isinstance(result, Mapping) else result)
        return found

    needs = {"data_source": ("data_source",), "ground_truth": ("ground_truth", "reward_model")}
    return Adapted(
        scores,
        tuple(columns for name, columns in needs.items() if name in taken),
        frozenset({"completions", "data_source", "ground_truth", "reward_model", "extra_info"}),
    )
