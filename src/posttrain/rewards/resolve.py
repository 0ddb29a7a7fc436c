"""From `rewards.py:correct` or a library name to a function that can be called, and the digest of all it is made of."""

from __future__ import annotations

import asyncio
import functools
import inspect
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError, RewardError
from posttrain.files import digest_json
from posttrain.grading.learned import learned_digest, learned_source, split_learned
from posttrain.grading.loading import load_own_file
from posttrain.grading.scorers import grading_digest
from posttrain.grading.source import (
    defined_names,
    dependency_versions,
    own_functions,
    parse_source,
    source_of,
    split_spec,
)
from posttrain.names import reward_name, reward_names
from posttrain.numerics import revision
from posttrain.rewards.library import GOLD_COLUMNS, REWARDS
from posttrain.rewards.signatures import adapted_from_verl, is_of_verl


class MissingColumnError(RewardError):
    """A reward asks for a column that the dataset does not have."""


@dataclass(frozen=True)
class RewardFunction:
    """A reward ready to be called: options bound, columns it does not take left out, async ones awaited."""

    spec: str
    name: str
    where: str
    fn: Callable[..., Any]
    needs: tuple[tuple[str, ...], ...]
    accepts: frozenset[str] | None  # None takes every column

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
        for group in self.needs:
            if not any(name in columns for name in group):
                if "env_reward" in group:
                    raise MissingColumnError(
                        f"{self.where}: reward {self.name!r} is what an environment pays, which nobody knows of an answer that was not played. "
                        "In a stage with env set reward_check: off; what it trains is then not promoted"
                    )
                present = ", ".join(sorted(columns)) or "none"
                raise MissingColumnError(
                    f"{self.where}: reward {self.name!r} needs the column {' or '.join(group)}; the dataset has {present}. "
                    "Rename one with datasets: columns, or change the reward"
                )
        given = {"prompts": prompts, "completions": completions, **columns}
        result = self.fn(
            **{name: value for name, value in given.items() if self.accepts is None or name in self.accepts}
        )
        return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result

    def reads(self) -> dict[str, Any]:
        """As JSON, which columns it takes (null: all), and of which groups it needs one each."""
        return {"accepts": None if self.accepts is None else sorted(self.accepts), "needs": self.needs}


async def _awaited(value: Any) -> Any:
    return await value


def options_by_name(kwargs: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """`reward_kwargs` keyed by the reward's name; `rewards.py:correct` counts as `correct`."""
    return {reward_name(key): dict(options) for key, options in (kwargs or {}).items()}


def _file_of(spec: str, path: str, folder: Path | None) -> Path:
    file = (folder or Path()) / Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"reward_funcs: {spec}: no file {file}; paths are relative to the YAML")
    return file.resolve()


