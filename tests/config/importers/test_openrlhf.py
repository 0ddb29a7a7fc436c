"""OpenRLHF's commands, in the spellings of its releases, all the way to a YAML that the strict loader takes."""

import pytest

from posttrain.config import load_stage
from posttrain.config.importers.convert import import_file
from posttrain.errors import ConfigError

SFT = """\
set -x
MODEL=base
read -r -d '' training_commands <<EOF
openrlhf.cli.train_sft \\
   --max_len 1024 \\
   --dataset Open-Orca/OpenOrca \\
   --input_key question \\
   --output_key response \\
   --input_template 'User: {}
Assistant: ' \\
   --train_batch_size 256 \\
   --micro_train_batch_size 2 \\
   --max_samples 500000 \\
   --pretrain $MODEL \\
   --save_path ./checkpoint/llama \\
   --save_steps -1 \\
   --logging_steps 1 \\
   --eval_steps -1 \\
   --zero_stage 3 \\
   --max_epochs 1 \\
   --param_dtype bf16 \\
   --attn_implementation flash_attention_2 \\
   --learning_rate 5e-6 \\
   --gradient_checkpointing \\
   --packing_samples \\
   --use_wandb SECRET
EOF
if [[ ${1} != "slurm" ]]; then
    deepspeed --module $training_commands
fi
"""
DPO = """\
deepspeed --module openrlhf.cli.train_dpo --model.model_name_or_path base --ref.model_name_or_path base \\
   --data.dataset OpenRLHF/preference_dataset_mixture2_and_safe_pku --data.apply_chat_template \\
   --data.chosen_key chosen --data.rejected_key rejected --model.beta 0.2 --model.ipo_enable \\
   --ds.lora.rank 8 --ds.lora.target_modules q_proj v_proj --model.nll_loss_coef 0.1 --adam.betas 0.9 0.98
"""


@pytest.fixture
def imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()

    def run(text):
        (tmp_path / "run.sh").write_text(text)
        made = import_file(tmp_path / "run.sh", tmp_path / "ours.yaml")
        return made, load_stage(made.kind, tmp_path / "ours.yaml")

    return run


def test_a_script_of_sft_becomes_a_yaml_that_the_loader_takes(imported):
    made, loaded = imported(SFT)
    keys, (source,) = loaded.keys, loaded.keys.datasets
    assert made.kind == "sft"
    assert (source.path, source.type, source.limit) == ("Open-Orca/OpenOrca", "completion", 500_000)
    assert source.prompt_format == ["User: {question}\nAssistant: "]
    assert source.columns == {"completion": "response"}
    assert (keys.sequence_len, keys.packing, keys.gradient_checkpointing, keys.bf16) == (1024, True, True, True)
    assert (keys.sharding.reshard_after_forward, keys.save_steps, keys.report_to) == (True, 0, ["wandb"])


def test_the_rows_of_a_step_are_the_same_under_any_number_of_processes(imported):
    keys = imported(SFT)[1].keys
    assert (keys.per_device_train_batch_size, keys.gradient_accumulation_steps, keys.num_processes) == (2, 128, 1)


def test_what_openrlhf_does_unasked_is_written_out(imported):
    keys = imported(SFT)[1].keys
    assert (keys.lr_scheduler_type, keys.min_lr_ratio, keys.warmup_ratio) == ("cosine", 0.1, 0.03)
    assert (keys.adam_beta2, keys.overflow, keys.weight_decay) == (0.95, "truncate", 0)


def test_a_token_in_the_command_is_written_nowhere(imported, tmp_path):
    made, _ = imported(SFT)
    assert "SECRET" not in made.text + "".join(made.notes) + (tmp_path / "ours.yaml").read_text()


def test_preferences_in_the_dotted_spelling_become_dpo(imported):
    made, loaded = imported(DPO)
    keys = loaded.keys
    assert (made.kind, keys.loss_type, keys.beta, keys.rpo_alpha) == ("dpo", "ipo", 0.2, 0.1)
    assert (keys.adapter, keys.lora_r, keys.lora_target, keys.adam_beta2) == ("lora", 8, ["q_proj", "v_proj"], 0.98)
    assert (keys.sequence_len, keys.gradient_accumulation_steps) == (512, 16)


def test_a_reward_model_becomes_that_stage(imported):
    made, loaded = imported(
        "deepspeed --module openrlhf.cli.train_rm --pretrain base --dataset a/b --apply_chat_template --loss sigmoid --train_batch_size 8\n"
    )
    assert (made.kind, loaded.keys.learning_rate, loaded.keys.datasets[0].type) == ("reward_model", 9e-6, "preference")


