"""Methods beside plain fine-tuning: pre-training, streamed rows, reward models, several validation sets, the best checkpoint."""

import json

import pytest

from posttrain.config import load_stage
from posttrain.config.importers.convert import import_file
from posttrain.config.importers.read import read_foreign

AXOLOTL = """\
base_model: a/b
micro_batch_size: 2
learning_rate: 2e-4
sequence_len: 512
max_steps: 9
"""
TEXTS = AXOLOTL + "pretraining_dataset: [{path: allenai/c4, name: en, split: train, type: pretrain}]\n"
CHATS = AXOLOTL + "datasets: [{path: c/d, type: chat_template}]\n"
LLAMAFACTORY = """\
model_name_or_path: a/b
finetuning_type: full
template: default
cutoff_len: 256
"""
TRL = "model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: false\n"
PAIRS = {
    "formatting": "sharegpt",
    "ranking": True,
    "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"},
}
DATA = {
    "wiki": {"file_name": "wiki.json", "columns": {"prompt": "body"}},
    "odd": {"file_name": "odd.json"},
    "a.b": {"file_name": "ab.json", "formatting": "sharegpt"},
    "c": {"file_name": "c.json", "formatting": "sharegpt"},
    "pairs": {"file_name": "pairs.json", **PAIRS},
    "good": {"file_name": "good.json", "columns": {"prompt": "q", "response": "a", "kto_tag": "good"}},
    "unsaid": {"file_name": "good.json", "columns": {"prompt": "q", "response": "a"}},
    "part": {"hf_hub_url": "c/d", "folder": "en"},
    "texts": {
        "file_name": "texts.json",
        "ranking": True,
        "columns": {"prompt": "instruction", "query": "input", "chosen": "good", "rejected": "bad"},
    },
}


@pytest.fixture
def loaded(tmp_path):
    """The keys that a file of another tool comes to here, by way of the YAML that is written."""

    def run(text, name="theirs.yaml"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATA))
        for entry in DATA.values():
            (tmp_path / "data" / entry.get("file_name", "none.json")).write_text("[]")
        (tmp_path / name).write_text(text)
        made = import_file(tmp_path / name, tmp_path / "ours.yaml")
        return made, load_stage(made.kind, tmp_path / "ours.yaml").keys

    return run


@pytest.fixture
def refused(tmp_path):
    def run(text, name="theirs.yaml"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATA))
        (tmp_path / name).write_text(text)
        return "\n".join(str(refusal) for refusal in read_foreign(tmp_path / name).convert().refusals)

    return run


def test_axolotls_running_text_is_streamed(loaded):
    made, keys = loaded(TEXTS)
    source = keys.datasets[0]
    assert (source.path, source.name, source.type) == ("allenai/c4", "en", "text")
    assert (keys.streaming, keys.buffer_size, keys.packing, keys.overflow) == (True, 10_000, False, "truncate")
    assert "streaming: true  # mapped from pretraining_dataset" in made.text


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("sample_packing: true", (True, "bfd", "split")),
        ("sample_packing: true\npretrain_multipack_attn: true", (True, "bfd", "split")),
        ("sample_packing: true\nexcess_length_strategy: drop", (True, "bfd", "split")),
        ("sample_packing: true\npretrain_multipack_attn: false", (True, "wrapped", "split")),
        ("pretraining_sample_concatenation: true", (True, "wrapped", "drop")),
        ("sample_packing: false\npretraining_sample_concatenation: true", (True, "wrapped", "drop")),
    ],
)
def test_how_axolotl_fills_rows_with_texts_is_how_they_are_filled_here(loaded, lines, found):
    keys = loaded(TEXTS + lines + "\n")[1]
    assert (keys.packing, keys.packing_strategy, keys.overflow) == found


@pytest.mark.parametrize(
    ("lines", "size"),
    [("streaming_multipack_buffer_size: 50", 50), ("pretrain_multipack_buffer_size: 60", 60)],
)
def test_so_many_texts_at_a_time_are_shuffled_as_axolotl_shuffles(loaded, lines, size):
    assert loaded(TEXTS + lines + "\n")[1].buffer_size == size


