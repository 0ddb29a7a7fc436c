"""Kills real child processes with SIGKILL, at every durable file operation and at random instants, and compares the ends.

Commit points are not listed anywhere: they are seen from outside, as the operations that change what a later process
would find (open for writing, rename, unlink, mkdir, rmdir, truncate, and SQL that changes or commits), each named by what it
does to which file. So code that is added has its commit points from the first day. An fsync is none: it changes nothing that
SIGKILL could take away.
"""

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from posttrain.models.provenance import model_digest

_TEMPORARY = re.compile(r"\.([^/]+)\.[a-z0-9_]{8}(?=/|$)")
_MASKED = r".\1.*"
_CHANGING_SQL = re.compile(
    r"(BEGIN|COMMIT|INSERT|UPDATE|DELETE|CREATE)\b(?: OR \w+)?(?: INTO| FROM)?(?: (?!SET\b)\w+)?"
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Driver:
    """Something that runs to its end in a folder, and is started again after a kill. `trace` is what must be the same."""

    name: str
    run: Callable[[Path], None]
    trace: Callable[[Path], dict[str, Any]]
    prepare: Callable[[Path], None] = lambda folder: None
    """Makes what the run reads; not part of it."""


@dataclass
class Tally:
    """What was done to a driver and what came of it."""

    driver: str
    at_points: int = 0
    at_random: int = 0
    points: set[str] = field(default_factory=set)
    runs: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.at_points + self.at_random

    def compare(self, found: dict[str, Any], expected: dict[str, Any]) -> None:
        self.runs += 1
        self.differences += [name for name, value in expected.items() if found[name] != value]


def start(run: Callable[[], None], errors: Path) -> int:
    """`run` in a forked child; its process id. The child leaves without running anything of its parent's."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        # Progress bars have a lock that forked processes share: one that is killed would never give it back.
        transformers_logging.disable_progress_bar()
        run()
        status = 0
    except BaseException:  # noqa: BLE001 - a process boundary: the parent reads why
        errors.write_text(traceback.format_exc())
    finally:
        os._exit(status)


def wait(child: int, errors: Path) -> bool:
    """Whether the child was killed. Raises: AssertionError if it failed by itself."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert os.waitstatus_to_exitcode(status) == 0, errors.read_text() if errors.exists() else status
    return False


def uninterrupted(driver: Driver, folder: Path) -> tuple[dict[str, Any], float]:
    """The trace of a run that nobody kills, and the seconds it took."""
    driver.prepare(folder)
    began = time.monotonic()
    wait(start(lambda: driver.run(folder), folder.with_suffix(".err")), folder.with_suffix(".err"))
    return driver.trace(folder), time.monotonic() - began


def kill_at_points(
    driver: Driver, folder: Path, expected: dict[str, Any], wanted: Callable[[str], bool] = lambda point: True
) -> Tally:
    """One run that dies at each of its commit points in turn, once: before the operation is done."""
    tally, journal = Tally(driver.name), folder.with_suffix(".points")
    errors = folder.with_suffix(".err")
    journal.touch()
    driver.prepare(folder)
    while wait(start(lambda: _die_at_a_new_point(driver, folder, journal, wanted), errors), errors):
        tally.at_points += 1
        assert tally.at_points < 5000
    tally.points = set(journal.read_text().splitlines())
    tally.compare(driver.trace(folder), expected)
    return tally


def kill_at_random(
    driver: Driver, folder: Path, expected: dict[str, Any], kills: int, longest_s: float, per_run: int = 5
) -> Tally:
    """`kills` kills at instants drawn anew, at most `per_run` of them for one run, which then goes to its end."""
    tally, chance, errors = Tally(driver.name), random.Random(f"{driver.name}{kills}"), folder.with_suffix(".err")
    survived = 0
    while tally.at_random < kills or survived:
        driver.prepare(folder)
        child = start(lambda: driver.run(folder), errors)
        if tally.at_random < kills and survived < per_run:
            time.sleep(chance.uniform(0.0, longest_s))
            os.kill(child, signal.SIGKILL)
        if wait(child, errors):
            tally.at_random += 1
            survived += 1
            continue
        tally.compare(driver.trace(folder), expected)
        shutil.rmtree(folder)
        survived = 0
    return tally


# --- commit points -------------------------------------------------------------------------------------------------


def _die_at_a_new_point(driver: Driver, folder: Path, journal: Path, wanted: Callable[[str], bool]) -> None:
    """Run, and die before the first operation that no earlier child died at; an operation that repeats is numbered."""
    seen = set(journal.read_text().splitlines())
    root, counts = str(folder.resolve()) + os.sep, dict[str, int]()

    def reach(operation: str, path: str) -> None:
        if not path.startswith(root):
            return
        name = f"{operation} {_TEMPORARY.sub(_MASKED, path.removeprefix(root))}"
        counts[name] = counts.get(name, 0) + 1
        point = f"{name} #{counts[name]}"
        if point in seen or not wanted(point):
            return
        descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, f"{point}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    _watch(reach)
    _watch_statements(reach)
    driver.run(folder)


def _watch(reach: Callable[[str, str], None]) -> None:
    """Call `reach` before each operation of this process that changes files."""
    places = {"os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.truncate": 0}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            reach("write", _path(arguments[0]))
        elif event in places:
            # Folders are emptied relative to a descriptor, which is then the last argument.
            relative_to = arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
            reach(event.removeprefix("os."), _path(arguments[places[event]], relative_to))

    sys.addaudithook(hook)


def _watch_statements(reach: Callable[[str, str], None]) -> None:
    """Call `reach` before each statement that changes a database of SQLite, which writes its files without Python."""
    connect = sqlite3.connect

    def watched(path: Any, *args: Any, **kwargs: Any) -> sqlite3.Connection:
        db = connect(path, *args, **kwargs)
        name = db.execute("PRAGMA database_list").fetchone()[2]  # the path given may be a URI

        def trace(sql: str) -> None:
            if found := _CHANGING_SQL.match(sql):
                reach(found.group(), name)

        db.set_trace_callback(trace)
        return db

    sqlite3.connect = watched  # in a child that ends here


def _path(what: Any, relative_to: Any = -1) -> str:
    if isinstance(what, int) or hasattr(what, "fileno"):
        return os.readlink(f"/proc/self/fd/{what if isinstance(what, int) else what.fileno()}")
    name = os.fsdecode(what)
    if isinstance(relative_to, int) and relative_to >= 0 and not os.path.isabs(name):
        return os.path.join(os.readlink(f"/proc/self/fd/{relative_to}"), name)
    return os.path.abspath(name)


# --- drivers -------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {"max_steps": 6, "save_steps": 1, "adapter": "lora", "lora_r": 4, "lora_dropout": 0.1, "packing": True,
            "sequence_len": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "dpo": {"max_steps": 6, "save_steps": 2, "eval_steps": 1, "load_best_model_at_end": True},
    "grpo": {"max_steps": 6, "save_steps": 1, "num_iterations": 2, "beta": 0.1, "dynamic_sampling": True,
             "num_prompts_per_step": 3, "reward_funcs": ["last_digit"]},
    "online_dpo": {"max_steps": 6, "save_steps": 1, "num_iterations": 2, "num_prompts_per_step": 3, "reward_funcs": ["last_digit"]},
    "ppo": {"max_steps": 6, "save_steps": 1, "num_iterations": 2, "beta": 0.1, "critic_warmup_steps": 1, "adapter": "lora", "lora_r": 4},
}  # fmt: skip


