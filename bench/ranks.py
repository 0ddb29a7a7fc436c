"""What a process holds where 1, 2 or 4 share a model: the largest rank's peak while it loads, trains, saves, exports, resumes.

    python bench/ranks.py                      a model of 42 M parameters, full fine-tuning in float32 with AdamW
    python bench/ranks.py --size 5M --ranks 1 2 --steps 5
    python bench/ranks.py --transfer copy      GRPO instead, sampled on a whole copy; `shared`: with the ranks' shares

The same global batch whatever the number of ranks: four rows, 512 tokens. Bytes are anonymous memory above that of the process
after its imports and the ranks' meeting, sampled every 5 ms; "and files" adds pages of files that are mapped into the process,
which the system takes back as it likes. Weights, gradients and AdamW's state are 16 bytes a parameter. Resuming is a
process of its own that starts from the last checkpoint. One thread a rank: tokens/s shows what the ranks' talk costs only
where there are as many idle cores as ranks. "CPU s" are those of a training step, of all ranks together, without the first step;
they depend less on what else the machine does.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import saving
import workload
from posttrain.files import read_json, write_json
from posttrain.tracking.jsonl import read_jsonl

if TYPE_CHECKING:
    from posttrain.config.stages import TrainKeys
    from posttrain.recipes.run.train_state import Learner

GOALS = {2: 0.65, 4: 0.45}
PHASES = ("load", "train", "save", "export", "resume")
_FOUND = "memory.json"
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Peaks of a process by the phase that it is in, above what it held when the watch began."""

    def __init__(self) -> None:
        self.phase = "load"
        self.peaks: dict[str, tuple[int, int]] = {}
        self._base, self._done = self._now(), Event()
        self._thread = Thread(target=self._sample, daemon=True)
        self._thread.start()

    @staticmethod
    def _now() -> tuple[int, int]:
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        return (resident - shared) * _PAGE, resident * _PAGE

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            anonymous, resident = (now - base for now, base in zip(self._now(), self._base, strict=True))
            before = self.peaks.get(self.phase, (0, 0))
            self.peaks[self.phase] = max(before[0], anonymous), max(before[1], resident)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def close(self) -> None:
        self._done.set()
        self._thread.join()


def stage_keys(size: str, steps: int, transfer: str | None) -> TrainKeys:
    """SFT, or with `transfer` GRPO whose completions are sampled so: 16 of a step, 32 tokens each."""
    from posttrain.config.rl import GRPOKeys
    from posttrain.config.stages import SFTKeys

    common = {
        "base_model": str(saving.model_dir(size)), "max_steps": steps, "num_processes": 4, "save_steps": 0, "sequence_len": 256,
        "learning_rate": 1e-5, "bf16": False, "device": "cpu",
    }  # fmt: skip
    if transfer is None:
        return SFTKeys.model_validate(
            {**common, "datasets": [{"path": str(saving.rows_file())}], "per_device_train_batch_size": 1}
        )
    return GRPOKeys.model_validate({
        **common, "datasets": [{"path": str(workload.data_file("grpo", 64)), "type": "prompt"}], "reward_funcs": [str(Path(__file__).with_name("rewards.py")) + ":vowels"],
        "num_prompts_per_step": 4, "num_generations": 4, "max_completion_length": 32, "per_device_train_batch_size": 4,
        "allow_raw_base": True, "rollout": {"transfer": transfer},
    })  # fmt: skip


