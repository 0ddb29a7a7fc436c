"""Runs a Python file that a user wrote, in a process that may be lost. `source.py` looks at one without running it."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from posttrain.errors import ConfigError
from posttrain.files import digest_json


def load_own_file(file: Path, what: str) -> ModuleType:
    """The file as a module, which may import its neighbours; loaded once. Raises: ConfigError with the line that raised."""
    name = f"posttrain_{what}_" + digest_json(str(file))[-16:]
    if name in sys.modules:
        return sys.modules[name]
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        raise ConfigError(
            f"{_user_line(error, file)}: importing the {what} file raised {type(error).__name__}: {error}"
        ) from error
    return module


def _user_line(error: BaseException, file: Path) -> str:
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == file.parent
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(file)
