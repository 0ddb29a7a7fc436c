"""Memory by hand, what fits, and the line that says it does not."""

import re
from dataclasses import replace

import pytest

from posttrain.config.kinds import STAGE_KINDS
from posttrain.errors import ModelError
from posttrain.files import size_text
from posttrain.planner import (
    DEVICES,
    Cluster,
    ModelShape,
    Workload,
    available_bytes,
    cannot_fit,
    estimate_memory,
    fits,
    shortfall,
)
from posttrain.planner.engine import SamplingEngine
from posttrain.planner.fit import overrun
from posttrain.planner.forecast import forecast
from posttrain.planner.memory import HELD
from posttrain.planner.sharding import ShardingPlan
from posttrain.planner.trained import adapter_params

QWEN3_8B = ModelShape.from_config({
    "hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 151936, "intermediate_size": 12288,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "dtype": "bfloat16",
})  # fmt: skip
TINY = ModelShape(num_layers=2, hidden=8, intermediate=16, vocab=10, num_heads=2, num_kv_heads=1, head_dim=4)
GIB = 1 << 30


def test_parameters_of_a_tiny_model_by_hand():
    """Per layer q 8·8, k and v 8·4 each, o 8·8, three MLP matrices of 8·16, two norms of 8; two embeddings of 10·8; one norm."""
    layer = 64 + 32 + 32 + 64 + 3 * 128 + 16
    assert TINY.num_params == 2 * layer + 2 * 80 + 8
    assert TINY.kv_bytes_per_token(2) == 2 * 2 * 1 * 4 * 2


def test_parameters_equal_those_of_the_real_model():
    """transformers counts 8,190,735,360; the query and key norms (36 · 2 · 128) are not in the shape."""
    assert QWEN3_8B.num_params == 8_190_735_360 - 36 * 2 * 128


@pytest.mark.slow  # imports transformers
def test_parameters_equal_transformers_for_several_architectures():
    from torch import device
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "vocab_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    for kind in ("llama", "mistral"):
        config = AutoConfig.for_model(kind, **sizes, tie_word_embeddings=False)
        with device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert ModelShape.from_config(config.to_dict()).num_params == sum(p.numel() for p in model.parameters())


def test_recorded_experts_are_counted_where_they_lie():
    """4 prompts × 2 answers × 10 tokens, 2 layers, 2 of 4 experts a token, a byte each; two where there are more than 256."""
    shape = replace(TINY, num_experts=4, experts_per_token=2)
    asked = SamplingEngine(routed_experts="replay")
    work = Workload(
        samples=True,
        sequence_len=30,
        max_completion_length=10,
        num_prompts_per_step=4,
        num_generations=2,
        rollout=asked,
    )
    assert estimate_memory(shape, work).host == {"routed_experts": 320}
    assert estimate_memory(shape, replace(work, on_cpu=True), shards=2).parts["routed_experts"] == 320
    assert estimate_memory(replace(shape, num_experts=512), work).host == {"routed_experts": 640}
    assert estimate_memory(shape, replace(work, rollout=SamplingEngine())).host == {}
    assert estimate_memory(TINY, work).host == {}


