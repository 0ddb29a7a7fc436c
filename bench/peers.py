"""Beside other tools than TRL alone: LLaMA-Factory, Axolotl, vLLM, `generate`, TRL with vLLM, lm-eval; the same work on both sides, in turns.

    python bench/peers.py                     every row, five pairs each
    python bench/peers.py --doc               the same, and writes the table of docs/performance.md
    python bench/peers.py --row axolotl-lora --quick     one row, two pairs

Sides are processes that work in turns, as in bench/vs_trl.py. LLaMA-Factory and Axolotl have environments of their own below `.venv-peers/`, made at their
first row (2 and 4 GB); the others are those of this Python. A row that cannot be run here is named with the reason. Rows are kept in
`bench/out/peers.json` as they end: the table has those of earlier calls too, where versions, threads and machine are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peer_envs
import peer_evals
import peer_table
import sections
import time_to_accuracy
import vs_trl
import workload
from gpu_report import LeftOut
from peer_table import Found
from posttrain.files import read_json_lines
from posttrain.rollout.vllm.options import installed
from rows import BY_NAME, Row
from side_posttrain import SEED
from stage_posttrain import QUICKSTART
from vs_trl import Options, Side, SideError

KEPT = workload.OUT / "peers.json"
DECODED = {"model": "nano", "prompt": 64, "tokens": 64, "near": 0}
ANSWER_TOKENS = 48
"""As in the quickstart's evals."""

Measure = Callable[[Options], Found]


@dataclass(frozen=True)
class PeerRow:
    name: str
    title: str
    peer: str
    measure: Measure


# --- training ------------------------------------------------------------------------------------------------------


def trained(peer: str, name: str) -> Measure:
    """A row of bench/rows.py through the trainer of a peer, on the same rows in the same order, the adapter drawn from the same seed."""

    def measure(options: Options) -> Found:
        python, row = peer_envs.python_of(peer), BY_NAME[name]
        job = vs_trl.job_of(row, options)
        theirs = job | {
            "data": str(with_ends(Path(job["data"]))), "lora": row.lora, "rank": 16, "alpha": 32, "batch": 8, "learning_rate": 1e-4,
            "longest": row.longest, "packing": bool(row.ours.get("packing")), "seed": SEED,
        }  # fmt: skip
        starts = [
            lambda: Side("side_posttrain.py", job, options),
            lambda: Side(f"side_{peer}.py", theirs, options, python),
        ]
        ours, other = vs_trl.in_turns(starts, options.pairs)
        # Says whether the two sides trained the same tokens.
        difference = vs_trl.summary(row, ours, other)["loss_difference"]
        return Found(ours, other, f"losses to {difference:.1e}" + ("" if row.same_batches else " (means)"))

    return measure


def with_ends(path: Path) -> Path:
    """The rows in the order in which our recipe takes them, each answer with the token that ends it."""
    rows = [row for _, row in read_json_lines(path)]
    ordered = [rows[index] for index in workload.training_order(len(rows), SEED)]
    made = path.with_name(f"{path.stem}-ends.jsonl")
    made.write_text(
        "".join(json.dumps(row | {"completion": row["completion"] + workload.END}) + "\n" for row in ordered)
    )
    return made


# --- rollouts ------------------------------------------------------------------------------------------------------


def decoded(side: str, rows: int) -> Measure:
    """Distinct prompts of one length and answers of one length: nothing can be left out."""

    def measure(options: Options) -> Found:
        if side == "vllm":
            require_vllm()
        said = [workload.OUT / f"peers-decode-{one}.json" for one in ("ours", side)]
        jobs = [
            DECODED | {"side": one, "rows": rows, "answers": str(path), "max_steps": 1 + options.pairs}
            for one, path in zip(("ours", side), said, strict=True)
        ]
        turns = vs_trl.in_turns([lambda job=job: Side("side_decode.py", job, options) for job in jobs], options.pairs)
        ours, theirs = (json.loads(path.read_text()) for path in said)
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        return Found(*turns, f"greedy tokens of {same} of {rows} rows")

    return measure