def test_the_column_of_the_text_keeps_its_name(loaded):
    text = AXOLOTL + "pretraining_dataset: [{path: a/c, text_column: body}]\n"
    assert loaded(text)[1].datasets[0].columns == {"text": "body"}
    assert loaded(AXOLOTL + "pretraining_dataset: a/c\n")[1].datasets[0].path == "a/c"


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        (TEXTS.replace("max_steps: 9\n", ""), "max_steps: missing: how many rows are streamed is not known; set it"),
        (TEXTS + "val_set_size: 0.1\n", "val_set_size: rows that are streamed are not held out; name rows for"),
        (TEXTS.replace("split: train", "skip: 5"), "pretraining_dataset.skip: 5: rows are read from the start here"),
        (TEXTS.replace("type: pretrain", "type: mine"), "pretraining_dataset.type: mine: a style of text"),
        (TEXTS + "datasets: [{path: c/d, type: alpaca}]\n", "datasets: they are not read beside pretraining_dataset"),
        (TEXTS + "rl: dpo\n", "pretraining_dataset: running text in dpo; take rl or reward_model out"),
        (AXOLOTL + "pretraining_dataset: [{path: a/b}, {path: c/d}]\n", "pretraining_dataset: 2 of them: Axolotl reads the first"),
        (CHATS.replace("d,", "d, nope: 1,"), "datasets.1.nope: 1: it has no counterpart"),
    ],
)  # fmt: skip
def test_running_text_that_cannot_be_had_is_refused_by_name(refused, text, refusal):
    assert refusal in refused(text)


def test_axolotls_streamed_conversations_are_streamed(loaded, refused):
    assert loaded(CHATS + "streaming: true\n")[1].streaming
    assert not loaded(CHATS + "streaming: false\nstreaming_multipack_buffer_size: 5\n")[1].streaming
    two = "datasets: [{path: a/b, type: chat_template}, {path: c/d, type: chat_template}]\n"
    assert "datasets: 2 streamed and packed" in refused(AXOLOTL + two + "streaming: true\nsample_packing: true\n")


def test_rows_that_another_stage_reads_whole_are_said_to_be(loaded):
    made, _ = loaded(CHATS.replace("chat_template", "chat_template.default") + "rl: dpo\nstreaming: true\n")
    assert "# streaming: changed because dpo reads the same rows whole" in made.text


def test_parts_of_a_long_completion_are_rows_as_in_axolotl(loaded):
    text = AXOLOTL + "datasets: [{path: c/d, type: completion}]\nexcess_length_strategy: drop\n"
    assert loaded(text)[1].overflow == "split"


def test_axolotls_test_datasets_are_one_validation_set(loaded):
    more = "test_datasets: [{path: e/f, type: chat_template, split: test}, {path: g/h, type: chat_template}]\n"
    keys = loaded(CHATS + more)[1]
    assert [(source.path, source.split) for source in keys.eval_datasets] == [("e/f", "test"), ("g/h", "train")]
    assert keys.eval_names == ("",)


def test_axolotls_several_losses_are_weighed_and_its_older_noise_is_added(loaded):
    pairs = CHATS.replace("chat_template", "chat_template.default")
    keys = loaded(pairs + "rl: dpo\ndpo_loss_type: [sigmoid, ipo]\ndpo_loss_weights: [1.0, 0.5]\n")[1]
    assert (keys.loss_type, keys.loss_weights) == (["sigmoid", "ipo"], [1.0, 0.5])
    assert loaded(CHATS + "noisy_embedding_alpha: 5\n")[1].neftune_noise_alpha == 5


def test_gdpo_is_grpo_that_normalises_each_reward(loaded, tmp_path):
    (tmp_path / "r.py").write_text("def f(prompts, completions, **_): return [0.0 for _ in completions]\n")
    made, keys = loaded(GRPO.replace("rl: grpo", "rl: gdpo"))
    assert (made.kind, keys.multi_objective_aggregation) == ("grpo", "normalize_then_sum")


