import dataclasses
import re

import pytest
from trl import DPOConfig, GRPOConfig, ModelConfig, RewardConfig, SFTConfig
from trl.experimental.gkd import GKDConfig
from trl.experimental.online_dpo import OnlineDPOConfig

from posttrain.config import load_stage
from posttrain.config.datasets import DatasetKeys
from posttrain.config.foreign import CONVERTED_NAMES, CONVERTED_VALUES, NO_COUNTERPART, foreign_names, unknown_key
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.schema import keys_of
from posttrain.errors import ConfigError

MINIMAL = "base_model: ./base\ndatasets: [{path: sft_data.jsonl}]\n"


def load(write, line, kind="sft"):
    text = MINIMAL + ("reward_funcs: [a, b]\n" if kind == "grpo" else "") + line + "\n"
    return load_stage(kind, write(text))


@pytest.mark.parametrize(
    ("kind", "line", "key", "value"),
    [
        ("sft", "cutoff_len: 512", "sequence_len", 512),
        ("sft", "micro_batch_size: 4", "per_device_train_batch_size", 4),
        ("sft", "num_epochs: 3", "num_train_epochs", 3.0),
        ("sft", "lr: 1e-4", "learning_rate", 1e-4),
        ("sft", "lr_scheduler: linear", "lr_scheduler_type", "linear"),
        ("sft", "lr_scheduler_type: constant_with_warmup", "lr_scheduler_type", "constant"),
        ("sft", "optimizer: adamw_torch_fused", "optim", "adamw"),
        ("sft", "finetuning_type: full", "adapter", "none"),
        ("sft", "use_peft: true", "adapter", "lora"),
        ("sft", "adapter: lora\nquantization_bit: 4", "load_in_4bit", True),
        ("sft", "lora_rank: 4", "lora_r", 4),
        ("sft", "lora_target: all", "lora_target", "all-linear"),
        ("sft", "lora_target: q_proj,v_proj", "lora_target", ["q_proj", "v_proj"]),
        ("sft", "lora_target: '.*q_proj'", "lora_target", ".*q_proj"),
        ("sft", "lora_target_modules: [q_proj]", "lora_target", ["q_proj"]),
        ("sft", "lora_target_linear: true", "lora_target", "all-linear"),
        ("sft", "train_on_inputs: false", "train_on", "assistant"),
        ("sft", "roles_to_train: [assistant]", "train_on", "assistant"),
        ("sft", "use_dft_loss: true", "loss_type", "dft"),
        ("sft", "assistant_only_loss: false", "train_on", "all"),
        ("sft", "excess_length_strategy: raise", "overflow", "error"),
        ("sft", "disable_gradient_checkpointing: false", "gradient_checkpointing", True),
        ("dpo", "pref_beta: 0.3", "beta", 0.3),
        ("dpo", "pref_loss: kto_pair", "loss_type", "kto"),
        ("grpo", "scale_rewards: false", "scale_rewards", "none"),
        ("grpo", "group_size: 4", "num_generations", 4),
    ],
)
def test_other_tools_names_and_values_are_read_with_a_note(write, kind, line, key, value):
    loaded = load(write, line, kind)
    assert getattr(loaded.keys, key) == value
    foreign_value = value == ".*q_proj"
    assert any("read as" in note for note in loaded.notes) is not foreign_value


def test_notes_say_whose_name_it_was(write):
    notes = load(write, "adapter: lora\ncutoff_len: 512\nlora_target_linear: true\noptim: adamw_torch").notes
    assert notes == (
        "lora_target_linear is Axolotl's name; read as lora_target: all-linear",
        "cutoff_len is LLaMA-Factory's name; read as sequence_len",
        "optim: adamw_torch is read as adamw",
    )


