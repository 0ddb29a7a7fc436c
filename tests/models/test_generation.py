import json
import logging
import shutil

import pytest
from transformers import GenerationConfig

from posttrain.config.stages import SFTKeys
from posttrain.data.template import end_of_turn
from posttrain.errors import ModelError
from posttrain.models.export import save_policy
from posttrain.models.generation import stop_token_ids
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.models.text import end_of_turn_id

QWEN25 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
BASES = {"qwen2.5": (QWEN25, "<|im_end|>"), "llama-3": (LLAMA3, "<|eot_id|>"), "phi-3": (PHI3, "<|end|>")}
"""Bases whose EOS ends a document (id 0 here), with the template and the token that ends a turn of it."""


@pytest.fixture
def base(model_dir, tmp_path):
    """`base("llama-3")`: keys of a base whose turns end with another token than its EOS."""

    def make(style, **options):
        template, ending = BASES[style]
        folder = tmp_path / style
        shutil.copytree(model_dir("qwen3"), folder)
        keys = SFTKeys(base_model=str(folder), datasets=[{"path": "unused.jsonl"}], **options)
        tokenizer = load_tokenizer(keys)
        tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", template
        if ending not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"extra_special_tokens": [ending]}, replace_extra_special_tokens=False)
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 0}
        (folder / "config.json").write_text(json.dumps(config))
        GenerationConfig(eos_token_id=0, pad_token_id=0).save_pretrained(folder)
        return keys, tokenizer.convert_tokens_to_ids(ending)

    return make


@pytest.mark.parametrize("style", BASES)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_end_of_turn_that_sft_trains_stops_every_sampler_and_is_exported(style, adapter, base, tmp_path):
    keys, ending = base(style, adapter=adapter)
    policy = load_policy(keys)
    assert stop_token_ids(policy.base, policy.tokenizer) == (0, ending)
    save_policy(policy, tmp_path / "out/model", keys)
    exported = json.loads((tmp_path / "out/model/generation_config.json").read_text())
    assert exported["eos_token_id"] == [0, ending]


@pytest.mark.parametrize("style", BASES)
def test_the_models_and_the_datas_end_of_turn_are_one_token(style, base):
    keys, ending = base(style)
    tokenizer = load_tokenizer(keys)
    assert end_of_turn_id(tokenizer) == ending == tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))


def test_stop_ids_are_the_tokenizers_and_the_generation_configs(model_dir):
    policy = load_policy(SFTKeys(base_model=str(model_dir("llama")), datasets=[{"path": "unused.jsonl"}]))
    policy.base.generation_config.eos_token_id = [7, 2]
    assert stop_token_ids(policy.base, policy.tokenizer) == (2, 7)
    policy.base.generation_config.eos_token_id = None
    assert stop_token_ids(policy.base, policy.tokenizer) == (2,)
    policy.tokenizer.chat_template = None
    assert end_of_turn_id(policy.tokenizer) is None


def test_a_generation_config_that_cannot_be_saved_is_mended_at_load_and_said(base, tmp_path, caplog):
    keys, _ = base("qwen2.5")
    path = tmp_path / "qwen2.5/generation_config.json"
    given = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 0, "repetition_penalty": 1.1}
    path.write_text(json.dumps(given))
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        policy = load_policy(keys)
    assert "temperature: 0.9, top_p: 0.6; these keys are left out of what is saved" in caplog.text
    save_policy(policy, tmp_path / "out/model", keys)
    saved = json.loads((tmp_path / "out/model/generation_config.json").read_text())
    assert saved["repetition_penalty"] == 1.1
    assert "temperature" not in saved
    path.write_text(json.dumps({"eos_token_id": 0, "num_beams": 1, "length_penalty": 0.5}))
    with pytest.raises(ModelError, match=r"generation_config.json cannot be saved again: .*mend that file"):
        load_policy(keys)
