"""Side by side with TRL: the same models, rows, batches and number of optimizer steps, in one run.

    python bench/vs_trl.py                    the rows of docs/performance.md
    python bench/vs_trl.py --all              the whole grid
    python bench/vs_trl.py --row dpo --quick  one row, two pairs

Each side has its own process. They take turns (ours, TRL's, ours, …), so that a busy minute meets both, and every pair
of turns gives one ratio. Prints a table and writes `bench/out/vs_trl.json`; `--doc` also puts it into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sections
import table
import workload
from rows import BY_NAME, ROWS, Row

HERE = Path(__file__).resolve().parent
PAIRS, QUICK_PAIRS = 5, 2
CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}
"""`cpu` where others use the machine too: with one thread it is what the wall would be without them."""
QUIET = 0.1
"""CPUs that others may use before a warning."""


@dataclass
class Options:
    pairs: int
    threads: int
    device: str
    clock: str = "wall"


class SideError(RuntimeError):
    """A side of the comparison that did not do its share; the first line says why."""


class Side:
    """One process, working a unit at a time."""

    def __init__(
        self, script: str, job: Mapping[str, Any], options: Options, python: Path | str = sys.executable
    ) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [str(python), str(HERE / script), json.dumps(job)], env=environment(options.threads),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def take_turn(self, *, first: bool = False) -> dict[str, Any]:
        """Let it work for a unit (the warm-up has no go) and read what it did."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if not first:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            tail = self._log.read().decode(errors="replace")[-3000:]
            raise SideError(
                f"a side of the comparison ended with status {self._process.wait()}: {_last_line(tail)}\n{tail}"
            )
        return json.loads(line)

    def stop(self) -> None:
        """Closing its input ends it; only if it is stuck is it killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it printed nothing"])[-1]


def environment(threads: int) -> dict[str, str]:
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return os.environ | quiet | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def compare(row: Row, options: Options) -> dict[str, Any]:
    job = job_of(row, options)
    ours, trl = in_turns([lambda script=script: Side(script, job, options) for script in ("side_posttrain.py", "side_trl.py")], options.pairs)  # fmt: skip
    return summary(row, ours, trl)


def in_turns(starts: Sequence[Callable[[], Side]], pairs: int) -> list[list[dict[str, Any]]]:
    """Warm the sides up, one after the other (the reference pass before DPO's first step is timed), then let them take turns: each side's records."""
    sides: list[Side] = []
    try:
        for start in starts:
            sides.append(start())
            sides[-1].take_turn(first=True)
        turns = [[side.take_turn() for side in sides] for _ in range(pairs)]
    finally:
        for side in sides:
            side.stop()
    return [list(turn) for turn in zip(*turns, strict=True)]


def job_of(row: Row, options: Options) -> dict[str, Any]:
    steps = 1 + (row.unit_steps or 0) * options.pairs
    num_rows = workload.EPOCH_ROWS if row.task in ("sft", "dpo") else row.num_prompts * steps
    if row.unit_steps is not None and row.task in ("sft", "dpo"):
        num_rows = max(num_rows, 8 * steps)
    return {
        "row": row.name, "model": str(workload.model_dir(row.model)), "device": options.device,
        "data": str(workload.data_file(row.task.split("_")[0].replace("rollout", "grpo"), num_rows, row.longest)),
        "unit_steps": row.unit_steps, "max_steps": -1 if row.unit_steps is None else steps, "epochs": options.pairs + 1,
    }  # fmt: skip


def summary(
    row: Row, ours: Sequence[dict[str, Any]], trl: Sequence[dict[str, Any]], clock: str = "seconds"
) -> dict[str, Any]:
    """Speed ratio per pair (tokens per second of the clock, ours by TRL's), memory ratio, and how far the losses are apart."""
    if row.same_batches and [turn["tokens"] for turn in ours] != [turn["tokens"] for turn in trl]:
        raise SideError(f"{row.name}: the two sides did not train the same tokens")
    speeds = [[turn["tokens"] / turn[clock] for turn in side] for side in (ours, trl)]
    ratios = [a / b for a, b in zip(*speeds, strict=True)]
    return {
        "row": row.name, "ratios": ratios, "ratio": statistics.median(ratios),
        "ours_tok_s": statistics.median(speeds[0]), "trl_tok_s": statistics.median(speeds[1]),
        "ours_peak_mb": ours[-1]["peak_mb"], "trl_peak_mb": trl[-1]["peak_mb"],
        "loss_difference": loss_difference(row, ours, trl),
        "others_cpus": max(turn["others_cpus"] for turn in (*ours, *trl)), "turns": {"ours": list(ours), "trl": list(trl)},
    }  # fmt: skip


def loss_difference(row: Row, ours: Sequence[dict[str, Any]], trl: Sequence[dict[str, Any]]) -> float | None:
    """Largest difference of a step's loss; of the mean loss where the batches are not the same; none for rollouts."""
    mine, theirs = ([loss for turn in turns for loss in turn["losses"]] for turns in (ours, trl))
    if not mine or row.task == "grpo":
        return None
    if row.same_batches:
        return max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
    return abs(statistics.mean(mine) - statistics.mean(theirs))


# --- start-up ------------------------------------------------------------------------------------------------------


def compare_startup(row: Row, options: Options) -> dict[str, Any]:
    """The two commands on one row of data, from the start of the process to the end of the first step."""
    data = workload.data_file("sft", 1)
    model = str(workload.model_dir(row.model))
    seconds: list[tuple[float, float]] = []
    others = 0.0
    for _ in range(options.pairs):
        with tempfile.TemporaryDirectory() as folder:
            pair = []
            for command, ended in (_our_command(model, data, folder, options), _trl_command(model, data, folder)):
                took, busy = time_to_first_step(command, ended, options)
                others = max(others, busy)
                pair.append(took)
            seconds.append((pair[0], pair[1]))
    ratios = [ours / trl for ours, trl in seconds]
    return {
        "row": row.name, "ratios": ratios, "ratio": statistics.median(ratios), "others_cpus": others,
        "ours_s": statistics.median(ours for ours, _ in seconds), "trl_s": statistics.median(trl for _, trl in seconds),
    }  # fmt: skip


def _our_command(model: str, data: Path, folder: str, options: Options) -> tuple[list[str], Path | str]:
    config = Path(folder) / "first.yaml"
    runs = Path(folder) / "run"
    config.write_text(
        f"base_model: {model}\ndatasets: [{{path: {data}}}]\nmax_steps: 1\noutput_dir: {runs}\ndevice: {options.device}\n"
    )
    return [str(Path(sys.executable).parent / "posttrain"), "sft", str(config), "--quiet"], runs


def _trl_command(model: str, data: Path, folder: str) -> tuple[list[str], Path | str]:
    source = Path(folder) / "data"
    source.mkdir()
    (source / "train.jsonl").write_text(data.read_text())
    flags = {
        "model_name_or_path": model, "dataset_name": source, "output_dir": Path(folder) / "trl", "max_steps": 1, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "report_to": "none", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    command = [str(Path(sys.executable).parent / "trl"), "sft"]
    return command + [part for name, value in flags.items() for part in (f"--{name}", str(value))], "'loss'"


def time_to_first_step(command: list[str], ended: Path | str, options: Options) -> tuple[float, float]:
    """Seconds until a metrics file appears below the path, or the text is printed; and CPUs others used meanwhile."""
    from turns import busy_seconds, own_seconds

    busy, own, start = busy_seconds(), own_seconds(), time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=environment(options.threads), stdout=output, stderr=output)
        while not _has_ended(ended, output.fileno()):
            if process.poll() is not None and not _has_ended(ended, output.fileno()):
                printed = _printed(output.fileno())[-3000:]
                raise SideError(f"{' '.join(command)} ended without a step: {_last_line(printed)}\n{printed}")
            time.sleep(0.01)
        took = time.perf_counter() - start
        process.wait()
        wall = time.perf_counter() - start
    return took, max(0.0, (busy_seconds() - busy) - (own_seconds() - own)) / wall


def _has_ended(ended: Path | str, descriptor: int) -> bool:
    if isinstance(ended, Path):
        return any(path.stat().st_size for path in ended.rglob("metrics.jsonl"))
    return ended in _printed(descriptor)


def _printed(descriptor: int) -> str:
    return os.pread(descriptor, 1 << 20, 0).decode(errors="replace")


# --- all of it -----------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = parse()
    options = Options(
        QUICK_PAIRS if arguments.quick else arguments.pairs, arguments.threads, arguments.device, arguments.clock
    )
    names = arguments.row or [row.name for row in ROWS if arguments.all or not row.extra]
    if not arguments.row and options.device == "cpu" and not has_bf16():
        names = [name for name in names if not BY_NAME[name].bf16]
        print("rows in bf16 are left out: this CPU has no bf16 instructions and takes minutes a step", file=sys.stderr)
    results: list[dict[str, Any]] = []
    for name in names:
        start = time.perf_counter()
        row = BY_NAME[name]
        try:
            result = (compare_startup if row.task == "startup" else compare)(row, options)
        except SideError as error:
            raise SystemExit(str(error)) from None
        results.append(result)
        print(f"{table.line(row, result)}  [{time.perf_counter() - start:.0f} s]", file=sys.stderr, flush=True)
        if result["others_cpus"] > QUIET:
            print(
                f"  warning: others used {result['others_cpus']:.2f} CPUs; the ratio is less certain", file=sys.stderr
            )
    text = table.render(results, facts(options))
    print(text)
    workload.OUT.mkdir(parents=True, exist_ok=True)
    (workload.OUT / "vs_trl.json").write_text(json.dumps({"facts": facts(options), "rows": results}, indent=1))
    if arguments.doc:
        sections.write("side by side", text)


def has_bf16() -> bool:
    """Whether the CPU multiplies in bf16 itself (avx512_bf16, amx_bf16, or Arm's bf16)."""
    return has_flag("bf16")


def has_flag(name: str) -> bool:
    """Whether the processor says that it has it; yes where it is not asked so."""
    flags = Path("/proc/cpuinfo")
    return not flags.exists() or name in flags.read_text()


def facts(options: Options) -> dict[str, str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    return {
        "packages": packages,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {options.threads} threads, {options.device}, {options.clock} clock",
        "pairs": str(options.pairs),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--row", action="append", choices=[row.name for row in ROWS], help="only this row; may be repeated"
    )
    parser.add_argument("--all", action="store_true", help="the whole grid")
    parser.add_argument("--quick", action="store_true", help="two pairs instead of five: to see that it runs")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of both sides")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what is timed; start-up always by the wall")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--doc", action="store_true", help="write the table into docs/performance.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
