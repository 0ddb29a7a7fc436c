import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.errors import ConfigError, ModelError
from posttrain.models.device import place
from posttrain.models.load import load_config, load_policy, load_tokenizer, missing_chat_template, stop_token_ids


def test_a_model_that_is_nowhere_is_one_line(keys_of, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    keys = keys_of("llama").model_copy(update={"base_model": "nobody/nothing-at-all"})
    with pytest.raises(
        ModelError, match="nobody/nothing-at-all is not a local folder and could not be fetched"
    ) as caught:
        load_config(keys)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"has no config\.json; expected a Hugging Face model folder"):
        load_config(keys.model_copy(update={"base_model": str(tmp_path)}))


def test_trained_weights_are_float32_and_frozen_ones_keep_their_dtype(model_dir, keys_of, tmp_path):
    AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    load_tokenizer(keys_of("llama")).save_pretrained(tmp_path)
    keys = keys_of("llama").model_copy(update={"base_model": str(tmp_path)})
    full = load_policy(keys)
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    adapted = load_policy(keys.model_copy(update={"adapter": "lora"}))
    assert {p.dtype for _, p in adapted.trainable()} == {torch.float32}
    assert {p.dtype for p in adapted.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    scored = load_policy(keys, trainable=False)
    assert {p.dtype for p in scored.model.parameters()} == {torch.bfloat16}
    assert scored.trainable() == []


def test_the_adapter_starts_the_same_for_the_same_seed(keys_of):
    def first(seed):
        return load_policy(keys_of("llama", adapter="lora", seed=seed)).trainable()[0][1]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_stop_ids_are_the_tokenizers_and_the_generation_configs(keys_of):
    policy = load_policy(keys_of("llama"))
    policy.base.generation_config.eos_token_id = [7, 2]
    assert stop_token_ids(policy.base, policy.tokenizer) == (2, 7)
    policy.base.generation_config.eos_token_id = None
    assert stop_token_ids(policy.base, policy.tokenizer) == (2,)


def test_a_given_template_replaces_the_tokenizers(keys_of, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = load_tokenizer(keys_of("llama", chat_template=str(template)))
    assert tokenizer.chat_template == template.read_text()
    assert not missing_chat_template(tokenizer)


def test_bf16_auto_stays_float32_on_a_cpu(keys_of):
    assert place(keys_of("llama", device="cpu")).autocast_dtype is None
    assert place(keys_of("llama", device="cpu", bf16=True)).autocast_dtype == torch.bfloat16
    assert place(keys_of("llama", device="cpu", bf16=False)).autocast_dtype is None


def test_a_device_this_machine_lacks(keys_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device here; set device: auto or cpu"):
        place(keys_of("llama", device="cuda"))
