"""What grows faster than its work: of each kind of size the seconds of a processor at three sizes, the fitted exponent, and the memory at the largest.

python bench/size.py            small sizes, under two minutes of a free core
python bench/size.py --full     the sizes of the aims
python bench/size.py --doc      and write the table of docs/performance.md

Each measurement is a process of its own (Linux: its peak is read from /proc); what it works on was made before, by another one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sections

Act = Callable[[], Any]
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
MOST_EXPONENT, MOST_MEMORY = 1.1, 2.0
STEPS = 500


@dataclass(frozen=True)
class Kind:
    """`prepare(folder, size)` makes files; `begin(folder, size)` what is measured, and the bytes that it cannot do without.

    `aim_s`: seconds at the largest of `full`. `work`: how the work grows with the size; 0 where it should not.
    `mapped`: pages of files that are read in place count as memory.
    """

    title: str
    small: tuple[int, int, int]
    full: tuple[int, int, int]
    prepare: Callable[[Path, int], None]
    begin: Callable[[Path, int], tuple[Act, int]]
    aim_s: float | None = None
    work: float = 1.0
    mapped: bool = True


# --- rows ----------------------------------------------------------------------------------------------------------


def write_rows(folder: Path, size: int, length: int, column: str = "text") -> None:
    draw = random.Random(1)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(size):
            file.write(json.dumps({column: " ".join(draw.choices(WORDS, k=length))}) + "\n")


def loading(folder: Path, load: str = "load_sft", **keys: Any) -> Act:
    from transformers import AutoTokenizer

    import posttrain.data.load
    import workload
    from posttrain.config.rl import GRPOKeys
    from posttrain.config.stages import SFTKeys

    of = {"load_sft": SFTKeys, "load_prompts": GRPOKeys}[load]
    made = of(base_model="x", datasets=[{"path": str(folder / "rows.jsonl")}], **keys)
    tokenizer = AutoTokenizer.from_pretrained(workload.tokenizer_dir())
    tokenizer("alpha")
    return lambda: getattr(posttrain.data.load, load)(made, tokenizer)


def first_rows(folder: Path, _: int) -> tuple[Act, int]:
    return loading(folder, sequence_len=4096), (folder / "rows.jsonl").stat().st_size


def found_rows(folder: Path, _: int) -> tuple[Act, int]:
    act = loading(folder, sequence_len=4096)
    return act, sum(file.stat().st_size for file in folder.rglob("ids.bin"))


def loaded_rows(folder: Path, size: int) -> None:
    write_rows(folder, size, 60)
    loading(folder, sequence_len=4096)()


def short_rows(folder: Path, size: int) -> None:
    write_rows(folder, size, 1)
    loading(folder, sequence_len=4096)()


def planned_epoch(folder: Path, size: int) -> tuple[Act, int]:
    from posttrain.config.stages import SFTKeys
    from posttrain.distributed.ranks import SingleProcess
    from posttrain.recipes.batches import Schedule

    data = loading(folder, sequence_len=4096)()
    keys = SFTKeys(base_model="x", datasets=[{"path": "rows.jsonl"}], packing=True, sequence_len=1024)
    return lambda: Schedule.of(data, keys, SingleProcess(), size=lambda row: len(row.ids)).step(0), 100 * size


GRPO = {"load": "load_prompts", "reward_funcs": ["rewards.py:f"], "max_completion_length": 64, "sequence_len": 128}


def prompts(folder: Path, size: int) -> None:
    write_rows(folder, size, 8, "prompt")
    loading(folder, **GRPO)()


def steps_over_prompts(folder: Path, size: int) -> tuple[Act, int]:
    from posttrain.recipes.experience.prompts import PromptStream

    stream = PromptStream(loading(folder, **GRPO)(), 1, {})
    stream(0)
    return lambda: [stream(number) for step in range(STEPS) for number in stream.next(8 * step, 8, resample=True)[0]], 0


def one_long_row(folder: Path, size: int) -> None:
    write_rows(folder, 1, size)


def long_row(folder: Path, size: int) -> tuple[Act, int]:
    from posttrain.models.batch import pack

    load = loading(folder, sequence_len=4 * size)
    return lambda: pack([[load().rows[0]]]), (folder / "rows.jsonl").stat().st_size


# --- gate, registry, records -----------------------------------------------------------------------------------------


def reports(folder: Path, size: int) -> None:
    from posttrain.evidence import EvalReport, ItemRecord
    from posttrain.files import digest_bytes

    for model, share in (("candidate", 0.62), ("baseline", 0.6)):
        draw = random.Random(model)
        items = tuple(
            ItemRecord(f"q{n}", digest_bytes(b"%d" % n), (float(draw.random() < share),), None, (f"the answer is {n}",), ("stop",), (9,))
            for n in range(size)
        )  # fmt: skip
        digests = [digest_bytes(name.encode()) for name in ("suite", model)]
        EvalReport("heldout", "gate", digests[0], digests[1], "boxed", items).save(folder / model)


def read_reports(folder: Path, _: int) -> tuple[Act, int]:
    from posttrain.evidence import EvalReport

    sizes = sum((folder / model / "items.jsonl").stat().st_size for model in ("candidate", "baseline"))
    return lambda: [EvalReport.load(folder / model) for model in ("candidate", "baseline")], sizes


def decision(folder: Path, size: int) -> tuple[Act, int]:
    from posttrain.gate.decide import decide
    from posttrain.gate.spec import GateSpec, Primary

    read, num_bytes = read_reports(folder, size)
    ours, theirs = read()
    spec = GateSpec(primary=(Primary("heldout"),))
    return lambda: decide(spec, {"heldout": ours}, {"heldout": theirs}), num_bytes


def versions(folder: Path, size: int) -> None:
    from registry_size import filled

    filled(folder, size).close()


def promoted(folder: Path, size: int) -> tuple[Act, int]:
    from posttrain.registry import Registry
    from registry_size import verdict_for

    registry = Registry(folder / "registry")
    digest = registry.show("words", size).digest

    def act() -> None:
        registry.entries()
        registry.promote("words", size, "champion", verdict_for(digest))
        registry.find("alias:champion")
        registry.verify("words", size)

    return act, sum(file.stat().st_size for file in (folder / "registry").glob("*.db*"))


def two_runs(folder: Path, size: int) -> None:
    from ui import make_folder

    for name in ("a", "b"):
        make_folder(folder / name, 1, size)


def metrics_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("metrics.jsonl"))


def reported(folder: Path, _: int) -> tuple[Act, int]:
    from posttrain.report.build import build_report

    return lambda: build_report(folder / "a" / "runs" / "run-0000"), metrics_bytes(folder / "a")


def compared(folder: Path, _: int) -> tuple[Act, int]:
    from posttrain.report.diff import diff_runs

    runs = [folder / name / "runs" / "run-0000" for name in ("a", "b")]
    return lambda: diff_runs(*runs), metrics_bytes(folder)


def cut_back(folder: Path, size: int) -> tuple[Act, int]:
    from posttrain.tracking.jsonl import JsonlSink

    sink = JsonlSink(folder / "a" / "runs" / "run-0000" / "stages" / "01-grpo")
    return lambda: sink.truncate_to(size - 10), metrics_bytes(folder / "a")


def rows_of_60(folder: Path, size: int) -> None:
    write_rows(folder, size, 60)


# --- models --------------------------------------------------------------------------------------------------------


LAYER = 4 * 512 * 512 + 3 * 512 * 1536
"""Parameters in the linears of a layer."""


def base_and_adapter(folder: Path, size: int) -> None:
    """A bf16 Qwen3, 512 wide, with so many thousand parameters in its layers, and an adapter of rank 8 on all of its linears."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import workload

    tokenizer = AutoTokenizer.from_pretrained(workload.tokenizer_dir())
    config = AutoConfig.for_model(
        "qwen3", vocab_size=workload.VOCAB, hidden_size=512, intermediate_size=1536, head_dim=64,
        num_hidden_layers=max(1, 1_000 * size // LAYER),
        num_attention_heads=8, num_key_value_heads=8, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = get_peft_model(
        model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(str(folder / "adapter"))


def merging(folder: Path, size: int) -> tuple[Act, int]:
    """The merge holds the adapter, and the layer that is merged in float32. What it imports is no part of it."""
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    from posttrain.config.stages import ModelKeys
    from posttrain.models.export import merge_into

    def act() -> None:
        base = str(folder / "base")
        merge_into(folder / "merged", base, folder / "adapter", ModelKeys(base_model=base))

    return act, 4 * LAYER + 2 * (folder / "adapter/adapter_model.safetensors").stat().st_size


KINDS: dict[str, Kind] = {
    "rows-first": Kind("rows of 60 words, tokenised", (2_000, 4_000, 8_000), (25_000, 50_000, 100_000), rows_of_60, first_rows),
    "rows-found": Kind("the same, found in the cache", (8_000, 16_000, 32_000), (25_000, 50_000, 100_000), loaded_rows, found_rows),
    "rows-short": Kind("rows of a word, an epoch packed", (5_000, 10_000, 20_000), (25_000, 50_000, 100_000), short_rows, planned_epoch),
    "prompts": Kind(f"{STEPS} steps over prompts of RL", (2_000, 4_000, 8_000), (25_000, 50_000, 100_000), prompts, steps_over_prompts, work=0.0),
    "long-row": Kind("one row of so many words, tokenised and packed", (8_192, 16_384, 32_768), (32_768, 65_536, 131_072), one_long_row, long_row),
    "gate-read": Kind("two reports of so many items, read", (5_000, 10_000, 20_000), (25_000, 50_000, 100_000), reports, read_reports),
    "gate": Kind("a gate on so many items, decided", (5_000, 10_000, 20_000), (25_000, 50_000, 100_000), reports, decision, aim_s=2.0),
    "registry": Kind("versions: list, promote, find, verify one", (500, 1_000, 2_000), (2_500, 5_000, 10_000), versions, promoted, aim_s=0.5),
    "report": Kind("the report of a run of so many steps", (5_000, 10_000, 20_000), (25_000, 50_000, 100_000), two_runs, reported, aim_s=5.0),
    "diff": Kind("two runs of so many steps, compared", (5_000, 10_000, 20_000), (25_000, 50_000, 100_000), two_runs, compared, aim_s=5.0),
    "metrics": Kind("metrics cut back to a checkpoint", (10_000, 20_000, 40_000), (250_000, 500_000, 1_000_000), two_runs, cut_back),
    "merge": Kind("an adapter merged into a bf16 model of so many thousand parameters (peak: without pages of its files)", (16_000, 32_000, 64_000), (64_000, 128_000, 256_000), base_and_adapter, merging, mapped=False),
}  # fmt: skip


# --- measuring -----------------------------------------------------------------------------------------------------


def resident(name: str) -> int:
    """`VmRSS`, `VmHWM` or `RssAnon` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def measure(kind: Kind, folder: Path, size: int) -> dict[str, float]:
    """In a process of its own."""
    act, necessary = kind.begin(folder, size)
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = resident("VmRSS" if kind.mapped else "RssAnon"), time.process_time()
    if kind.mapped:
        act()
        seconds, most = time.process_time() - begun, resident("VmHWM")
    else:  # of it alone the system keeps no highest value
        with ThreadPoolExecutor(1) as pool:
            done, most = pool.submit(act), before
            while not done.done():
                most = max(most, resident("RssAnon"))
                time.sleep(0.005)
        done.result()
        seconds = time.process_time() - begun
    return {"size": size, "seconds": seconds, "peak": most - before, "necessary": necessary}


def points(name: str, sizes: Sequence[int]) -> Iterator[dict[str, float]]:
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"POSTTRAIN_CACHE": f"{folder}/cache"}
            for what in ("prepare", "measure"):
                command = [sys.executable, __file__, "--part", what, name, folder, str(size)]
                answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            yield json.loads(answer.rstrip().rpartition("\n")[2])


def exponent(found: Sequence[dict[str, float]]) -> float:
    import numpy as np

    return float(np.polyfit(np.log([p["size"] for p in found]), np.log([max(p["seconds"], 1e-4) for p in found]), 1)[0])


def line(kind: Kind, found: Sequence[dict[str, float]]) -> str:
    last, slope = found[-1], exponent(found)
    needed = f"{last['peak'] / last['necessary']:.1f}×" if last["necessary"] else ""
    aimed = "" if kind.aim_s is None else f"≤ {kind.aim_s:g} s at {kind.full[-1]:,}"
    sizes = " · ".join(f"{int(point['size']):,}" for point in found)
    seconds = " · ".join(f"{point['seconds']:.2f}" for point in found)
    return (
        f"| {kind.title} | {sizes} | {seconds} | {aimed} | **{slope:.2f}** | {last['peak'] / 1e6:,.0f} MB | {needed} |"
    )


HEAD = "| what | sizes | seconds of a processor | aim | exponent | peak at the largest | over what is necessary |\n|---|---|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", help="in the place of those of each kind")
    parser.add_argument("--doc", action="store_true")
    parser.add_argument("--part", nargs=4, metavar=("WHAT", "KIND", "FOLDER", "SIZE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        what, name, folder, size = given.part
        kind = KINDS[name]
        if what == "prepare":
            kind.prepare(Path(folder), int(size))
        else:
            print(json.dumps(measure(kind, Path(folder), int(size))))
        return
    lines = [HEAD]
    for name in given.kinds:
        kind = KINDS[name]
        sizes = given.sizes or (kind.full if given.full else kind.small)
        lines.append(line(kind, list(points(name, sizes))))
        print(lines[-1], flush=True)
    if given.doc:
        sections.write("size", "\n".join(lines))


if __name__ == "__main__":
    main()
