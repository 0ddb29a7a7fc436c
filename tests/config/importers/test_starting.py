"""What a run starts from and which of its weights are trained: tokenizer, layers, optimizer."""

import re

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from posttrain.config import load_stage
from posttrain.config.importers.convert import import_file
from posttrain.config.importers.read import read_foreign

AXOLOTL = """\
base_model: a/b
datasets: [{path: c/d, type: alpaca}]
micro_batch_size: 2
learning_rate: 2e-4
sequence_len: 512
"""
LORA = AXOLOTL + "adapter: lora\nlora_target_modules: [q_proj, mlp.down_proj]\n"
LLAMAFACTORY = """\
model_name_or_path: a/b
stage: sft
template: default
cutoff_len: 256
dataset: mine
"""
FREEZE = LLAMAFACTORY + "finetuning_type: freeze\n"


@pytest.fixture
def loaded(tmp_path):
    def run(text):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "dataset_info.json").write_text('{"mine": {"hf_hub_url": "c/d"}}')
        (tmp_path / "theirs.yaml").write_text(text)
        made = import_file(tmp_path / "theirs.yaml", tmp_path / "ours.yaml")
        return made, load_stage(made.kind, tmp_path / "ours.yaml").keys

    return run


@pytest.fixture
def refused(tmp_path):
    def run(text):
        (tmp_path / "theirs.yaml").write_text(text)
        return "\n".join(str(refusal) for refusal in read_foreign(tmp_path / "theirs.yaml").convert().refusals)

    return run


@pytest.mark.parametrize(
    "text",
    [
        AXOLOTL + "tokenizer_config: e/f\n",
        "model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: false\ntokenizer_name_or_path: e/f\n",
    ],
)
def test_a_tokenizer_from_elsewhere_is_named_here_too(loaded, text):
    assert loaded(text)[1].tokenizer_name_or_path == "e/f"


def test_a_tokenizer_that_is_the_models_own_is_not(loaded, refused):
    assert loaded(AXOLOTL + "tokenizer_config: a/b\n")[1].tokenizer_name_or_path is None
    assert "base_model_config: e/f: the config is that of base_model" in refused(AXOLOTL + "base_model_config: e/f\n")


def test_axolotls_muon_has_another_scale_where_its_processes_form_a_mesh(loaded):
    _, alone = loaded(AXOLOTL + "optimizer: muon\n")
    assert (alone.optim, alone.muon_adjust_lr, alone.adam_beta1, alone.adam_beta2) == ("muon", "match_rms_adamw", 0.95, 0.95)  # fmt: skip
    made, mesh = loaded(AXOLOTL + "optimizer: muon\nadam_beta2: 0.9\nfsdp_version: 2\nfsdp_config: {reshard_after_forward: true}\n")  # fmt: skip
    assert (mesh.optim, mesh.muon_adjust_lr, mesh.adam_beta1, mesh.adam_beta2) == ("muon", "spectral_norm", 0.9, 0.9)
    assert "the momentum of muon is Nesterov's here" in made.text


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("", (2, False, [], [])),
        ("freeze_trainable_layers: -3", (-3, False, [], [])),
        ("freeze_trainable_layers: 8\nuse_llama_pro: true", (8, True, [], [])),
        ("freeze_trainable_modules: mlp,self_attn\nfreeze_extra_modules: lm_head", (2, False, ["mlp", "self_attn"], [".*lm_head"])),
    ],
)  # fmt: skip
def test_llamafactorys_frozen_layers_are_ours(loaded, lines, found):
    _, keys = loaded(FREEZE + lines + "\n")
    read = keys.unfrozen_layers, keys.unfrozen_layers_spread, keys.unfrozen_layer_modules, keys.unfrozen_parameters
    assert (keys.adapter, read) == ("none", found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (FREEZE + "freeze_trainable_layers: 0\n", "freeze_trainable_layers: 0: no layer would be trained; set how many"),
        (FREEZE + "freeze_trainable_layers: many\n", "freeze_trainable_layers: many is no number"),
        (LLAMAFACTORY + "use_llama_pro: true\n", "use_llama_pro: true: an adapter stands in all layers here"),
        (LLAMAFACTORY + "finetuning_type: oft\n", "finetuning_type: oft: weights are trained whole or by LoRA here; set lora, full or freeze"),
    ],
)  # fmt: skip
def test_layers_that_are_not_to_be_had_are_refused(refused, text, words):
    assert words in refused(text)


@pytest.mark.parametrize(
    ("text", "seed"),
    [
        (AXOLOTL + "reinit_weights: true\n", 42),
        (AXOLOTL + "reinit_weights: true\nseed: 7\n", 7),
        (AXOLOTL + "reinit_weights: false\nadapter: lora\nlora_target_linear: true\n", None),
        (LLAMAFACTORY + "finetuning_type: full\ntrain_from_scratch: true\n", 42),
    ],
)
def test_training_from_scratch_draws_the_weights_by_seed(loaded, text, seed):
    assert loaded(text)[1].init_seed == seed


