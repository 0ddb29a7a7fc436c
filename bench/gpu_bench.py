"""How fast the GPU path is on this card: tokens per second, MFU, peak memory; beside its own other form, `generate` and TRL.

make gpu-bench                              about five minutes on one card, rows in order of worth
python bench/gpu_bench.py --device cpu      the same rows with tiny shapes: to see that it runs
python bench/gpu_bench.py --row sft         only rows whose name begins so

Each row is written to bench/out/gpu/bench.jsonl as it ends. `--doc` writes the table into docs/performance.md.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import gpu_report
import gpu_work as work
from posttrain.models.batch import Batch
from posttrain.objectives.fused import fused_head
from posttrain.objectives.logprobs import chunked_logprobs, head_tile_rows
from posttrain.types import TokenSeq

_BUDGET_S = 300
_TRL_PAIRS = 2


@dataclass(frozen=True)
class Setting:
    device: torch.device
    rehearsal: bool

    def shape(self, name: str) -> work.Shape:
        return work.SHAPES["tiny" if self.rehearsal else name]

    def scaled(self, size: int) -> int:
        return max(8, size // 64) if self.rehearsal else size


class LeftOut(Exception):
    """Why a row does not apply here."""


Row = Callable[[Setting], dict[str, Any]]

# --- training ------------------------------------------------------------------------------------------------------


def training_row(
    model: str, groups_of: Callable[[Setting, int], list[list[TokenSeq]]], *, adapter: bool = False, entropy: bool = False,
    beside_untreed: bool = False,
) -> Row:  # fmt: skip
    """Optimizer steps of a group a micro-batch; `beside_untreed`: and of the same sequences without shared prompts."""

    def measure(setting: Setting) -> dict[str, Any]:
        shape = setting.shape(model)
        policy = work.random_policy(shape, setting.device, adapter=adapter)
        optimizer = work.make_optimizer(policy)
        groups = groups_of(setting, shape.vocab)
        micros = [work.packed([group], policy) for group in groups]

        def seconds(batches: Sequence[Batch]) -> float:
            return work.seconds_of(
                lambda: work.train_step(policy, optimizer, batches, entropy=entropy), setting.device, runs=3
            )

        took = seconds(micros)
        tokens = sum(len(one.ids) - 1 for group in groups for one in group)
        flops = sum(work.step_flops(shape, micro, frozen=adapter) for micro in micros)
        found = {"tokens_per_s": tokens / took, "step_s": took, "peak_gib": work.peak_gib(setting.device)}
        found |= utilisation(flops / took, setting)
        if beside_untreed:
            alone = seconds([work.packed(work.untreed([group]), policy) for group in groups])
            found |= {"ratio": alone / took, "beside": "the same without shared prompts"}
        return found

    return measure


def utilisation(rate: float, setting: Setting) -> dict[str, Any]:
    """Of the data sheet's rate (MFU), and of what this card reaches in a large product."""
    if setting.device.type != "cuda":
        return {}
    sheet = work.data_sheet_rate(torch.cuda.get_device_name(setting.device))
    measured = work.product_rate(setting.device, 8192)
    return {"mfu": rate / sheet if sheet else None, "of_measured_products": rate / measured}


def sft(setting: Setting, vocab: int) -> list[list[TokenSeq]]:
    return work.documents(vocab, [setting.scaled(8192) + 1] * 2)


def pairs(setting: Setting, vocab: int) -> list[list[TokenSeq]]:
    return work.families(vocab, 4, 2, setting.scaled(1024), setting.scaled(1024))


def completions(setting: Setting, vocab: int) -> list[list[TokenSeq]]:
    return work.families(vocab, 4, 8, setting.scaled(1024), setting.scaled(512))


# --- head and rollouts ---------------------------------------------------------------------------------------------


def head(setting: Setting) -> dict[str, Any]:
    """Log-prob, entropy and gradients of 8,192 tokens by the fused kernel and by chunks."""
    shape, device = setting.shape("4b"), setting.device
    count = setting.scaled(8192)
    hidden = torch.randn(count, shape.hidden, device=device, dtype=torch.bfloat16)
    weight = torch.randn(shape.vocab, shape.hidden, device=device, dtype=torch.bfloat16) * shape.hidden**-0.5
    targets = torch.randint(0, shape.vocab, (count,), device=device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def run(chunk: int | None) -> None:
        scores = chunked_logprobs(*leaves, targets, with_entropy=True, with_top1=False, chunk=chunk)
        assert scores.entropy_M is not None
        torch.autograd.grad(scores.logp_M.sum() + scores.entropy_M.sum(), leaves)

    chunked = work.seconds_of(lambda: run(head_tile_rows(shape.vocab, device.type)), device)
    found: dict[str, Any] = {"tokens_per_s": count / chunked, "step_s": chunked, "peak_gib": work.peak_gib(device)}
    if fused_head(hidden, None, None) is None:
        return found | {"beside": "by chunks; no fused head fits this card (a Hopper card and posttrain[gpu])"}
    took = work.seconds_of(lambda: run(None), device)
    return found | {"tokens_per_s": count / took, "step_s": took, "ratio": chunked / took, "beside": "by chunks"}


def rollouts(setting: Setting) -> dict[str, Any]:
    """64 completions of 8 prompts by the embedded engine, and by `generate` of transformers, as TRL calls it."""
    from posttrain.rollout.embedded import EmbeddedEngine
    from posttrain.types import Request, SamplingParams

    shape, device = setting.shape("0.6b"), setting.device
    policy = work.random_policy(shape, device)
    engine = EmbeddedEngine(policy, stop_token_ids=(), batch_size=64)
    prompts = [work.sequence(shape.vocab, setting.scaled(512), prompt_seed=n, seed=n).ids for n in range(8)]
    length = setting.scaled(128)
    requests = [Request(tuple(prompt), 8 * n + i) for n, prompt in enumerate(prompts) for i in range(8)]
    took = work.seconds_of(lambda: list(engine.generate(requests, SamplingParams(length))), device, runs=1)
    peak = work.peak_gib(device)
    model = policy.base
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([prompt for prompt in prompts for _ in range(8)], device=device)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "min_new_tokens": length, "use_cache": True}

    @torch.inference_mode()
    def generate() -> None:
        with policy.placement.autocast():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    beside = work.seconds_of(generate, device, runs=1)
    rate = len(requests) * length / took
    return {
        "tokens_per_s": rate,
        "step_s": took,
        "peak_gib": peak,
        "ratio": beside / took,
        "beside": "transformers' generate",
    }


