import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.config.stages import SFTKeys
from posttrain.errors import ModelError
from posttrain.models.batch import pack
from posttrain.models.export import merge_adapter, save_policy
from posttrain.models.load import load_policy
from posttrain.models.proof import probe_logits


def moved(policy, std=0.05):
    torch.manual_seed(5)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn_like(parameter) * std)
    return policy


@pytest.fixture
def bf16_keys(bf16_dir):
    """Keys of a stage on a tiny model whose file is bf16."""
    return lambda architecture, **options: SFTKeys(
        base_model=str(bf16_dir(architecture)), datasets=[{"path": "unused.jsonl"}], **options
    )


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("adapter", ["none", "lora", "qlora"])
def test_the_proof_is_in_float32_also_for_a_bf16_base(architecture, adapter, bf16_keys, tmp_path, monkeypatch):
    """Merged and trained agree to float32 rounding where bf16 arithmetic would hide a hundred times as much."""
    monkeypatch.setattr("posttrain.models.device.has_bf16", lambda kind: True)
    target = {} if adapter == "none" else {"lora_target": ["q_proj", "v_proj"], "lora_r": 4}
    keys = bf16_keys(architecture, adapter=adapter, load_in_4bit=adapter == "qlora", **target)
    policy = moved(load_policy(keys), std=0.02)
    report = save_policy(policy, tmp_path / "model", keys)
    assert report.relative < 1e-4
    assert report.dtype == "bfloat16"
    assert report.cast_difference > 0
    exported = probe_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert float((exported - probe_logits(policy.model)).abs().max()) == pytest.approx(report.cast_difference, rel=1e-3)


@pytest.mark.parametrize("architecture", ["mixtral", "llama4_text", "lfm2", "gpt2"])
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_default_targets_on_a_bf16_file_are_proven_where_modules_read_each_others_weights(
    architecture, adapter, bf16_keys, tmp_path
):
    """Experts, a router that is a linear by class, a convolution's weight read from outside, matrices held transposed."""
    keys = bf16_keys(architecture, adapter=adapter, load_in_4bit=adapter == "qlora", lora_r=4, bf16=True)
    policy = moved(load_policy(keys), std=0.02)
    assert save_policy(policy, tmp_path / "model", keys).relative < 1e-4


@pytest.mark.parametrize(("save_dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_a_full_fine_tune_of_a_bf16_base_exports_bf16_unless_told(save_dtype, expected, bf16_keys, tmp_path):
    keys = bf16_keys("qwen3", save_dtype=save_dtype)
    policy = load_policy(keys)
    save_policy(policy, tmp_path / "model", keys)
    weights = load_file(tmp_path / "model/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {expected}
    assert "lm_head.weight" not in weights, "a tied head is written once"
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["dtype"] == str(expected).removeprefix("torch.")
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}


def test_the_router_key_is_exported_as_it_was_given(keys_of, model_dir, tmp_path, families):
    keys = keys_of("qwen3_moe")
    policy = load_policy(keys)
    assert policy.score(pack(families)).aux_loss is not None
    save_policy(policy, tmp_path / "model", keys)
    given, saved = (json.loads((at / "config.json").read_text()) for at in (model_dir("qwen3_moe"), tmp_path / "model"))
    assert saved["output_router_logits"] is given["output_router_logits"] is False


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_init_that_moves_the_base_exports_the_trained_model_and_an_adapter_for_the_given_base(
    init, rslora, keys_of, model_dir, tmp_path
):
    from peft import PeftModel

    keys = keys_of("llama", adapter="lora", lora_r=4, init_lora_weights=init, use_rslora=rslora,
                   rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6})  # fmt: skip
    policy = moved(load_policy(keys))
    assert policy.start is not None
    trained = probe_logits(policy.model)
    assert save_policy(policy, tmp_path / "model", keys).relative < 1e-4
    base = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    by_peft = probe_logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    for found in (by_peft, probe_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))):
        torch.testing.assert_close(found, trained, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "olora", "mica"])
