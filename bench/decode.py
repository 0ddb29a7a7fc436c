"""Decoding where nothing can be left out: rows of equal length and distinct prompts, beside `generate` of transformers, in turns.

python bench/decode.py                          nano (5 M) at 1, 16 and 64 rows; medians of five pairs; with and without `rollout.prepack` and `native_kernels`
python bench/decode.py --near 48                prompts up to 48 tokens shorter than the longest; with and without `rollout.pad_prompts`
python bench/decode.py --peak --rows 64 --prompt 1024 --tokens 1
                                                what one call holds at most, over the keys and values of its prompts
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import gpu_work as work
from posttrain.models.policy import Policy
from posttrain.rollout.cached import Shortcuts
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Request, SamplingParams, in_order

SHAPES = {
    "nano": work.Shape(256, 768, 6, 8, 4, 32, 4096),
    "small": work.Shape(512, 1536, 8, 8, 4, 64, 32_000),
}
CPU = torch.device("cpu")
_STRIDE = 37
"""Neighbours differ in length."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` where others use the machine too: with one thread it is what the wall would be without them."""


Prompts = Sequence[tuple[int, ...]]
Run = Callable[[float], list[tuple[int, ...]]]
"""Temperature → the completions, in the order of the prompts."""


def prompts_of(shape: work.Shape, rows: int, options: argparse.Namespace) -> Prompts:
    lengths = [options.prompt - (n * _STRIDE % (options.near + 1)) for n in range(rows)]
    return [tuple(work.sequence(shape.vocab, length, prompt_seed=n, seed=n).ids) for n, length in enumerate(lengths)]


def embedded(**more: Any) -> Callable[[Policy, Prompts, int], Run]:
    def side(policy: Policy, prompts: Prompts, tokens: int) -> Run:
        return _by(EmbeddedEngine(policy, stop_token_ids=(), batch_size=len(prompts), **more), policy, prompts, tokens)

    return side


def vllm(policy: Policy, prompts: Prompts, tokens: int) -> Run:
    return _by(work.vllm_beside(policy, len(prompts), max(map(len, prompts)) + tokens), policy, prompts, tokens)


def _by(engine: Any, policy: Policy, prompts: Prompts, tokens: int) -> Run:
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]

    def run(temperature: float) -> list[tuple[int, ...]]:
        policy.base.set_attn_implementation(work.attention.NAME)
        return [one.ids for one in in_order(engine.generate(requests, SamplingParams(tokens, temperature)))]

    return run


def generate(policy: Policy, prompts: Prompts, tokens: int) -> Run:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    asked: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "use_cache": True}

    @torch.inference_mode()
    def run(temperature: float) -> list[tuple[int, ...]]:
        policy.base.set_attn_implementation("sdpa")
        sampling: dict[str, Any] = {"do_sample": True, "top_k": 0} if temperature else {"do_sample": False}
        found = policy.base.generate(input_ids=ids, attention_mask=mask, **asked, **sampling)
        return [tuple(row) for row in found[:, longest:].tolist()]

    return run


SHORTCUTS = {
    "ours": Shortcuts(),
    "prepack": Shortcuts(prepack=True),
    "native_kernels": Shortcuts(native_kernels=True),
    "both": Shortcuts(prepack=True, native_kernels=True),
    "pad_prompts": Shortcuts(pad_prompts=True),
}
SIDES: dict[str, Callable[[Policy, Prompts, int], Run]] = {
    **{name: embedded(shortcuts=one) for name, one in SHORTCUTS.items()}, "generate": generate, "vllm": vllm,
}  # fmt: skip


def measure(policy: Policy, shape: work.Shape, rows: int, options: argparse.Namespace) -> str:
    prompts, tokens = prompts_of(shape, rows, options), options.tokens
    names = [name for name in SIDES if name != "vllm" and (options.near or name != "pad_prompts")]

    def by(name: str) -> Callable[[], None]:
        run = SIDES[name](policy, prompts, tokens)

        def turn() -> None:
            assert sum(map(len, run(1.0))) == rows * tokens

        return turn

    turns = work.in_turns(list(map(by, names)), CPU, options.pairs, CLOCKS[options.clock])
    rates = [rows * tokens / statistics.median(seconds) for seconds in zip(*turns, strict=True)]
    found = [f"generate {rates[-1]:8.0f} tokens/s"]
    for number, name in enumerate(names[:-1]):
        ratios = sorted(turn[-1] / turn[number] for turn in turns)
        found.append(
            f"{name} {rates[number]:8.0f}: {statistics.median(ratios):.2f}× ({ratios[0]:.2f}–{ratios[-1]:.2f})"
        )
    return f"{rows:>4} rows: " + ", ".join(found)


def measure_peak(policy: Policy, shape: work.Shape, rows: int, options: argparse.Namespace) -> str:
    """Of the process's first call: the high-water mark never falls."""
    prompts = prompts_of(shape, rows, options)
    engine = EmbeddedEngine(policy, stop_token_ids=(), batch_size=rows)
    list(engine.generate([Request(prompts[0][:8], 0)], SamplingParams(2)))
    before = _peak_mib()
    list(engine.generate([Request(prompt, n) for n, prompt in enumerate(prompts)], SamplingParams(options.tokens)))
    text = policy.base.config.get_text_config()
    kept = 8 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * rows * options.prompt / (1 << 20)
    above = _peak_mib() - before
    return f"{rows:>4} rows: {above:.0f} MiB, {above / kept:.1f} times the {kept:.0f} MiB of keys and values"


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
    parser.add_argument("--peak", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.model]
    policy = work.random_policy(shape, CPU, bf16=False)
    for rows in options.rows:
        print((measure_peak if options.peak else measure)(policy, shape, rows, options), flush=True)


if __name__ == "__main__":
    main()
