"""Rewards that were written for another tool, called as ours are. Knows nothing of files or workers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.errors import ConfigError, RewardError
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


def adapted_from_verl(fn: Callable[..., Any], parameters: Mapping[str, inspect.Parameter], where: str) -> Adapted:
    """`fn` with the columns that verl's rows have: `reward_model` holds the `ground_truth`, unless it is a column itself.

    What it returns is a number, or an object with a `score`; an `extra_info` that a row lacks is `{}`.
    Raises: ConfigError for a parameter that verl does not give; RewardError, when called, for a row without ground truth, and for an object without score.
    """
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    bare = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in kinds and n not in OF_VERL]
    if bare:
        raise ConfigError(f"{where}: nothing gives the parameter {bare[0]!r}; set it in reward_kwargs, or give it a default (verl's are {', '.join(OF_VERL)})")  # fmt: skip
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    taken = [name for name in OF_VERL if takes_all or name in parameters]

    async def scores(completions: Sequence[Any], **columns: Sequence[Any]) -> list[Any]:
        found: list[Any] = []
        for place, completion in enumerate(completions):
            row = {name: values[place] for name, values in columns.items()}
            given = {**row, "solution_str": text_of(completion), "extra_info": _own(row.get("extra_info"))}
            if "ground_truth" in taken:
                given["ground_truth"] = _ground_truth(row, where)
            result = fn(**{name: given[name] for name in taken})
            result = await result if inspect.isawaitable(result) else result
            found.append(_score(result, where))
        return found

    needs = {"data_source": ("data_source",), "ground_truth": ("ground_truth", "reward_model")}
    return Adapted(
        scores,
        tuple(columns for name, columns in needs.items() if name in taken),
        frozenset({"completions", "data_source", "ground_truth", "reward_model", "extra_info"}),
    )


def _own(extra_info: Any) -> Any:
    """A copy, which a function may write into."""
    if extra_info is None:
        return {}
    return dict(extra_info) if isinstance(extra_info, Mapping) else extra_info


def _ground_truth(row: Mapping[str, Any], where: str) -> Any:
    if row.get("ground_truth") is not None:
        return row["ground_truth"]
    holder = row.get("reward_model")
    if not isinstance(holder, Mapping) or "ground_truth" not in holder:
        raise RewardError(f"{where}: a row has no ground truth (`ground_truth`, or `reward_model` with a `ground_truth` inside); name its column with datasets: columns")  # fmt: skip
    return holder["ground_truth"]


def _score(result: Any, where: str) -> Any:
    if not isinstance(result, Mapping):
        return result
    if "score" not in result:
        raise RewardError(f"{where}: it returned an object with {', '.join(map(repr, result)) or 'nothing'}; expected a number, or an object with 'score'")  # fmt: skip
    return result["score"]
