"""Does the GPU path compute the right numbers on this card? Kernels against float64 with the mask written out, models against float32.

make gpu-check                              at most four minutes on one card; exit code 1 where a row is beyond its limit
python bench/gpu_check.py --device cpu      the same rows through the kernels that are registered for a CPU: to see that it runs

Each row is written to bench/out/gpu/check.jsonl as it ends. `--doc` writes the table into docs/performance.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import gpu_report
import gpu_work as work
from gpu_report import LeftOut
from posttrain.models.attention import ragged_attention
from posttrain.models.batch import Layout, Tree
from posttrain.models.compiled import compile_layers
from posttrain.models.offload import OffloadedLayers, checkpoint_layers
from posttrain.models.tree_attention import Window, token_places
from posttrain.objectives import fused
from posttrain.objectives.logprobs import chunked_logprobs, head_tile_rows

TREES = (
    Tree(0, 700),
    Tree(700, 1000, (1100, 1100, 1500)),
    Tree(1500, 1501),
    Tree(1501, 1700, (1750, 1900, 2048), (0, 1, 1)),
)
SMALL_TREES = (Tree(0, 30), Tree(30, 50, (60, 60, 75)), Tree(75, 76), Tree(76, 80, (85, 90, 97), (0, 1, 1)))
_BUDGET_S = 240
_LOSS_LIMIT, _GRADIENT_LIMIT = 1e-3, 1e-2


@dataclass(frozen=True)
class Setting:
    """Where the rows run; on a CPU with tiny shapes."""

    device: torch.device
    rehearsal: bool

    @property
    def trees(self) -> tuple[Tree, ...]:
        return SMALL_TREES if self.rehearsal else TREES

    @property
    def shape(self) -> work.Shape:
        return work.SHAPES["tiny" if self.rehearsal else "check"]

    def scaled(self, size: int) -> int:
        return size // 32 if self.rehearsal else size


@dataclass(frozen=True)
class Found:
    """The largest error relative to the largest value, what it may be, and the seconds of one run."""

    error: float
    limit: float
    seconds: float

    @property
    def holds(self) -> bool:
        return self.error <= self.limit


# --- attention -----------------------------------------------------------------------------------------------------


def attention_row(
    dtype: torch.dtype, limit: float, *, window: int | None = None, chunked: bool = False, softcap: float | None = None
) -> Callable[[Setting], Found]:
    """Output and gradients of one layer over trees, against float64 with the mask written out."""

    def check(setting: Setting) -> Found:
        device, trees = setting.device, setting.trees
        size = None if window is None else setting.scaled(window)
        module: Any = torch.nn.Module()
        module.config = _Config(size if chunked else None)
        torch.manual_seed(work.SEED)
        num_tokens = trees[-1].stop
        leaves = [torch.randn(1, heads, num_tokens, 64, device=device, dtype=dtype) for heads in (8, 4, 4)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        grad_out = torch.randn(1, num_tokens, 8, 64, device=device, dtype=dtype)
        options = {"sliding_window": None if chunked else size, "softcap": softcap}

        def run() -> list[torch.Tensor]:
            out, _ = ragged_attention(module, *leaves, None, layout=Layout(trees), **options)
            return [out, *torch.autograd.grad(out, leaves, grad_out)]

        found = run()
        expected = _by_mask([leaf.detach() for leaf in leaves], grad_out, trees, size, chunked, softcap)
        error = _largest(_relative(a, b) for a, b in zip(found, expected, strict=True))
        return Found(error, limit, work.seconds_of(run, device))

    return check


@dataclass(frozen=True)
class _Config:
    attention_chunk_size: int | None
    layer_types: None = None


def _by_mask(
    leaves: list[torch.Tensor], grad_out: torch.Tensor, trees: tuple[Tree, ...], size: int | None, chunked: bool,
    softcap: float | None,
) -> list[torch.Tensor]:  # fmt: skip
    query, key, value = (leaf.double().requires_grad_() for leaf in leaves)
    position, stop = token_places(trees, query.device)
    index = torch.arange(len(position), device=query.device)
    mask = (index[None] <= index[:, None]) & (index[:, None] < stop[None])
    if size is not None:
        mask &= position[:, None] - position[None] < Window(size, chunked).reach(position)[:, None]
    keys, values = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    out = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), grad_out.double())]


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.detach().double() - theirs).abs().max() / theirs.abs().max())


def _largest(errors: Iterable[float]) -> float:
    """Not a number where one is none; Python's `max` passes over it."""
    return float(torch.tensor([*errors], dtype=torch.float64).max())


# --- head ----------------------------------------------------------------------------------------------------------