def sampled(name: str, script: str, theirs: str) -> Measure:
    """Rows of bench/rows.py that sample: `name` by our recipe, `theirs` by another engine or trainer."""

    def measure(options: Options) -> Found:
        if "vllm" in theirs:
            require_vllm()
        jobs = {one: vs_trl.job_of(BY_NAME[one], options) for one in (name, theirs)}
        starts = [
            lambda: Side("side_posttrain.py", jobs[name], options),
            lambda: Side(script, jobs[theirs], options),
        ]
        ours, other = vs_trl.in_turns(starts, options.pairs)
        lengths = [mean_tokens(BY_NAME[one], turns) for one, turns in ((name, ours), (theirs, other))]
        return Found(ours, other, "none: other random numbers; {:.0f} and {:.0f} tokens a completion".format(*lengths))

    return measure


def mean_tokens(row: Row, turns: Sequence[Mapping[str, Any]]) -> float:
    return statistics.mean(turn["tokens"] / turn["steps"] for turn in turns) / (row.num_prompts * workload.GROUP)


def require_vllm() -> None:
    if installed() is None:
        raise LeftOut("vLLM is not installed: make setup-vllm")


# --- evals ---------------------------------------------------------------------------------------------------------


def asked(kind: str, side: str) -> Measure:
    """1,000 items of the quickstart by its model after SFT, beside lm-eval's `hf` model: `side` is our suite, or our engine under lm-eval's task."""

    def measure(options: Options) -> Found:
        if find_spec("lm_eval") is None:
            raise LeftOut("lm-eval is not installed: pip install 'posttrain[eval]'")
        files = peer_evals.write(kind, workload.OUT, ANSWER_TOKENS)
        said = {one: workload.OUT / f"peers-{kind}-{one}.json" for one in (side, "lm_eval")}
        shared = {
            "model": str(asked_model(options)), "max_tokens": ANSWER_TOKENS, "chat": kind == "answers", "max_steps": 1 + options.pairs, **files,
        }  # fmt: skip
        jobs = [shared | {"side": one, "answers": str(path)} for one, path in said.items()]
        turns = vs_trl.in_turns([lambda job=job: Side("side_eval.py", job, options) for job in jobs], options.pairs)
        ours, theirs = (json.loads(path.read_text()) for path in said.values())
        # Our engine under lm-eval's task keeps no text of a choice.
        what, place = ("answers", 0) if any(text for text, _ in ours) else ("verdicts", 1)
        same = sum(a[place] == b[place] for a, b in zip(ours, theirs, strict=True))
        right = "{:.1f} and {:.1f} % right".format(
            *(100 * statistics.mean(score for _, score in side) for side in (ours, theirs))
        )
        return Found(*turns, f"{same:,} of {len(ours):,} {what}; {right}", "items")

    return measure


def asked_model(options: Options) -> Path:
    """The quickstart's base after its SFT, trained once."""
    once = time_to_accuracy.Options((SEED,), options.threads, 0, "dev", workload.OUT / "peers-model")
    return time_to_accuracy.run_stage(SEED, "ours", "sft", ("base", str(QUICKSTART / "base")), once).model


# --- all of it -----------------------------------------------------------------------------------------------------