def check_spec(spec: str, folder: Path | None = None) -> None:
    """Find what can be found without running anything. Raises: ConfigError."""
    if split_learned(spec):
        learned_source(spec, folder)
        return
    parts = split_spec(spec)
    if parts is None:
        if spec not in REWARDS:
            near = get_close_matches(spec, REWARDS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"reward_funcs: {spec!r} is neither file.py:function nor model:FOLDER nor judge:FILE.yaml nor in the library{hint} "
                f"(library: {', '.join(REWARDS)})"
            )
        return
    file = _file_of(spec, parts[0], folder)
    tree = parse_source(file)
    defined = defined_names(tree)
    if parts[1] not in defined:
        own = own_functions(tree)
        near = get_close_matches(parts[1], own, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{file}: no function {parts[1]!r}{hint} (it defines {', '.join(own) or 'no function'})")


def load_reward(
    spec: str, kwargs: Mapping[str, Any] | None = None, folder: Path | None = None, *, timeout_s: float = 10.0
) -> RewardFunction:
    """The reward named by `file.py:function` (relative to `folder`) or by a library name, with its options bound.

    A parameter `reward_timeout_s` is told the deadline of a call.
    Raises: ConfigError, with file and line, for a missing file or function, an import that fails, a wrong signature.
    """
    check_spec(spec, folder)
    options = dict(kwargs or {})
    parts = split_spec(spec)
    if parts is None:
        row = REWARDS[spec]
        bound = _bind(spec, spec, f"reward {spec}", row.fn, options, row.needs, timeout_s)
        # They take `**columns` as TRL's do, and read the columns of answers alone besides those that they name.
        named = {name for name in inspect.signature(row.fn).parameters if name != "columns"}
        read = named.union(GOLD_COLUMNS, *row.needs) - set(options)
        return replace(bound, accepts=frozenset(read))
    file = _file_of(spec, parts[0], folder)
    fn = getattr(load_own_file(file, "reward"), parts[1], None)
    line = getattr(getattr(fn, "__code__", None), "co_firstlineno", 1)
    where = f"{file}:{line}"
    if not callable(fn) or inspect.isclass(fn):
        raise ConfigError(
            f"{where}: {parts[1]} is {type(fn).__name__}, expected a function fn(prompts, completions, **columns)"
        )
    return _bind(spec, parts[1], where, fn, options, None, timeout_s)


def _bind(
    spec: str,
    name: str,
    where: str,
    fn: Callable[..., Any],
    options: dict[str, Any],
    needs: tuple[tuple[str, ...], ...] | None,
    timeout_s: float,
) -> RewardFunction:
    parameters = inspect.signature(fn).parameters
    by_name = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if stray := [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]:
        raise ConfigError(f"{where}: {name}: parameter {stray[0]!r} is positional-only; rewards are called by name")
    of_verl = is_of_verl(parameters)
    if "completions" not in by_name and not takes_all and not of_verl:
        raise ConfigError(
            f"{where}: {name}({', '.join(parameters)}) has no parameter `completions`; expected fn(prompts, completions, **columns)"
        )
    # What a function of ours takes besides its own parameters are columns; what verl's takes are its options.
    if unknown := sorted(set(options) - set(by_name)) if not (of_verl and takes_all) else []:
        allowed = [n for n, p in by_name.items() if p.default is not p.empty]
        raise ConfigError(
            f"reward_kwargs: {name}: unknown option {unknown[0]!r}; it takes {', '.join(allowed) or 'none'}"
        )
    if "reward_timeout_s" in by_name:
        options = {"reward_timeout_s": timeout_s} | options
    bound = functools.partial(fn, **options) if options else fn
    if of_verl:
        adapted = adapted_from_verl(
            bound, {n: p for n, p in parameters.items() if n not in options}, f"{where}: {name}"
        )
        return RewardFunction(spec, name, where, adapted.fn, adapted.needs, adapted.accepts)
    if needs is None:
        ours = {"prompts", "completions", *options}
        needs = tuple((n,) for n, p in by_name.items() if p.default is p.empty and n not in ours)
    accepts = None if takes_all else frozenset(by_name) - set(options)
    return RewardFunction(spec, name, where, bound, needs, accepts)


# --- digest --------------------------------------------------------------------------------------------------------


def reward_digest(
    specs: Sequence[str],
    kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    weights: Sequence[float] | None = None,
    folder: Path | None = None,
) -> str:
    """Digest of what decides a reward: source of the files and their neighbours, weights of models, a judge's file, numbers of library
    and graders, versions, options.

    Nothing is executed. What a reward reads from disk or network is not seen; nor is the model behind a judge's URL.
    """
    options = options_by_name(kwargs)
    sources: dict[str, str] = {}
    imported: set[str] = set()
    for spec in specs:
        check_spec(spec, folder)
        if parts := split_spec(spec):
            digests, modules = source_of(_file_of(spec, parts[0], folder))
            sources |= digests
            imported |= modules
        elif options.get(spec, {}).get("backend") == "math_verify":
            imported |= {"math_verify", "latex2sympy2_extended", "sympy"}
    names = reward_names(specs)
    learned = {spec: learned_digest(spec, folder) for spec in specs if split_learned(spec)}
    return digest_json(
        {
            **({"learned": list(learned.values())} if learned else {}),
            "rewards": [reward_name(spec) for spec in specs],
            "sources": sources,
            "library": [revision("rewards"), grading_digest()],
            "versions": dependency_versions(imported),
            "python": platform.python_version_tuple()[:2],
            "weights": [float(w) for w in weights] if weights is not None else [1.0] * len(specs),
            "kwargs": {name: options.get(name, {}) for name in names},
        }
    )
