"""What the checks and the bench of a GPU run on: random models of known shapes, packed batches, steps, and how they are counted.

Models are made on the device; nothing is read from disk. A step is the product's: pack, score, loss, backward, clip, AdamW.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from posttrain.models import attention
from posttrain.models.adapters import attach_adapter
from posttrain.models.batch import Batch, pack
from posttrain.models.device import Placement
from posttrain.models.policy import Policy
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Completion, Request, SamplingParams, TokenSeq, in_order


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def weights(self) -> int:
        """Weights that multiply a token: linears and the head."""
        attention_weights = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention_weights + 3 * self.hidden * self.intermediate) + self.vocab * self.hidden


SHAPES = {
    "0.6b": Shape(1024, 3072, 28, 16, 8, 128, 151_936),
    "4b": Shape(2560, 9728, 36, 32, 8, 128, 151_936),
    "check": Shape(512, 1536, 4, 8, 4, 64, 32_000),
    "tiny": Shape(64, 128, 2, 4, 2, 32, 300),
}
"""Qwen3's shapes, a small one that a check can also compute in float32, and one for rehearsals on a CPU."""
SEED = 1


def random_model(shape: Shape, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3Config

    attention.register()
    config = Qwen3Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        max_position_embeddings=32_768, tie_word_embeddings=True, use_cache=False, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(SEED)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.NAME).eval()


def random_policy(shape: Shape, device: torch.device, *, adapter: bool = False, bf16: bool = True) -> Policy:
    """float32 masters under bf16 autocast; with an adapter on a base in bf16."""
    from posttrain.config.datasets import DatasetKeys
    from posttrain.config.stages import SFTKeys

    keys = SFTKeys(
        base_model="random",
        datasets=[DatasetKeys(path="unused.jsonl")],
        adapter="lora" if adapter else "none",
        bf16=bf16,
    )
    model = random_model(shape, device)
    if adapter:
        # Drawn in float32: in bf16 torch draws other numbers. Rounded for both, so that a check compares one base.
        model = model.to(torch.bfloat16).to(torch.bfloat16 if bf16 else torch.float32)
    model.config.name_or_path = "random"
    if adapter:
        torch.manual_seed(SEED)
        model, _ = attach_adapter(model, keys)
    placement = Placement(device, torch.bfloat16 if bf16 else None)
    tokenizer: Any = None  # nothing here has a text
    return Policy(model.eval(), tokenizer, placement, ragged=True, source="random", under=keys)


# --- batches -------------------------------------------------------------------------------------------------------


def sequence(vocab: int, length: int, *, prompt: int = 1, seed: int = 0, prompt_seed: int = 0) -> TokenSeq:
    """`length` random tokens, of which the first `prompt` (not trained) follow `prompt_seed` alone."""
    head = torch.randint(1, vocab, (prompt,), generator=torch.Generator().manual_seed(prompt_seed))
    tail = torch.randint(1, vocab, (length - prompt,), generator=torch.Generator().manual_seed(1000 + seed))
    return TokenSeq((*head.tolist(), *tail.tolist()), (False,) * prompt + (True,) * (length - prompt))


def continued(prompt: Sequence[int], answer: Sequence[int]) -> TokenSeq:
    return TokenSeq((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))


def documents(vocab: int, lengths: Sequence[int]) -> list[list[TokenSeq]]:
    return [[sequence(vocab, length, seed=number, prompt_seed=number)] for number, length in enumerate(lengths)]


def families(vocab: int, count: int, branches: int, prompt: int, answer: int) -> list[list[TokenSeq]]:
    """`count` prompts, each continued by `branches` answers."""
    return [
        [sequence(vocab, prompt + answer, prompt=prompt, seed=n * branches + i, prompt_seed=n) for i in range(branches)]
        for n in range(count)
    ]


def untreed(groups: Sequence[Sequence[TokenSeq]], policy: Policy) -> Batch:
    """The same sequences, each with a prompt of its own."""
    alone = [[one] for group in groups for one in group]
    return pack(alone, least_shared=math.inf).to(policy.placement.device)


# --- steps ---------------------------------------------------------------------------------------------------------


def engine_of(policy: Policy, rows: int) -> EmbeddedEngine:
    return EmbeddedEngine(policy, stop_token_ids=(), batch_size=rows)


def vllm_beside(policy: Policy, rows: int, longest: int) -> Any:
    """vLLM on the same weights, read from a folder that is gone when it has them."""
    from posttrain.rollout.vllm.engine import VLLMEngine
    from posttrain.rollout.vllm.options import VLLMOptions

    device = policy.placement.device.type
    with tempfile.TemporaryDirectory() as folder:
        policy.base.save_pretrained(Path(folder))
        options = VLLMOptions(
            folder, (), device=device, dtype="bfloat16" if device == "cuda" else "float32", max_num_seqs=rows,
            max_model_len=longest, beside={"skip_tokenizer_init": True},
        )  # fmt: skip
        return VLLMEngine(options, lambda ids: "")


