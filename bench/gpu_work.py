"""What the checks and the bench of a GPU run on: random models of known shapes, packed batches, steps, and how they are counted.

Models are made on the device; nothing is read from disk. A step is the product's: pack, score, loss, backward, clip, AdamW.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from posttrain.models import attention
from posttrain.models.adapters import attach_adapter
from posttrain.models.batch import Batch, pack
from posttrain.models.device import Placement
from posttrain.models.policy import Policy
from posttrain.types import TokenSeq


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
    "tiny": Shape(64, 128, 2, 4, 2, 16, 300),
}
"""Qwen3's shapes, a small one that a check can also compute in float32, and one for rehearsals on a CPU."""
SEED = 1


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype, implementation: str = attention.NAME) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3Config

    attention.register()
    config = Qwen3Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        max_position_embeddings=32_768, tie_word_embeddings=True, use_cache=False, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(SEED)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation).eval()


def random_policy(shape: Shape, device: torch.device, *, adapter: bool = False, bf16: bool = True) -> Policy:
    """float32 masters under bf16 autocast; with an adapter on a base in bf16."""
    from posttrain.config.stages import DatasetKeys, SFTKeys

    keys = SFTKeys(
        base_model="random",
        datasets=[DatasetKeys(path="unused.jsonl")],
        adapter="lora" if adapter else "none",
        bf16=bf16,
    )
    model = random_model(shape, device, torch.bfloat16 if adapter and bf16 else torch.float32)
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


def documents(vocab: int, lengths: Sequence[int]) -> list[list[TokenSeq]]:
    return [[sequence(vocab, length, seed=number, prompt_seed=number)] for number, length in enumerate(lengths)]


def families(vocab: int, count: int, branches: int, prompt: int, answer: int) -> list[list[TokenSeq]]:
    """`count` prompts, each continued by `branches` answers."""
    return [
        [sequence(vocab, prompt + answer, prompt=prompt, seed=n * branches + i, prompt_seed=n) for i in range(branches)]
        for n in range(count)
    ]


def untreed(groups: Sequence[Sequence[TokenSeq]]) -> list[list[TokenSeq]]:
    """The same sequences, each with a prompt of its own."""
    return [[one] for group in groups for one in group]


# --- steps ---------------------------------------------------------------------------------------------------------


def make_optimizer(policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in policy.trainable()], lr=1e-6, fused=True)


def train_step(policy: Policy, optimizer: torch.optim.Optimizer, micros: Sequence[Batch], *, entropy: bool) -> None:
    """The tokens' mean log-prob, up; with an entropy as RL asks for it. The norm is clipped on the device."""
    count = sum(micro.target_M.numel() for micro in micros)
    for micro in micros:
        scores = policy.score(micro, entropy=entropy)
        loss = -scores.logp_M.sum() / count
        if scores.entropy_M is not None:
            loss = loss - 1e-3 * scores.entropy_M.sum() / count
        loss.backward()
    torch.nn.utils.clip_grad_norm_([p for _, p in policy.trainable()], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- counting ------------------------------------------------------------------------------------------------------

FORMULA = (
    "model FLOPs of a step = 6·P·T + 12·L·H·D·A (with a frozen base 4·P·T): P weights of linears and head, T packed tokens, "
    "L layers, H heads of D channels, A pairs of a token and one that it attends to"
)


def step_flops(shape: Shape, batch: Batch, *, frozen: bool = False) -> float:
    """By `FORMULA`. A shared prompt is one of T and not several: what is not computed is not counted."""
    tokens = batch.input_ids_N.numel()
    attended = sum(
        (n := segment.end - segment.begin) * (n + 1) // 2 + n * segment.position
        for tree in batch.layout.trees
        for segment in tree.segments()
    )
    per_weight = 4.0 if frozen else 6.0
    return per_weight * shape.weights * tokens + 12.0 * shape.layers * shape.heads * shape.head_dim * attended


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