GRPO = (
    AXOLOTL + "datasets: [{path: c/d}]\nrl: grpo\ngradient_accumulation_steps: 8\n"
    "trl: {reward_funcs: [r.f, e/reward-1.5b], num_generations: 4, max_completion_length: 64, loss_type: dr_grpo, use_vllm: true}\n"
)


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ("", (4, 1)),  # 2 rows × 8 micro-batches are 16 completions, 4 groups of 4
        ("generation_batch_size: 64, ", (16, 4)),
        ("temperature: 0.9, ", (4, 1)),
    ],
)
def test_axolotls_grpo_counts_completions_and_ours_prompts(loaded, tmp_path, more, found):
    (tmp_path / "r.py").write_text("def f(prompts, completions, **_): return [0.0 for _ in completions]\n")
    made, keys = loaded(GRPO.replace("trl: {", "trl: {" + more))
    assert (keys.num_prompts_per_step, keys.steps_per_generation) == found
    assert (keys.reward_funcs[1], keys.loss_type, keys.beta) == ("model:e/reward-1.5b", "dr_grpo", 0)
    assert ("multiply it by the number of processes" in made.text) == ("batch_size" not in more)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("num_generations: 4", "num_generations: 5", "micro_batch_size: 16 completions are no whole groups of 5 and whole steps of 16 rows; set trl.num_generations"),
        ("num_generations: 4", "num_generations: four", "trl.num_generations: four is no size; give"),
        ("use_vllm: true", "sync_ref_model: true", "trl.sync_ref_model: true: the reference of grpo stays"),
        ("use_vllm: true", "rollout_func: a.b", "trl.rollout_func: a.b: it is a program"),
        ("use_vllm: true", "repetition_penalty: 1.1", "trl.repetition_penalty: 1.1: sampling has no such"),
        ("max_completion_length: 64, ", "", "trl.max_completion_length: missing"),
        ("{path: c/d}", "{path: c/d, type: r.rows}", "datasets.1.type: r.rows: a function that makes prompts"),
    ],
)  # fmt: skip
def test_what_axolotls_grpo_has_and_ours_lacks_is_refused(refused, before, after, words):
    assert words in refused(GRPO.replace(before, after))


RLOO = "trl rloo --model_name_or_path a/b --dataset_name c/d --reward_funcs r.f --per_device_train_batch_size 4 "


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ("", {"beta": 0.05, "kl_in_reward": True, "num_generations": 2, "num_prompts_per_step": 2}),
        ("--beta 0 --num_generations 4", {"beta": 0, "kl_in_reward": False, "num_generations": 4, "num_prompts_per_step": 1}),
    ],
)  # fmt: skip
def test_trls_rloo_is_grpo_with_its_loss(loaded, tmp_path, more, found):
    (tmp_path / "r.py").write_text("def f(prompts, completions, **_): return [0.0 for _ in completions]\n")
    made, keys = loaded(RLOO + more, "run.sh")
    assert (made.kind, keys.loss_type) == ("grpo", "rloo")
    assert {key: getattr(keys, key) for key in found} == found


@pytest.mark.parametrize("key", ["normalize_advantages true", "reward_clip_range '[-1,1]'"])
def test_what_trls_rloo_has_and_ours_lacks_is_refused(refused, key):
    assert refused(f"{RLOO}--{key}", "run.sh").startswith(f"{key.split()[0]}: ")


STEPS = "trl grpo --model_name_or_path a/b --dataset_name c/d --reward_funcs r.f --per_device_train_batch_size 8 --gradient_accumulation_steps 4 --num_generations 4 "


@pytest.mark.parametrize(("loss", "told"), [("dr_grpo", False), ("dapo", True), ("cispo", True)])
def test_several_generation_batches_of_a_step_are_one(loaded, tmp_path, loss, told):
    """The policy that samples 2 × 16 completions of a step is the same for both."""
    (tmp_path / "r.py").write_text("def f(prompts, completions, **_): return [0.0 for _ in completions]\n")
    made, keys = loaded(f"{STEPS}--steps_per_generation 2 --loss_type {loss}", "run.sh")
    assert (keys.num_prompts_per_step, keys.steps_per_generation) == (8, 1)
    assert (f"{loss} is a mean over the tokens of the step here" in made.text) == told


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--steps_per_generation 3", "24 completions are no whole groups of 4 and whole steps of 32 rows"),
        ("--steps_per_generation 2 --scale_rewards batch", "2 generation batches of a step with scale_rewards: batch come to"),
        ("--steps_per_generation 2 --num_iterations 2", "2 generation batches of a step with num_iterations: 2 come to"),
    ],
)  # fmt: skip
def test_generation_batches_that_are_not_one_are_refused(refused, more, words):
    assert f"steps_per_generation: {words}" in refused(STEPS + more, "run.sh")


