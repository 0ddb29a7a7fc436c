"""What a click on `posttrain ui` waits for, with 1,000 runs of which one logged 1 M steps. One line a request: the median and the worst of 20, and
the median of the processor's time, which other work on the machine does not lengthen.

python bench/ui.py [--runs 1000] [--rows 1000000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from posttrain.cli.agent_folder import ServedFolder
from posttrain.cli.pages.app import make_pages
from posttrain.cli.pages.site import Site
from posttrain.serve.options import ServeOptions

TOKEN = "bench"
METRICS = ("loss", "reward", "reward_std", "kl", "entropy", "grad_norm", "learning_rate", "completions/mean_length")


def make_folder(root: Path, num_runs: int, num_rows: int) -> None:
    for number in range(num_runs):
        run = root / "runs" / f"run-{number:04}"
        (run / "stages" / "01-grpo").mkdir(parents=True)
        stage = {"kind": "grpo", "folder": "stages/01-grpo", "status": "done", "steps": 100}
        (run / "pipeline.json").write_text(
            json.dumps({"name": run.name, "status": "passed", "stages": [stage], "gates": []})
        )
        (run / "config.yaml").write_text(f"name: {run.name}\nseed: {number}\n")
        write_metrics(run / "stages" / "01-grpo" / "metrics.jsonl", num_rows if number == 0 else 100)


def write_metrics(path: Path, num_rows: int) -> None:
    with path.open("w") as handle:
        for step in range(1, num_rows + 1):
            row = {"step": step, "time": 1e9 + step, "num_tokens": 500 * step, "memory_peak_bytes": 2**30}
            handle.write(
                json.dumps(row | {name: (step * 37 % 101) / 101 + place for place, name in enumerate(METRICS)}) + "\n"
            )


Times = list[tuple[float, float]]
"""Milliseconds of each request, by the clock and of the processor."""


def ask(client: TestClient, path: str, found: Times) -> Any:
    begun, used = time.perf_counter(), time.process_time()
    answer = client.get(path)
    found.append((1000 * (time.perf_counter() - begun), 1000 * (time.process_time() - used)))
    assert answer.status_code == 200, answer.text[:300]
    return answer


def timed(client: TestClient, path: str, count: int = 20) -> Times:
    found: Times = []
    for _ in range(count):
        ask(client, path, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_folder(root, given.runs, given.rows)
        site = Site(ServedFolder(root), TOKEN, registry="registry", allow_acts=False)
        client = TestClient(
            make_pages(site, ServeOptions(token=TOKEN)),
            "http://localhost",
            headers={"authorization": f"Bearer {TOKEN}"},
        )
        names = "".join(
            f"&name={name}"
            for name in (
                "reward",
                "reward_std",
                "entropy",
                "kl",
                "completions/mean_length",
                "tokens_per_second",
                "memory_peak_mib",
            )
        )
        curves = f"/api/curves?run=runs/run-0000&stage=01-grpo{names}"
        reading, begun = Times(), time.perf_counter()
        while ask(client, curves, reading).json()["share_read"] < 1.0:
            pass
        print(f"{given.rows:,} rows read in {time.perf_counter() - begun:.1f} s, {len(reading)} requests", flush=True)
        report("curves, while the file is read", reading)
        report("curves, all steps", timed(client, curves))
        report("curves, zoomed", timed(client, f"{curves}&low={given.rows // 3}&high={given.rows // 2}"))
        report("runs, first time", timed(client, "/", 1))
        report("runs", timed(client, "/?page=2"))
        report("runs, found by words", timed(client, "/?q=run-09"))
        report("a run with that many rows", timed(client, "/run?run=runs/run-0000"))
        report(
            "compare eight", timed(client, "/compare?" + "&".join(f"run=runs/run-{number:04}" for number in range(8)))
        )


def report(what: str, found: Times) -> None:
    clock, used = zip(*found, strict=True)
    print(
        f"{what:32}  median {statistics.median(clock):6.1f} ms   worst {max(clock):6.1f} ms   processor {statistics.median(used):6.1f} ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
