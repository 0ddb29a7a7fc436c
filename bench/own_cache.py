"""Models that are sampled one by one: from the cache that they keep themselves, and with the whole sequence run again for each token. In CPU time.

python bench/own_cache.py [--tokens 128] [--architectures mamba gpt_oss qwen3_next]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import workload
from posttrain.config.stages import ModelKeys
from posttrain.models.load import load_policy
from posttrain.models.policy import Policy
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Request, SamplingParams, in_order

SHAPE = {
    "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 4096,
    "head_dim": 64, "state_size": 16, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "pad_token_id": 0,
}  # fmt: skip
ROWS, PROMPT = 2, tuple(range(40, 72))


def make(architecture: str, folder: Path) -> Policy:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SHAPE)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    keys = ModelKeys(base_model=str(folder), tokenizer_name_or_path=str(workload.tokenizer_dir()))
    return load_policy(keys, trainable=False)


def sampled(policy: Policy, tokens: int) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds of a processor, and the ids."""
    asked = [Request(PROMPT, seed) for seed in range(ROWS)]
    begun = time.process_time()
    found = in_order(EmbeddedEngine(policy, stop_token_ids=()).generate(asked, SamplingParams(tokens)))
    return time.process_time() - begun, [one.ids for one in found]


def line(architecture: str, tokens: Sequence[int]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        policy = make(architecture, Path(folder))
        assert policy.cache_is_exact, f"{architecture} has no exact cache of its own"
        cells: list[str] = []
        for most in tokens:
            ours, ids = sampled(policy, most)
            theirs, other_ids = sampled(replace(policy, cache_is_exact=False), most)
            assert ids == other_ids, "the same tokens"
            cells.append(f"{most} tokens: {ours:.2f} and {theirs:.2f} s, {theirs / ours:.1f}×")
    return f"{architecture}: {'; '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128])
    parser.add_argument("--architectures", nargs="+", default=["mamba", "gpt_oss", "qwen3_next"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    for architecture in given.architectures:
        print(line(architecture, given.tokens), flush=True)


if __name__ == "__main__":
    main()
