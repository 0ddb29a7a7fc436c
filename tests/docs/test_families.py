"""Every cell of docs/families.md, done with a tiny random model of that family."""

import re
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import posttrain as pt
from posttrain.config.stages import ModelKeys
from posttrain.errors import PosttrainError
from posttrain.forms.export.export import export_model
from posttrain.forms.export.families import GGUF_FAMILIES
from posttrain.forms.found import FoundModel
from posttrain.models.load import load_policy
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Request, SamplingParams, in_order

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
COLUMNS, ROWS = ("full", "LoRA", "packed", "sampled", "RL", "fp8", "GGUF", "served"), {}
for line in re.findall(r"^\| `(\w+)` \|.*\|$", PAGE, re.M):
    cells = [cell.strip() for cell in re.search(rf"^\| `{line}` \|(.*)\|$", PAGE, re.M)[1].split("|")]
    ROWS[line] = dict(zip(COLUMNS, cells[1:], strict=True))
SHAPES = {
    "mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}, "gemma3_text": {"num_hidden_layers": 6, "query_pre_attn_scalar": 32},
    "stablelm": {"head_dim": 16}, "helium": {"head_dim": 16}, "granite": {"attention_multiplier": 0.18},
    "deepseek_v3": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "q_lora_rank": None,
                    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "head_dim": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "olmoe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}, "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16},
    "qwen3_next": {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "qwen3_5_text": {"num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
}  # fmt: skip
"""What a family's tiny model wants beyond the shape that all have."""
TRAIN = {"max_steps": 2, "per_device_train_batch_size": 2, "sequence_len": 128, "bf16": False, "show": False}
FAST = ("qwen3", "gemma2")


def trained(folder, data, **keys):
    """A run writes its model and compares it with what it trained, or fails."""
    run = pt.sft(base_model=folder, datasets=data / "sft.jsonl", learning_rate=3e-3, **TRAIN, **keys)
    return run.metrics[-1]["loss"] < run.metrics[0]["loss"] + 0.5 and run.status == "done"


def packed(folder, data):
    return load_policy(ModelKeys(base_model=str(folder)), trainable=False).ragged or "one by one"


def sampled(folder, data):
    """Greedy, the likeliest ids of transformers' own forward over the whole text."""
    policy = load_policy(ModelKeys(base_model=str(folder)), trainable=False)
    prompts = [(40, 41, 42), (50, 51, 52, 53, 54)]
    asked = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    params = SamplingParams(temperature=0.0, max_tokens=6)
    answers = in_order(EmbeddedEngine(policy, stop_token_ids=()).generate(asked, params))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*prompt, *answer.ids]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        assert list(answer.ids) == logits.argmax(-1).tolist()
    return len(answers[0].ids) == 6


def reinforced(folder, data):
    run = pt.grpo(
        base_model=folder, datasets=data / "prompts.jsonl", reward_funcs=[by_length], num_generations=4, num_prompts_per_step=2,
        max_completion_length=6, reward_check="off", **TRAIN,
    )  # fmt: skip
    return run.status == "done"


def by_length(completions, **columns):
    return [float(len(messages[-1]["content"])) for messages in completions]


def exported(form, type_):
    def cell(folder, data):
        return export_model(FoundModel(folder), Path("out"), form, type_, None).exit_code == 0

    return cell


def served(folder, data):
    import httpx

    from posttrain.serve.options import ServeOptions
    from posttrain.serve.run import run_server
    from posttrain.serve.setup import ServedNames, make_router

    options, said = ServeOptions(port=0), []

    def ask(serving):
        body = {"model": "it", "prompt": "What is 1 plus", "max_tokens": 4, "temperature": 0}
        said.append(serving.address)
        thread = threading.Thread(target=lambda: (said.append(httpx.post(f"{serving.address}/v1/completions", json=body, timeout=120)), serving.stop()))  # fmt: skip
        thread.start()

    run_server(options, lambda: make_router(ServedNames([str(folder)], Path("none"), name="it"), options), ask)
    return said[1].status_code == 200


CELLS = {
    "full": trained,
    "LoRA": lambda folder, data: trained(folder, data, adapter="lora", lora_r=4, lora_target="all-linear"),
    "packed": packed,
    "sampled": sampled,
    "RL": reinforced,
    "fp8": exported("fp8", "fp8"),
    "GGUF": exported("gguf", "q8_0"),
    "served": served,
}


def weight(family, cell):
    fast = family == "qwen3" or (family in FAST and cell in ("packed", "sampled", "GGUF"))
    return () if fast else pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "cell"), [pytest.param(family, cell, marks=weight(family, cell)) for family in ROWS for cell in CELLS]
)
def test_the_cell_says_what_happens(family, cell, model_dir, data_dir, tmp_path, monkeypatch):
    if cell == "served":
        pytest.importorskip("fastapi", reason="serving needs posttrain[serve]")
    monkeypatch.chdir(tmp_path)
    folder = model_dir(family, **SHAPES.get(family, {}))
    said = ROWS[family][cell]
    if said == "no":
        try:
            assert CELLS[cell](folder, data_dir) is False
        except PosttrainError as refused:
            assert str(refused)
    else:
        assert CELLS[cell](folder, data_dir) == ("one by one" if said == "one by one" else True)


def test_the_page_says_one_of_three_things_and_has_every_packed_family():
    assert {cell for row in ROWS.values() for cell in row.values()} <= {"yes", "no", "one by one"}
    assert set(GGUF_FAMILIES) | {"qwen3_moe"} <= {name for name, row in ROWS.items() if row["packed"] == "yes"}