ROWS = [
    ("--apply_chat_template --input_key messages", {"type": "chat", "columns": {}}, "last"),
    ("--apply_chat_template --input_key turns --multiturn", {"type": "chat", "columns": {"messages": "turns"}}, "assistant"),
    ("--apply_chat_template --input_key q --output_key a", {"type": "alpaca", "columns": {"instruction": "q", "output": "a"}}, "assistant"),
    ("--pretrain_mode --input_key text", {"type": "text", "columns": {}}, "assistant"),
    ("--output_key a", {"type": "completion", "prompt_format": ["User: {input}\nAssistant: "]}, "assistant"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "source", "train_on"), ROWS)
def test_the_form_of_its_rows_is_told_by_several_keys(imported, flags, source, train_on):
    keys = imported(f"openrlhf.cli.train_sft --pretrain base --dataset a/b {flags}\n")[1].keys
    assert {name: getattr(keys.datasets[0], name) for name in source} == source
    assert keys.train_on == train_on


def test_a_constant_rate_has_no_warmup_as_it_has_none_there(imported):
    start = "openrlhf.cli.train_sft --pretrain base --dataset a/b --output_key a --lr_warmup_ratio 0.1 --lr_scheduler "
    assert imported(start + "constant\n")[1].keys.warmup_ratio == 0
    assert imported(start + "constant_with_warmup\n")[1].keys.warmup_ratio == 0.1


def test_a_template_in_bashs_own_quotes_has_its_line_break(imported):
    start = "openrlhf.cli.train_sft --pretrain base --dataset a/b --output_key a "
    keys = imported(start + r"--input_template $'It\'s: {}\nA: '" + "\n")[1].keys
    assert keys.datasets[0].prompt_format == ["It's: {input}\nA: "]


def test_a_token_that_only_the_shell_knows_is_no_obstacle(imported):
    text = "openrlhf.cli.train_sft --pretrain base --dataset a/b --output_key a --use_wandb $WANDB_API_KEY\n"
    assert imported(text)[1].keys.report_to == ["wandb"]


def test_a_stray_apostrophe_far_above_the_command_does_not_swallow_it(imported):
    command = "openrlhf.cli.train_sft --pretrain base --dataset a/b --output_key a\n"
    assert imported("it's\n" + "a line\n" * 200 + command + "isn't\n")[0].kind == "sft"


def test_several_sets_of_rows_have_their_shares(imported):
    text = "openrlhf.cli.train_sft --pretrain base --dataset a/b,c/d --dataset_probs 0.3,0.7 --output_key a --eval_dataset e/f --eval_split test\n"
    keys = imported(text)[1].keys
    assert [(source.path, source.weight) for source in keys.datasets] == [("a/b", 0.3), ("c/d", 0.7)]
    assert (keys.eval_datasets[0].path, keys.eval_datasets[0].split) == ("e/f", "test")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--no_such_key 3", "no_such_key: no key of OpenRLHF's that is known here"),
        ("--aux_loss_coef 0.01", "aux_loss_coef: 0.01: the routers' loss has the weight that the model's config gives it"),
        ("--tokenizer_chat_template '{{ x }}'", "tokenizer_chat_template: .*set chat_template: FILE"),
        ("--optim muon", "optim: muon has no counterpart here"),
        ("--load_in_4bit", "load_in_4bit: true without lora.rank would train nothing"),
        ("--train_batch_size 100 --micro_train_batch_size 3", "train_batch_size: 100 is no multiple of 3"),
        ("--input_template 'no place'", "input_template: no place: the prompt has no place in it"),
        ("--max_len $LENGTH", "max_len: .*names something that is not in the file"),
        ("--ref_pretrain other", "ref_pretrain: other: the reference is the model the stage starts from"),
        ("--pretrain_mode", "output_key: a: with pretrain_mode it follows the text of input"),
        ("--apply_chat_template --multiturn", "multiturn: true: with output_key an answer is put behind a conversation"),
        ("--eval_dataset c/d@folder", "dataset: c/d@folder: a folder inside a dataset"),
        ("--use_ms", "use_ms: .*ModelScope"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused_by_name(imported, more, message):
    with pytest.raises(ConfigError, match=message):
        imported(f"openrlhf.cli.train_sft --pretrain base --dataset a/b --output_key a {more}\n")