def test_trls_moving_reference_of_grpo_is_refused(refused):
    text = "model_name_or_path: a/b\ndataset_name: c/d\nreward_funcs: [r.f]\nuse_peft: false\nsync_ref_model: true\n"
    assert "sync_ref_model: true: the reference of grpo stays" in refused(text + "beta: 0.1\n")
    assert "sync_ref_model" not in refused(text)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("", (True, "wrapped")),
        ("packing: true", (True, "wrapped")),
        ("packing: false", (False, "bfd")),
    ],
)
def test_llama_factorys_pre_training_joins_texts_unless_told_not_to(loaded, lines, found):
    keys = loaded(f"{LLAMAFACTORY}stage: pt\ndataset: wiki\n{lines}\n")[1]
    assert (keys.packing, keys.packing_strategy) == found
    assert (keys.datasets[0].type, keys.datasets[0].columns) == ("text", {"text": "body"})


def test_llama3s_texts_end_as_llama_factory_ends_them(loaded):
    keys = loaded(LLAMAFACTORY.replace("default", "llama3") + "stage: pt\ndataset: wiki\n")[1]
    assert keys.special_tokens == {"eos_token": "<|end_of_text|>"}


def test_llama_factory_streams(loaded, refused):
    rows = LLAMAFACTORY + "stage: pt\ndataset: wiki\nstreaming: true\n"
    assert loaded(rows + "max_steps: 9\n")[1].buffer_size == 16_384
    keys = loaded(rows + "max_steps: 9\nbuffer_size: 7\n")[1]
    assert (keys.streaming, keys.buffer_size) == (True, 7)
    assert "max_steps: missing: how many rows are streamed" in refused(rows)


def test_llama_factorys_reward_models_are_trained(loaded):
    made, keys = loaded(LLAMAFACTORY.replace("full", "lora") + "stage: rm\ndataset: pairs\n")
    assert (made.kind, keys.adapter, keys.lora_r) == ("reward_model", "lora", 8)
    assert keys.datasets[0].columns == {"conversations": "talk", "chosen": "good", "rejected": "bad"}
    assert "# stage: changed because rm: the head reads the last token's state as it is" in made.text


def test_a_reward_models_base_lies_in_8_bits_where_llama_factorys_does(loaded):
    lines = LLAMAFACTORY.replace("full", "lora") + "quantization_bit: 8\nstage: rm\ndataset: pairs\n"
    assert loaded(lines)[1].load_in_8bit


@pytest.mark.parametrize(
    ("lines", "refusal"),
    [
        ("stage: ppo\nreward_model: x\ndataset: wiki", "stage: ppo: its critic is a head on the policy"),
        ("stage: rm\ndataset: wiki", "dataset wiki: it holds no preferences and the stage is reward_model"),
        ("stage: pt\ndataset: odd", "dataset odd: running text is one column here"),
        ("stage: pt\ndataset: wiki\nneat_packing: true", "neat_packing: true: there it is for stage: sft only"),
        ("stage: mystery\ndataset: wiki", "stage: mystery: no such method here; set stage: pt, sft, rm, dpo, kto"),
    ],
)
def test_what_llama_factorys_stages_have_and_we_lack_is_refused_by_name(refused, lines, refusal):
    assert refusal in refused(f"{LLAMAFACTORY}{lines}\n")


