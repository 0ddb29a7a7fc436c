"""Kill SFT, DPO, GRPO and a pipeline hundreds of times, start them again, and compare how they end.

    python bench/recovery/kills.py --random 75

Prints the table of docs/reliability.md and, with --write, puts it there. `--drivers sft grpo` does some of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs/reliability.md"
BEGIN, END = "<!-- kills: begin -->", "<!-- kills: end -->"
HEAD = [
    "| driver | kills at commit points | distinct points | kills at random instants | survived | runs compared | digests equal | metric series equal | ledger exactly once | minutes |",
    "|---|---|---|---|---|---|---|---|---|---|",
]
_OF_THE_LEDGER = {"ledger", "exactly once"}
_OF_METRICS = {"metrics", "result", "items"}


def load(path: str) -> Any:
    """A module of the tests, which are no package."""
    name = path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def make_drivers(folder: Path) -> dict[str, Any]:
    """The four drivers on a tiny model."""
    conftest, runner = load("tests/conftest.py"), load("tests/stage_runner.py")
    harness, pipelines = load("tests/recovery/harness.py"), load("tests/recovery/pipeline_driver.py")
    model = conftest.make_model(folder / "model", "llama")
    data = folder / "data"
    data.mkdir()
    for name, row in conftest.ROWS.items():
        for prefix, numbers in (("", range(12)), ("dev-", range(12, 16))):
            lines = [json.dumps(row(n % 5, n)) + "\n" for n in numbers]
            (data / f"{prefix}{name}.jsonl").write_text("".join(lines))
    (data / "rewards.py").write_text(conftest.REWARDS)
    made = {kind: harness.stage_driver(kind, runner, model, data) for kind in harness.OPTIONS}
    projects = load("tests/pipeline/conftest.py")
    return made | {"pipeline": pipelines.pipeline_driver(harness, projects, runner, model)}


def row(name: str, points: Any, at_random: Any, seconds: float) -> str:
    differences = points.differences + at_random.differences
    runs = points.runs + at_random.runs

    def equal(names: set[str]) -> str:
        broken = sum(difference in names for difference in differences)
        return "yes" if not broken else f"NO ({broken})"

    others = set(differences) - _OF_THE_LEDGER - _OF_METRICS
    digests = "yes" if not others else f"NO ({', '.join(sorted(others))})"
    ledger = equal(_OF_THE_LEDGER) if name in ("grpo", "pipeline") else "–"
    kills = points.kills + at_random.kills
    return (
        f"| {name} | {points.at_points} | {len(points.points)} | {at_random.at_random} | {kills} of {kills} | {runs} | "
        f"{digests} | {equal(_OF_METRICS)} | {ledger} | {seconds / 60:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drivers", nargs="*", default=["sft", "dpo", "grpo", "pipeline"])
    parser.add_argument("--random", type=int, default=75, help="kills at random instants per driver")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["POSTTRAIN_CACHE"] = str(folder / "cache")
        drivers, harness = make_drivers(folder), sys.modules["tests_recovery_harness"]
        for name in options.drivers:
            # Once in this process, so that every child finds its modules imported.
            drivers[name].prepare(folder / f"{name}-first")
            drivers[name].run(folder / f"{name}-first")
        for name in options.drivers:
            began, driver = time.monotonic(), drivers[name]
            expected, longest_s = harness.uninterrupted(driver, folder / f"{name}-straight")
            points = harness.kill_at_points(driver, folder / f"{name}-points", expected)
            at_random = harness.kill_at_random(driver, folder / f"{name}-random", expected, options.random, longest_s)
            lines.append(row(name, points, at_random, time.monotonic() - began))
            print(lines[-1], *sorted(set(points.differences + at_random.differences)), flush=True)
    table = "\n".join([*HEAD, *lines])
    print(table)
    if options.write:
        text = DOCUMENT.read_text()
        before, rest = text.split(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
