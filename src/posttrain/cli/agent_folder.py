"""What an agent may see: paths inside one folder. Knows no tool."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import ConfigError

_LEVELS_OF_A_RUN = ("*", "*/*", "*/*/*", "*/*/*/*")


class ServedFolder:
    """The folder that an agent is given; nothing outside of it is read or named for it."""

    def __init__(self, root: Path) -> None:
        """Raises: ConfigError if there is no such folder."""
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise ConfigError(
                f"--folder {root}: no such folder; expected the one that holds your YAMLs, runs and registry"
            )

    def inside(self, text: str | Path) -> Path:
        """The path with its symlinks resolved. Raises: ConfigError if it leads out of the folder."""
        if "\0" in str(text):
            raise ConfigError("got a path with a zero byte; expected the path of a file")
        try:
            path = (self.root / text).resolve()
            with suppress(FileNotFoundError, NotADirectoryError):
                path.stat()
        except (OSError, RuntimeError) as error:  # a name that is too long; links that go in a circle
            said = error.strerror if isinstance(error, OSError) else "links in a circle"
            raise ConfigError(f"{_short(text)}: got no path ({said}); expected the path of a file") from error
        if not path.is_relative_to(self.root):
            raise ConfigError(
                f"{text}: got a path that leads out of the folder served; expected one inside {self.root}"
            )
        return path

    def shown(self, path: Path) -> str:
        """Relative to the folder, as a command line names it."""
        text = os.path.relpath(path, self.root)
        return f"./{text}" if text.startswith("-") else text

    def run_folder(self, text: str | Path) -> Path:
        """A run, no file of which is a link that leads out. Raises: ConfigError."""
        run = self.inside(text)
        for pattern in _LEVELS_OF_A_RUN:
            for path in run.glob(pattern):
                if path.is_symlink():
                    self.inside(path)
        return run

    def overrides(self, sets: Iterable[str]) -> list[str]:
        """`KEY=VALUE`s, the values of which name no place outside. Raises: ConfigError."""
        for text in sets:
            for value in _texts(_value(text)):
                if value.startswith("~") or re.match(r"(file|local|dir)(:|://)", value):
                    raise ConfigError(
                        f"--set {text}: got a place outside of the folder served; expected one inside {self.root}"
                    )
                if "://" not in value:
                    self.inside(value)
        return list(sets)

    def runs(self) -> Iterator[Path]:
        """Folders with a `pipeline.json`. Hidden folders and links are not entered, nor is a run."""
        for where, folders, files in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if "pipeline.json" in files:
                folders.clear()
                yield Path(where)


def _short(text: str | Path) -> str:
    return said if len(said := str(text)) <= 80 else f"{said[:80]}…"


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text.partition("=")[2])
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: not a value of YAML ({str(error).splitlines()[0]})") from error


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