# --- TRL -----------------------------------------------------------------------------------------------------------


def beside_trl(name: str) -> Row:
    """A row of the side-by-side bench, two processes in turns, with TRL's own defaults for a GPU and bf16 on both sides."""

    def measure(setting: Setting) -> dict[str, Any]:
        if find_spec("trl") is None:
            raise LeftOut("pip install 'trl>=1.16,<1.17'")
        import vs_trl
        from rows import BY_NAME

        row = BY_NAME[name.removeprefix("gpu-") if setting.rehearsal else name]
        result = vs_trl.compare(row, vs_trl.Options(_TRL_PAIRS, 2 if setting.rehearsal else 8, setting.device.type))
        return {
            "tokens_per_s": result["ours_tok_s"], "peak_gib": result["ours_peak_mb"] * 1e6 / 2**30,
            "ratio": result["ratio"], "beside": f"TRL, {row.setup}", "ratios": result["ratios"],
        }  # fmt: skip

    return measure


ROWS: Mapping[str, Row] = {
    "sft 0.6 B, full, documents of 8k": training_row("0.6b", sft),
    "grpo training half 0.6 B, 4 × 8, prompts 1k, completions 512": training_row(
        "0.6b", completions, entropy=True, beside_untreed=True
    ),
    "lora 4 B, documents of 8k": training_row("4b", sft, adapter=True),
    "head of 4 B, 8k tokens, with entropy": head,
    "rollouts 0.6 B, 8 × 8, prompts 512, completions 128": rollouts,
    "dpo pairs 0.6 B, full, 4 × 2, prompts 1k, answers 1k": training_row("0.6b", pairs, beside_untreed=True),
    "grpo training half 4 B, LoRA": training_row("4b", completions, adapter=True, entropy=True, beside_untreed=True),
    "trl sft 0.6 B": beside_trl("gpu-sft"),
    "trl grpo whole step 0.6 B": beside_trl("gpu-grpo"),
    "trl grpo training half 0.6 B": beside_trl("gpu-grpo-train"),
    "trl dpo 0.6 B": beside_trl("gpu-dpo"),
    "trl lora 0.6 B": beside_trl("gpu-sft-lora"),
    "trl rollouts 0.6 B": beside_trl("gpu-rollout"),
}
"""In order of worth: when the time is up, what is left is left out."""


def main() -> None:
    arguments = gpu_report.parse(__doc__)
    device = gpu_report.device_of(arguments)
    setting = Setting(device, device.type == "cpu")
    lines = gpu_report.Lines(Path(arguments.out) / "bench.jsonl", gpu_report.facts(device))
    print(work.FORMULA, flush=True)
    started = time.monotonic()
    for name, measure in ROWS.items():
        if arguments.row and not name.startswith(tuple(arguments.row)):
            continue
        if time.monotonic() - started > _BUDGET_S:
            lines.add({"row": name, "left_out": f"{_BUDGET_S} s are over; --row runs it alone"})
            continue
        try:
            lines.add({"row": name} | measured(measure, setting))
        except (LeftOut, RuntimeError) as reason:  # out of memory is one; the rows after it are still measured
            lines.add({"row": name, "left_out": f"{type(reason).__name__}: {str(reason).splitlines()[0]}"})
    if arguments.doc:
        lines.write_doc("gpu bench", table)


def measured(measure: Row, setting: Setting) -> dict[str, Any]:
    """A row by itself: what the row before it held is gone, and its peak is its own."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)
    return measure(setting)


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        work.FORMULA + ".", "",
        "| work | tokens/s | MFU | of measured products | peak memory | ratio | beside |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        cells = [
            row["row"], f"{row['tokens_per_s']:,.0f}", _percent(row.get("mfu")), _percent(row.get("of_measured_products")),
            "" if row.get("peak_gib") is None else f"{row['peak_gib']:.1f} GiB",
            f"**{row['ratio']:.2f}×**" if "ratio" in row else "", row.get("beside", ""),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


if __name__ == "__main__":
    main()