def test_the_reference_is_the_given_model_whatever_the_init_does_to_the_base(init, keys_of, families):
    batch = pack(families)
    given = load_policy(keys_of("qwen3"), trainable=False).score(batch).logp_M
    policy = moved(load_policy(keys_of("qwen3", adapter="lora", lora_r=4, init_lora_weights=init)))
    assert (policy.score(batch).logp_M - given).abs().max() > 0.05
    torch.testing.assert_close(policy.reference_logp(batch), given, atol=1e-4, rtol=1e-4)
    assert (policy.score(batch).logp_M - given).abs().max() > 0.05


@pytest.mark.parametrize("other", [{"use_dora": True}, {"adapter": "qlora", "load_in_4bit": True}])
def test_an_init_that_moves_the_base_is_refused_where_it_cannot_be_taken_apart(other, keys_of):
    keys = keys_of("llama", **{"adapter": "lora", "lora_r": 4, "init_lora_weights": "olora", **other})
    with pytest.raises(ModelError, match="init_lora_weights: olora moves a part of the base into the adapter"):
        load_policy(keys)


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("eva", "activations"), ("corda", "covariances"), ("lora_ga", "gradients"), ("loftq", "a quantiser of its own"),
        ("gausian", "no such init"), ("pissa_niter_many", "no such init"),
    ],
)  # fmt: skip
def test_inits_that_need_data_and_unknown_ones_are_refused_by_name_at_load(init, reason, keys_of):
    with pytest.raises(ValueError, match=f"init_lora_weights: {init}: .*{reason}.*; use true, false, gaussian"):
        keys_of("llama", adapter="lora", init_lora_weights=init)


def test_an_init_that_this_rank_does_not_allow_is_one_line(keys_of):
    with pytest.raises(ModelError, match=r"PEFT refuses this adapter .*orthogonal.*even"):
        load_policy(keys_of("llama", adapter="lora", lora_r=3, init_lora_weights="orthogonal"))


def test_the_merge_takes_the_revision_that_was_trained(model_dir, keys_of, tmp_path, monkeypatch):
    """Two revisions of one model in a local hub cache; the adapter was trained on the older one."""
    cache = tmp_path / "hub/models--team--model"
    for revision, scale in (("a" * 40, 1.0), ("b" * 40, 1.5)):
        shutil.copytree(model_dir("llama"), cache / "snapshots" / revision)
        model = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(scale)
        model.save_pretrained(cache / "snapshots" / revision)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    keys = keys_of("llama", adapter="lora", lora_r=4, revision="a" * 40)
    keys = keys.model_copy(update={"base_model": "team/model"})
    policy = moved(load_policy(keys))
    assert save_policy(policy, tmp_path / "out/model", keys).relative < 1e-4
    wrong = keys.model_copy(update={"revision": "b" * 40})
    with pytest.raises(ModelError, match=r"changes the logits .*would not be the trained one"):
        merge_adapter("team/model", tmp_path / "out/adapter", wrong, policy=policy, trained=probe_logits(policy.model))


def test_onto_the_original_base_the_difference_is_bounded_by_what_quantising_did(keys_of, tmp_path, monkeypatch):
    keys = keys_of("llama", adapter="qlora", load_in_4bit=True, lora_r=4, merge_onto="original")
    policy = moved(load_policy(keys))
    report = save_policy(policy, tmp_path / "model", keys)
    assert report.base == "original"
    assert report.max_logit_difference > 1e-2
    monkeypatch.setattr("posttrain.models.export.QUANTISATION", 1e-3)
    with pytest.raises(ModelError, match="onto the original weights changes the logits"):
        save_policy(policy, tmp_path / "again/model", keys)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_model_with_code_of_its_own_is_exported_without_a_question(
    adapter, model_dir, keys_of, tmp_path, monkeypatch
):
    base = tmp_path / "own"
    shutil.copytree(model_dir("llama"), base)
    (base / "modeling_own.py").write_text(OWN_CODE)
    config = json.loads((base / "config.json").read_text()) | {"model_type": "own_llama", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (base / "config.json").write_text(json.dumps(config))

    def asked(*_):
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    keys = keys_of("llama", adapter=adapter, lora_r=4, trust_remote_code=True).model_copy(
        update={"base_model": str(base)}
    )
    policy = moved(load_policy(keys))
    assert type(policy.base).__name__ == "OwnModel"
    assert save_policy(policy, tmp_path / "out/model", keys).relative < 1e-4
