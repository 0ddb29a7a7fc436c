"""How fast the GPU path is on this card: tokens per second, MFU, peak memory; in turns with its own other form, `generate`, vLLM and TRL.

make gpu-bench                              about five minutes on one card, rows in order of worth
python bench/gpu_bench.py --device cpu      the same rows with tiny shapes: to see that it runs
python bench/gpu_bench.py --row sft         only rows whose name begins so

Each row is written to bench/out/gpu/bench.jsonl as it ends. `--doc` writes the table into docs/performance.md.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import gpu_report
import gpu_work as work
from gpu_report import LeftOut
from posttrain.models.batch import Batch
from posttrain.models.compiled import as_written, compile_layers
from posttrain.models.policy import Policy
from posttrain.objectives.fused import fused_head
from posttrain.objectives.logprobs import chunked_logprobs, head_tile_rows
from posttrain.rollout.vllm.options import installed
from posttrain.types import TokenSeq

_BUDGET_S = 300
_PAIRS = 2


@dataclass(frozen=True)
class Setting:
    device: torch.device
    rehearsal: bool

    def shape(self, name: str) -> work.Shape:
        return work.SHAPES["tiny" if self.rehearsal else name]

    def scaled(self, size: int) -> int:
        return max(4, size // 256) if self.rehearsal else size


Groups = list[list[TokenSeq]]
Row = Callable[[Setting], dict[str, Any]]

# --- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """Optimizer steps of a group a micro-batch; `untreed`: in turns with the same sequences without shared prompts. `compiled`:
    with compiled layers, in turns with the layers as they are.

    `reference`: the groups are pairs, and their log-probs with the adapter off are computed in the step, as DPO does.
    """

    model: str
    groups: Callable[[Setting, int], Groups]
    adapter: bool = False
    entropy: bool = False
    reference: bool = False
    untreed: bool = False
    compiled: bool = False

    def __call__(self, setting: Setting) -> dict[str, Any]:
        shape, device = setting.shape(self.model), setting.device
        policy = work.random_policy(shape, device, adapter=self.adapter)
        groups = self.groups(setting, shape.vocab)
        micros = [work.packed([group], policy) for group in groups]
        ours = plain = self._step(policy, micros)
        if self.compiled:
            compile_layers(policy, "eager" if setting.rehearsal else "inductor")
        ours()
        found: dict[str, Any] = {"peak_gib": work.peak_gib(device)}
        beside: dict[str, Callable[[], None]] = {}
        if self.untreed:
            beside["the same without shared prompts"] = self._step(
                policy, [work.untreed([group], policy) for group in groups]
            )
        if self.compiled:
            beside["layers as they are"] = lambda: _as_written(policy, plain)
        if beside:
            [(name, theirs)] = beside.items()
            turns = work.in_turns([ours, theirs], device)
            took = statistics.median(turn[0] for turn in turns)
            found |= work.ratio_of(turns) | {"beside": name}
        else:
            took = work.seconds_of(ours, device)
        tokens = sum(len(one.ids) - 1 for group in groups for one in group)
        flops = sum(work.step_flops(shape, micro, frozen=self.adapter, reference=self.reference) for micro in micros)
        return {"tokens_per_s": tokens / took, "step_s": took} | found | utilisation(flops / took, setting)

    def _step(self, policy: Policy, micros: list[Batch]) -> Callable[[], None]:
        optimizer = work.make_optimizer(policy)
        options = {"entropy": self.entropy, "reference": self.reference}
        return lambda: work.train_step(policy, optimizer, micros, **options)


def _as_written(policy: Policy, step: Callable[[], None]) -> None:
    with as_written(policy):
        step()


def utilisation(rate: float, setting: Setting) -> dict[str, Any]:
    """Of the data sheet's rate (MFU), and of what this card reaches in a large product."""
    if setting.device.type != "cuda":
        return {}
    sheet = work.data_sheet_rate(torch.cuda.get_device_name(setting.device))
    measured = work.product_rate(setting.device, 8192)
    return {"mfu": rate / sheet if sheet else None, "of_measured_products": rate / measured}


def sft(setting: Setting, vocab: int) -> Groups:
    return work.documents(vocab, [setting.scaled(8192) + 1] * 2)


def pairs(setting: Setting, vocab: int) -> Groups:
    return work.families(vocab, 4, 2, setting.scaled(1024), setting.scaled(1024))