def test_drawn_weights_under_an_adapter_are_refused(refused):
    text = AXOLOTL + "adapter: lora\nlora_target_linear: true\nreinit_weights: true\n"
    assert "reinit_weights: true beside an adapter: the random weights under it" in refused(text)


@pytest.mark.parametrize(
    ("text", "order"),
    [
        (LLAMAFACTORY + "finetuning_type: full\ndisable_shuffling: true\n", "sequential"),
        (LLAMAFACTORY + "finetuning_type: full\ngroup_by_length: true\n", "random"),
        (AXOLOTL + "curriculum_sampling: true\nshuffle_merged_datasets: false\n", "sequential"),
        (AXOLOTL + "shuffle_merged_datasets: false\n", "random"),
        (AXOLOTL + "streaming: true\nmax_steps: 3\nshuffle_merged_datasets: false\n", "sequential"),
        ("model_name_or_path: a/b\ndataset_name: c/d\ntrain_sampling_strategy: sequential\n", "sequential"),
        ("model_name_or_path: a/b\ndataset_name: c/d\ntrain_sampling_strategy: group_by_length\n", "random"),
    ],
)
def test_the_order_of_rows_is_that_of_the_other_tool(loaded, text, order):
    assert loaded(text)[1].train_sampling_strategy == order


def test_one_shuffle_for_all_epochs_is_refused(refused):
    assert "curriculum_sampling: true with shuffle_merged_datasets" in refused(AXOLOTL + "curriculum_sampling: true\n")


@pytest.mark.parametrize(
    ("lines", "scale"),
    [
        ("embedding_lr_scale: 0.5", 0.5),
        ("embedding_lr: 2e-5", 0.1),
        ("embedding_lr: 2e-5\nadapter: lora\nlora_target_linear: true", 1.0),
        ("embedding_lr: 2e-5\nadapter: lora\nlora_target_linear: true\nlora_modules_to_save: [embed_tokens]", 0.1),
    ],
)
def test_embeddings_have_a_learning_rate_of_their_own(loaded, lines, scale):
    assert loaded(AXOLOTL + lines + "\n")[1].embedding_lr_scale == pytest.approx(scale)


@pytest.fixture
def before(tmp_path):
    (tmp_path / "before" / "inner").mkdir(parents=True)
    return str((tmp_path / "before").resolve())


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        (LORA + "lora_model_dir: ./before\n", ""),
        (AXOLOTL + "adapter: lora\nlora_model_dir: ./before\n", ""),
        (LLAMAFACTORY + "adapter_name_or_path: before\n", ""),
        (LLAMAFACTORY + "adapter_name_or_path: before\nadapter_folder: inner\ncreate_new_adapter: false\n", "/inner"),
    ],
)
def test_an_adapter_is_started_from(loaded, before, text, inner):
    assert loaded(text)[1].adapter_name_or_path == before + inner


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LLAMAFACTORY + "adapter_name_or_path: a, b\n", "adapter_name_or_path: a, b: adapters are merged before training there; merge"),
        (LLAMAFACTORY + "adapter_name_or_path: a\ncreate_new_adapter: true\n", "create_new_adapter: a: adapters are merged before"),
        (LLAMAFACTORY + "adapter_name_or_path: a\nfinetuning_type: full\n", "adapter_name_or_path: a with finetuning_type: full, which LLaMA-Factory refuses too"),
        (AXOLOTL + "lora_model_dir: ./before\n", "lora_model_dir: ./before without adapter: Axolotl trains the base"),
        (LORA + "lora_model_dir: ./before\nrl: dpo\n", "lora_model_dir: ./before: the reference is the base without it there"),
    ],
)  # fmt: skip
def test_adapters_that_are_used_otherwise_there_are_refused(refused, before, text, words):
    assert words in refused(text)


NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in (1, 11, 3)
    for module in ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj", "mlp.experts.1.q_proj", "q_proj")
] + ["lm_head", "model.other.1.self_attn.q_proj"]


@pytest.mark.parametrize("pattern", [None, "layers", ["h", "layers"]])
def test_layers_of_an_adapter_are_those_that_peft_chooses(loaded, pattern):
    lines = "" if pattern is None else f"peft_layers_pattern: {pattern}\n"
    target = loaded(LORA + f"peft_layers_to_transform: [1, 3]\n{lines}")[1].lora_target
    peft = LoraConfig(target_modules=["q_proj", "mlp.down_proj"], layers_to_transform=[1, 3], layers_pattern=pattern)
    theirs = [name for name in NAMES if check_target_module_exists(peft, name)]
    assert 3 < len(theirs) < len(NAMES)
    assert [name for name in NAMES if re.fullmatch(target, name)] == theirs


def test_layers_of_all_linear_modules_are_refused(refused):
    text = AXOLOTL + "adapter: lora\nlora_target_linear: true\npeft_layers_to_transform: [1]\n"
    assert "peft_layers_to_transform: [1] without a list of module names; name them" in refused(text)