def test_names_inside_a_dataset_are_read_too(write):
    loaded = load_stage(
        "sft",
        write(
            "base_model: ./base\ndatasets: [{path: sft_data.jsonl, type: chat_template, field_messages: conversations}]\n"
        ),
    )
    assert loaded.keys.datasets[0].type == "chat"
    assert loaded.keys.datasets[0].columns == {"messages": "conversations"}
    assert loaded.provenance["datasets.1.columns"] == "train.yaml:2"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sequence_len: 8\ncutoff_len: 512", "train.yaml:4: cutoff_len: is LLaMA-Factory's name for sequence_len, which is set too"),
        ("finetuning_type: oft", "train.yaml:3: finetuning_type: is LLaMA-Factory's name for adapter; its value oft has no counterpart; set adapter: one of none, lora, qlora"),
        ("quantization_bit: 8", "its value 8 has no counterpart"),
        ("roles_to_train: [user, assistant]", "its value [user, assistant] has no counterpart"),
        ("cutoff_len: long", "train.yaml:3: sequence_len: got 'long', expected an integer"),
        ("fp16: true", "fp16 is Axolotl's and LLaMA-Factory's and TRL's key and has no counterpart here; bf16 or fp32 only"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_why(write, line, expected):
    with pytest.raises(ConfigError) as caught:
        load(write, line)
    assert expected in str(caught.value)


def test_no_name_is_both_read_and_refused():
    models = [*(row.keys for row in STAGE_KINDS.values()), DatasetKeys]
    ours = {name for model in models for name in keys_of(model)}
    read = {name for model in models for name in foreign_names(model)}
    assert not read & set(NO_COUNTERPART)
    assert not ours & set(NO_COUNTERPART)
    assert set(CONVERTED_NAMES) <= read
    assert set(CONVERTED_VALUES) <= ours


@pytest.mark.parametrize("model", [*(row.keys for row in STAGE_KINDS.values()), DatasetKeys])
def test_no_foreign_name_is_lost_to_ambiguity(model):
    names = [other.name for info in keys_of(model).values() for other in info.also]
    assert sorted(names) == sorted(foreign_names(model))


@pytest.mark.parametrize(
    "line",
    [
        "adapter: lora\nlora_target_linear: true\nlora_target_modules: [q_proj]",
        "sequence_len: 8\ncutoff_len: 512",
        "roles_to_train: [user, assistant]",
    ],
)
def test_a_refused_foreign_name_is_refused_once(write, line):
    with pytest.raises(ConfigError) as caught:
        load(write, line)
    assert len(str(caught.value).splitlines()) == 1


OF_OTHER_TOOLS = {
    "sft": [field.name for config in (SFTConfig, ModelConfig) for field in dataclasses.fields(config)],
    "dpo": [field.name for config in (DPOConfig, ModelConfig) for field in dataclasses.fields(config)],
    "reward_model": [field.name for config in (RewardConfig, ModelConfig) for field in dataclasses.fields(config)],
    "process_reward_model": [
        field.name for config in (RewardConfig, ModelConfig) for field in dataclasses.fields(config)
    ],
    "grpo": [field.name for config in (GRPOConfig, ModelConfig) for field in dataclasses.fields(config)],
    "ppo": [field.name for config in (GRPOConfig, ModelConfig) for field in dataclasses.fields(config)],
    "online_dpo": [field.name for config in (OnlineDPOConfig, ModelConfig) for field in dataclasses.fields(config)],
    "distill": [field.name for config in (GKDConfig, ModelConfig) for field in dataclasses.fields(config)],
    "ebft": [field.name for config in (SFTConfig, ModelConfig) for field in dataclasses.fields(config)],
}
NAMES_SEEN = [
    "adam_eps",
    "auto_find_batch_size",
    "dataset_prepared_path",
    "dataset_processes",
    "eval_sample_packing",
    "evals_per_epoch",
    "flash_attn",
    "gpu_memory_limit",
    "gradient_checkpointing_kwargs",
    "hub_model_id",
    "hub_strategy",
    "include_num_input_tokens_seen",
    "lisa_n_layers",
    "lisa_step_interval",
    "load_best_model_at_end",
    "loraplus_lr_ratio",
    "lora_fan_in_fan_out",
    "lora_mlp_kernel",
    "lora_model_dir",
    "lora_o_kernel",
    "lora_qkv_kernel",
    "max_samples",
    "mix_strategy",
    "neat_packing",
    "neftune_noise_alpha",
    "oft_target",
    "oft_rank",
    "overwrite_cache",
    "pissa_init",
    "preprocessing_num_workers",
    "reinit_weights",
    "relora_steps",
    "report_to",
    "rope_scaling",
    "s2_attention",
    "sample_packing_eff_est",
    "save_only_model",
    "save_safetensors",
    "saves_per_epoch",
    "shuffle_merged_datasets",
    "special_tokens",
    "streaming",
    "tokenized_path",
    "trust_remote_code",
    "unfrozen_parameters",
    "upcast_layernorm",
    "use_badam",
    "use_dft_loss",
    "use_galore",
    "use_unsloth",
    "val_size",
    "wandb_name",
    "weight_decay",
    "xformers_attention",
]
"""Of configurations of Axolotl and LLaMA-Factory."""
MEANS_THE_SAME = {
    "adam_eps": "adam_epsilon",
    "vllm_importance_sampling_correction": "importance_sampling_correction",
}
"""Name of another tool → the key that is suggested for it, which a person has found to mean the same."""


@pytest.mark.parametrize("kind", STAGE_KINDS)
def test_no_name_of_another_tool_is_taken_for_a_typo_of_a_key_that_means_something_else(kind):
    model = STAGE_KINDS[kind].keys
    unknown = [n for n in (*OF_OTHER_TOOLS[kind], *NAMES_SEEN) if n not in keys_of(model) | foreign_names(model)]
    assert len(unknown) > 100, "the walk sees the names of the other tools"
    suggested = {n: re.findall(r"did you mean (\w+)", unknown_key(n, kind, [model])) for n in unknown}
    assert {n: keys[0] for n, keys in suggested.items() if keys}.items() <= MEANS_THE_SAME.items()
