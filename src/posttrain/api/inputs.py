"""Python values as the files that a run pins: rows of data, and reward functions.

A file's name is the digest of what it holds, so the same value is the same input on the next start.
"""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import cloudpickle

from posttrain.errors import ConfigError, DataError
from posttrain.files import digest_bytes, digest_json, write_atomic

_DATA_KEYS = ("datasets", "eval_datasets", "ptx_datasets")


def as_keys(given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The arguments as YAML values; rows and functions are written into `folder`.

    Raises: DataError for rows that JSON cannot hold, ConfigError for a function that cannot be sent to another process.
    """
    keys = {name: _plain(value) for name, value in given.items()}
    for name in _DATA_KEYS:
        if name in keys:
            keys[name] = _datasets(name, keys[name], folder)
    if "reward_funcs" in keys:
        funcs = keys["reward_funcs"]
        funcs = funcs if isinstance(funcs, list) else [funcs]
        keys["reward_funcs"] = [_reward(entry, folder) if callable(entry) else entry for entry in funcs]
    return keys


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


# --- data ----------------------------------------------------------------------------------------------------------


def _datasets(name: str, value: Any, folder: Path) -> list[Any]:
    """A path, rows, a Hugging Face dataset, a mapping of dataset keys, or a list of any of these.

    Validation sets may be given by name, as in transformers' `eval_dataset`.
    """
    if isinstance(value, list) and not _are_rows(value):
        return [entry for part in cast("list[Any]", value) for entry in _datasets(name, part, folder)]
    if isinstance(value, (str, Path)):
        return [{"path": str(value)}]
    if isinstance(value, Mapping) and name == "eval_datasets" and "path" not in value:
        parts = {key: _datasets(name, part, folder) for key, part in cast("Mapping[str, Any]", value).items()}
        return [{**entry, "eval_name": key} for key, part in parts.items() for entry in part]
    if isinstance(value, Mapping):
        return [dict(value)]
    rows: Any = cast("Any", value).to_list() if hasattr(value, "to_list") else value
    if not isinstance(rows, Iterable):
        raise DataError(
            f"{name}: got {type(value).__name__}; expected a path, a list of rows (dicts), a Hugging Face dataset, or a list of these"
        )
    return [{"path": str(_rows_file(name, list(rows), folder))}]


def _are_rows(value: list[Any]) -> bool:
    """Dicts are rows of data unless each names a `path` and nothing a row has."""
    return bool(value) and all(isinstance(row, Mapping) and "path" not in row for row in value)


def _rows_file(name: str, rows: list[Any], folder: Path) -> Path:
    if not rows:
        raise DataError(f"{name}: got no rows")
    lines: list[str] = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}[{number}]: got {type(row).__name__}; expected a row (a dict of columns)")
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise DataError(f"{name}[{number}]: {error}; rows hold what JSON can hold") from error
    content = "\n".join(lines) + "\n"
    path = folder / f"{name}-{_short(digest_bytes(content.encode('utf-8', 'surrogatepass')))}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    return path


# --- rewards -------------------------------------------------------------------------------------------------------


def _reward(function: Callable[..., Any], folder: Path) -> str:
    """`file.py:name`: the function's own file where it can be imported from there, else a file that carries it."""
    name = getattr(function, "__name__", type(function).__name__)
    own = _importable_from(function)
    return f"{own}:{name}" if own else f"{_carried(function, name, folder)}:{_identifier(name)}"


def _importable_from(function: Callable[..., Any]) -> Path | None:
    """The file that defines `function` at its top; None for notebooks, closures, lambdas and scripts being run."""
    if not inspect.isfunction(function) or function.__module__ == "__main__":
        return None
    if function.__qualname__ != function.__name__ or function.__name__ == "<lambda>":
        return None
    path = Path(inspect.getfile(function))
    return path.resolve() if path.is_file() else None


def _carried(function: Callable[..., Any], name: str, folder: Path) -> Path:
    source = _source(function)
    digest = digest_json([source, _bound(function)]) if source else None
    path = folder / f"reward-{_short(digest)}.py" if digest else None
    if path is not None and path.exists():
        return path  # pickles of equal functions differ; the first one stands for all of them
    try:
        payload = cloudpickle.dumps(function)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"reward_funcs: {name} cannot be sent to the reward workers ({error}); define it in a file and name it file.py:{name}"
        ) from error
    path = path or folder / f"reward-{_short(digest_bytes(payload))}.py"
    folder.mkdir(parents=True, exist_ok=True)
    commented = "".join(f"# {line}\n" for line in (source or "(no source)").splitlines())
    encoded = base64.b64encode(payload).decode("ascii")
    write_atomic(
        path,
        f'"""The reward {name}, as it was given from Python."""\n\nimport base64\nimport pickle\n\n{commented}\n'
        f'{_identifier(name)} = pickle.loads(base64.b64decode("{encoded}"))\n',
    )
    return path


def _source(function: Callable[..., Any]) -> str | None:
    target = function if inspect.isfunction(function) else type(function)
    try:
        return inspect.getsource(target)
    except (OSError, TypeError):
        return None


def _bound(function: Callable[..., Any]) -> list[str]:
    """What the source does not show: values the function closed over, defaults, and the attributes of a callable object."""
    closure = [repr(cell.cell_contents) for cell in getattr(function, "__closure__", None) or ()]
    state = [] if inspect.isfunction(function) else [repr(sorted(vars(function).items(), key=lambda item: item[0]))]
    return [repr(getattr(function, "__defaults__", None)), *closure, *state]


def _identifier(name: str) -> str:
    return name if name.isidentifier() else "reward"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:16]
