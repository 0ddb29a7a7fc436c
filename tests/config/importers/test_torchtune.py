"""torchtune's YAML and its command line, all the way to a YAML that the strict loader takes."""

import json

import pytest

from posttrain.config import load_stage
from posttrain.config.datasets import DatasetKeys
from posttrain.config.importers.convert import import_file
from posttrain.data.opened import read_rows
from posttrain.errors import ConfigError

LORA = """\
output_dir: ./out
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 64
  lora_alpha: 128
  lora_dropout: 0.0
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: base/original/tokenizer.model
  max_seq_len: null
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: base
  checkpoint_files: [model.safetensors]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3_2
resume_from_checkpoint: False
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: False
  split: train[:500]
seed: null
shuffle: True
batch_size: 4
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  lr: 3e-4
  betas: [0.9, 0.95]
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.LinearCrossEntropyLoss
epochs: 1
max_steps_per_epoch: null
gradient_accumulation_steps: 8
clip_grad_norm: null
compile: False
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
log_every_n_steps: 1
device: cuda
dtype: bf16
enable_activation_checkpointing: True
enable_activation_offloading: False
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: False
"""
DPO = (
    LORA.replace("alpaca_cleaned_dataset", "hh_rlhf_helpful_dataset")
    .replace("torchtune.modules.loss.LinearCrossEntropyLoss", "torchtune.rlhf.loss.DPOLoss\n  beta: 0.05")
    .replace("  packed: False\n", "")
)


@pytest.fixture
def imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()

    def run(text, command=None):
        (tmp_path / "theirs.yaml").write_text(text)
        if command is not None:
            (tmp_path / "run.sh").write_text(command)
        made = import_file(tmp_path / ("run.sh" if command else "theirs.yaml"), tmp_path / "ours.yaml")
        return made, load_stage(made.kind, tmp_path / "ours.yaml")

    return run


def test_a_lora_yaml_becomes_one_that_the_loader_takes(imported):
    made, loaded = imported(LORA)
    keys = loaded.keys
    assert made.kind == "sft"
    assert keys.lora_target == ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert (keys.adapter, keys.lora_r, keys.lora_alpha) == ("lora", 64, 128)
    assert (keys.optim, keys.adam_beta2, keys.warmup_steps, keys.bf16) == ("adamw", 0.95, 100, True)
    assert (keys.datasets[0].path, keys.datasets[0].limit) == ("yahma/alpaca-cleaned", 500)
    assert str(keys.chat_template).endswith("llama3.jinja")


def test_what_torchtune_does_unasked_is_written_out(imported):
    keys = imported(LORA)[1].keys
    assert (keys.train_on, keys.max_grad_norm, keys.weight_decay) == ("all", 0, 0.01)
    assert keys.overflow == "error"  # it has no limit there, and nothing is cut in silence
    assert imported(LORA.replace("max_seq_len: null", "max_seq_len: 512"))[1].keys.overflow == "truncate"
    no_schedule = LORA.replace(LORA[LORA.index("lr_scheduler:") : LORA.index("loss:")], "")
    assert imported(no_schedule)[1].keys.lr_scheduler_type == "constant"


def test_every_key_of_the_file_stands_in_the_comments(imported):
    text = imported(LORA)[0].text
    for line in ("tokenizer.path", "checkpointer.model_type", "profiler.enabled", "optimizer.fused", "clip_grad_norm"):
        assert f"# {line}: left out because" in text
    assert "output_dir: ./out" in text


def test_the_text_of_an_alpaca_row_is_a_users_turn(imported, tmp_path):
    source = imported(LORA)[1].keys.datasets[0]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "Add.", "input": "2 2", "output": "4"}) + "\n")
    read = read_rows(DatasetKeys(path=str(rows), type="alpaca", prompt_format=source.prompt_format))
    (row,) = [row for _, row in read]
    assert row.keys() == {"instruction", "output"}
    assert row["instruction"].endswith("### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n")


def test_preferences_become_dpo(imported):
    made, loaded = imported(DPO)
    assert (made.kind, loaded.keys.loss_type, loaded.keys.beta) == ("dpo", "sigmoid", 0.05)
    assert loaded.keys.datasets[0].type == "preference"


def test_a_command_line_sets_keys_over_the_file(imported):
    command = """\
        set -e
        LR=1e-5
        tune run --nproc_per_node 2 lora_finetune_distributed --config theirs.yaml \\
          optimizer.lr=$LR model.lora_rank=8 dataset.train_on_input=False epochs=3 ~lr_scheduler._component_ \\
          ~lr_scheduler.num_warmup_steps 2>&1 | tee log.txt
    """
    keys = imported(LORA, command)[1].keys
    assert (keys.learning_rate, keys.lora_r, keys.train_on, keys.num_train_epochs) == (1e-5, 8, "assistant", 3)
    assert (keys.lr_scheduler_type, keys.warmup_steps) == ("constant", 0)


