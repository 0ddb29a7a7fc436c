"""Ranks that read their own rows of a model's file hold, together, what one process reads."""

import pytest
from safetensors.torch import load_file

SCRIPT = """
import json, os, sys, torch
from pathlib import Path
from posttrain.config.stages import SFTKeys
from posttrain.distributed.ranks import join_ranks
from posttrain.distributed.sharding import sharding_over
from posttrain.models.load import load_policy
from posttrain.models.read import may_read_shares, read_model
from torch.distributed.tensor import DTensor

torch.set_num_threads(1)
found = {}
with join_ranks() as ranks:
    sharding = sharding_over(ranks)
    for name, (folder, options) in json.loads(sys.argv[1]).items():
        keys = SFTKeys(base_model=folder, datasets=[{"path": "x"}], device="cpu", **options)
        shared, whole = load_policy(keys, sharding=sharding), load_policy(keys)
        mine = dict(shared.model.named_parameters())
        wrong = [n for n in {n for n, _ in whole.model.named_parameters()} ^ mine.keys()]
        for n, expected in whole.model.named_parameters():
            tensor = sharding.whole(mine[n])
            same = torch.equal(tensor, expected) and tensor.dtype == expected.dtype
            if not (same and mine[n].requires_grad == expected.requires_grad and isinstance(mine[n], DTensor)):
                wrong.append(n)
        buffers = dict(shared.model.named_buffers())
        wrong += [n for n, buffer in whole.model.named_buffers() if not torch.equal(buffer, buffers[n])]
        wrong += [] if shared.ragged == whole.ragged else ["ragged"]
        config = shared.base.config.to_dict() == whole.base.config.to_dict()
        read = read_model(keys, torch.float32, sharding) if may_read_shares(keys) else None
        locals = [p.to_local() if isinstance(p, DTensor) else p for p in read.parameters()] if read else []
        found[name] = {"wrong": wrong, "config": config, "numbers": sum(p.numel() for p in locals)}
    if ranks.is_main:
        Path(os.environ["FOUND"]).write_text(json.dumps(found))
"""


def _same(found):
    for name, result in found.items():
        assert not result["wrong"], name
        assert result["config"], name


LORA = {"adapter": "lora", "lora_r": 4}


def test_two_ranks_read_each_half_of_the_model_one_reads(model_dir, found_by):
    models = {"full": (str(model_dir("qwen3")), {}), "adapter": (str(model_dir("qwen3")), LORA)}
    found = found_by(2, SCRIPT, models)
    _same(found)
    total = sum(tensor.numel() for tensor in load_file(model_dir("qwen3") / "model.safetensors").values())
    # Rank 0 has half of every tensor.
    assert found["full"]["numbers"] == pytest.approx(total / 2, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_ranks_read_every_architecture_as_one_process_does(ranks, model_dir, found_by):
    """Three ranks divide nothing evenly, and leave one without an expert."""
    names = ("qwen3", "gemma3_text", "qwen3_moe", "mixtral", "gpt2", "mamba", "gpt_oss", "llama4_text")
    models = {name: (str(model_dir(name)), {}) for name in names}
    qwen, experts = str(model_dir("qwen3")), str(model_dir("qwen3_moe"))
    models |= {
        "adapter of experts": (experts, {**LORA, "lora_target": ["q_proj", "gate_up_proj", "down_proj"]}),
        "init from the base": (qwen, {**LORA, "init_lora_weights": "pissa"}),
        "dora": (qwen, {**LORA, "use_dora": True}),
        "added tokens": (qwen, {"added_tokens": ["<a>", "<b>"]}),
        "whole modules": (qwen, {**LORA, "lora_modules_to_save": ["embed_tokens"]}),
    }
    _same(found_by(ranks, SCRIPT, models))