ROWS = (
    PeerRow("llamafactory-full", "SFT full f32", "LLaMA-Factory, padded batches", trained("llamafactory", "sft")),
    PeerRow("llamafactory-lora", "SFT LoRA r16 all-linear", "LLaMA-Factory, padded batches", trained("llamafactory", "sft-lora")),
    PeerRow("llamafactory-packed", "SFT full f32, packed", "LLaMA-Factory, neat_packing, 1 × 1024", trained("llamafactory", "sft-packed")),
    PeerRow("axolotl-full", "SFT full f32", "Axolotl, padded batches", trained("axolotl", "sft")),
    PeerRow("axolotl-lora", "SFT LoRA r16 all-linear", "Axolotl, padded batches", trained("axolotl", "sft-lora")),
    PeerRow("axolotl-packed", "SFT full f32, packed", "Axolotl, sample_packing, 1 × 1024", trained("axolotl", "sft-packed")),
    PeerRow("generate-16", "decoding, 16 distinct prompts of equal length", "transformers generate", decoded("generate", 16)),
    PeerRow("generate-64", "decoding, 64 distinct prompts of equal length", "transformers generate", decoded("generate", 64)),
    PeerRow("vllm-16", "decoding, 16 distinct prompts of equal length", "vLLM, float32, eager", decoded("vllm", 16)),
    PeerRow("vllm-64", "decoding, 64 distinct prompts of equal length", "vLLM, float32, eager", decoded("vllm", 64)),
    PeerRow("generate-groups", "GRPO rollouts, 12 × 8, ragged", "transformers generate, calls of 32", sampled("rollout-12", "side_trl.py", "rollout-12")),
    PeerRow("vllm-groups", "GRPO rollouts, 12 × 8, ragged", "vLLM, float32, eager", sampled("rollout-12", "side_posttrain.py", "rollout-12-vllm")),
    PeerRow("trl-vllm", "GRPO whole step, 4 × 8, vLLM on both sides", "TRL, vLLM colocated, **patched**", sampled("grpo-vllm", "side_trl.py", "grpo-vllm")),
    PeerRow("lm-eval-answers", "eval of 1,000 sampled answers, our suite", "lm-eval, hf, batches of 128", asked("answers", "suite")),
    PeerRow("lm-eval-answers-task", "the same, lm-eval's task on our engine", "lm-eval, hf, batches of 128", asked("answers", "task")),
    PeerRow("lm-eval-choices", "eval of 1,000 ranked choices, our suite", "lm-eval, hf, batches of 128", asked("choices", "suite")),
    PeerRow("lm-eval-choices-task", "the same, lm-eval's task on our engine", "lm-eval, hf, batches of 128", asked("choices", "task")),
)  # fmt: skip


def main() -> None:
    arguments = parse()
    options = Options(vs_trl.QUICK_PAIRS if arguments.quick else arguments.pairs, arguments.threads, "cpu")
    known = facts(options)
    for row in () if arguments.kept else ROWS:
        if not arguments.row or row.name in arguments.row:
            start = time.perf_counter()
            result = measured(row, options) | {"pairs": options.pairs}
            keep(row, result, known)
            print(f"{peer_table.line(row, result)}  [{time.perf_counter() - start:.0f} s]", file=sys.stderr, flush=True)
    text = peer_table.render(ROWS, kept_rows(known), known)
    print(text)
    if arguments.doc:
        sections.write("peers", text)


def measured(row: PeerRow, options: Options) -> dict[str, Any]:
    try:
        return asdict(row.measure(options))
    except (LeftOut, SideError, SystemExit) as error:  # the last: training the model that is asked ended
        print(f"{row.name}: {error}", file=sys.stderr, flush=True)
        return {"left_out": str(error).splitlines()[0]}


def keep(row: PeerRow, result: Mapping[str, Any], known: Mapping[str, str]) -> None:
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    # Read again: another call may have added rows meanwhile.
    KEPT.write_text(json.dumps({"facts": known, "rows": kept_rows(known) | {row.name: result}}, indent=1))


def kept_rows(known: Mapping[str, str]) -> dict[str, Any]:
    """Of earlier calls, where what was measured is what would be now."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return kept["rows"] if kept.get("facts") == known else {}


def facts(options: Options) -> dict[str, str]:
    ours = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    beside = {"vLLM": installed(), "lm-eval": version("lm_eval") if find_spec("lm_eval") else None}
    beside |= {peer.title: peer_envs.version_of(name) for name, peer in peer_envs.PEERS.items()}
    cpus = f"{platform.machine()}{' with AVX-512' if vs_trl.has_flag('avx512f') else ''}, {os.cpu_count()} CPUs"
    return {
        "packages": ", ".join([ours, *(f"{name} {found}" for name, found in beside.items() if found)]),
        "machine": f"{cpus}, {options.threads} thread{'s' * (options.threads > 1)} a side, float32",
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--row", action="append", choices=[row.name for row in ROWS], help="only this row; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="two pairs instead of five: to see that it runs")
    parser.add_argument("--pairs", type=int, default=vs_trl.PAIRS)
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of both sides")
    parser.add_argument("--kept", action="store_true", help="measure nothing: the table of what earlier calls kept")
    parser.add_argument("--doc", action="store_true", help="write the table into docs/performance.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