def head_row(name: str) -> Callable[[Setting], Found]:
    """A fused head's log-probs, entropies and gradients against float32 chunks."""

    def check(setting: Setting) -> Found:
        device, shape = setting.device, setting.shape
        torch.manual_seed(work.SEED)
        hidden = torch.randn(setting.scaled(2048), shape.hidden, device=device, dtype=torch.bfloat16)
        weight = torch.randn(shape.vocab, shape.hidden, device=device, dtype=torch.bfloat16) * shape.hidden**-0.5
        targets = torch.randint(0, shape.vocab, (len(hidden),), device=device)
        if not fused.FUSED_HEADS[name].fits(hidden):
            raise LeftOut(f"the {name} head needs a Hopper card and pip install 'posttrain[gpu]'")

        def run(dtype: torch.dtype, chunk: int | None) -> list[torch.Tensor]:
            leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
            scores = chunked_logprobs(*leaves, targets, temperature=0.8, with_entropy=True, chunk=chunk)
            assert scores.entropy_M is not None
            total = scores.logp_M.sum() + 0.1 * scores.entropy_M.sum()
            return [scores.logp_M.detach(), scores.entropy_M.detach(), *torch.autograd.grad(total, leaves)]

        expected = run(torch.float32, head_tile_rows(shape.vocab, device.type))
        error = _largest(_relative(a, b) for a, b in zip(run(torch.bfloat16, None), expected, strict=True))
        return Found(error, 2e-2, work.seconds_of(lambda: run(torch.bfloat16, None), device))

    return check


# --- models --------------------------------------------------------------------------------------------------------


def model_row(what: str, *, adapter: bool = False, compiled: bool = False) -> Callable[[Setting], Found]:
    """Loss, or norm of the gradients' difference, in bf16 on this device against float32 on it, over trees and documents."""

    def check(setting: Setting) -> Found:
        vocab, scaled = setting.shape.vocab, setting.scaled
        groups = work.families(vocab, 2, 4, scaled(640), scaled(320)) + work.documents(vocab, [scaled(960)] * 2)

        def run(bf16: bool) -> tuple[float, list[torch.Tensor], Callable[[], Any]]:
            policy = work.random_policy(setting.shape, setting.device, adapter=adapter, bf16=bf16)
            batch = work.packed(groups, policy)
            if compiled and bf16:
                compile_layers(policy, "eager" if setting.rehearsal else "inductor")

            def step() -> Any:
                loss = -policy.score(batch).logp_M.mean()
                return loss, torch.autograd.grad(loss, [p for _, p in policy.trainable()])

            loss, grads = step()
            return float(loss.detach()), [grad.float() for grad in grads], step

        loss, grads, step = run(True)
        exact_loss, exact_grads, _ = run(False)
        norm = sum(float(grad.square().sum()) for grad in exact_grads) ** 0.5
        apart = sum(float((a - b).square().sum()) for a, b in zip(grads, exact_grads, strict=True)) ** 0.5
        errors = {"loss": (abs(loss / exact_loss - 1), _LOSS_LIMIT), "gradients": (apart / norm, _GRADIENT_LIMIT)}
        return Found(*errors[what], work.seconds_of(step, setting.device))

    return check


def trees_row(setting: Setting) -> Found:
    """Gradients with a shared prompt against those of the same sequences each by itself, both in bf16."""
    groups = work.families(setting.shape.vocab, 2, 4, setting.scaled(640), setting.scaled(320))
    policy = work.random_policy(setting.shape, setting.device)
    batches = [work.packed(groups, policy), work.untreed(groups, policy)]

    def grads(number: int) -> list[torch.Tensor]:
        loss = -policy.score(batches[number]).logp_M.mean()
        return list(torch.autograd.grad(loss, [p for _, p in policy.trainable()]))

    shared, alone = grads(0), grads(1)
    apart = sum(float((a - b).square().sum()) for a, b in zip(shared, alone, strict=True)) ** 0.5
    norm = sum(float(grad.square().sum()) for grad in alone) ** 0.5
    return Found(apart / norm, _GRADIENT_LIMIT, work.seconds_of(lambda: grads(0), setting.device))


def offload_row(setting: Setting) -> Found:
    """Gradients with layers and their inputs in the machine's memory against those without; the second pass finds what the first left."""
    groups = work.documents(setting.shape.vocab, [setting.scaled(960)] * 4)

    def run(offload: bool) -> tuple[list[torch.Tensor], Callable[[], Any]]:
        policy = work.random_policy(replace(setting.shape, layers=6), setting.device, adapter=True)
        checkpoint_layers(policy.model, offload=offload)
        if offload:
            policy.offloaded = OffloadedLayers(policy.model.cpu(), setting.device)
        policy.model.train()
        batch = work.packed(groups, policy)

        def step() -> Any:
            return torch.autograd.grad(-policy.score(batch).logp_M.mean(), [p for _, p in policy.trainable()])

        step()
        return [grad.float() for grad in step()], step

    (ours, step), (theirs, _) = run(True), run(False)
    apart = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True)) ** 0.5
    norm = sum(float(grad.square().sum()) for grad in theirs) ** 0.5
    # A card's attention adds up its gradients in no fixed order.
    limit = 0.0 if setting.rehearsal else _GRADIENT_LIMIT
    return Found(apart / norm, limit, work.seconds_of(step, setting.device))


