"""Decoding where nothing can be left out: rows of equal length and distinct prompts, beside `generate` of transformers, in turns.

python bench/decode.py                          nano (5 M) at 1, 16 and 64 rows; medians of five pairs
python bench/decode.py --near 8                 prompts up to 8 tokens shorter than the longest (ours alone reads none of the padding)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import gpu_work as work
from posttrain.models.policy import Policy
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Request, SamplingParams

SHAPES = {
    "nano": work.Shape(256, 768, 6, 8, 4, 32, 4096),
    "small": work.Shape(512, 1536, 8, 8, 4, 64, 32_000),
}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` where others use the machine too: with one thread it is what the wall would be without them."""


def measure(policy: Policy, shape: work.Shape, rows: int, near: int, options: argparse.Namespace) -> str:
    lengths = [options.prompt - (n % (near + 1)) for n in range(rows)]
    prompts = [tuple(work.sequence(shape.vocab, length, prompt_seed=n, seed=n).ids) for n, length in enumerate(lengths)]
    model, tokens = policy.base, options.tokens
    engine = EmbeddedEngine(policy, stop_token_ids=(), batch_size=rows)
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    ids = torch.tensor([[0] * (options.prompt - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (options.prompt - length) + [1] * length for length in lengths])
    sampling: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "min_new_tokens": tokens}

    def ours() -> None:
        model.set_attn_implementation(work.attention.NAME)
        assert sum(len(c.ids) for c in engine.generate(requests, SamplingParams(tokens))) == rows * tokens

    @torch.inference_mode()
    def theirs() -> None:
        model.set_attn_implementation("sdpa")
        model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **sampling)

    pairs = in_turns([ours, theirs], options.pairs, CLOCKS[options.clock])
    rates = [rows * tokens / statistics.median(seconds) for seconds in zip(*pairs, strict=True)]
    ratios = sorted(theirs_s / ours_s for ours_s, theirs_s in pairs)
    return f"{rows:>4} rows: {rates[0]:8.0f} tokens/s, generate {rates[1]:8.0f}: {statistics.median(ratios):.2f}× ({ratios[0]:.2f}–{ratios[-1]:.2f})"


def in_turns(sides: Sequence[Callable[[], None]], pairs: int, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds of each side, pair by pair; the first run of each warms up."""
    found: list[list[float]] = []
    for _ in range(pairs + 1):
        seconds: list[float] = []
        for side in sides:
            start = clock()
            side()
            seconds.append(clock() - start)
        found.append(seconds)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="nano")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--near", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.model]
    policy = work.random_policy(shape, torch.device("cpu"), bf16=False)
    for rows in options.rows:
        print(measure(policy, shape, rows, options.near, options), flush=True)


if __name__ == "__main__":
    main()