def make_optimizer(policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in policy.trainable()], lr=1e-6, fused=True)


def train_step(
    policy: Policy, optimizer: torch.optim.Optimizer, micros: Sequence[Batch], *, entropy: bool = False, reference: bool = False
) -> None:  # fmt: skip
    """The tokens' mean log-prob, up; with an entropy as RL asks for it, or over a reference as DPO. The norm is clipped on the device."""
    count = sum(micro.target_M.numel() for micro in micros)
    for micro in micros:
        scores = policy.score(micro, entropy=entropy)
        if reference:
            margin_M = scores.logp_M - policy.reference_logp(micro)
            margin_S = torch.zeros(micro.num_sequences, device=margin_M.device).index_add_(0, micro.seq_M, margin_M)
            loss = -torch.nn.functional.logsigmoid(0.1 * (margin_S[0::2] - margin_S[1::2])).sum() / len(micros)
        else:
            loss = -scores.logp_M.sum() / count
        if scores.entropy_M is not None:
            loss = loss - 1e-3 * scores.entropy_M.sum() / count
        loss.backward()
    torch.nn.utils.clip_grad_norm_([p for _, p in policy.trainable()], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def sampled(engine: Any, prompts: Sequence[Sequence[int]], each: int, length: int) -> list[Completion]:
    """`each` completions of `length` tokens for every prompt, in order."""
    requests = [Request(tuple(prompt), each * n + i) for n, prompt in enumerate(prompts) for i in range(each)]
    return in_order(engine.generate(requests, SamplingParams(length)))


def packed(groups: Sequence[Sequence[TokenSeq]], policy: Policy) -> Batch:
    return pack(groups).to(policy.placement.device)


def seconds_of(work: Callable[[], Any], device: torch.device, runs: int = 3, warm_up: int = 1) -> float:
    """Median seconds of a run, the device's work included."""
    for _ in range(warm_up):
        work()
    found: list[float] = []
    for _ in range(runs):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def in_turns(
    sides: Sequence[Callable[[], Any]], device: torch.device, pairs: int = 3, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:  # fmt: skip
    """Seconds of each side, pair by pair, so that a busy moment meets them all; the first run of each warms up."""
    found: list[list[float]] = []
    for _ in range(pairs + 1):
        seconds: list[float] = []
        for side in sides:
            _wait(device)
            start = clock()
            side()
            _wait(device)
            seconds.append(clock() - start)
        found.append(seconds)
    return found[1:]


def ratio_of(pairs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How many times as fast the first side is: the median over pairs, and each of them."""
    ratios = [theirs / ours for ours, theirs in pairs]
    return {"ratio": statistics.median(ratios), "ratios": ratios}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- counting ------------------------------------------------------------------------------------------------------

FORMULA = (
    "model FLOPs of a step = 6·P·T + 12·L·H·D·A (4·P·T with a frozen base; 2·P·T + 4·L·H·D·A more where a "
    "reference is scored beside): P weights of linears and head, T packed tokens, L layers, H heads of D channels, A pairs of a token "
    "and one that it attends to"
)


def step_flops(shape: Shape, batch: Batch, *, frozen: bool = False, reference: bool = False) -> float:
    """By `FORMULA`. A shared prompt is one of T and not several: what is not computed is not counted."""
    tokens = batch.input_ids_N.numel()
    attended = sum(
        (n := segment.end - segment.begin) * (n + 1) // 2 + n * segment.position
        for tree in batch.layout.trees
        for segment in tree.segments()
    )
    weights, pairs = shape.weights * tokens, shape.layers * shape.heads * shape.head_dim * attended
    forward = 2.0 * weights + 4.0 * pairs
    return (4.0 if frozen else 6.0) * weights + 12.0 * pairs + (forward if reference else 0.0)


DATA_SHEET = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "RTX 5090": 209e12, "RTX 4090": 165e12, "A10G": 70e12, "A10": 125e12,
}  # fmt: skip
"""Dense bf16 products per second, from the data sheet of the card whose name has this in it; the first that fits."""


def data_sheet_rate(card: str) -> float | None:
    return next((rate for name, rate in DATA_SHEET.items() if name in card), None)


@lru_cache(maxsize=2)
def product_rate(device: torch.device, size: int) -> float:
    """FLOP/s that this card reaches in a large bf16 product: what a data sheet does not promise."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * size**3 / seconds_of(lambda: a @ b, device, runs=5)


def peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