def test_experts_count_in_full_for_memory_and_in_part_for_time():
    """Qwen3-30B-A3B: 30.5B parameters, 3.3B of them active."""
    shape = ModelShape.from_config({
        "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151936, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    })  # fmt: skip
    assert shape.num_params / 1e9 == pytest.approx(30.5, abs=0.1)
    assert shape.active_params / 1e9 == pytest.approx(3.3, abs=0.1)


def test_a_config_without_sizes_is_refused_by_name():
    with pytest.raises(ModelError, match=r"config.json has no num_hidden_layers, vocab_size; expected"):
        ModelShape.from_config({"hidden_size": 8})


def test_full_fine_tuning_holds_sixteen_bytes_a_parameter():
    parts = estimate_memory(TINY, Workload()).parts
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 16 * TINY.num_params
    small = estimate_memory(TINY, Workload(optim="adamw_8bit")).parts["optimizer"]
    assert small == pytest.approx(2 * TINY.num_params, rel=0.05)


def test_adapter_parameters_by_hand_and_by_peft():
    """Rank 16 on q, k, v, o of Qwen3-8B: 36 · 16 · (8192 + 5120 + 5120 + 8192) = 15.3M, as PEFT prints."""
    assert (
        adapter_params(QWEN3_8B, 16, ["q_proj", "k_proj", "v_proj", "o_proj"])
        == 36 * 16 * (8192 + 5120 + 5120 + 8192)
        == 15_335_424
    )
    assert adapter_params(QWEN3_8B, 16, r".*\.mlp\.(gate|up)_proj") == 36 * 16 * 2 * (4096 + 12288)
    assert adapter_params(QWEN3_8B, 16, [r".*\.mlp\.(gate|up)_proj"]) == 36 * 16 * 2 * (4096 + 12288)
    assert adapter_params(QWEN3_8B, 16, "all-linear") == 43_646_976


def test_a_base_in_8_bits_takes_a_byte_in_the_linear_modules():
    full = estimate_memory(QWEN3_8B, Workload(adapter="lora")).parts["weights"]
    eight = estimate_memory(QWEN3_8B, Workload(adapter="lora", load_in_8bit=True)).parts["weights"]
    assert full - eight == QWEN3_8B.linear_params


def test_qlora_weights_take_half_a_byte_in_the_linear_modules():
    full = estimate_memory(QWEN3_8B, Workload(adapter="lora")).parts["weights"]
    packed = estimate_memory(QWEN3_8B, Workload(adapter="qlora", load_in_4bit=True)).parts["weights"]
    plain = estimate_memory(
        QWEN3_8B, Workload(adapter="qlora", load_in_4bit=True, bnb_4bit_use_double_quant=False)
    ).parts["weights"]
    assert full == 2 * QWEN3_8B.num_params
    linear = QWEN3_8B.linear_params
    assert packed - (full - 2 * linear) == pytest.approx(linear * 0.5159, rel=1e-3)
    assert (plain - packed) * 8 / linear == pytest.approx(
        0.373, abs=0.002
    )  # bits a parameter that double quantisation saves (paper: 0.37)


def workload(kind, **keys):
    rewards = {"reward_funcs": ["exact_match"]} if STAGE_KINDS[kind].rewarded else {}
    made = STAGE_KINDS[kind].keys(base_model="m", datasets=[{"path": "d.jsonl"}], **rewards, **keys)
    demands = STAGE_KINDS[kind].demands(made)
    return Workload.from_keys(made.model_dump(), **demands, device_has_bf16=False, on_cpu=False)


@pytest.mark.parametrize(("kind", "keys", "held"), [
    ("sft", {}, False),
    ("dpo", {"loss_type": "sigmoid"}, False),
    ("dpo", {"loss_type": "sigmoid", "precompute_ref_log_probs": False}, True),
    ("dpo", {"loss_type": "kto"}, True),
    ("dpo", {"loss_type": "kto", "precompute_ref_log_probs": True}, True),
    ("dpo", {"loss_type": "kto", "adapter": "lora"}, False),
    ("dpo", {"loss_type": "sigmoid", "adapter": "lora"}, False),
    ("dpo", {"loss_type": "sigmoid", "precompute_ref_log_probs": True}, False),
    ("dpo", {"loss_type": "simpo"}, False),
    ("grpo", {"beta": 0.0}, False),
    ("grpo", {"beta": 0.04}, True),
])  # fmt: skip
def test_a_frozen_copy_is_counted_only_where_one_is_held(kind, keys, held):
    assert ("reference" in estimate_memory(TINY, workload(kind, **keys)).parts) == held


def test_pairs_are_two_sequences_a_row_and_labels_one():
    one = workload("sft").tokens(TINY)
    assert [workload("dpo", **keys).tokens(TINY) for keys in ({}, {"loss_type": "kto"})] == [2 * one, one]


def test_teachers_are_held_in_what_is_computed_with_and_shared_out_like_the_rest():
    alone, taught = Workload(bf16=True), Workload(bf16=True, teachers_held=(QWEN3_8B, TINY))
    plan = estimate_memory(TINY, taught)
    assert plan.parts["teachers"] == QWEN3_8B.num_params * 2 + TINY.num_params * TINY.stored_bytes
    assert plan.total_bytes - estimate_memory(TINY, alone).total_bytes == pytest.approx(
        1.05 * plan.parts["teachers"], rel=1e-6
    )
    assert estimate_memory(TINY, taught, shards=2).parts["teachers"] == pytest.approx(plan.parts["teachers"] / 2, abs=1)
    assert estimate_memory(TINY, replace(taught, bf16=False)).parts["teachers"] == 4 * (
        QWEN3_8B.num_params + TINY.num_params
    )


def test_a_critic_is_counted_with_gradients_and_optimizer_whatever_the_policy_trains():
    alone = Workload(bf16=True, samples=True, adapter="lora", load_in_4bit=True, per_device_train_batch_size=4)
    valued = replace(alone, critics_held=(TINY,))
    plan = estimate_memory(TINY, valued)
    assert plan.parts["critic"] == TINY.num_params * (4 + 4 + 8)
    assert (
        plan.parts["activations"]
        == estimate_memory(TINY, replace(alone, adapter="none", load_in_4bit=False)).parts["activations"]
    )
    assert plan.total_bytes > estimate_memory(TINY, alone).total_bytes + plan.parts["critic"]
    assert estimate_memory(TINY, valued, shards=2).parts["critic"] == pytest.approx(plan.parts["critic"] / 2, abs=1)
    assert estimate_memory(TINY, replace(valued, optim="paged_adamw")).parts["critic"] == TINY.num_params * (4 + 4)


def test_the_reference_is_a_float32_copy_whatever_the_file_holds():
    kto = estimate_memory(replace(QWEN3_8B, stored_bytes=2), workload("dpo", loss_type="kto"))
    assert kto.parts["reference"] == kto.parts["weights"] == 4 * QWEN3_8B.num_params


def test_phases_follow_each_other_and_only_the_largest_counts():
    """At the end a merge holds the model several times; training is over then. Checkpoints of a run that goes on are copies on the host."""
    lora = Workload(samples=True, adapter="lora", on_cpu=True, rollout_batch_size=8, max_completion_length=64)
    parts = estimate_memory(TINY, lora).parts
    always = sum(parts[name] for name in ("weights", "adapter", "optimizer", "runtime"))
    phases = [
        parts["gradients"] + parts["activations"] + parts["logits"],
        parts["kv_cache"] + parts["prefill"],
        parts["export"],
    ]
    assert estimate_memory(TINY, lora).total_bytes == int((always + max(phases)) * 1.05)
    saving = estimate_memory(TINY, replace(lora, save_steps=10))
    assert saving.total_bytes == int((always + saving.part("checkpoint") + max(phases)) * 1.05)
    assert saving.part("checkpoint") == parts["adapter"] + parts["optimizer"]
    assert not {"checkpoint", "export"} & estimate_memory(TINY, replace(lora, on_cpu=False)).parts.keys()


def test_prompts_that_are_encoded_in_parts_need_the_memory_of_one():
    def prefill(prompts):
        keys = {"max_completion_length": 64, "num_generations": 1, "sequence_len": 1088, "on_cpu": True}
        return estimate_memory(TINY, Workload(samples=True, rollout_batch_size=prompts, **keys)).parts["prefill"]

    assert 0 < prefill(4) < prefill(8)
    # The cache of completions, which takes the place of the forward's memory, grows with the rows.
    assert prefill(8) - prefill(16) == 8 * 65 * TINY.kv_bytes_per_token(2) < prefill(16)


def test_deltas_of_weights_hold_the_last_version_at_both_ends():
    def held(**rollout):
        keys = workload("grpo", rollout={"engine": "vllm", **rollout})
        return estimate_memory(TINY, replace(keys, on_cpu=True)).parts.get("weight_deltas", 0)

    assert held(transfer="copy") == 0
    assert held(transfer="delta", dtype="float32") == 2 * 4 * TINY.num_params
    assert held(transfer="delta", dtype="bfloat16") == 2 * 2 * TINY.num_params


def test_checkpointing_saves_most_activations_and_length_costs_in_proportion():
    def activations(**changes):
        return estimate_memory(QWEN3_8B, Workload(**changes)).parts["activations"]

    assert activations(gradient_checkpointing=True) < activations() / 10
    assert activations(sequence_len=4096) == 2 * activations(sequence_len=2048)


def test_the_flat_yaml_of_8b_does_not_fit_a_small_machine_and_the_line_says_so():
    keys = {
        "adapter": "qlora", "load_in_4bit": True, "lora_r": 16, "lora_target": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "sequence_len": 4096, "gradient_checkpointing": True, "bf16": True, "per_device_train_batch_size": 8, "learning_rate": 1e-4,
    }  # fmt: skip
    plan = estimate_memory(QWEN3_8B, Workload.from_keys(keys, device_has_bf16=False, on_cpu=False))
    assert (
        cannot_fit(plan, 4 * GIB)
        and not fits(plan, 16 * GIB)
        and fits(plan, 80 * GIB)
        and not cannot_fit(plan, 16 * GIB)
    )
    line = shortfall(plan, 4 * GIB, "Qwen/Qwen3-8B")
    assert re.match(
        r"Qwen/Qwen3-8B \(8\.2B\) does not fit: QLoRA needs 6\.\d GiB whatever the data \(.*\) and this machine has 4\.0 GiB free; no setting makes it fit",
        line,
    )
    assert "\n" not in line
    assert "may not fit" in shortfall(
        plan, 16 * GIB, "m"
    ) and "it would fit with per_device_train_batch_size: 1 (" in shortfall(plan, 16 * GIB, "m")


def test_the_remedy_is_one_that_fits():
    plan = estimate_memory(QWEN3_8B, Workload())
    line = shortfall(plan, 24 * GIB, "m")
    assert "full fine-tuning needs" in line and "adapter: lora" in line and "qlora" not in line
    assert "adapter: qlora" in shortfall(plan, 10 * GIB, "m") and "adapter: lora" not in shortfall(
        plan, 10 * GIB, "m"
    ).replace("adapter: qlora", "")
    promised = float(re.search(r"it would fit with .* \(([\d.]+) GiB\)", line)[1])
    assert promised <= 24


def test_a_model_without_that_many_positions_needs_no_memory_for_them():
    short = replace(QWEN3_8B, max_positions=512)
    assert estimate_memory(short, Workload(sequence_len=4096)) == replace(
        estimate_memory(short, Workload(sequence_len=512)), workload=Workload(sequence_len=4096)
    )


def test_frozen_weights_keep_the_type_they_were_saved_in():
    lora = Workload(adapter="lora")
    assert estimate_memory(replace(QWEN3_8B, stored_bytes=4), lora).parts["weights"] == 4 * QWEN3_8B.num_params


def test_the_container_limit_counts(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    assert available_bytes(meminfo, tmp_path) == 1000 * 1024
    (tmp_path / "memory.current").write_text("100\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_bytes(meminfo, tmp_path) == 4900
    assert available_bytes(tmp_path / "absent", tmp_path) is None


def test_a_run_that_ran_out_is_told_which_term_was_wrong_and_what_would_fit():
    """Activations needed twice what was counted: what is promised fits with that factor on what passes."""
    plan = estimate_memory(QWEN3_8B, Workload(adapter="lora", sequence_len=1024))
    held = {name: sum(plan.part(part) for part in parts) for name, parts in HELD.items()}
    needed = sum(held.values()) + 2 * plan.passing_bytes
    line = overrun(plan, held, needed, 60 * GIB, "this card")
    assert line.startswith("this card has 60.0 GiB; the plan counted ")
    assert "for activations, logits and caches, and" in line
    assert re.search(r"it would fit with gradient_checkpointing: true(, .*)? \(([\d.]+) GiB\)", line)
    assert float(re.search(r"it would fit with .* \(([\d.]+) GiB\)", line)[1]) <= 60


def test_weights_that_are_larger_than_planned_are_named_and_stay_so():
    plan = estimate_memory(QWEN3_8B, Workload(adapter="lora", sequence_len=512, per_device_train_batch_size=1))
    held = {name: sum(plan.part(part) for part in parts) for name, parts in HELD.items()}
    held["weights"] *= 2
    line = overrun(plan, held, sum(held.values()) + plan.passing_bytes, 30 * GIB, "this card")
    assert (
        f"counted {size_text(held['weights'] // 2)} for weights, and {size_text(held['weights'])} were needed" in line
    )


def test_what_was_planned_right_is_said_to_be():
    plan = estimate_memory(QWEN3_8B, Workload())
    held = {name: sum(plan.part(part) for part in parts) for name, parts in HELD.items()}
    assert "no term was larger than planned" in overrun(plan, held, sum(held.values()), 24 * GIB, "this card")


def test_a_paged_optimizer_leaves_a_gpu_and_stays_on_a_machine_without():
    assert "optimizer" not in estimate_memory(TINY, Workload(optim="paged_adamw")).parts
    on_cpu = [estimate_memory(TINY, Workload(optim=optim, on_cpu=True)).parts for optim in ("paged_adamw", "adamw")]
    assert on_cpu[0] == on_cpu[1]


def test_a_soft_cap_holds_scores_on_a_cpu_alone():
    """Two float32 scores a head, a layer and a pair of tokens: 2 layers · 2 heads · 2 · 4 bytes · 64 · 64."""
    capped, plain = replace(TINY, attention_softcap=True), TINY
    sizes = {
        on_cpu: [
            estimate_memory(shape, Workload(sequence_len=64, per_device_train_batch_size=1, on_cpu=on_cpu)).parts[
                "activations"
            ]
            for shape in (capped, plain)
        ]
        for on_cpu in (True, False)
    }
    assert sizes[True][0] - sizes[True][1] == 2 * 2 * 2 * 4 * 64 * 64
    assert sizes[False][0] == sizes[False][1]


def test_processes_share_what_is_trained_and_gather_a_layer_at_a_time():
    one, four = (estimate_memory(QWEN3_8B, Workload(), shards) for shards in (1, 4))
    for name in ("weights", "gradients", "optimizer"):
        assert four.part(name) == -(-one.part(name) // 4)
    layer = QWEN3_8B.linear_params // QWEN3_8B.num_layers
    assert four.part("gathered") == (2 * layer + QWEN3_8B.embedding_params) * (2 * 4 + 2)
    assert (
        "autocast" not in four.parts
        and "gathered" not in one.parts
        and four.part("activations") == one.part("activations")
    )


def test_an_export_holds_what_is_read_back_and_processes_share_it():
    """Tensors are cast one at a time while they are written, so no second copy is held."""

    def held(shards, **keys):
        return estimate_memory(QWEN3_8B, Workload(on_cpu=True, **keys), shards).part("export")

    def written(dtype):
        return held(1, save_dtype=dtype) - logits

    logits = 4 * 64 * QWEN3_8B.vocab * 4
    assert (written("bfloat16"), written("float32")) == (2 * QWEN3_8B.num_params, 4 * QWEN3_8B.num_params)
    gathered = 4 * (2 * QWEN3_8B.linear_params // QWEN3_8B.num_layers + QWEN3_8B.embedding_params)
    assert held(4) - logits - gathered == pytest.approx((held(1) - logits) / 4, abs=1)
    layer = QWEN3_8B.linear_params // QWEN3_8B.num_layers
    assert held(1, adapter="lora") - held(1) == 2 * QWEN3_8B.num_params + 4 * layer, "the base as its file holds it"
    in_shares = 4 * (QWEN3_8B.num_params + QWEN3_8B.linear_params) / 4
    assert held(4, adapter="lora") - held(4) == pytest.approx(in_shares, abs=1)


def test_a_base_in_4_bits_is_whole_on_every_process():
    quantised = Workload(adapter="qlora", load_in_4bit=True)
    one, four = (estimate_memory(QWEN3_8B, quantised, shards) for shards in (1, 4))
    assert four.part("weights") == one.part("weights") and four.part("optimizer") * 4 == pytest.approx(
        one.part("optimizer"), abs=4
    )


def test_more_processes_are_proposed_where_they_would_do():
    plan = estimate_memory(QWEN3_8B, Workload(gradient_checkpointing=True, per_device_train_batch_size=1), 2)
    line = shortfall(plan, 48 * GIB, "m")
    found = re.search(r"or with (\d+) processes", line)
    assert found and fits(estimate_memory(QWEN3_8B, plan.workload, int(found[1])), 48 * GIB)
    assert not fits(estimate_memory(QWEN3_8B, plan.workload, int(found[1]) // 2), 48 * GIB)


def test_keys_of_sharding_move_what_a_process_holds():
    def plan(**keys):
        how = ShardingPlan(**keys).on(4)
        return estimate_memory(QWEN3_8B, Workload(sharding=how), 16)

    usual, copies, node = plan(), plan(dp_shard_size=8), plan(dp_shard_size="node")
    for part in ("weights", "gradients", "optimizer"):
        assert copies.part(part) == pytest.approx(2 * usual.part(part), rel=1e-6)
        assert node.part(part) == pytest.approx(4 * usual.part(part), rel=1e-6)
    shared = plan(sp_size=4)
    assert shared.part("activations") == pytest.approx(usual.part("activations") / 4, rel=1e-6)
    assert shared.part("weights") == usual.part("weights")
    parallel = plan(tensor_parallel_size=4)
    assert parallel.part("weights") == usual.part("weights")
    assert usual.part("activations") / 4 < parallel.part("activations") < usual.part("activations")
    assert parallel.part("gathered") < usual.part("gathered")
    kept, once, half = plan(reshard_after_forward=False), plan(sync_each_batch=False), plan(param_dtype="bfloat16")
    assert kept.part("gathered") > QWEN3_8B.num_params * 4 > usual.part("gathered") > half.part("gathered")
    assert once.part("gradients") - usual.part("gradients") == QWEN3_8B.num_params * 4


def test_inputs_of_layers_and_frozen_layers_leave_a_gpu_for_the_machines_memory():
    """36 layers of 8 · 2048 tokens and 4096 float32 channels; of the layers two are on the card."""
    lora = Workload(adapter="lora", gradient_checkpointing=True)
    plain, inputs, layers = (
        estimate_memory(QWEN3_8B, replace(lora, **changes))
        for changes in ({}, {"gradient_checkpointing": "offload"}, {"layer_offloading": True})
    )
    one = 8 * 2048 * QWEN3_8B.hidden * 4
    assert plain.part("activations") - inputs.part("activations") == (QWEN3_8B.num_layers - 1) * one
    assert inputs.host == {"activations": QWEN3_8B.num_layers * one}
    # Each of several processes has inputs of its own; layers are offloaded by one alone.
    both = replace(lora, gradient_checkpointing="offload", layer_offloading=True)
    assert estimate_memory(QWEN3_8B, both, shards=8).host == inputs.host
    gone = plain.part("weights") - layers.part("weights")
    assert gone == pytest.approx(layers.copied_bytes * (QWEN3_8B.num_layers - 2) / QWEN3_8B.num_layers, rel=1e-3)
    assert layers.copied_to_train_bytes == 2 * gone
    assert gone < layers.host["layers"] < 2 * gone
    assert not plain.host and not plain.copied_bytes


def test_a_cpu_has_no_other_memory_to_put_them_in():
    lora = Workload(adapter="lora", gradient_checkpointing=True, on_cpu=True)
    plain, inputs, layers = (
        estimate_memory(QWEN3_8B, replace(lora, **changes))
        for changes in ({}, {"gradient_checkpointing": "offload"}, {"layer_offloading": True})
    )
    assert inputs.parts == plain.parts and not inputs.host
    assert layers.part("weights") > plain.part("weights") and not layers.host


def test_offloading_is_proposed_where_4_bits_alone_do_not_do():
    plan = estimate_memory(QWEN3_8B, Workload(adapter="qlora", load_in_4bit=True, sequence_len=512))
    assert "it would fit with gradient_checkpointing: offload (" in shortfall(plan, 9 * GIB, "m")
    assert "layer_offloading: true" in shortfall(plan, 5 * GIB, "m")
    assert "offload" not in shortfall(replace(plan, workload=replace(plan.workload, on_cpu=True)), 5 * GIB, "m")


@pytest.mark.parametrize(
    ("asks", "processes", "refused"),
    [
        ({"adapter": "lora"}, 2, ["layer_offloading"]),
        ({"adapter": "lora", "torch_compile": True}, 1, ["layer_offloading", "qlora"]),
    ],
)
def test_nothing_is_proposed_that_would_be_refused(asks, processes, refused):
    """Layers are offloaded in one process, and compiled in neither 4 bits nor a machine's memory."""
    lines = [
        shortfall(estimate_memory(QWEN3_8B, Workload(**asks), processes), available * GIB, "m")
        for available in range(2, 400, 6)
    ]
    assert any("it would fit with" in line for line in lines) and any("no setting" in line for line in lines)
    for line in lines:
        _, _, proposed = line.partition("free; ")
        assert not [key for key in refused if key in proposed], line


def test_full_fine_tuning_is_not_told_to_offload_what_it_trains():
    for available in range(4, 100, 4):
        line = shortfall(estimate_memory(QWEN3_8B, Workload()), available * GIB, "m")
        assert "layer_offloading" not in line or ("adapter: " in line and "gradient_checkpointing: " in line), line


def test_a_critic_is_counted_in_checkpoints_and_exports():
    keys = {
        **STAGE_KINDS["ppo"]
        .keys(base_model="m", datasets=[{"path": "d.jsonl"}], reward_funcs=["exact_match"])
        .model_dump(),
        "save_steps": 5,
        "save_total_limit": 2,
    }
    alone, valued = (
        forecast(
            TINY, Cluster(DEVICES["h100"], 1), "ppo", replace(workload("ppo"), critics_held=critics), keys
        ).disk_bytes
        for critics in ((), (TINY,))
    )
    assert valued == 2 * alone == 2 * (4 * 12 + TINY.stored_bytes) * TINY.num_params
