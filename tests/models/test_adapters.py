import json
import logging

import pytest
import torch

from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError
from posttrain.models.adapters import check_targets, dequantized_weights
from posttrain.models.batch import pack
from posttrain.models.load import load_policy


def move(policy, std=0.05):
    """Take the adapter away from its no-op start."""
    torch.manual_seed(5)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn_like(parameter) * std)
    return policy


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
    "list": {"lora_target": ["q_proj", "down_proj"]},
    "regex": {"lora_target": r".*layers\.1\..*_proj"},
    "saved": {"lora_modules_to_save": ["norm"]},
    "pissa": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_adapter_is_a_no_op(variant, policy_of, families):
    batch = pack(families)
    expected = policy_of("qwen3").score(batch).logp_M
    policy = policy_of("qwen3", adapter="lora", lora_r=4, **VARIANTS[variant])
    torch.testing.assert_close(policy.score(batch).logp_M, expected, atol=1e-5, rtol=1e-5)
    assert any(parameter.requires_grad for parameter in policy.model.parameters())


def test_only_the_adapter_is_trained(policy_of, families):
    policy = policy_of("qwen3", adapter="lora", lora_target=["q_proj"], lora_r=4)
    assert len(policy.trainable()) == 4
    policy.score(pack(families)).logp_M.sum().backward()
    graded = {name for name, parameter in policy.model.named_parameters() if parameter.grad is not None}
    assert graded == {name for name, _ in policy.trainable()}


@pytest.mark.parametrize(
    ("options", "scale"), [({}, 32 / 4), ({"use_rslora": True}, 32 / 2), ({"lora_alpha": 3}, 3 / 4)]
)
def test_the_update_is_alpha_over_r_times_b_a_of_rank_r(options, scale, policy_of):
    """W = W0 + s·B·A with s = alpha / r, or alpha / sqrt(r) for rsLoRA (r = 4 here)."""
    policy = move(policy_of("llama", adapter="lora", lora_r=4, lora_target=["up_proj"], **options))
    layer = policy.base.model.layers[0].mlp.up_proj
    before = layer.base_layer.weight.detach().clone()
    b, a = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
    merged = policy.model.merge_and_unload().model.layers[0].mlp.up_proj.weight.detach()
    update = (merged - before).double()
    torch.testing.assert_close(update, scale * b.double() @ a.double(), atol=1e-6, rtol=1e-4)
    values = torch.linalg.svdvals(update)
    assert values[3] > 1e-3
    assert values[4:].max() < 1e-5 * values[0]


def test_rank_pattern_sets_the_rank_of_what_it_names(policy_of):
    policy = policy_of("llama", adapter="lora", lora_r=8, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6})
    attention = policy.base.model.layers[0].self_attn
    assert attention.q_proj.lora_A["default"].weight.shape[0] == 2
    assert attention.k_proj.lora_A["default"].weight.shape[0] == 8
    assert attention.q_proj.scaling["default"] == 3.0


def test_counts_per_entry_and_kind_of_target(policy_of, caplog):
    model = policy_of("qwen3").model
    assert check_targets(model, ["q_proj", "self_attn.k_proj"]) == {"q_proj": 2, "self_attn.k_proj": 2}
    assert check_targets(model, "all-linear") == {"all-linear": 14}
    mixed = [r".*layers\.0\.self_attn\.[qk]_proj", "up_proj"]
    assert check_targets(model, mixed) == {mixed[0]: 2, "up_proj": 2}
    assert check_targets(model, r".*layers\.0\.self_attn\..*") == {r".*layers\.0\.self_attn\..*": 4}
    with caplog.at_level(logging.INFO, logger="posttrain"):
        policy_of("qwen3", adapter="lora", lora_target=["q_proj", "v_proj"])
    assert "adapter: 4 modules (q_proj ×2, v_proj ×2)" in caplog.text