def work(size: str, steps: int, transfer: str | None, folder: Path, *, again: bool) -> None:
    """One rank: a stage to its end, or its last checkpoint read `again`. Rank 0 writes what the largest rank held."""
    import torch

    from posttrain.distributed.ranks import join_ranks
    from posttrain.models.policy import Policy
    from posttrain.recipes.kinds import LOOPS
    from posttrain.recipes.run.stage import Stage, StageResult
    from posttrain.recipes.run.train_state import Checkpoints, TrainState

    torch.set_num_threads(1)
    with join_ranks() as ranks:
        watch = Watch()
        cpu_s: list[float] = []

        class WatchedCheckpoints(Checkpoints):
            def save(self, state: TrainState, *, wait: bool = True) -> None:
                with watch.during("save"):
                    super().save(state, wait=wait)

        class WatchedStage(Stage):
            def resume(
                self, policy: Policy, optimizer: torch.optim.Optimizer, total_steps: int, critic: Learner | None = None
            ) -> TrainState:
                with watch.during("resume" if again else "load"):
                    state = super().resume(policy, optimizer, total_steps, critic)
                watch.phase = "train"
                return state

            def begin_step(self, step: int) -> None:
                cpu_s.append(time.process_time())
                super().begin_step(step)

            def done(self, state: TrainState) -> StageResult:
                with watch.during("export"):
                    return super().done(state)

        keys = stage_keys(size, steps, transfer)
        kind = "sft" if transfer is None else "grpo"
        stage = WatchedStage(kind, folder, keys, ranks)
        stage.checkpoints = WatchedCheckpoints(stage.checkpoints.store, ranks, stage.run)
        LOOPS[kind](keys, stage)
        watch.close()
        peaks = ranks.gather(watch.peaks)
        cpu_s = ranks.sum([after - before for before, after in itertools.pairwise(cpu_s)])[1:]
        if ranks.is_main:
            rows = read_jsonl(folder / "metrics.jsonl")
            found = {phase: [max(p.get(phase, (0, 0))[i] for p in peaks) for i in (0, 1)] for phase in PHASES}
            step_s = sorted(row["step_time"] for row in rows)[len(rows) // 2]
            tokens = rows[-1]["num_tokens"] / len(rows)
            write_json(
                folder / _FOUND, {"peaks": found, "tok_s": tokens / step_s, "cpu_s": statistics.median(cpu_s or [0.0])}
            )


def run(size: str, steps: int, transfer: str | None, num_ranks: int, folder: Path, *, again: bool) -> dict[str, Any]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)] if num_ranks > 1 else []
    )
    worker = [__file__, "--worker", str(folder), "--size", size, "--steps", str(steps), *(["--again"] if again else [])]
    worker += [] if transfer is None else ["--transfer", transfer]
    done = subprocess.run(
        [sys.executable, *launcher, *worker], check=False, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return read_json(folder / _FOUND)


def measure(size: str, steps: int, transfer: str | None, num_ranks: int) -> dict[str, Any]:
    folder = workload.OUT / "ranks-run"
    shutil.rmtree(folder, ignore_errors=True)
    found = run(size, steps, transfer, num_ranks, folder, again=False)
    found["peaks"]["resume"] = run(size, steps, transfer, num_ranks, folder, again=True)["peaks"]["resume"]
    shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=saving.SHAPES, default="42M")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--transfer", choices=["copy", "shared"])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.size, options.steps, options.transfer, options.worker, again=options.again)
        return
    saving.model_dir(options.size), saving.rows_file()
    print(f"| ranks | {' | '.join(PHASES)} | peak | and files | of one process | goal | tokens/s | CPU s |")
    print(f"|{'---|' * (len(PHASES) + 7)}")
    one = None
    # One process comes first: the others are shares of it.
    for num_ranks in sorted(set(options.ranks)):
        found = measure(options.size, options.steps, options.transfer, num_ranks)
        if num_ranks == 1:
            one = found
        print(line(num_ranks, found, one), flush=True)


def line(num_ranks: int, found: Mapping[str, Any], one: Mapping[str, Any] | None) -> str:
    """A row of the table; without a measurement of `one` process nothing is a share of it."""
    cells = [str(num_ranks), *(f"{found['peaks'][phase][0] / 1e6:.0f}" for phase in PHASES)]
    cells += [f"{_largest(found, 0) / 1e6:.0f}", f"{_largest(found, 1) / 1e6:.0f}"]
    cells.append("–" if one is None else f"{_largest(found, 0) / _largest(one, 0):.2f}")
    cells += [str(GOALS.get(num_ranks, "–")), f"{found['tok_s']:.0f}", f"{found['cpu_s']:.2f}"]
    return "| " + " | ".join(cells) + " |"


def _largest(found: Mapping[str, Any], kind: int) -> int:
    """Over the phases; kind 0 is anonymous memory, 1 all that is resident."""
    return max(found["peaks"][phase][kind] for phase in PHASES)


if __name__ == "__main__":
    main()
