"""Thousands of optimizer steps of each kind of stage: does memory stay flat, do files, descriptors and threads stay bounded?

    python bench/long_run.py                 SFT 3,000 steps, DPO and GRPO (with reward workers) 4,000; table and plot
    python bench/long_run.py --only grpo     one of them

Each stage runs in a process of its own, with everything a `posttrain` command has: metrics, events, samples, live view,
checkpoints, validation. A sink looks at the process from inside. The slope of memory is fitted to the means of equal
blocks of steps after the warm-up, so that its interval is honest about samples that are not independent.

Two sizes are looked at: what the process has allocated, which a leak makes grow, and what it holds of the machine's memory,
which also moves with the holes that an allocator leaves between long-lived blocks. Exit code 1 if anything grows.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import workload
from posttrain.files import read_json_lines

STEPS = {"sft": 3000, "dpo": 4000, "grpo": 4000}
SAMPLES = 300
WARM_UP = 1 / 3
BLOCKS = 12
FLAT_KB_PER_1000 = 512.0
"""A slope whose 95 % interval ends below this is called flat: a run of 100,000 steps grows by less than 50 MB."""
MOST_RESIDENT_MB = 8.0
"""How far resident memory may move after the warm-up where what is allocated is flat: holes come and go by some MB."""
APPENDED = ("metrics.jsonl", "events.jsonl", "samples.jsonl")
PLOT = Path(__file__).resolve().parents[1] / "docs" / "long-run.svg"
BASE = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "sequence_len": 96, "learning_rate": 1e-4,
    "lr_scheduler_type": "constant", "save_steps": 100, "save_total_limit": 2, "eval_steps": 250, "logging_steps": 1,
    "bf16": False, "device": "cpu",
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {},
    "grpo": {
        "reward_funcs": [str(Path(__file__).with_name("rewards.py")) + ":vowels"], "reward_workers": 1, "num_generations": 4,
        "num_prompts_per_step": 2, "per_device_train_batch_size": 8, "max_completion_length": 12, "beta": 0.02,
        "learning_rate": 1e-5,
    },
}  # fmt: skip


# --- what is run ---------------------------------------------------------------------------------------------------


def tiny_model() -> Path:
    """A Qwen3 of 0.4 M parameters with the tokenizer of the other benches."""
    folder = workload.OUT / "model-tiny"
    if not folder.exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(workload.tokenizer_dir())
        config = AutoConfig.for_model(
            "qwen3", vocab_size=workload.VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def rows_file(kind: str, part: str, num_rows: int) -> Path:
    """Short rows of very different lengths: what fragments a heap."""
    path = workload.OUT / f"long-{kind}-{part}-{num_rows}.jsonl"
    if not path.exists():
        rng, language = random.Random(f"{kind}/{part}"), workload.words()

        def text(median: int) -> str:
            return workload.draw_text(rng, language, workload.log_normal(rng, median, 40))

        answers = {"sft": ("completion",), "dpo": ("chosen", "rejected"), "grpo": ()}[kind]
        rows = [{"prompt": text(10) + ":"} | {name: text(12) for name in answers} for _ in range(num_rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def child(kind: str, steps: int, folder: Path, samples: Path) -> None:
    """Run one stage in this process and write what the sink saw."""
    from rich.console import Console

    from posttrain.config.kinds import STAGE_KINDS
    from posttrain.distributed.ranks import SingleProcess
    from posttrain.recipes.kinds import LOOPS
    from posttrain.recipes.run.stage import Stage
    from posttrain.tracking.live import LiveView

    fill_interned()
    keys = STAGE_KINDS[kind].keys.model_validate(BASE | OWN[kind] | {
        "base_model": str(tiny_model()), "max_steps": steps,
        "datasets": [{"path": str(rows_file(kind, "train", 400))}],
        "eval_datasets": [{"path": str(rows_file(kind, "dev", 16))}],
    })  # fmt: skip
    with open(os.devnull, "w") as nowhere, open(samples, "w") as seen:
        watcher = Watcher(folder, max(1, steps // SAMPLES), seen)
        view = LiveView(kind, steps, Console(file=nowhere))
        stage = Stage(kind, folder, keys, SingleProcess(), watchers=lambda *_: [view, watcher])
        LOOPS[kind](keys, stage)


def fill_interned(names: int = 200_000) -> None:
    """Let Python's table of interned strings reach its size.

    `pathlib` interns the parts of every path, so each new file name takes a place in the table, which doubles once, by
    3.8 MB, when its places are used up, and keeps that size from then on: thousands of steps into a run, or here.
    """
    for number in range(names):
        sys.intern(f"{number:x}")


class Watcher:
    """A metric sink that looks at its own process every few steps and writes it down: kept, it would be growth itself."""

    def __init__(self, folder: Path, every: int, seen: IO[str]) -> None:
        self.folder, self.every, self.seen = folder, every, seen
        self._since: tuple[int, float] | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step % self.every == 0:
            self.seen.write(json.dumps({"step": step, **look(self.folder), **self._pace(step)}) + "\n")

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass

    def _pace(self, step: int) -> dict[str, float]:
        """CPU seconds a step since the last look: other processes on the machine do not count."""
        now = time.process_time()
        since, self._since = self._since, (step, now)
        return {} if since is None else {"step_cpu_s": (now - since[1]) / (step - since[0])}


def look(folder: Path) -> dict[str, Any]:
    """Memory, descriptors, threads, child processes and files of this process, from /proc."""
    children = [
        int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    ]
    files: dict[str, int] = {}
    for place, _, names in os.walk(folder):  # unlike rglob it does not mind a checkpoint that is retired meanwhile
        for path in (Path(place, name) for name in names):
            with suppress(FileNotFoundError):
                files[path.relative_to(folder).as_posix()] = path.stat().st_size
    return {
        "rss_kb": rss_kb("self"),
        "allocated_kb": allocated_kb(),
        "children_rss_kb": sum(rss_kb(str(pid)) for pid in children),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "children": len(children),
        "num_files": len(files),
        "other_bytes": sum(size for name, size in files.items() if name not in APPENDED),
        **{name: files.get(name, 0) for name in APPENDED},
    }


def rss_kb(process: str) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


def allocated_kb() -> float:
    """What malloc has handed out and not got back, and Python's own blocks, which are in none of malloc's books."""
    info = _mallinfo2()
    return (info.uordblks + info.hblkhd + sys.getallocatedblocks() * PYTHON_BLOCK) / 1024


PYTHON_BLOCK = 64
"""Bytes of a small object, about: good enough to see their number grow."""


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later, summed over all arenas."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    ))  # fmt: skip


_mallinfo2 = ctypes.CDLL(None).mallinfo2
_mallinfo2.restype = _MallocInfo


class Reader(threading.Thread):
    """Reads metrics.jsonl all the while: at any moment every whole line must parse and steps must follow each other."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path, self.reads, self.broken = path, 0, 0
        self._done = threading.Event()

    def __enter__(self) -> Reader:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        while not self._done.wait(0.25):
            if self.path.exists():
                self.reads += 1
                *whole, _ = self.path.read_bytes().split(b"\n")
                self.broken += not steps_follow(whole)