def completions(setting: Setting, vocab: int) -> Groups:
    return work.families(vocab, 4, 8, setting.scaled(1024), setting.scaled(512))


def long_completions(setting: Setting, vocab: int) -> Groups:
    return work.families(vocab, 2, 8, setting.scaled(7168), setting.scaled(1024))


# --- head ----------------------------------------------------------------------------------------------------------


def head(setting: Setting) -> dict[str, Any]:
    """Log-prob, entropy and gradients of 8,192 tokens by the fused kernel, in turns with chunks."""
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

    run(None)
    found: dict[str, Any] = {"peak_gib": work.peak_gib(device)}
    turns = work.in_turns([lambda: run(None), lambda: run(head_tile_rows(shape.vocab, device.type))], device)
    took = statistics.median(pair[0] for pair in turns)
    found |= {"tokens_per_s": count / took, "step_s": took}
    if fused_head(hidden, None, None) is None:
        return found | {"beside": "by chunks; no fused head fits this card (a Hopper card and posttrain[gpu])"}
    return found | work.ratio_of(turns) | {"beside": "by chunks"}


# --- rollouts ------------------------------------------------------------------------------------------------------


def rollouts(setting: Setting) -> dict[str, Any]:
    """64 completions of 8 prompts by the embedded engine, in turns with `generate` of transformers, as TRL calls it."""
    shape, device = setting.shape("0.6b"), setting.device
    policy = work.random_policy(shape, device)
    prompts, length = _prompts(setting, shape), setting.scaled(128)
    ids = torch.tensor([list(prompt) for prompt in prompts for _ in range(8)], device=device)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "min_new_tokens": length, "use_cache": True}

    @torch.inference_mode()
    def generate() -> None:
        policy.base.set_attn_implementation("sdpa")
        with policy.placement.autocast():
            policy.base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    return _rolled_out(setting, policy, generate, "transformers' generate")


def rollouts_beside_vllm(setting: Setting) -> dict[str, Any]:
    """The same 64 completions, in turns with vLLM on the same card."""
    if installed() is None:
        raise LeftOut("pip install 'posttrain[vllm]'")
    shape = setting.shape("0.6b")
    policy = work.random_policy(shape, setting.device)
    prompts, length = _prompts(setting, shape), setting.scaled(128)
    engine = work.vllm_beside(policy, rows=64, longest=len(prompts[0]) + length)
    try:
        return _rolled_out(setting, policy, lambda: work.sampled(engine, prompts, 8, length), f"vLLM {installed()}")
    finally:
        engine.close()


def _rolled_out(setting: Setting, policy: Policy, theirs: Callable[[], Any], beside: str) -> dict[str, Any]:
    prompts, length = _prompts(setting, setting.shape("0.6b")), setting.scaled(128)
    engine = work.engine_of(policy, 64)

    def ours() -> None:
        policy.base.set_attn_implementation(work.attention.NAME)
        assert sum(len(one.ids) for one in work.sampled(engine, prompts, 8, length)) == 64 * length

    ours()
    peak = work.peak_gib(setting.device)
    turns = work.in_turns([ours, theirs], setting.device, _PAIRS)
    took = statistics.median(pair[0] for pair in turns)
    found = {"tokens_per_s": 64 * length / took, "step_s": took, "peak_gib": peak, "beside": beside}
    return found | work.ratio_of(turns)


def _prompts(setting: Setting, shape: work.Shape) -> list[tuple[int, ...]]:
    return [work.sequence(shape.vocab, setting.scaled(512), prompt_seed=n, seed=n).ids for n in range(8)]


def whole_step(model: str, *, adapter: bool = False) -> Row:
    """GRPO's step: 8 completions of each of 4 prompts by the embedded engine, then trained; the share that sampling took."""

    def measure(setting: Setting) -> dict[str, Any]:
        shape, device = setting.shape(model), setting.device
        policy = work.random_policy(shape, device, adapter=adapter)
        optimizer, engine = work.make_optimizer(policy), work.engine_of(policy, 32)
        prompts, length = _prompts(setting, shape)[:4], setting.scaled(512)
        sampling: list[float] = []

        def step() -> None:
            started = time.perf_counter()
            found = work.sampled(engine, prompts, 8, length)
            sampling.append(time.perf_counter() - started)
            groups = [[work.continued(prompts[n], one.ids) for one in found[8 * n : 8 * n + 8]] for n in range(4)]
            work.train_step(policy, optimizer, [work.packed([group], policy) for group in groups], entropy=True)
            engine.update(policy, engine.policy_version + 1)

        took = work.seconds_of(step, device, runs=2)
        return {
            "tokens_per_s": 32 * length / took, "step_s": took, "peak_gib": work.peak_gib(device),
            "rollout_share": statistics.median(sampling[1:]) / took,
        }  # fmt: skip

    return measure