@pytest.mark.parametrize(("apart", "names"), [("true", ("a_b", "c")), ("false", ("",))])
def test_llama_factory_measures_each_validation_set_apart_where_asked(loaded, apart, names):
    text = f"dataset: c\neval_dataset: a.b,c\neval_on_each_dataset: {apart}\nmax_samples: 5\n"
    keys = loaded(LLAMAFACTORY + text)[1]
    assert keys.eval_names == names
    assert [source.limit for source in (*keys.datasets, *keys.eval_datasets)] == [5, 5, 5]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("metric_for_best_model: loss\nload_best_model_at_end: true", ("eval_loss", None)),
        ("metric_for_best_model: eval_loss\ngreater_is_better: false\nload_best_model_at_end: true", ("eval_loss", False)),
        ("metric_for_best_model: loss\ngreater_is_better: false", (None, None)),
        ("metric_for_best_model: eval_loss\nearly_stopping_patience: 3", ("eval_loss", None)),
    ],
)  # fmt: skip
def test_the_best_checkpoint_is_told_by_the_metric_that_is_named(loaded, lines, found):
    keys = loaded(f"{CHATS}val_set_size: 0.1\neval_steps: 5\n{lines}\n")[1]
    assert (keys.metric_for_best_model, keys.greater_is_better) == found


def test_a_metric_of_the_other_tools_own_is_refused(refused, loaded):
    best = "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 5\nmetric_for_best_model: "
    assert "metric_for_best_model: eval_mean_token_accuracy is not measured" in refused(
        f"{TRL}{best}eval_mean_token_accuracy\n"
    )
    pairs = loaded(f"{TRL}{best}eval_rewards/accuracies\nbeta: 0.2\n")[1]
    assert pairs.metric_for_best_model == "eval_rewards/accuracies"
    kto = "#!/bin/bash\npython kto.py --model_name_or_path a/b --dataset_name c/d --load_best_model_at_end true --metric_for_best_model rewards/margins"
    assert "metric_for_best_model: rewards/margins is not measured" in refused(kto, "kto.sh")


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("packing: true\npacking_strategy: wrapped", ("wrapped", "truncate")),
        ("packing: true\npacking_strategy: bfd", ("bfd", "truncate")),
        ("packing: true\npacking_strategy: bfd_split", ("bfd", "split")),
        ("packing: false\npacking_strategy: wrapped", ("bfd", "truncate")),
    ],
)
def test_trl_packs_by_the_strategy_that_is_named(loaded, lines, found):
    keys = loaded(f"{TRL}{lines}\n")[1]
    assert (keys.packing_strategy, keys.overflow) == found


def test_trl_streams_and_a_strategy_of_no_name_is_refused(loaded, refused):
    assert loaded(TRL + "dataset_streaming: true\nmax_steps: 9\n")[1].streaming
    assert "packing_strategy: odd has no counterpart" in refused(TRL + "packing: true\npacking_strategy: odd\n")


@pytest.mark.parametrize(
    "script", ["trl reward", "python examples/scripts/reward_modeling.py", "python -m trl.scripts.reward"]
)
def test_trls_reward_models_are_trained(loaded, script):
    line = f"{script} --model_name_or_path a/b --dataset_name c/d --center_rewards_coefficient 0.01 --use_peft --lora_target_modules all-linear\n"
    made, keys = loaded(line, "run.sh")
    assert (made.kind, keys.center_rewards_coefficient, keys.adapter) == ("reward_model", 0.01, "lora")
    assert (keys.learning_rate, keys.sequence_len, keys.overflow) == (1e-4, 1024, "drop")


@pytest.mark.parametrize("script", ["examples/scripts/dpo_online.py", "online_dpo.py"])
def test_trls_online_dpo_is_ours(loaded, script):
    asked = "--model_name_or_path a/b --dataset_name c/d --reward_model_path e/f --missing_eos_penalty 1.0 --max_new_tokens 32"
    made, keys = loaded(
        f"python {script} {asked} --per_device_train_batch_size 4 --gradient_accumulation_steps 2\n", "run.sh"
    )
    assert (made.kind, keys.reward_funcs, keys.missing_eos_penalty) == ("online_dpo", ["model:e/f"], 1.0)
    assert (keys.num_prompts_per_step, keys.num_generations, keys.max_completion_length) == (8, 2, 32)
    assert (keys.beta, keys.loss_type, keys.temperature, keys.learning_rate) == (0.1, "sigmoid", 0.9, 5e-7)
    assert any("they add up there" in note for note in made.notes)