def test_a_sections_name_alone_sets_its_component_or_takes_the_section_out(imported):
    start = "tune run lora_finetune_single_device --config theirs.yaml "
    keys = imported(LORA, start + "dataset=torchtune.datasets.slimorca_dataset optimizer=torch.optim.SGD")[1].keys
    assert (keys.datasets[0].path, keys.datasets[0].type, keys.optim) == ("Open-Orca/SlimOrca-Dedup", "sharegpt", "sgd")
    keys = imported(LORA, start + "~lr_scheduler epochs=2 clip_grad_norm=None")[1].keys
    assert (keys.lr_scheduler_type, keys.warmup_steps, keys.max_grad_norm) == ("constant", 0, 0)


def test_a_reference_inside_a_list_of_datasets_is_followed(imported):
    entry = (
        "\n  - _component_: torchtune.datasets.alpaca_dataset\n    train_on_input: ${compile}\n    packed: ${compile}\n"
    )
    text = LORA.replace(LORA[LORA.index("dataset:") : LORA.index("seed:")], f"dataset:{entry}")
    keys = imported(text)[1].keys
    assert (keys.train_on, keys.packing) == ("assistant", False)


def test_a_limit_of_the_texts_is_that_of_the_run(imported):
    texts = "text_completion_dataset\n  source: a/b\n  column: text\n  max_seq_len: 512"
    keys = imported(LORA.replace("alpaca_cleaned_dataset", texts))[1].keys
    assert (keys.sequence_len, keys.overflow) == (512, "truncate")


def test_a_line_break_in_their_file_begins_no_line_of_ours(imported):
    text = LORA.replace("  enabled: False", '  "enabled\\nseed: 666": 1')
    text = text.replace("torchtune.models.llama3_2.lora_llama3_2_1b", '"torchtune.models.lora_a\\nseed: 666"')
    made, loaded = imported(text)
    assert "666" in made.text
    assert loaded.keys.seed != 666


def test_it_is_taken_in_place_with_a_note_per_key(imported, tmp_path):
    (tmp_path / "in_place.yaml").write_text(LORA)
    loaded = load_stage("sft", tmp_path / "in_place.yaml")
    assert loaded.keys.learning_rate == 3e-4
    assert any(note.startswith("learning_rate: mapped from optimizer.lr") for note in loaded.notes)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size: 4", "batch_sizes: 4", "batch_sizes: no key of torchtune's that is known here.*did you mean batch_size"),
        ("  fused: True", "  fuzed: True", r"optimizer.fuzed: no key of torchtune's"),
        ("  packed: False", "  filter_fn: mine.keep", "dataset.filter_fn: mine.keep: it has no counterpart here and may change the rows"),
        ("train[:500]", "'train[:10%]'", "dataset.split: .*only the first so many rows"),
        ("  max_seq_len: null", "  prompt_template: torchtune.data.ChatMLTemplate", "tokenizer.prompt_template: .*set chat_template: FILE"),
        ("LinearCrossEntropyLoss", "MyLoss", "loss._component_: MyLoss: no such loss here"),
        ("torch.optim.AdamW", "torch.optim.Adam", "optimizer._component_: torch.optim.Adam has no counterpart here"),
        ("FullModelHFCheckpointer", "FullModelTorchTuneCheckpointer", "checkpointer._component_: .*not in transformers' form"),
        ("dtype: bf16", "dtype: fp16", "dtype: fp16 has no counterpart here"),
        ("checkpoint_dir: base", "checkpoint_dir: ${nowhere}/base", "checkpointer.checkpoint_dir: .*names something that is not in the file"),
        ("log_every_n_steps: 1", "quantizer: {_component_: torchtune.QAT}", "quantizer._component_: .*QAT"),
        ("  packed: False", "  packed: [1, '${nowhere}']", "dataset.packed: .*names something that is not in the file"),
        ("epochs: 1\nmax_steps_per_epoch: null", "epochs: 2\nmax_steps_per_epoch: 5", "max_steps_per_epoch: 5 with 2 epochs"),
        ("lora_llama3_2_1b", "lora_llama3_2_vision_11b", "images are not trained here"),
        ("  beta: 0.05", "  beta: 0.05\nref_checkpointer: {checkpoint_dir: other}", "ref_checkpointer.checkpoint_dir: other"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused_by_name(imported, old, new, message):
    with pytest.raises(ConfigError, match=message):
        imported((DPO if "beta" in old else LORA).replace(old, new))


def test_a_config_by_torchtunes_own_name_says_how_to_get_the_file(imported):
    with pytest.raises(ConfigError, match="tune cp NAME FILE"):
        imported(LORA, "tune run full_finetune_single_device --config llama3_2/1B_full\n")