# --- TRL -----------------------------------------------------------------------------------------------------------


def beside_trl(name: str, rehearsal: str) -> Row:
    """A row of the side-by-side bench, two processes in turns, bf16 on both sides; on a CPU the row that is made for one."""

    def measure(setting: Setting) -> dict[str, Any]:
        if find_spec("trl") is None:
            raise LeftOut("pip install 'trl>=1.16,<1.17'")
        import vs_trl
        from rows import BY_NAME

        row = BY_NAME[rehearsal if setting.rehearsal else name]
        result = vs_trl.compare(row, vs_trl.Options(_PAIRS, 2 if setting.rehearsal else 8, setting.device.type))
        return {
            "tokens_per_s": result["ours_tok_s"], "peak_gib": result["ours_peak_mb"] * 1e6 / 2**30,
            "ratio": result["ratio"], "beside": f"TRL, {row.setup}", "ratios": result["ratios"],
        }  # fmt: skip

    return measure


ROWS: Mapping[str, Row] = {
    "sft 0.6 B, full, documents of 8k": Training("0.6b", sft),
    "grpo training half 0.6 B, 4 × 8, prompts 1k, completions 512": Training(
        "0.6b", completions, entropy=True, untreed=True
    ),
    "rollouts 0.6 B, 8 × 8, prompts 512, completions 128": rollouts,
    "lora 4 B, documents of 8k": Training("4b", sft, adapter=True),
    "head of 4 B, 8k tokens, with entropy": head,
    "grpo whole step 0.6 B, 4 × 8, prompts 512, completions 512": whole_step("0.6b"),
    "sft 0.6 B, compiled layers": Training("0.6b", sft, compiled=True),
    "vllm beside rollouts 0.6 B, the same": rollouts_beside_vllm,
    "trl sft 0.6 B, documents up to 8k": beside_trl("gpu-sft", "sft"),
    "trl grpo whole step 0.6 B": beside_trl("gpu-grpo", "grpo"),
    "dpo 0.6 B, full, pairs 4 × 2, prompts 1k, answers 1k": Training("0.6b", pairs, untreed=True),
    "grpo training half 4 B, LoRA, the same": Training("4b", completions, adapter=True, entropy=True, untreed=True),
    "grpo training half 4 B, LoRA, 2 × 8 of 8k": Training("4b", long_completions, adapter=True, entropy=True),
    "dpo 4 B, LoRA, the same pairs, reference in the step": Training("4b", pairs, adapter=True, reference=True),
    "grpo whole step 4 B, LoRA, 4 × 8": whole_step("4b", adapter=True),
    "trl grpo training half 0.6 B": beside_trl("gpu-grpo-train", "grpo-train"),
    "trl lora 0.6 B, documents up to 8k": beside_trl("gpu-sft-lora", "sft-lora"),
    "trl dpo 0.6 B": beside_trl("gpu-dpo", "dpo"),
    "trl rollouts 0.6 B": beside_trl("gpu-rollout", "rollout"),
    "trl sft 0.6 B, without recomputing": beside_trl("gpu-sft-kept", "sft"),
    "sft 4 B, full, documents of 8k": Training("4b", sft),
}
"""In order of worth: when the time is up, what is left is left out."""


def main() -> None:
    arguments = gpu_report.parse(__doc__, ROWS)
    device = gpu_report.device_of(arguments)
    setting = Setting(device, device.type == "cpu")
    lines = gpu_report.Lines(Path(arguments.out) / "bench.jsonl", gpu_report.facts(device), arguments.row)
    print(work.FORMULA, flush=True)
    started = time.monotonic()
    for name, measure in ROWS.items():
        if arguments.row and name not in arguments.row:
            continue
        if time.monotonic() - started > _BUDGET_S:
            lines.add({"row": name, "left_out": f"{_BUDGET_S} s are over; --row runs it alone"})
            continue
        try:
            lines.add({"row": name} | measured(measure, setting))
        except Exception as error:  # noqa: BLE001 - kernels, compilers, other programs; the rows after it are still measured
            lines.add({"row": name, "left_out": gpu_report.said(error)})
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
