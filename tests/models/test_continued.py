"""`adapter_start: continue`: the adapter of the stage before is trained on, over the base that it was begun on."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.config.resolved import resolved_yaml
from posttrain.config.stages import SFTKeys
from posttrain.errors import ModelError
from posttrain.models.batch import pack
from posttrain.models.export import save_policy
from posttrain.models.load import load_policy
from posttrain.models.proof import probe_logits
from posttrain.models.provenance import source_digest


def moved(policy, std=0.05, seed=5):
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn_like(parameter) * std)
    return policy


def stage(folder, keys, seed=5):
    """A finished stage in `folder`, and the logits of the policy that it trained."""
    policy = moved(load_policy(keys), seed=seed)
    trained = probe_logits(policy.model)
    save_policy(policy, folder / "model", keys)
    (folder / "config.yaml").write_text(resolved_yaml(keys))
    return trained


def after(folder, keys, **options):
    """The keys of a stage that goes on with the adapter in `folder`."""
    return keys.model_copy(update={"base_model": str(folder / "model"), "adapter_start": "continue", **options})


VARIANTS = {
    "plain": {},
    "dora": {"use_dora": True},
    "olora": {"init_lora_weights": "olora", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "head": {"lora_modules_to_save": ["lm_head"]},
    "qlora": {"adapter": "qlora", "load_in_4bit": True},
    "8 bits": {"load_in_8bit": True},
    "added": {"added_tokens": ["<tool>"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_continued_adapter_is_the_trained_one_and_its_own_reference(variant, keys_of, families, tmp_path):
    keys = keys_of("llama", **{"adapter": "lora", "lora_r": 4, **VARIANTS[variant]})
    trained = stage(tmp_path / "one", keys)
    # The form of the adapter is its own, whatever the keys of this stage say.
    policy = load_policy(after(tmp_path / "one", keys, lora_r=16, use_dora=False, lora_modules_to_save=[]))
    torch.testing.assert_close(probe_logits(policy.model), trained, atol=1e-4, rtol=1e-4)
    batch = pack(families)
    start = policy.score(batch).logp_M.detach()
    torch.testing.assert_close(policy.reference_logp(batch), start, atol=1e-5, rtol=1e-5)
    moved(policy, seed=6)
    assert (policy.score(batch).logp_M - start).abs().max() > 0.05
    torch.testing.assert_close(policy.reference_logp(batch), start, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["plain", "dora", "olora", "head", "qlora", "8 bits"])
def test_what_a_continued_adapter_exports_is_for_the_given_base_and_needs_no_merge_before(
    variant, keys_of, model_dir, tmp_path
):
    from peft import PeftModel

    keys = keys_of("llama", **{"adapter": "lora", "lora_r": 4, **VARIANTS[variant]})
    stage(tmp_path / "one", keys)
    stage(tmp_path / "two", after(tmp_path / "one", keys), seed=6)
    trained = stage(tmp_path / "three", after(tmp_path / "two", keys), seed=7)
    record = (tmp_path / "three/adapter/posttrain.json").read_text()
    assert source_digest(str(model_dir("llama"))) in record
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "three/model")
    torch.testing.assert_close(probe_logits(merged), trained, atol=2e-3, rtol=1e-3)
    if variant not in ("qlora", "8 bits"):
        base = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
        torch.testing.assert_close(
            probe_logits(PeftModel.from_pretrained(base, tmp_path / "three/adapter")), trained, atol=1e-3, rtol=1e-3
        )


def test_from_a_bf16_file_what_is_saved_whole_is_continued_without_rounding(bf16_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.models.device.has_bf16", lambda kind: True)
    keys = SFTKeys(base_model=str(bf16_dir("llama")), datasets=[{"path": "unused.jsonl"}], adapter="lora", lora_r=4,
                   lora_modules_to_save=["lm_head"])  # fmt: skip
    trained = stage(tmp_path / "one", keys)
    policy = load_policy(after(tmp_path / "one", keys))
    torch.testing.assert_close(probe_logits(policy.model), trained, atol=1e-4, rtol=1e-4)
    assert {parameter.dtype for _, parameter in policy.trainable()} == {torch.float32}


def test_continue_without_an_adapter_before_is_refused_by_name(keys_of, tmp_path):
    keys = keys_of("llama", adapter="lora", lora_r=4, adapter_start="continue")
    with pytest.raises(ModelError, match=r"adapter_start: continue: there is no adapter .* set adapter_start: fresh"):
        load_policy(keys)
    whole = keys_of("llama")
    save_policy(load_policy(whole), tmp_path / "one/model", whole)
    with pytest.raises(ModelError, match="there is no adapter to train on beside"):
        load_policy(keys.model_copy(update={"base_model": str(tmp_path / "one/model")}))


def test_continue_in_another_precision_of_the_base_is_refused_by_name(keys_of, tmp_path):
    keys = keys_of("llama", adapter="qlora", load_in_4bit=True, lora_r=4)
    stage(tmp_path / "one", keys)
    with pytest.raises(ModelError, match=r"was trained on a base in 4 bits; set adapter: qlora"):
        load_policy(after(tmp_path / "one", keys, adapter="lora", load_in_4bit=False))


def test_continue_on_a_base_that_changed_is_refused(make_local_model, tmp_path):
    base = make_local_model("llama")
    keys = SFTKeys(base_model=str(base), datasets=[{"path": "unused.jsonl"}], adapter="lora", lora_r=4)
    stage(tmp_path / "one", keys)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="was trained on a base with digest"):
        load_policy(after(tmp_path / "one", keys))
