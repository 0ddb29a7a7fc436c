"""The machine's C compiler: what builds the kernels of `rollout.native_kernels`, and so decides their last bits."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import lru_cache

_ANSWER_SECONDS = 20


def find_compiler() -> str | None:
    """That of CC, or cc, gcc or clang."""
    return next(filter(shutil.which, [os.environ.get("CC", ""), "cc", "gcc", "clang"]), None)


@lru_cache(maxsize=1)
def compiler_version() -> str | None:
    """The first line of what it says of itself; None where there is none."""
    if (compiler := find_compiler()) is None:
        return None
    try:
        done = subprocess.run(
            [compiler, "--version"], check=True, capture_output=True, text=True, timeout=_ANSWER_SECONDS
        )
    except (subprocess.SubprocessError, OSError) as error:
        return f"{compiler} does not say: {error}"
    return next(iter(done.stdout.splitlines()), compiler)