def test_trls_betas_by_epoch_are_refused_and_one_is_read(loaded, refused):
    text = TRL + "reward_model_path: e/f\nloss_type: ipo\n"
    made, keys = loaded(text + "beta: [0.3]\n")
    assert (keys.beta, keys.losses) == (0.3, ("ipo",))
    assert any("compares sums" in note for note in made.notes)
    assert "beta: [0.3, 0.1] has no counterpart here" in refused(text + "beta: [0.3, 0.1]\n")
    assert "judge: pair_rm: a judge stands in a file" in refused(text + "judge: pair_rm\n")


def test_trls_methods_that_are_none_here_are_refused_by_name(refused):
    assert "posttrain_stage: ppo: " in refused("python ppo.py --model_name_or_path a/b --dataset_name c/d\n", "run.sh")


@pytest.mark.parametrize(("stage", "kind"), [("dpo", "dpo"), ("rm", "reward_model")])
def test_llamafactorys_pairs_in_text_columns_become_conversations(loaded, stage, kind):
    made, keys = loaded(f"{LLAMAFACTORY}stage: {stage}\ndataset: texts\n")
    source = keys.datasets[0]
    assert (made.kind, source.type, source.columns) == (
        kind,
        "alpaca_preference",
        {"chosen": "good", "rejected": "bad"},
    )


def test_axolotls_scored_texts_become_conversations(loaded):
    text = "base_model: a/b\nreward_model: true\nsequence_len: 64\ndatasets: [{path: c/d, type: bradley_terry.chat_template}]\n"
    made, keys = loaded(
        text
        + "chat_template: tokenizer_default\nmicro_batch_size: 1\nnum_epochs: 1\nlearning_rate: 1e-4\noptimizer: adamw_torch\nlr_scheduler: cosine\n"
    )
    source = keys.datasets[0]
    assert (made.kind, source.type, source.columns) == ("reward_model", "alpaca_preference", {"instruction": "input"})


def test_llamafactorys_labelled_answers_in_text_columns_become_conversations(loaded, refused):
    made, keys = loaded(f"{LLAMAFACTORY}stage: kto\ndataset: good\n")
    source = keys.datasets[0]
    assert (made.kind, source.type) == ("dpo", "alpaca_kto")
    assert source.columns == {"instruction": "q", "output": "a", "label": "good"}
    assert "no column says which answers are good; give it columns: {kto_tag: NAME}" in refused(
        f"{LLAMAFACTORY}stage: kto\ndataset: unsaid\n"
    )


def test_llamafactorys_names_are_of_the_hub_where_it_says_so(loaded, refused):
    source = loaded(f"{LLAMAFACTORY}stage: sft\ndataset: c/d\ndataset_dir: ONLINE\n")[1].datasets[0]
    assert (source.path, source.type) == ("c/d", "alpaca")
    assert "folder en: one folder of a hub dataset" in refused(f"{LLAMAFACTORY}stage: sft\ndataset: part\n")


@pytest.mark.parametrize(("line", "found"), [("default_system: Be brief.", "Be brief."), ("default_system: ''", "")])
def test_llamafactorys_system_message_is_that_of_each_dataset(loaded, line, found):
    keys = loaded(f"{LLAMAFACTORY}stage: sft\ndataset: c\neval_dataset: a.b\n{line}\n")[1]
    assert [source.default_system for source in (*keys.datasets, *keys.eval_datasets)] == [found] * 2
    assert keys.chat_template_kwargs == ({} if found else {"default_system": ""})


ASKED = AXOLOTL + "rl: {rl}\ndatasets: [{{path: c/d, type: {style}}}]\n"


