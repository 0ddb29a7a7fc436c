"""accelerate's configuration (FSDP 1 and 2) and DeepSpeed's JSON: every key mapped, noted or refused by name."""

import json

import pytest
import yaml

from posttrain.config.importers.convert import import_file
from posttrain.config.importers.read import read_foreign
from posttrain.config.importers.sharded import fsdp_words
from posttrain.config.sharding import ShardingKeys
from posttrain.errors import ConfigError

FSDP1 = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
enable_cpu_affinity: false
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_backward_prefetch: BACKWARD_PRE
  fsdp_forward_prefetch: true
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_sharding_strategy: FULL_SHARD
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_sync_module_states: true
  fsdp_use_orig_params: true
  fsdp_activation_checkpointing: true
machine_rank: 0
main_process_ip: 10.0.0.1
main_process_port: 29400
main_training_function: main
mixed_precision: bf16
num_machines: 2
num_processes: 16
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
FSDP2 = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: Qwen3DecoderLayer
  fsdp_offload_params: true
  fsdp_activation_checkpointing: false
  fsdp_cpu_ram_efficient_loading: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
mixed_precision: 'no'
num_machines: 1
num_processes: 8
"""
ZERO = {
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_gather_16bit_weights_on_model_save": True, "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
    },
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 100, "warmup_min_lr": 0, "warmup_max_lr": 1e-5}},
    "gradient_accumulation_steps": 2, "gradient_clipping": 1.0, "train_batch_size": 64, "train_micro_batch_size_per_gpu": 4,
    "steps_per_print": 2000, "wall_clock_breakdown": False,
}  # fmt: skip


@pytest.fixture
def imported(tmp_path):
    def read(content, name="file.yaml", tool=None):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return import_file(path, None, tool)

    return read


def test_accelerate_with_fsdp1_becomes_keys_and_the_torchrun_line(imported):
    found = imported(FSDP1)
    assert found.keys == {
        "sharding": {"reshard_after_forward": True}, "gradient_checkpointing": True, "bf16": True, "num_processes": 16,
        "device": "auto",
    }  # fmt: skip
    assert not found.whole
    line = "torchrun --nproc-per-node 8 --nnodes 2 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29400 --rdzv-id run --no-python posttrain sft stage.yaml"
    assert line in found.text
    assert "mapped from fsdp_config.fsdp_sharding_strategy; FULL_SHARD there" in found.text
    assert yaml.safe_load(found.text) == found.keys


def test_accelerate_with_fsdp2_says_what_it_does_in_another_way(imported):
    found = imported(FSDP2)
    assert found.keys == {
        "sharding": {"reshard_after_forward": False}, "gradient_checkpointing": False, "bf16": False, "num_processes": 8,
    }  # fmt: skip
    assert "torchrun --nproc-per-node 8 --no-python posttrain sft stage.yaml" in found.text
    assert "fsdp_config.fsdp_offload_params: changed because shares are not offloaded here" in found.text


def test_every_key_of_a_deepspeed_file_has_its_note(imported):
    found = imported(ZERO, "ds.json")
    assert found.keys == {
        "bf16": True, "optim": "adamw", "learning_rate": 1e-5, "adam_epsilon": 1e-8, "adam_beta1": 0.9, "adam_beta2": 0.95,
        "lr_scheduler_type": "linear", "warmup_steps": 10, "max_steps": 100, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0,
        "per_device_train_batch_size": 4, "num_processes": 8, "sharding": {"reshard_after_forward": True},
    }  # fmt: skip
    for said in (
        "mapped from zero_optimization.stage; 3 there; FSDP2 shards here",
        "zero_optimization.offload_optimizer.device: changed because shares are not offloaded here",
        "zero_optimization.offload_param.device: left out because none asks for nothing",
        "optimizer.params.weight_decay: left out because it is unset",
    ):
        assert said in found.text, said


REFUSED = [
    (FSDP2.replace("'no'", "fp8"), "mixed_precision: fp8 has no counterpart here"),
    (FSDP2.replace("distributed_type: FSDP", "distributed_type: MEGATRON_LM"), "distributed_type: MEGATRON_LM has no counterpart here"),
    (FSDP2 + "main_process_prot: 1\n", "main_process_prot: no key of accelerate's that is known here.*main_process_port"),
    (FSDP2 + "parallelism_config: {parallelism_config_cp_size: 2}\n", "parallelism_config_cp_size: 2: that is not done here"),
    ({**ZERO, "fp16": {"enabled": True}}, "fp16.enabled: true: there is no float16 training here"),
    ({**ZERO, "train_batch_size": 60}, "train_batch_size: 60 is not told apart"),
    ({**ZERO, "compression_training": {"weight_quantization": {}}, "eigenvalue": {"enabled": True}}, "eigenvalue.enabled: no key of DeepSpeed's"),
    ({**ZERO, "scheduler": {"type": "OneCycle"}}, "scheduler.type: OneCycle has no counterpart here"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_has_no_counterpart_is_refused_by_name(content, message, imported):
    with pytest.raises(ConfigError, match=message):
        imported(content, "file.json" if isinstance(content, dict) else "file.yaml")


def test_the_words_of_fsdp():
    assert fsdp_words("full_shard auto_wrap") == {"reshard_after_forward": True}
    assert fsdp_words("shard_grad_op offload") == {"reshard_after_forward": False}
    assert fsdp_words(True) == fsdp_words(["full_shard"])
    with pytest.raises(KeyError):
        fsdp_words("full_shard autowrap")


COPIES = FSDP2.replace(
    "num_processes: 8", "num_processes: 8\nparallelism_config: {parallelism_config_dp_replicate_size: 2}"
)
SHARDED = [
    (FSDP1.replace("FULL_SHARD", "HYBRID_SHARD"), {"dp_shard_size": "node", "reshard_after_forward": True}),
    (FSDP1.replace("FULL_SHARD", "5"), {"dp_shard_size": "node", "reshard_after_forward": False}),
    (FSDP1.replace("FULL_SHARD", "NO_SHARD"), {"dp_shard_size": 1}),
    (COPIES, {"reshard_after_forward": False, "dp_shard_size": 4}),
    (COPIES.replace("replicate_size: 2", "shard_size: 2"), {"reshard_after_forward": False, "dp_shard_size": 2}),
    (COPIES.replace("dp_replicate_size", "sp_size"), {"reshard_after_forward": False, "sp_size": 2}),
    (COPIES.replace("dp_replicate_size: 2", "sp_size: 2, parallelism_config_dp_shard_size: 4"), {"reshard_after_forward": False, "dp_shard_size": 8, "sp_size": 2}),
    (COPIES.replace("size: 2", "size: 2, parallelism_config_dp_shard_size: 2, parallelism_config_sp_size: 2"), {"reshard_after_forward": False, "dp_shard_size": 4, "sp_size": 2}),
    ({**ZERO, "zero_optimization": {"stage": 1}}, {"reshard_after_forward": False, "sync_each_batch": False}),
    ({**ZERO, "zero_optimization": {"stage": 2}, "communication_data_type": "bf16"}, {"reshard_after_forward": False, "reduce_dtype": "bfloat16"}),
    ({**ZERO, "zero_optimization": {"stage": 3, "mics_shard_size": 8}}, {"reshard_after_forward": True, "dp_shard_size": 8}),
]  # fmt: skip


@pytest.mark.parametrize(("content", "sharding"), SHARDED, ids=[str(sharding) for _, sharding in SHARDED])
def test_strategies_and_stages_become_keys_of_sharding(content, sharding, imported):
    keys = imported(content, "file.json" if isinstance(content, dict) else "file.yaml").keys
    assert keys["sharding"] == sharding
    ShardingKeys.model_validate(keys["sharding"])


FLAGS = [("full_shard auto_wrap", {"reshard_after_forward": True}), ("false", None)]


@pytest.mark.parametrize(("words", "sharding"), FLAGS)
def test_the_flag_of_trl_becomes_keys_of_sharding(words, sharding, tmp_path):
    (tmp_path / "trl.sh").write_text(f'trl sft --model_name_or_path m --dataset_name d --fsdp "{words}"\n')
    assert read_foreign(tmp_path / "trl.sh").convert().keys.get("sharding") == sharding


def test_an_unknown_word_of_the_flag_is_refused(tmp_path):
    (tmp_path / "trl.sh").write_text('trl sft --model_name_or_path m --dataset_name d --fsdp "full_shrad"\n')
    (refusal,) = read_foreign(tmp_path / "trl.sh").convert().refusals
    assert refusal.key == "fsdp"
    assert "full_shrad has no counterpart here" in refusal.why