def steps_follow(lines: Sequence[bytes]) -> bool:
    try:
        steps = [json.loads(line)["step"] for line in lines]
    except (ValueError, KeyError):
        return False
    return steps == list(range(1, len(steps) + 1))


# --- what is made of it --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slope:
    """Growth per 1,000 steps with its two-sided 95 % interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:+.0f} ({self.low:+.0f} to {self.high:+.0f})"


def slope(steps: Sequence[float], values: Sequence[float], blocks: int = BLOCKS) -> Slope:
    """Least squares through block means; neighbouring samples are alike, block means nearly independent."""
    import numpy as np
    from scipy.stats import t

    x = np.array([part.mean() for part in np.array_split(np.asarray(steps, float) / 1000, blocks)])
    y = np.array([part.mean() for part in np.array_split(np.asarray(values, float), blocks)])
    centred = x - x.mean()
    estimate = float(centred @ y / (centred @ centred))
    residual = y - y.mean() - estimate * centred
    error = math.sqrt(float(residual @ residual) / (blocks - 2) / float(centred @ centred))
    half = float(t.ppf(0.975, blocks - 2)) * error
    return Slope(estimate, estimate - half, estimate + half)


def judge(kind: str, record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """A row of the table, and what is wrong."""
    samples = record["samples"]
    late = samples[int(len(samples) * WARM_UP) :]
    steps = [sample["step"] for sample in late]

    def of(name: str) -> list[float]:
        return [float(sample[name]) for sample in late]

    allocated, resident, workers = (slope(steps, of(name)) for name in ("allocated_kb", "rss_kb", "children_rss_kb"))
    pace = of("step_cpu_s")
    third = len(pace) // 3
    wrong = [
        f"{kind}: {what} grows by {found} kB per 1,000 steps, expected an interval below {FLAT_KB_PER_1000:.0f}"
        for what, found in (("allocated memory", allocated), ("memory of the reward workers", workers))
        if found.high > FLAT_KB_PER_1000
    ]
    moved = (max(of("rss_kb")) - min(of("rss_kb"))) / 1024
    if moved > MOST_RESIDENT_MB:
        wrong.append(
            f"{kind}: resident memory moves by {moved:.1f} MB after the warm-up, expected {MOST_RESIDENT_MB:.0f}"
        )
    for name in ("descriptors", "threads", "children"):
        low, high = min(of(name)), max(of(name))
        # One descriptor, thread or temporary file more while a checkpoint is written is no growth.
        if high - low > 3 or of(name)[-1] > of(name)[0] + 3:
            wrong.append(f"{kind}: {name} go from {low:.0f} to {high:.0f}")
    if record["broken"]:
        wrong.append(f"{kind}: {record['broken']} of {record['reads']} reads of metrics.jsonl met a broken line")
    last = samples[-1]
    per_step = " + ".join(f"{last[name] / last['step']:.0f}" for name in APPENDED)
    row = [
        kind, f"{last['step']:,}", f"{last['rss_kb'] / 1024:.0f}", str(allocated), str(resident), f"{moved:.1f}",
        str(workers) if last["children"] else "–",
        *(f"{min(of(name)):.0f}–{max(of(name)):.0f}" for name in ("descriptors", "threads", "children", "num_files")),
        f"{max(of('other_bytes')) / 1e6:.1f}", per_step,
        f"{sum(pace[-third:]) / sum(pace[:third]):.3f}", f"{record['reads']} / {record['broken']}",
    ]  # fmt: skip
    return row, wrong


HEAD = [
    "stage", "steps", "resident MB", "allocated: kB per 1,000 steps (95 %)", "resident: the same", "resident: range after warm-up, MB",
    "reward workers: the same", "descriptors", "threads",
    "children", "files", "checkpoints and the rest MB", "appended bytes a step (metrics + events + samples)",
    "CPU a step, last third : first", "reads while written / broken",
]  # fmt: skip


def draw(records: Mapping[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "long-run"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for kind, record in records.items():
        samples = record["samples"]
        steps = [sample["step"] for sample in samples]
        axes[0].plot(steps, [sample["rss_kb"] / 1024 for sample in samples], label=kind, linewidth=1)
        axes[1].plot(
            steps, [sum(sample[name] for name in APPENDED) / 1e6 for sample in samples], label=kind, linewidth=1
        )
    for axis, title in zip(axes, ("resident memory, MB", "metrics, events and samples, MB"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def measure(kind: str, steps: int) -> dict[str, Any]:
    folder = workload.OUT / f"long-{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    samples = workload.OUT / f"long-{kind}.jsonl"
    started = time.monotonic()
    command = [sys.executable, __file__, "--child", kind, str(steps), str(folder), str(samples)]
    with Reader(folder / "metrics.jsonl") as reader:
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = {"reads": reader.reads, "broken": reader.broken, "wall_s": time.monotonic() - started}
    record = {"samples": [row for _, row in read_json_lines(samples)]} | found
    shutil.rmtree(folder)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STEPS, help="one kind of stage")
    parser.add_argument("--steps", type=int, help="other than the numbers above; the plot is then not drawn")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, steps, folder, samples = options.child
        child(kind, int(steps), Path(folder), Path(samples))
        return
    kinds = [options.only] if options.only else list(STEPS)
    tiny_model()
    records = {kind: measure(kind, options.steps or STEPS[kind]) for kind in kinds}
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    wrong: list[str] = []
    for kind, record in records.items():
        row, bad = judge(kind, record)
        print(f"| {' | '.join(row)} |")
        wrong += bad
    print(f"\nwall time {sum(record['wall_s'] for record in records.values()) / 60:.1f} min")
    if not options.only and not options.steps:
        draw(records, PLOT)
        print(f"plot: {PLOT}")
    held = f"flat: allocated memory grows by less than {FLAT_KB_PER_1000:.0f} kB per 1,000 steps, resident memory "
    print("\n".join(wrong) if wrong else held + f"moves by less than {MOST_RESIDENT_MB:.0f} MB")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
