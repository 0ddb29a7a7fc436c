"""Processes as they are seen from outside: what one has started, who writes a log, whether they are gone."""

import os
import time
from contextlib import suppress
from pathlib import Path


def family(pid):
    """`pid` and all that it has started, the youngest last."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [pid]
    for one in found:
        found += sorted(child for child, parent in parents.items() if parent == one)
    return found


def processes():
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def command_of(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def writers_of(log):
    """Processes whose errors go to this file, but those that supervise or keep what writes there."""
    return [pid for pid in processes() if _log_of(pid) == str(log) and b"posttrain.supervised" not in command_of(pid)]


def _log_of(pid):
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/fd/2")
    return ""


def all_gone(pids, within_s=20):
    deadline = time.monotonic() + within_s
    while any(map(_lives, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _lives(pid):
    """Who has ended and was not yet asked how is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
