"""Adapters beside each other on one base: each row is what PEFT makes of it with its own adapter alone."""

import json

import pytest
import torch

from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError
from posttrain.models.adapters import load_adapter
from posttrain.models.load import load_policy, read_model
from posttrain.models.slots import AdapterSlots, read_factors
from posttrain.rollout.decoding import Decoding, DecodingRow, Ends
from posttrain.types import Request, SamplingParams

OPTIONS = [
    {"r": 4, "lora_alpha": 8},
    {"r": 2, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    {"r": 4, "lora_alpha": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
]


def make_adapter(folder, base, seed, **options):
    """An adapter with random weights, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    model = read_model(ModelKeys(base_model=str(base)), torch.float32)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder, save_embedding_layers=False)  # the base has its head itself
    return folder


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "llama"])
def test_rows_of_several_adapters_decode_together_as_each_does_alone(model_dir, tmp_path, architecture):
    """Llama's head is a layer of its own, which the first and the last adapter change too."""
    base = model_dir(architecture)
    with_head = {"target_modules": ["q_proj", "up_proj", "lm_head"]} if architecture == "llama" else {}
    options_of = [OPTIONS[0] | with_head, OPTIONS[1], OPTIONS[2] | with_head]
    folders = [make_adapter(tmp_path / f"a{n}", base, n, **options) for n, options in enumerate(options_of)]
    policy = load_policy(ModelKeys(base_model=str(base)), trainable=False)
    slots = AdapterSlots(policy)
    for folder in folders:
        slots.load(folder.name, read_factors(folder))
    params, ends = SamplingParams(10), Ends(10, frozenset(), None)
    rows = [
        DecodingRow(n, Request((5, 6, 7), n), params, ends, adapter=name, num_top=0)
        for n, name in enumerate(["a0", "a1", None, "a2", "a0", None, "a1"])
    ]
    with torch.no_grad():
        decoding = Decoding(policy, rows[:3], adapters=slots)
        decoding.advance(8)
        for row in rows[3:]:
            decoding.join(row)
        while decoding.is_busy:
            decoding.advance(8)
    for row in rows:
        model = read_model(ModelKeys(base_model=str(base)), torch.float32)
        model.set_attn_implementation("eager")  # transformers' other one leaves out soft caps
        alone = model if row.adapter is None else load_adapter(model, tmp_path / row.adapter)
        with torch.no_grad():
            logp_TV = alone.eval()(input_ids=torch.tensor([row.sequence]), use_cache=False).logits[0].log_softmax(-1)
        expected = [float(logp_TV[2 + at, token]) for at, token in enumerate(row.ids)]
        assert [noted.logp for noted in row.likeliest] == pytest.approx(expected, abs=1e-5)
    assert len({tuple(row.ids) for row in rows}) == len(rows)


def test_an_adapter_that_is_unloaded_changes_nothing(model_dir, tmp_path):
    policy = load_policy(ModelKeys(base_model=str(model_dir("qwen3"))), trainable=False)
    slots = AdapterSlots(policy)
    ids = torch.tensor([[5, 6, 7]])

    def logits():
        slots.assign(["a"] * 3)
        with torch.no_grad():
            return policy.model(input_ids=ids, use_cache=False).logits

    before = logits()
    slots.load("a", read_factors(make_adapter(tmp_path / "a", model_dir("qwen3"), 1)))
    assert not torch.equal(logits(), before)
    slots.unload("a")
    assert torch.equal(logits(), before)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"use_dora": True}, "use_dora: True cannot be served beside other adapters; merge it"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias: all"),
    ],
)
def test_an_adapter_that_is_more_than_low_rank_updates_is_refused_by_name(model_dir, tmp_path, change, complaint):
    folder = make_adapter(tmp_path / "a", model_dir("qwen3"), 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=complaint):
        read_factors(folder)


def test_an_adapter_of_another_base_is_refused_and_nothing_of_it_is_loaded(model_dir, tmp_path, make_local_model):
    policy = load_policy(ModelKeys(base_model=str(model_dir("qwen3"))), trainable=False)
    other = make_local_model("qwen3", intermediate_size=64)
    slots = AdapterSlots(policy)
    with pytest.raises(ModelError, match="down_proj is 64 → 64, the base's 128 → 64"):
        slots.load("a", read_factors(make_adapter(tmp_path / "a", other, 1)))
    assert not any(slot.factors for slot in slots._slots.values())


def test_a_model_whose_rows_cannot_be_run_together_is_refused(model_dir):
    with pytest.raises(ModelError, match="cannot be run together"):
        AdapterSlots(load_policy(ModelKeys(base_model=str(model_dir("mamba"))), trainable=False))