@pytest.mark.parametrize(
    ("rl", "style", "form", "prompt"),
    [
        ("dpo", "chatml.intel", "preference", "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"),
        ("dpo", "chatml.icr", "preference", "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n"),
        ("kto", "chatml.argilla", "kto", "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_axolotls_styles_of_pairs_write_prompt_and_end_as_text(loaded, rl, style, form, prompt):
    source = loaded(ASKED.format(rl=rl, style=style))[1].datasets[0]
    system = "<|im_start|>system\n{system}<|im_end|>\n"
    assert (source.type, source.prompt_format) == (form, [system + prompt, prompt])
    assert source.completion_suffix == "<|im_end|>"
    headers = loaded(ASKED.format(rl=rl, style=style.replace("chatml", "llama3")))[1].datasets[0]
    assert headers.completion_suffix == "<|eot_id|>" and len(headers.prompt_format) == 2


def test_axolotls_pairs_as_they_are_and_in_a_style_of_ones_own(loaded, refused):
    assert loaded(ASKED.format(rl="ipo", style="passthrough"))[1].datasets[0].type == "preference"
    own = "{field_prompt: q, field_chosen: good, prompt_format: '{system}Q: {prompt} A:', chosen_format: '{chosen}</a>', rejected_format: '{rejected}</a>'}"
    source = loaded(ASKED.format(rl="dpo", style=own))[1].datasets[0]
    assert source.prompt_format == ["{system}Q: {q} A:", "Q: {q} A:"]
    assert (source.completion_suffix, source.columns) == ("</a>", {"chosen": "good"})
    odd = own.replace("'{rejected}</a>'", "'{rejected}'")
    assert "chosen_format and rejected_format: answers end alike here" in refused(ASKED.format(rl="dpo", style=odd))
    assert "chatml.ultra: a prompt style that is not known here; known are" in refused(
        ASKED.format(rl="dpo", style="chatml.ultra")
    )


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        (
            "train_on_inputs: true",
            "train_on_inputs: true: of conversations Axolotl then trains the texts of every turn",
        ),
        ("roles_to_train: []", "roles_to_train: []: which turns are trained is then told by flags in the rows"),
    ],
)
def test_what_axolotl_trains_of_a_conversation_is_refused_where_it_is_not_the_answers(refused, line, refusal):
    assert refusal in refused(CHATS + line + "\n")


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("chat_template, conversation: chatml}", "datasets.1.conversation: left out because only alpaca_chat reads it"),
        ("chat_template, field: text}", "datasets.1.field: left out because chat_template does not read it"),
        (
            "completion, roles_to_train: [user]}",
            "datasets.1.roles_to_train: left out because completion does not read it",
        ),
    ],
)
def test_a_key_of_an_entry_that_its_type_does_not_read_has_its_note(loaded, line, note):
    assert note in loaded(CHATS.replace("chat_template}", line))[0].text


def test_another_style_of_alpaca_chat_is_refused(refused):
    text = refused(CHATS.replace("chat_template}", "alpaca_chat, conversation: phi}"))
    assert "datasets.1.conversation: phi: only the style chat is read" in text


def test_roles_of_validation_rows_are_read_too(refused):
    text = CHATS + "test_datasets: [{path: c/e, type: chat_template, roles_to_train: [user]}]\n"
    assert "test_datasets.1.roles_to_train: ['user']: only the assistant's turns" in refused(text)


def test_the_end_of_a_turn_that_axolotl_leaves_untrained_has_its_note(loaded):
    note = "eot_tokens: changed because it is unset"
    assert note in loaded(CHATS)[0].text
    assert note not in loaded(CHATS + "eot_tokens: [<|im_end|>]\n")[0].text
    assert note not in loaded(CHATS + "chat_template: chatml\nspecial_tokens: {eos_token: <|im_end|>}\n")[0].text
    assert note in loaded(CHATS + "chat_template: chatml\nspecial_tokens: {eos_token: </s>}\n")[0].text


def test_columns_of_whole_pairs_are_renamed(loaded):
    style = "{path: c/d, type: chat_template.argilla_chat, field_chosen: good}"
    assert loaded(AXOLOTL + f"rl: dpo\ndatasets: [{style}]\n")[1].datasets[0].columns == {"chosen": "good"}


def test_where_thinking_stands_has_its_note(loaded):
    text = CHATS.replace("chat_template}", "chat_template, field_thinking: thinking, template_thinking_key: reasoning}")
    notes = loaded(text)[0].text
    assert "datasets.1.field_thinking: left out because thinking is read as thinking" in notes
    assert "datasets.1.template_thinking_key: left out because reasoning is read as thinking" in notes


EBFT = AXOLOTL + "gradient_accumulation_steps: 4\nrl: ebft\n"
SOLVED = EBFT + "datasets: [{path: c/d, type: ebft_opencode.transform}]\n"
CODE = EBFT + "datasets: [{path: c/d, type: ebft_pretrain.transform}]\n"