@pytest.mark.parametrize("target", [["q_proj", "qproj"], r".*\.nothing"])
def test_an_entry_that_matches_nothing_names_the_modules_there_are(target, policy_of):
    with pytest.raises(
        ModelError, match=r"matches no module of Qwen3ForCausalLM; it has down_proj, gate_proj, k_proj"
    ) as caught:
        policy_of("qwen3", adapter="lora", lora_target=target)
    assert ("qproj" if isinstance(target, list) else "nothing") in str(caught.value)


def test_leaving_out_attention_warns(policy_of, caplog):
    policy_of("qwen3", adapter="lora", lora_target=["up_proj"])
    assert "leaves out the attention projections (up_proj)" in caplog.text
    caplog.clear()
    policy_of("qwen3", adapter="lora", lora_target=["up_proj", "v_proj"])
    assert "attention" not in caplog.text


def test_experts_take_an_adapter_and_train(policy_of, families):
    batch = pack(families)
    expected = policy_of("qwen3_moe").score(batch).logp_M
    policy = policy_of(
        "qwen3_moe", adapter="lora", lora_r=4, lora_target=["q_proj", "experts.gate_up_proj", "down_proj"]
    )
    torch.testing.assert_close(policy.score(batch).logp_M, expected, atol=1e-5, rtol=1e-5)
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=0.02)
    losses = []
    for _ in range(3):
        loss = -policy.score(batch).logp_M.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05
    moved = {name: float(p.detach().abs().max()) for name, p in policy.trainable() if "lora_B" in name}
    assert len(moved) == 2 + 4
    assert min(moved.values()) > 0


def test_a_pattern_of_modules_stands_beside_experts_by_name(policy_of):
    pattern = r".*layers\.1\.self_attn\.(q|v)_proj"
    policy = policy_of("qwen3_moe", adapter="lora", lora_r=4, lora_target=[pattern, "experts.gate_up_proj"])
    adapted = {name.split(".lora_")[0].removeprefix("base_model.model.") for name, _ in policy.trainable()}
    assert {name for name in adapted if "self_attn" in name} == {f"model.layers.1.self_attn.{p}_proj" for p in "qv"}
    assert len({name for name in adapted if "experts" in name}) == 2


def test_expert_names_are_offered_and_dropout_on_them_is_refused(policy_of):
    with pytest.raises(ModelError, match="down_proj, gate_up_proj"):
        policy_of("qwen3_moe", adapter="lora", lora_target=["gate_proj"])
    with pytest.raises(ModelError, match=r"lora_dropout=0.1 with experts .*set it to 0"):
        policy_of("qwen3_moe", adapter="lora", lora_target=["gate_up_proj"], lora_dropout=0.1)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", "mica"])
def test_experts_begun_on_their_own_weights_are_refused(policy_of, init):
    with pytest.raises(ModelError, match=rf"init_lora_weights: {init} with experts in lora_target .*set .*: true"):
        policy_of("qwen3_moe", adapter="lora", lora_target=["q_proj", "gate_up_proj"], init_lora_weights=init)


def test_a_model_that_does_not_run_in_4_bits_is_refused_by_name_at_load(make_local_model):
    pytest.importorskip("bitsandbytes")
    folder = make_local_model("mamba", state_size=8, time_step_rank=32, hidden_size=64, intermediate_size=128)
    keys = ModelKeys(base_model=str(folder), adapter="qlora", load_in_4bit=True, lora_target=["in_proj"])
    with pytest.raises(
        ModelError, match=r"adapter: qlora: MambaForCausalLM does not run on a base in 4 bits .*set adapter: lora"
    ):
        load_policy(keys)


QLORA = {"adapter": "qlora", "load_in_4bit": True, "lora_r": 4}


def _gradients(policy, batch):
    policy.model.zero_grad()
    policy.model.train()
    policy.score(batch).logp_M.sum().backward()
    return {name: p.grad.clone() for name, p in policy.trainable()}