def step_row(setting: Setting) -> Found:
    """An optimizer step lowers the loss of its own batch; the error is what is missing to that."""
    policy = work.random_policy(setting.shape, setting.device)
    batch = work.packed(work.documents(setting.shape.vocab, [setting.scaled(960)] * 4), policy)
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=1e-3, fused=True)

    def loss() -> float:
        with torch.no_grad():
            return float(-policy.score(batch).logp_M.mean())

    before = loss()
    seconds = work.seconds_of(lambda: work.train_step(policy, optimizer, [batch], entropy=True), setting.device)
    return Found(_largest([0.0, loss() / before - 0.99]), 0.0, seconds)


def decode_row(setting: Setting) -> Found:
    """Log-probs that the engine keeps against those of the trainer for the same tokens."""
    from posttrain.rollout.embedded import EmbeddedEngine
    from posttrain.types import Request, SamplingParams

    policy = work.random_policy(setting.shape, setting.device)
    engine = EmbeddedEngine(policy, stop_token_ids=(), batch_size=16)
    prompt = work.sequence(setting.shape.vocab, setting.scaled(256)).ids
    requests = [Request(tuple(prompt), seed) for seed in range(8)]

    def run() -> list[Any]:
        return sorted(engine.generate(requests, SamplingParams(setting.scaled(512))), key=lambda c: c.request)

    completions = run()
    again = engine.score([((*prompt, *c.ids), len(prompt)) for c in completions])
    gaps = [abs(a - b) for c, row in zip(completions, again, strict=True) for a, b in zip(c.logp, row, strict=True)]
    return Found(sum(gaps) / len(gaps), 2e-2, work.seconds_of(run, setting.device, runs=1, warm_up=0))


ROWS: Mapping[str, Callable[[Setting], Found]] = {
    "attention, trees, bf16": attention_row(torch.bfloat16, 2e-2),
    "attention, trees, float32": attention_row(torch.float32, 1e-4),
    "attention, sliding window, bf16": attention_row(torch.bfloat16, 2e-2, window=128),
    "attention, sliding window, float32": attention_row(torch.float32, 1e-4, window=128),
    "attention, chunks, bf16": attention_row(torch.bfloat16, 2e-2, window=256, chunked=True),
    "attention, soft cap (flex), bf16": attention_row(torch.bfloat16, 3e-2, softcap=5.0),
    "head, liger": head_row("liger"),
    "model in bf16, loss": model_row("loss"),
    "model in bf16, gradients": model_row("gradients"),
    "LoRA in bf16, loss": model_row("loss", adapter=True),
    "LoRA in bf16, gradients": model_row("gradients", adapter=True),
    "compiled layers in bf16, gradients": model_row("gradients", compiled=True),
    "shared prompts against none": trees_row,
    "offloaded layers against none": offload_row,
    "steps lower the loss": step_row,
    "engine's log-probs against the trainer's": decode_row,
}
"""One row a kernel or a path, the ones that everything rests on first."""


def main() -> None:
    arguments = gpu_report.parse(__doc__, ROWS)
    device = gpu_report.device_of(arguments)
    setting = Setting(device, device.type == "cpu")
    lines = gpu_report.Lines(Path(arguments.out) / "check.jsonl", gpu_report.facts(device), arguments.row)
    failed, started = 0, time.monotonic()
    for name, check in ROWS.items():
        if arguments.row and name not in arguments.row:
            continue
        if time.monotonic() - started > _BUDGET_S:
            lines.add({"row": name, "left_out": f"{_BUDGET_S} s are over; --row runs it alone"})
            continue
        try:
            found = check(setting)
        except LeftOut as reason:
            lines.add({"row": name, "left_out": str(reason)})
            continue
        except Exception as error:  # noqa: BLE001 - kernels and their compilers raise anything; the rows after it are still asked
            failed += 1
            lines.add({"row": name, "holds": False, "raised": gpu_report.said(error)})
            continue
        failed += not found.holds
        lines.add(
            {"row": name, "error": found.error, "limit": found.limit, "seconds": found.seconds, "holds": found.holds}
        )
    if arguments.doc:
        lines.write_doc("gpu check", _table)
    sys.exit(1 if failed else 0)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = ["| what | relative error | at most | | ms |", "|---|---|---|---|---|"]
    return head + [
        f"| {r['row']} | | | **{r['raised']}** | |"
        if "raised" in r
        else f"| {r['row']} | {r['error']:.1e} | {r['limit']:.0e} | {'holds' if r['holds'] else '**does not hold**'} | {1e3 * r['seconds']:.1f} |"
        for r in rows
    ]


if __name__ == "__main__":
    main()