def test_axolotls_feature_matching_is_that_of_whole_answers(loaded):
    """Its trainer is that of GRPO: groups of completions, divided by their spread."""
    made, keys = loaded(
        SOLVED
        + "ebft: {diversity_coef: 0.5}\ntrl: {num_generations: 4, scale_rewards: true, epsilon: 0.2, loss_type: grpo, use_vllm: true}\n"
    )
    assert made.kind == "ebft"
    assert (keys.mode, keys.num_prompts_per_step, keys.num_generations, keys.per_device_train_batch_size) == (
        "structured",
        2,
        4,
        2,
    )
    assert (keys.advantage_estimator, keys.scale_rewards, keys.loss_type) == ("group", "group", "grpo")
    assert (keys.unbiased_baseline, keys.use_whitening, keys.normalize_layers, keys.diversity_coef) == (
        False,
        False,
        False,
        0.5,
    )
    assert (keys.datasets[0].type, keys.datasets[0].prompt_format) == ("alpaca", ["{input}"])
    assert "# ebft.adaptive_max_tokens: changed because completions are not cut" in made.text
    assert "# trl.epsilon: left out because each generation batch is trained on once" in made.text


def test_axolotls_strided_texts_make_a_step_of_as_many(loaded):
    made, keys = loaded(
        CODE
        + "ebft: {mode: strided, stride: 4, generate_max_len: 6, context_length: 10, n_samples_per_prompt: 3, ce_coef: 0.03, use_whitening: true, rl_coef: 1.0}\n"
    )
    assert (keys.mode, keys.stride, keys.context_length, keys.max_completion_length) == ("strided", 4, 10, 6)
    # (512 − 6 − 10) // 4 + 1 anchors of a text, as Axolotl counts them.
    assert (keys.num_prompts_per_step, keys.per_device_train_batch_size) == (8, 2 * 125 * 3)
    assert (keys.temperature, keys.ce_coef, keys.use_whitening, keys.normalize_layers) == (0.6, 0.03, True, True)
    assert (keys.advantage_estimator, keys.unbiased_baseline, keys.diversity_coef) == ("rloo", False, 1.0)
    assert (keys.datasets[0].type, keys.datasets[0].columns, keys.overflow) == (
        "text",
        {"text": "question"},
        "truncate",
    )
    assert "the loss uses it too, which Axolotl's does not" in made.text


def test_features_of_several_layers_are_longer_in_axolotls_strided_mode(loaded):
    """√3 where each of three has length 1: products of two are three times as large."""
    keys = loaded(CODE + "ebft: {mode: strided, feature_layers: [0.25, 0.5, 0.75], diversity_coef: 0.5}\n")[1]
    assert (keys.use_whitening, keys.diversity_coef) == (False, 1.5)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "ebft: {embed_method: mean_pooling}",
            "ebft.embed_method: mean_pooling: with mode: structured the mean goes over the prompt too",
        ),
        ("ebft: {embed_method: completion_mean}", "ebft.embed_method: completion_mean"),
        ("ebft: {embed_method: concat}", "ebft.embed_method: concat: it takes three places"),
        ("ebft: {mode: strided, embed_method: concat}", "ebft.embed_method: concat: it is read as last_token"),
        ("ebft: {mode: strided, rl_coef: 0.5}", "ebft.rl_coef: 0.5"),
        ("ebft: {mode: strided, advantage_estimator: reinforce}", "ebft.advantage_estimator: reinforce"),
        ("ebft: {ce_coef: 0.03}", "ebft.ce_coef: 0.03: Axolotl reads it with mode: strided only"),
        ("ebft: {critic_learning_rate: 1e-6}", "ebft.critic_learning_rate"),
        ("trl: {beta: 0.1}", "trl.beta: 0.1"),
        ("trl: {num_iterations: 2}", "trl.num_iterations: 2"),
        ("trl: {num_generations: 3}", "2 × 4 completions are no groups of 3"),
    ],
)
def test_what_axolotls_feature_matching_does_otherwise_is_refused(refused, lines, message):
    assert message in refused(SOLVED + lines + "\n")


def test_a_function_of_the_users_own_is_not_guessed(refused):
    assert "own.transform: a prompt style that is not known here" in refused(SOLVED.replace("ebft_opencode", "own"))
