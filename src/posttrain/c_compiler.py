"""The machine's C compiler: what builds the kernels of `rollout.native_kernels`, and so decides their last bits."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from functools import lru_cache

_ANSWER_SECONDS = 20


def find_compiler() -> list[str] | None:
    """The command of CC, with its arguments, or else cc, gcc or clang; None where there is none of them."""
    commands = [shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]]
    return next((command for command in commands if command and shutil.which(command[0])), None)


@lru_cache(maxsize=1)
def compiler_version() -> str | None:
    """The first line of what it says of itself; None where there is none."""
    if (compiler := find_compiler()) is None:
        return None
    try:
        done = subprocess.run(
            [*compiler, "--version"], check=True, capture_output=True, text=True, timeout=_ANSWER_SECONDS
        )
    except (subprocess.SubprocessError, OSError) as error:
        return f"{shlex.join(compiler)} does not say: {error}"
    return next(iter(done.stdout.splitlines()), shlex.join(compiler))