def test_gradients_of_qlora_before_and_after_an_eval_forward_are_equal(policy_of, families):
    policy = move(policy_of("llama", **QLORA))
    batch = pack(families)
    before = _gradients(policy, batch)
    assert all(gradient.abs().max() > 0 for gradient in before.values())
    policy.model.eval()
    with torch.no_grad():
        policy.score(batch)
    after = _gradients(policy, batch)
    for name, gradient in before.items():
        assert torch.equal(after[name], gradient), name


@pytest.mark.parametrize("double_quant", [True, False])
def test_qlora_trains_on_nf4(double_quant, policy_of, families):
    policy = policy_of("llama", **QLORA, bnb_4bit_use_double_quant=double_quant)
    layer = policy.base.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.quant_type == "nf4"
    assert layer.weight.quant_state.nested == double_quant
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=0.02)
    batch = pack(families)
    losses = []
    for _ in range(4):
        policy.model.train()
        loss = -policy.score(batch).logp_M.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1


def test_dequantized_weights_are_what_the_4_bit_layers_compute(policy_of):
    policy = policy_of("llama", **QLORA)
    weights = {name: unpack() for name, unpack in dequantized_weights(policy.model).items()}
    assert len(weights) == 14
    layer = policy.base.model.layers[0].mlp.up_proj.base_layer
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ weights["model.layers.0.mlp.up_proj"].T, atol=1e-5, rtol=1e-4)


def test_a_saved_adapter_names_its_targets(policy_of, tmp_path):
    policy_of("qwen3", adapter="lora", lora_target=["q_proj"], lora_r=4).model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    assert (config["r"], config["lora_alpha"]) == (4, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_modules_to_save": ["lm_hed"]}, r"lora_modules_to_save: 'lm_hed' is no module of .*it has .*lm_head"),
        ({"rank_pattern": {"qproj": 2}}, "rank_pattern: 'qproj' matches no adapted module; adapted are down_proj"),
        ({"alpha_pattern": {"lm_head": 2}}, "alpha_pattern: 'lm_head' matches no adapted module"),
        ({"rank_pattern": {"k_proj": 2}, "lora_target": ["q_proj"]}, "'k_proj' matches no adapted module; .* q_proj"),
    ],
)
def test_what_matches_nothing_in_the_adapters_keys_is_an_error(options, message, policy_of):
    with pytest.raises(ModelError, match=message):
        policy_of("llama", adapter="lora", lora_r=4, **options)


@pytest.mark.parametrize("target", [r".*(head|q_proj)", ["q_proj", "lm_head"], ["embed_tokens", "v_proj"]])
def test_an_adapter_on_a_tied_head_is_refused_before_training(target, policy_of):
    with pytest.raises(ModelError, match=r"reaches .*embedding and head share one weight"):
        policy_of("qwen3", adapter="lora", lora_r=4, lora_target=target)


@pytest.mark.parametrize("target", [r".*(head|q_proj)", ["q_proj", "lm_head"]])
def test_an_untied_head_may_be_adapted(target, policy_of, tmp_path, keys_of):
    from posttrain.models.export import save_policy

    policy = move(policy_of("llama", adapter="lora", lora_r=4, lora_target=target))
    assert any("lm_head" in name for name, _ in policy.trainable())
    keys = keys_of("llama", adapter="lora", lora_r=4, lora_target=target)
    assert save_policy(policy, tmp_path / "model", keys).relative < 1e-4


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_embedding_and_head_are_trained_whole_and_stay_tied(saved, architecture, policy_of, keys_of, tmp_path):
    from posttrain.models.export import save_policy

    options = {"adapter": "lora", "lora_r": 4, "lora_target": ["q_proj"], "lora_modules_to_save": [saved]}
    policy = move(policy_of(architecture, **options))
    assert save_policy(policy, tmp_path / "model", keys_of(architecture, **options)).relative < 1e-4
