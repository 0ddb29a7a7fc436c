"""Files of other tools, all the way to a YAML that the strict loader takes."""

import json

import pytest

from posttrain.config import load_stage
from posttrain.config.importers.convert import import_file
from posttrain.config.importers.read import TOOLS, read_foreign
from posttrain.config.sharding import ShardingKeys
from posttrain.errors import ConfigError

AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
datasets: [{path: teknium/GPT4-LLM-Cleaned, type: alpaca}]
val_set_size: 0.1
adapter: qlora
load_in_4bit: true
load_in_8bit: false
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_steps: 10
wandb_project:
bf16: auto
flash_attention: true
"""
LLAMAFACTORY = """\
model_name_or_path: Qwen/Qwen3-8B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: mine
template: qwen3
cutoff_len: 1024
learning_rate: 1.0e-4
"""
TRL_COMMAND = """\
#!/bin/bash
export A=b
accelerate launch --num_processes 2 trl/scripts/dpo.py \\
    --model_name_or_path Qwen/Qwen2-0.5B-Instruct \\
    --dataset_name trl-lib/ultrafeedback_binarized \\
    --learning_rate 5e-7 --per_device_train_batch_size=2 \\
    --use_peft --lora_target_modules q_proj v_proj --beta 0.2
"""


@pytest.fixture
def imported(tmp_path):
    def run(text, name="theirs.yaml", **options):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "mine.json").write_text("[]")
        (tmp_path / "data" / "pairs.json").write_text("[]")
        info = {
            "mine": {"file_name": "mine.json", "columns": {"prompt": "q", "response": "a"}},
            "pairs": {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt"},
            "calls": {"file_name": "mine.json", "formatting": "sharegpt", "columns": {"tools": "tools"}},
        }
        (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
        (tmp_path / name).write_text(text)
        out = tmp_path / "ours.yaml"
        made = import_file(tmp_path / name, out, **options)
        return made, load_stage(made.kind, out)

    return run


def test_an_axolotl_yaml_becomes_one_that_the_loader_takes(imported):
    made, loaded = imported(AXOLOTL)
    keys = loaded.keys
    assert made.kind == "sft"
    assert (keys.adapter, keys.lora_r, keys.lora_target) == ("qlora", 32, "all-linear")
    assert (keys.per_device_train_batch_size, keys.gradient_accumulation_steps, keys.packing) == (2, 4, True)
    assert (keys.optim, keys.val_size, keys.warmup_steps) == ("adamw_8bit", 0.1, 10)
    assert not [note for note in loaded.notes if "read as" in note]


def test_an_alpaca_row_is_written_as_axolotl_writes_it(imported):
    source = imported(AXOLOTL)[1].keys.datasets[0]
    assert source.type == "completion"
    with_input, without = source.prompt_format
    assert with_input.endswith("### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")
    assert without.endswith("request.\n\n### Instruction:\n{instruction}\n\n### Response:\n")


def test_every_key_of_the_file_stands_in_the_comments(imported):
    text = imported(AXOLOTL)[0].text
    for line in AXOLOTL.splitlines():
        key = line.partition(":")[0]
        assert f"from {key}" in text or f"# {key}: " in text, key


def test_the_comments_say_each_fate(imported):
    text = imported(AXOLOTL)[0].text
    assert "learning_rate: 0.0002  # mapped from learning_rate" in text
    assert "bf16: auto  # mapped from bf16; the default here" in text
    assert "# wandb_project: left out because it is unset, so the default applies" in text
    assert "# flash_attention: left out because attention and kernels are chosen for the machine here" in text
    assert "load_in_8bit: false  # mapped" in text


def test_llamafactory_data_is_looked_up_and_its_defaults_are_written_out(imported):
    made, loaded = imported(LLAMAFACTORY)
    assert loaded.keys.datasets[0].columns == {"instruction": "q", "output": "a"}
    assert loaded.keys.datasets[0].path.endswith("data/mine.json")
    assert "path: ./data/mine.json" in made.text
    assert (loaded.keys.lora_alpha, loaded.keys.overflow, loaded.keys.num_train_epochs) == (16, "truncate", 3.0)
    assert any("LLaMA-Factory's default" in note for note in made.notes)


def test_a_trl_command_line_is_read_from_a_script(imported):
    made, loaded = imported(TRL_COMMAND, "run.sh")
    assert made.kind == "dpo"
    assert (loaded.keys.beta, loaded.keys.learning_rate, loaded.keys.lora_target) == (0.2, 5e-7, ["q_proj", "v_proj"])
    assert (loaded.keys.lora_dropout, loaded.keys.num_train_epochs) == (0.05, 3.0)


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, {}),
        ({"loss_type": ["ipo"], "f_divergence_type": "js_divergence"}, {"loss_type": "ipo"}),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3, "beta": 0.2}, {}),
        ({"ld_alpha": 0.5, "use_weighting": True, "beta": 0.2}, {}),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 8, "beta": 0.2}, {}),
    ],
)
def test_what_trl_weighs_preferences_by_is_asked_for_here(imported, given, ours):
    lines = "model_name_or_path: a/b\ndataset_name: c/d\n" + "".join(
        f"{key}: {json.dumps(value)}\n" for key, value in given.items()
    )
    made, loaded = imported(lines)
    assert made.kind == "dpo"
    assert loaded.keys.model_dump(include=set(given)) == given | ours


def test_trls_share_of_uncertain_tokens_is_asked_for_here(imported, tmp_path):
    (tmp_path / "my_rewards.py").write_text("def correct(completions, **_):\n    return [0.0] * len(completions)\n")
    made, loaded = imported(
        "model_name_or_path: a/b\ndataset_name: c/d\nreward_funcs: [my_rewards.correct]\ntop_entropy_quantile: 0.2\n"
    )
    assert (made.kind, loaded.keys.top_entropy_quantile) == ("grpo", 0.2)


def test_axolotls_losses_and_weighting_are_asked_for_here(imported):
    _, loaded = imported(
        AXOLOTL.replace("type: alpaca", "type: chat_template.default")
        + "rl: dpo\ndpo_loss_type: [sigmoid, ipo]\ndpo_use_weighting: true\n"
    )
    assert (loaded.keys.loss_type, loaded.keys.use_weighting) == (["sigmoid", "ipo"], True)


def test_entropy_adaptive_fine_tuning_is_asked_for_here(imported):
    axolotl = imported(AXOLOTL + "use_eaft: true\neaft_alpha: 0.5\neaft_k: 10\n")[1].keys
    assert (axolotl.loss_type, axolotl.eaft_alpha, axolotl.eaft_k) == ("eaft", 0.5, 10)
    llamafactory = imported(LLAMAFACTORY + "use_eaft_loss: true\n")[1].keys
    assert (llamafactory.loss_type, llamafactory.eaft_alpha, llamafactory.eaft_k) == ("eaft", 1.0, 20)
    assert imported(AXOLOTL + "use_eaft: false\neaft_alpha: 0.5\n")[1].keys.loss_type == "nll"


def test_experts_in_mxfp4_are_taken_where_they_are_unpacked_there_too(imported):
    key = "model_quantization_config"
    text = imported(AXOLOTL + f"{key}: Mxfp4Config\n{key}_kwargs: {{dequantize: true}}\n")[0].text
    assert f"# {key}: left out because experts in MXFP4 are always unpacked" in text
    for given in (f"{key}: Mxfp4Config\n", f"{key}: FineGrainedFP8Config\n{key}_kwargs: {{dequantize: true}}\n"):
        with pytest.raises(ConfigError, match=rf"{key}: \w+: the base is trained as stored.*; set "):
            imported(AXOLOTL + given)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("", "sft"),
        ("rl: dpo", "dpo"),
        ("rl: kto", "dpo"),
        ("reward_model: false", "sft"),
        ("rl: false", "sft"),
        ("reward_model: true", "reward_model"),
        ("process_reward_model: true", "process_reward_model"),
        ("rl: gdpo", "grpo"),
    ],
)
def test_the_stage_comes_from_the_keys(tmp_path, line, kind):
    (tmp_path / "a.yaml").write_text(AXOLOTL + line + "\n")
    assert read_foreign(tmp_path / "a.yaml").convert().kind == kind


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        ("reward_model: true\nrl: dpo", "rl: dpo beside reward_model: true are two stages; keep one of the two"),
        (
            "reward_model: true",
            "datasets.1.type: alpaca: a prompt style that is not known here; known are bradley_terry.chat_template",
        ),
        (
            "process_reward_model: true",
            "datasets.1.type: alpaca: a prompt style that is not known here; known are stepwise_supervised",
        ),
        (
            "process_reward_model: true\nreward_model: true",
            "reward_model: true beside process_reward_model: true are two stages; keep one of the two",
        ),
        ("process_reward_model: true\nnum_labels: 3", "num_labels: 3: a step is right or wrong; set 2"),
        ("rl: ppo", "rl: ppo: no such method here; set rl: dpo"),
        (
            "processor_type: AutoProcessor",
            "processor_type: AutoProcessor: images, audio and video are not trained here; name",
        ),
        (
            "rl: orpo\nneftune_noise_alpha: 5",
            "neftune_noise_alpha: 5: noise on the embeddings is added in sft only; take it out",
        ),
        (
            "save_strategy: epoch\nmax_steps: 9",
            "save_strategy: epoch with max_steps: the steps of an epoch are known only",
        ),
        (
            "no_such_key: 3",
            "no_such_key: no key of Axolotl's that is known here; it may change what is learned; take it out",
        ),
        (
            "chat_template: chatml\ntest_datasets: [{path: a/b, type: nonsense}]",
            "test_datasets.1.type: nonsense: a prompt style",
        ),
        (
            "test_datasets: [{path: a/b, type: chat_template, split_thinking: true}]",
            "test_datasets.1.split_thinking: True: it has",
        ),
        ("plugins: [axolotl.integrations.kd.KDPlugin]", "plugins: axolotl.integrations.kd.KDPlugin: what it does"),
    ],
)
def test_what_changes_what_is_learned_is_refused_with_what_to_do(tmp_path, line, refusal):
    (tmp_path / "a.yaml").write_text(AXOLOTL + line + "\n")
    with pytest.raises(ConfigError) as caught:
        import_file(tmp_path / "a.yaml", tmp_path / "ours.yaml")
    assert refusal in str(caught.value)
    assert not (tmp_path / "ours.yaml").exists()


@pytest.mark.parametrize("off", ["null", "false", "0", "0.0", "''", "[]"])
def test_a_key_that_asks_for_nothing_is_no_obstacle(imported, off):
    made, _ = imported(AXOLOTL + f"neftune_noise_alpha: {off}\nlora_model_dir: {off}\nrelora: {off}\n")
    assert "# relora: left out" in made.text


def test_two_keys_that_contradict_each_other_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(AXOLOTL + "dpo_beta: 0.1\nrl_beta: 0.2\nrl: dpo\n")
    with pytest.raises(ConfigError, match=r"rl_beta: 0.2 stands against beta: 0.1 from dpo_beta; keep one"):
        import_file(tmp_path / "a.yaml", None)


def test_preferences_for_another_stage_are_refused(imported):
    with pytest.raises(ConfigError, match="it holds preferences and the stage is sft"):
        imported(LLAMAFACTORY.replace("dataset: mine", "dataset: pairs"))


def test_names_without_dataset_info_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(LLAMAFACTORY + "dataset_dir: nowhere\n")
    with pytest.raises(ConfigError, match=r"names in nowhere/dataset_info.json, which was not found"):
        import_file(tmp_path / "a.yaml", None)


def test_a_template_by_name_needs_a_model_that_carries_it(imported):
    assert any("qwen3 is the format" in note for note in imported(LLAMAFACTORY)[0].notes)
    with pytest.raises(ConfigError, match="template: solar: a template by name, and Qwen3-8B is not known to carry it"):
        imported(LLAMAFACTORY.replace("template: qwen3", "template: solar"))


def test_a_template_of_another_tools_name_is_the_one_here_that_renders_the_same(imported):
    loaded = imported(LLAMAFACTORY.replace("template: qwen3", "template: llama3"))[1]
    assert loaded.keys.chat_template.endswith("/llamafactory_llama3.jinja")
    assert loaded.keys.special_tokens == {"eos_token": "<|eot_id|>"}
    words = imported(LLAMAFACTORY.replace("template: qwen3", "template: default"))[1].keys.chat_template
    assert words.endswith("/llamafactory_default.jinja"), "a format of that name, not the tokenizer's own"
    text = AXOLOTL.replace("type: alpaca", "type: chat_template") + "chat_template: falcon_h1\n"
    assert imported(text)[1].keys.chat_template.endswith("/axolotl_falcon_h1.jinja")


def test_rows_with_tools_are_left_to_the_tokenizers_own_template(imported):
    text = LLAMAFACTORY.replace("template: qwen3", "template: qwen3_nothink").replace("dataset: mine", "dataset: calls")
    assert imported(text.replace("calls", "mine"))[1].keys.chat_template.endswith("/llamafactory_chatml.jinja")
    assert imported(text)[1].keys.chat_template is None
    with pytest.raises(
        ConfigError, match=r"template: phi4: .* not known to carry it, and its own template here writes no tools"
    ):
        imported(text.replace("qwen3_nothink", "phi4"))


def test_a_file_of_no_tool_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("some: thing\n")
    with pytest.raises(ConfigError, match="no key says which tool it is for"):
        import_file(tmp_path / "a.yaml", None)


@pytest.mark.parametrize("tool", TOOLS)
def test_the_tool_is_told_by_its_keys(tmp_path, tool):
    texts = {
        "axolotl": AXOLOTL,
        "llamafactory": LLAMAFACTORY,
        "trl": "model_name_or_path: a/b\ndataset_name: c/d\nmax_length: 9\n",
        "torchtune": "model: {_component_: a.b}\nbatch_size: 2\nepochs: 1\noptimizer: {_component_: c.d}\n",
        "openrlhf": "pretrain: a/b\nmicro_train_batch_size: 2\n",
        "verl": "actor_rollout_ref: {model: {path: a/b}, rollout: {n: 2}}\nalgorithm: {adv_estimator: grpo}\n",
    }
    (tmp_path / "a.yaml").write_text(texts[tool])
    assert read_foreign(tmp_path / "a.yaml").tool is TOOLS[tool]


@pytest.mark.parametrize("line", ["", "no_such_key: 3\n"])
def test_a_file_of_another_tool_is_run_in_place(tmp_path, line):
    (tmp_path / "a.yaml").write_text(AXOLOTL + line)
    if line:
        with pytest.raises(ConfigError, match=r"a.yaml:\d+: no_such_key: no key of Axolotl's that is known here"):
            load_stage("sft", tmp_path / "a.yaml")
        return
    loaded = load_stage("sft", tmp_path / "a.yaml", ["learning_rate=1e-5"])
    out = tmp_path / "ours.yaml"
    import_file(tmp_path / "a.yaml", out)
    written = load_stage("sft", out, ["learning_rate=1e-5"])
    assert loaded.keys.model_dump(exclude={"output_dir"}) == written.keys.model_dump(exclude={"output_dir"})
    assert "per_device_train_batch_size: mapped from micro_batch_size" in loaded.notes
    assert loaded.provenance["per_device_train_batch_size"] == "a.yaml:13"


def test_a_file_for_another_stage_says_which(tmp_path):
    (tmp_path / "a.yaml").write_text(AXOLOTL.replace("type: alpaca", "type: chat_template.default") + "rl: dpo\n")
    with pytest.raises(ConfigError, match="this Axolotl file is for dpo; run posttrain dpo"):
        load_stage("sft", tmp_path / "a.yaml")


def test_parameters_of_experts_are_named_among_the_modules(imported):
    text = AXOLOTL.replace(
        "lora_target_linear: true", "lora_target_modules: [q_proj]\nlora_target_parameters: [mlp.experts.gate_up_proj]"
    )
    assert imported(text)[1].keys.lora_target == ["q_proj", "mlp.experts.gate_up_proj"]
    text = text.replace("[q_proj]", r"'.*layers\.\d+\.self_attn\.[qv]_proj'")
    assert imported(text)[1].keys.lora_target == [r".*layers\.\d+\.self_attn\.[qv]_proj", "mlp.experts.gate_up_proj"]


def test_the_constant_schedule_has_no_warmup_there(imported):
    keys = imported(AXOLOTL.replace("lr_scheduler: cosine", "lr_scheduler: constant"))[1].keys
    assert (keys.lr_scheduler_type, keys.warmup_steps, keys.warmup_ratio) == ("constant", 0, 0.0)


def test_single_files_of_a_hub_dataset_are_kept(imported):
    text = AXOLOTL.replace("type: alpaca}", "type: alpaca, data_files: [a.jsonl]}")
    assert imported(text)[1].keys.datasets[0].data_files == ["a.jsonl"]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("gradient_checkpointing: offload\nlayer_offloading: true", ("offload", True)),
        ("gradient_checkpointing: unsloth\nlayer_offloading: false", ("offload", False)),
        ("gradient_checkpointing: true\nlayer_offloading: true\nadapter:\nload_in_4bit: false", (True, False)),
        ("gradient_checkpointing: false\nlayer_offloading: true", (False, False)),
    ],
)
def test_what_axolotl_offloads_is_offloaded_where_it_can_be(lines, found, imported):
    changed = {line.partition(":")[0] for line in lines.splitlines()}
    kept = [line for line in AXOLOTL.splitlines() if line.partition(":")[0] not in changed]
    keys = imported("\n".join([*kept, lines]))[1].keys
    assert (keys.gradient_checkpointing, keys.layer_offloading) == found


@pytest.mark.parametrize(
    "text",
    [
        AXOLOTL,
        AXOLOTL.replace("adapter: qlora\nload_in_4bit: true", "adapter: lora\nlayer_offloading: true\ngradient_checkpointing: true"),
        LLAMAFACTORY + "quantization_bit: 4\n",
        "model_name_or_path: m/m\ndataset_name: d/d\nuse_peft: true\nload_in_4bit: true\nlora_target_modules: all-linear\noutput_dir: out\n",
    ],
    ids=["axolotl", "axolotl, offloaded", "llamafactory", "trl"],
)  # fmt: skip
def test_layers_that_are_not_compiled_here_run_as_they_are_and_a_note_says_so(text, imported):
    """It changes no more than roundings, so it is no reason to refuse a file."""
    made, loaded = imported(text + "torch_compile: true\n")
    assert loaded.keys.torch_compile is False
    assert "# torch_compile: left out because with l" in made.text


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("evals_per_epoch: 4\nsaves_per_epoch: 1", {"eval_steps": 0.25, "save_steps": 0}),
        ("num_epochs: 4\nsave_strategy: epoch\neval_strategy: epoch\nsave_steps: 7", {"eval_steps": 0.25, "save_steps": 0.25}),
        ("evals_per_epoch: 2\nnum_epochs: 3", {"eval_steps": 0.166666}),
        ("eval_steps: 0.05\nsave_steps: 0.1", {"eval_steps": 0.05, "save_steps": 0.1}),
        ("eval_steps: 20\nearly_stopping_patience: 3", {"early_stopping_patience": 3, "load_best_model_at_end": True, "eval_steps": 20}),
        ("neftune_noise_alpha: 5", {"neftune_noise_alpha": 5.0}),
        ("label_smoothing_factor: 0.1", {"label_smoothing_factor": 0.1}),
    ],
)  # fmt: skip
def test_when_is_measured_and_how_the_loss_is_softened(imported, lines, found):
    changed = {line.partition(":")[0] for line in lines.splitlines()}
    kept = [line for line in AXOLOTL.splitlines() if line.partition(":")[0] not in changed]
    keys = imported("\n".join([*kept, lines]))[1].keys
    assert {name: getattr(keys, name) for name in found} == found


def test_llamafactory_counts_three_epochs_where_it_is_told_of_none(imported):
    keys = imported(
        LLAMAFACTORY
        + "save_strategy: epoch\nneftune_alpha: 4\nval_size: 0.1\neval_strategy: steps\neval_steps: 10\nearly_stopping_steps: 2\n"
    )[1].keys
    assert (keys.save_steps, keys.neftune_noise_alpha, keys.early_stopping_patience) == (0.333333, 4.0, 2)


def test_data_on_a_server_is_named_where_it_lies(imported):
    made, loaded = imported(AXOLOTL.replace("path: teknium/GPT4-LLM-Cleaned", "path: s3://bucket/rows.jsonl"))
    assert loaded.keys.datasets[0].path == "s3://bucket/rows.jsonl"
    assert "path: s3://bucket/rows.jsonl" in made.text


SPLIT = [
    ("context_parallel_size: 4", {"sp_size": 4}),
    ("sequence_parallel_degree: 2\ncontext_parallel_size: 2", {"sp_size": 2}),
    ("dp_shard_size: 2\ncontext_parallel_size: 4", {"sp_size": 4, "dp_shard_size": 8}),
    ("context_parallel_size: 1", {}),
    ("context_parallel_size: 0", {}),
]


@pytest.mark.parametrize(("lines", "sharding"), SPLIT)
def test_processes_that_share_a_sequence_do_so_here(lines, sharding, imported):
    loaded = imported(AXOLOTL + lines + "\n")[1]
    assert loaded.keys.sharding == ShardingKeys(**sharding)


def test_llama_factorys_too_and_a_size_that_is_none_is_refused(imported):
    loaded = imported(
        LLAMAFACTORY + "dataset_dir: data\nsequence_parallel_size: 2\nsequence_parallel_mode: zigzag-ring\n"
    )[1]
    assert loaded.keys.sharding.sp_size == 2
    for size in ("many", "-2", "1.5"):
        with pytest.raises(ConfigError, match=f"context_parallel_size: {size} has no counterpart here"):
            imported(AXOLOTL + f"context_parallel_size: {size}\n")
    with pytest.raises(ConfigError, match="stands against sharding"):
        imported(AXOLOTL + "context_parallel_size: 2\nsequence_parallel_degree: 4\n")


@pytest.mark.parametrize("key", ["eval_steps", "save_steps", "evals_per_epoch", "saves_per_epoch", "warmup_steps", "early_stopping_patience", "neftune_noise_alpha", "label_smoothing_factor"])  # fmt: skip
@pytest.mark.parametrize("value", ["abc", "[1]", "{a: 1}", "true", ".nan", "1e400"])
def test_what_should_be_a_number_and_is_none_is_refused_by_name(imported, key, value):
    text = AXOLOTL.replace("warmup_steps: 10\n", "") + f"{key}: {value}\n"
    with pytest.raises(ConfigError, match=rf"{key}: .* is no number"):
        imported(text)


@pytest.mark.parametrize("epochs", ["0", "abc", ".nan", "[1]"])
def test_how_often_per_epoch_of_no_number_of_epochs_is_refused_for_the_epochs(imported, epochs):
    with pytest.raises(ConfigError, match="num_train_epochs"):
        imported(AXOLOTL.replace("num_epochs: 1", f"num_epochs: {epochs}") + "evals_per_epoch: 4\n")


@pytest.mark.parametrize("text", [AXOLOTL, LLAMAFACTORY], ids=["axolotl", "llamafactory"])
@pytest.mark.parametrize("told", ["no", "epoch"])
def test_when_is_validated_by_its_older_name_says_nothing_of_when_is_saved(imported, text, told):
    kept = "".join(line for line in text.splitlines(True) if not line.startswith(("save", "eval")))
    _, loaded = imported(f"{kept}evaluation_strategy: {told}\nsave_steps: 50\n")
    assert loaded.keys.save_steps == 50


def test_a_no_that_yaml_reads_as_false_measures_nothing_on_the_way(imported):
    text = AXOLOTL + "eval_strategy: no\neval_steps: 5\nsave_strategy: no\nsave_steps: 5\n"
    _, loaded = imported(text)
    assert (loaded.keys.eval_steps, loaded.keys.save_steps) == (0, 0)


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        (AXOLOTL, "lr_scheduler_kwargs", ["abc", "[1]"]),
        (AXOLOTL, "special_tokens", ["abc", "[1]"]),
        (AXOLOTL, "plugins", ["true", "-1"]),
        (AXOLOTL.replace("gradient_accumulation_steps: 4\n", ""), "batch_size", ["abc", "{a: 1}"]),
        (AXOLOTL, "unfrozen_parameters", ["[1]", "true"]),
        (AXOLOTL, "rl", ["[1]", "{a: 1}"]),
        (AXOLOTL, "test_datasets", ["1.5"]),
        (AXOLOTL, "max_steps", ["1e400"]),
        (LLAMAFACTORY, "max_samples", ["abc", ".nan", "1e400"]),
        (LLAMAFACTORY, "gradient_checkpointing", ["abc", "[1]"]),
    ],
)
def test_a_key_of_the_wrong_form_is_refused_by_its_name(imported, text, key, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"theirs.yaml: {key}: .*(form that is not known|no counterpart)"):
            imported(f"{text}{key}: {value}\n")


@pytest.mark.parametrize("value", ["turn", "all"])
def test_the_end_of_a_turn_is_trained_as_its_older_name_says(imported, value):
    text = AXOLOTL.replace("type: alpaca", f"type: chat_template, train_on_eot: {value}")
    if value == "turn":
        assert "datasets.1.train_on_eot: left out because turn: so it is here" in imported(text)[0].text
    else:
        with pytest.raises(
            ConfigError, match=r"datasets\.1\.train_on_eot: all: every trained turn is trained through its end"
        ):
            imported(text)


@pytest.mark.parametrize(
    ("line", "fate"),
    [
        ("selective_checkpointing: {save: [attention]}", "left out"),
        ("swanlab_api_key: SECRET", "left out"),
        ("multipack_real_batches: true", "changed"),
        ("qgalore_rank: 128", "left out"),
        ("lm_eval_tasks: [arc_easy]", "left out"),
    ],
)
def test_keys_of_axolotls_schema_that_change_nothing_have_their_reason(imported, line, fate):
    text = imported(AXOLOTL + line + "\n")[0].text
    assert f"# {line.partition(':')[0]}: {fate} because " in text
    assert "SECRET" not in text


@pytest.mark.parametrize("line", ["mora: {use_mora: true}", "dense_mixer: true", "nemo_gym_enabled: true", "scaling_softmax: true"])  # fmt: skip
def test_keys_of_axolotls_schema_that_change_what_is_learned_are_refused(imported, line):
    with pytest.raises(ConfigError, match=line.partition(":")[0] + ": "):
        imported(AXOLOTL + line + "\n")


STEPPED = """
base_model: org/model
model_type: AutoModelForTokenClassification
num_labels: 2
process_reward_model: true
sequence_len: 512
micro_batch_size: 2
num_epochs: 1
learning_rate: 0.00005
datasets:
  - {path: trl-lib/math_shepherd, type: stepwise_supervised, step_separator: "\\n\\n", max_completion_length: 64, split: train}
"""


def test_axolotls_rated_steps_are_a_stage_of_their_own(imported):
    made, loaded = imported(STEPPED)
    assert made.kind == "process_reward_model"
    assert [source.type for source in loaded.keys.datasets] == ["stepwise_supervised"]
    keys = loaded.keys
    assert (keys.step_separator, keys.max_completion_length, keys.train_on_last_step_only) == ("\n\n", 64, False)


def test_entries_whose_steps_are_written_otherwise_are_refused(imported):
    with pytest.raises(ConfigError, match=r"datasets\.2\.step_separator: .* stands against step_separator"):
        imported(STEPPED + "  - {path: org/other, type: stepwise_supervised, max_completion_length: 64}\n")
