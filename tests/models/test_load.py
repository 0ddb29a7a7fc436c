import logging
import shutil

import pytest
import torch
from transformers import Gemma3Config, LlavaConfig, Qwen2_5_VLConfig

from posttrain.errors import ConfigError, ModelError
from posttrain.models.batch import pack
from posttrain.models.device import place
from posttrain.models.load import load_config, load_policy, load_tokenizer, missing_chat_template

RAGGED = ("qwen3", "llama", "mistral", "gemma2", "gemma3_text", "qwen3_moe")


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


def test_only_unfrozen_parameters_are_trained(keys_of, train, tmp_path):
    pattern = r"model\.layers\.1\.self_attn"
    keys = keys_of("llama").model_copy(update={"unfrozen_parameters": [pattern, "model.norm"]})
    trained = {name for name, _ in load_policy(keys).trainable()}
    assert trained == {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"} | {"model.norm.weight"}
    with pytest.raises(ModelError, match="unfrozen_parameters: nothing matches no parameter of the model; expected"):
        load_policy(keys.model_copy(update={"unfrozen_parameters": ["nothing"]}))
    run = train("sft", architecture="llama", unfrozen_parameters=[pattern])
    before, after = (load_policy(keys.model_copy(update={"base_model": str(folder)})).model.state_dict() for folder in (keys.base_model, run / "model"))  # fmt: skip
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"}


@pytest.mark.parametrize("units", [True, False])
def test_trained_weights_are_float32_and_frozen_ones_keep_a_dtype_the_machine_computes_in(
    units, keys_of, bf16_dir, monkeypatch, caplog
):
    monkeypatch.setattr("posttrain.models.device.has_bf16", lambda kind: units)
    frozen = torch.bfloat16 if units else torch.float32
    keys = keys_of("llama").model_copy(update={"base_model": str(bf16_dir("llama"))})
    full = load_policy(keys)
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    assert full.placement.autocast_dtype is None
    with caplog.at_level(logging.INFO, logger="posttrain"):
        adapted = load_policy(keys.model_copy(update={"adapter": "lora"}))
    assert f"bfloat16 file, held in {'bfloat16' if units else 'float32'}" in caplog.text
    assert {p.dtype for _, p in adapted.trainable()} == {torch.float32}
    assert {p.dtype for p in adapted.model.parameters() if not p.requires_grad} == {frozen}
    assert adapted.placement.autocast_dtype == (torch.bfloat16 if units else None)
    scored = load_policy(keys, trainable=False)
    assert {p.dtype for p in scored.model.parameters()} == {frozen}
    assert scored.trainable() == []
    exact = load_policy(keys.model_copy(update={"adapter": "lora", "bf16": False}))
    assert {p.dtype for p in exact.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize(
    ("architecture", "adapter"),
    # Mamba's own forward reads a projection's weight as a matrix, which a 4-bit one is not.
    [*((name, kind) for name in (*RAGGED, "gpt_oss") for kind in ("lora", "qlora")), ("mamba", "lora")],
)
def test_every_family_trains_an_adapter_from_a_bf16_file(
    architecture, adapter, units, keys_of, bf16_dir, families, monkeypatch
):
    monkeypatch.setattr("posttrain.models.device.has_bf16", lambda kind: units)
    options = {"adapter": adapter, "load_in_4bit": adapter == "qlora", "lora_r": 4}
    target = {"lora_target": ["q_proj", "v_proj"]} if architecture != "mamba" else {"lora_target": ["in_proj"]}
    keys = keys_of(architecture, **options, **target)
    policy = load_policy(keys.model_copy(update={"base_model": str(bf16_dir(architecture))}))
    assert policy.ragged == (architecture in RAGGED)
    policy.model.train()
    scores = policy.score(pack(families))
    assert scores.logp_M.dtype == torch.float32
    scores.logp_M.sum().backward()
    gradients = [p.grad for name, p in policy.trainable() if "lora_B" in name]
    assert gradients
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


def test_the_adapter_starts_the_same_for_the_same_seed(keys_of):
    def first(seed):
        return load_policy(keys_of("llama", adapter="lora", seed=seed)).trainable()[0][1]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_a_base_with_pickled_weights_alone_is_refused_at_load(model_dir, keys_of, tmp_path):
    shutil.copytree(model_dir("llama"), tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    torch.save({}, tmp_path / "base/pytorch_model.bin")
    keys = keys_of("llama").model_copy(update={"base_model": str(tmp_path / "base")})
    for load in (load_config, load_policy):
        with pytest.raises(
            ModelError, match=r"has only pickled weights \(pytorch_model.bin\).*expected \*.safetensors"
        ):
            load(keys)


@pytest.mark.parametrize("family", [Gemma3Config, Qwen2_5_VLConfig, LlavaConfig])
def test_a_checkpoint_with_parts_for_images_is_refused_by_name_before_it_is_trained(
    family, keys_of, model_dir, tmp_path
):
    shutil.copytree(model_dir("llama"), tmp_path / "base")
    family(architectures=["OfImages"]).save_pretrained(tmp_path / "base")
    keys = keys_of("llama").model_copy(update={"base_model": str(tmp_path / "base")})
    with pytest.raises(ModelError, match=r"base is OfImages, with parts for images or sound \(vision_config\)"):
        load_policy(keys)


def test_a_model_of_text_of_such_a_family_is_trained(keys_of):
    assert load_policy(keys_of("gemma3_text")).base.config.model_type == "gemma3_text"


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