def stage_driver(kind: str, runner: Any, model: Path, data: Path, **options: Any) -> Driver:
    """One stage: packed SFT with an adapter, DPO with the best checkpoint, GRPO that refills its batches, online DPO with tied groups, or PPO."""
    values = {**OPTIONS[kind], **options}
    if kind == "dpo":
        values["eval_datasets"] = [{"path": str(data / "dev-pairs.jsonl")}]
    keys = runner.keys_of(kind, model, data, **values)

    def trace(folder: Path) -> dict[str, Any]:
        result = json.loads((folder / "result.json").read_text())
        result.pop("wall_s")
        prompts = ledger(folder)
        return {
            "digest": result["model_digest"],
            "critic": model_digest(folder / "critic") if kind == "ppo" else None,
            "result": result,
            "metrics": runner.rows(folder),
            "ledger": prompts,
            "exactly once": not prompts or is_exactly_once(prompts),
            "leftovers": leftovers(folder),
        }

    return Driver(kind, lambda folder: _finished(runner.run_stage(kind, folder, keys)), trace)


def _finished(result: Any) -> None:
    assert result is not None


def ledger(folder: Path) -> list[dict[str, Any]]:
    """What the surviving history says of its prompts: a record per generation batch."""
    lines = (folder / "events.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["kind"] == "rollouts"]
    return [{"generation": event["generation"], "step": event["step"], **event["prompts"]} for event in events]


def is_exactly_once(records: list[dict[str, Any]]) -> bool:
    """Every prompt of the run's row was issued (or passed over) once, and none was trained on in two batches or unissued."""
    issued = [number for record in records for name in ("issued", "passed_over") for number in record.get(name, [])]
    trained = [number for record in records for number in record["trained"]]
    generations = [record["generation"] for record in records]
    return (
        sorted(issued) == list(range(len(issued)))
        and len(set(trained)) == len(trained) > 0
        and all(set(record["trained"]) <= set(record["issued"]) for record in records)
        and generations == list(range(len(generations)))
    )


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders that a finished run should have swept."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob(".*"))
    return sorted(name for name in found if _TEMPORARY.search(name))
