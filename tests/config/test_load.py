import re
from pathlib import Path
from typing import get_args

import pytest

from posttrain.config import describe_keys, detect_kind, load_gate, load_stage
from posttrain.config.datasets import ROWS_OF_TYPE, DatasetKeys
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.load import marked_kind
from posttrain.config.stages import SFTKeys
from posttrain.data.formats import FORMATS
from posttrain.errors import ConfigError

MINIMAL = "base_model: ./base\ndatasets: [{path: sft_data.jsonl}]\n"
GRPO = "base_model: ./base\ndatasets: [{path: sft_data.jsonl}]\nreward_funcs: [rewards.py:correct]\n"


def refusal(kind, path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_stage(kind, path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_the_flat_yaml_of_the_documentation_loads(folder):
    loaded = load_stage("sft", folder / "train.yaml")
    keys = loaded.keys
    assert isinstance(keys, SFTKeys)
    assert (keys.base_model, keys.adapter, keys.load_in_4bit, keys.bf16) == ("Qwen/Qwen3-8B", "qlora", True, True)
    assert (keys.lora_r, keys.lora_alpha, keys.sequence_len) == (16, 32.0, 4096)
    assert keys.lora_target == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert keys.gradient_checkpointing is True
    assert keys.datasets[0].path == str(folder / "sft_data.jsonl")
    assert keys.datasets[0].type == "chat"
    assert keys.output_dir == str(folder / "runs/train")
    assert loaded.notes == ()


def test_provenance_says_default_line_or_set(folder):
    loaded = load_stage("sft", folder / "train.yaml", ["learning_rate=1e-6", "datasets.1.weight=2"])
    assert loaded.keys.learning_rate == 1e-6
    assert loaded.keys.datasets[0].weight == 2.0
    expected = {
        "base_model": "train.yaml:1",
        "lora_target": "train.yaml:6",
        "datasets.1.path": "train.yaml:10",
        "datasets.1.split": "default",
        "datasets.1.weight": "--set",
        "learning_rate": "--set",
        "seed": "default",
        "output_dir": "default",
    }
    assert {key: loaded.provenance[key] for key in expected} == expected


def test_describe_lists_every_key_with_its_default(folder):
    rows = describe_keys(load_stage("sft", folder / "train.yaml"))
    names = [key for key, _, _ in rows]
    assert set(SFTKeys.model_fields) - {"datasets"} <= {name.partition(".")[0] for name in names}
    assert len(names) == len(set(names))
    assert ("learning_rate", 2e-5, "default") in rows
    assert ("lora_r", 16, "train.yaml:4") in rows


def test_qlora_implies_4_bits_and_says_why(write):
    loaded = load_stage("sft", write(MINIMAL + "adapter: qlora\n"))
    assert loaded.keys.load_in_4bit is True
    assert loaded.provenance["load_in_4bit"] == "train.yaml:3"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("learning_rate: fast", "train.yaml:3: learning_rate: got 'fast', expected a number (> 0); e.g. learning_rate: 1e-5"),
        ("learning_rate: -1", "train.yaml:3: learning_rate: got -1, expected a number (> 0); e.g. learning_rate: 1e-5"),
        ("learning_rate: .inf", "train.yaml:3: learning_rate: got inf, expected a number (> 0); e.g. learning_rate: 1e-5"),
        ("lora_r: true", "train.yaml:3: lora_r: got true, expected an integer (≥ 1); e.g. lora_r: 16"),
        ("lora_r: 1.5", "train.yaml:3: lora_r: got 1.5, expected an integer (≥ 1); e.g. lora_r: 16"),
        ("lora_dropout: 1", "train.yaml:3: lora_dropout: got 1, expected a number (≥ 0, < 1); e.g. lora_dropout: 0"),
        ("adapter: qlra", "train.yaml:3: adapter: got 'qlra', expected one of none, lora, qlora; did you mean qlora or lora?"),
        ("bf16: maybe", "train.yaml:3: bf16: got 'maybe', expected true or false or auto; e.g. bf16: auto"),
        ("lora_target: 5", "train.yaml:3: lora_target: got 5, expected a list of strings or a string; e.g. lora_target: [q_proj, v_proj]"),
        ("lora_target: [q, 5]", "train.yaml:3: lora_target.2: got 5, expected"),
        ("rank_pattern: {q: big}", "train.yaml:3: rank_pattern.q: got 'big', expected a mapping of names to integers"),
        ("revision: 3", "train.yaml:3: revision: got 3, expected a string; e.g. revision: main"),
        ("eval_datasets: dev.jsonl", "train.yaml:3: eval_datasets: got 'dev.jsonl', expected a list of mappings with path,"),
        ("eval_datasets: [dev.jsonl]", "train.yaml:3: eval_datasets.1: got 'dev.jsonl', expected"),
        ("eval_datasets: [{type: chat}]", "train.yaml:3: eval_datasets.1.path: missing; each entry of eval_datasets needs it; e.g. path: ./data.jsonl"),
        ("eval_datasets: [{path: sft_data.jsonl, typ: chat}]", "train.yaml:3: eval_datasets.1.typ: unknown key; did you mean type?"),
        ("lerning_rate: 1", "train.yaml:3: lerning_rate: unknown key; did you mean learning_rate?"),
        ("Learning-Rate: 1", "train.yaml:3: Learning-Rate: unknown key; did you mean learning_rate?"),
        ("zzz: 1", "train.yaml:3: zzz: unknown key; `posttrain explain` lists the keys"),
        ("num_generations: 4", "train.yaml:3: num_generations is a grpo, ppo, online_dpo, distill and ebft key; this is sft"),
        ("beta: 0.1", "train.yaml:3: beta is a dpo, grpo, ppo and online_dpo key; this is sft"),
        ("pref_beta: 0.1", "train.yaml:3: pref_beta is a dpo key; this is sft"),
        ("evals: {}", "train.yaml:3: evals is a pipeline key; it stands at the top of a YAML for `posttrain run`"),
        ("weight: 2", "train.yaml:3: weight: unknown key; it belongs inside an entry of datasets"),
        ("adapter: qlora\nload_in_4bit: false", "load_in_4bit: false contradicts adapter: qlora"),
        ("layer_offloading: true", "layer_offloading: true with adapter: none: weights that are trained stay"),
        (
            "adapter: lora\ngradient_checkpointing: false\nlayer_offloading: true",
            "layer_offloading: true with gradient_checkpointing: false",
        ),
        ("lora_target: [q_proj, 'layers.[01']", "lora_target: layers.[01 is no regular expression: unterminated"),
        ("lora_target: 'a(b'", "lora_target: a(b is no regular expression"),
        ("lora_target: []", "lora_target: got [], expected a list of strings"),
        ("rank_pattern: {'q[': 3}", "rank_pattern: q[ is no regular expression"),
        ("unfrozen_parameters: ['*']", "unfrozen_parameters: * is no regular expression"),
        ("load_in_4bit: true", "train.yaml:3: load_in_4bit: true with adapter: none would train nothing; set adapter: qlora"),
    ],
)  # fmt: skip
def test_messages_name_line_value_and_way_out(write, line, expected):
    assert expected in refusal("sft", write(MINIMAL + line + "\n"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train_on: all", "train.yaml:4: train_on is a sft key; this is grpo"),
        ("num_generations: 1", "train.yaml:4: num_generations: got 1, expected an integer (≥ 2); e.g. num_generations: 8"),
        ("delta: 1", "train.yaml:4: delta: got 1, expected a number (> 1); e.g. delta: 4"),
        ("reward_weights: [1, 2]", "train.yaml:4: reward_weights has 2 entries for 1 reward_funcs; give one each"),
        ("reward_weights: [.nan]", "train.yaml:4: reward_weights.1: got nan, expected a list of numbers"),
        ("reward_kwargs: {corect: {}}", "train.yaml:4: reward_kwargs.corect: no such entry in reward_funcs; did you mean correct?"),
        ("num_prompts_per_step: 5\nsteps_per_generation: 2", "train.yaml:4: num_prompts_per_step=5 is not divisible by steps_per_generation=2"),
    ],
)  # fmt: skip
def test_messages_of_an_rl_stage(write, line, expected):
    assert expected in refusal("grpo", write(GRPO + line + "\n"))


def test_missing_keys_are_named_with_an_example(write):
    message = refusal("grpo", write("seed: 1\n"))
    assert (
        "train.yaml:1: base_model: missing; every grpo configuration needs it; e.g. base_model: Qwen/Qwen3-8B"
        in message
    )
    assert "train.yaml:1: datasets: missing; every grpo configuration needs it" in message
    assert (
        "train.yaml:1: reward_funcs: missing; every grpo configuration needs it; e.g. reward_funcs: [rewards.py:correct]"
        in message
    )


def test_all_errors_are_listed_in_the_order_of_the_file(write):
    text = "base_model: ./bse\nadapter: qlra\nlerning_rate: 3\ndatasets: [{path: gone.jsonl, typ: chat}]\nlora_r: x\n"
    lines = refusal("sft", write(text), ["seed=x"]).splitlines()
    assert [re.match(r"train\.yaml:(\d+)|--set", line)[0] for line in lines] == [
        "train.yaml:1", "train.yaml:2", "train.yaml:3", "train.yaml:4", "train.yaml:4", "train.yaml:5", "--set",
    ]  # fmt: skip
    assert "pydantic" not in "\n".join(lines)


def test_long_values_are_cut(write):
    assert "…" in refusal("sft", write(MINIMAL + f"seed: {'x' * 500}\n"))


def test_null_means_the_default(write):
    loaded = load_stage("sft", write(MINIMAL + "learning_rate:\nwandb_project: null\nadapter: ~\n"))
    assert loaded.keys.learning_rate == 2e-5
    assert loaded.keys.adapter == "none"


def test_text_and_whole_floats_are_numbers_where_numbers_are_meant(write):
    keys = load_stage("sft", write(MINIMAL + "max_steps: 1e2\nlearning_rate: '1e-4'\n")).keys
    assert (keys.max_steps, keys.learning_rate) == (100, 1e-4)


def test_a_pipeline_is_not_a_stage(folder):
    assert "this is a pipeline; run it with `posttrain run" in refusal("sft", folder / "pipeline.yaml")


def test_set_takes_other_tools_names_and_outranks_the_file(folder):
    loaded = load_stage("sft", folder / "train.yaml", ["cutoff_len=512", "sft.seed=7", "lora_target=[q_proj]"])
    assert (loaded.keys.sequence_len, loaded.keys.seed, loaded.keys.lora_target) == (512, 7, ["q_proj"])
    assert loaded.provenance["sequence_len"] == "--set"
    assert loaded.notes == ("cutoff_len is LLaMA-Factory's name; read as sequence_len",)


def test_set_can_unset_add_and_reach_inside(folder):
    overrides = ["lora_alpha=", "rank_pattern.q_proj=4", "datasets.2={path: data/sft.jsonl, limit: 3}"]
    keys = load_stage("sft", folder / "train.yaml", overrides).keys
    assert keys.lora_alpha == 32.0
    assert keys.rank_pattern == {"q_proj": 4}
    assert [(source.path, source.limit) for source in keys.datasets] == [
        (str(folder / "sft_data.jsonl"), None),
        (str(folder / "data/sft.jsonl"), 3),
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learning_rat=1", "--set learning_rat=1: learning_rat: unknown key; did you mean learning_rate?"),
        ("learning_rate=fast", "--set learning_rate=fast: learning_rate: got 'fast', expected a number (> 0)"),
        ("learning_rate", "--set learning_rate: expected KEY=VALUE, e.g. --set learning_rate=1e-6"),
        ("=3", "--set =3: expected KEY=VALUE"),
        ("grpo.learning_rate=1", "--set grpo.learning_rate=1: grpo: this is sft, not grpo"),
        ("sft=1", "--set sft=1: sft: name a key of the sft stage"),
        ("datasets.9.path=x", "--set datasets.9.path=x: datasets: got place 9, expected 1 to 2"),
        ("seed.x=1", "--set seed.x=1: seed"),
        ("lora_target=[a", "--set lora_target=[a: value:1:"),
        (
            "num_generations=4",
            "--set num_generations=4: num_generations is a grpo, ppo, online_dpo, distill and ebft key; this is sft",
        ),
    ],
)
def test_a_bad_override_is_named_as_such(folder, override, expected):
    assert expected in refusal("sft", folder / "train.yaml", [override])


def test_a_gate_spec_stands_alone_or_in_a_pipeline(folder, write):
    alone = load_gate(
        write("primary: [{suite: heldout, min_delta: 0.05}]\nguards: [{suite: format, margin: 0.02}]\n", "gate.yaml")
    )
    inside = load_gate(folder / "pipeline.yaml")
    assert alone.primary == inside.primary
    assert alone.guards == inside.guards
    assert alone.alpha == 0.05


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha: 0.05\n", "gate.yaml:1: a gate needs at least one entry in guards or primary"),
        ("guards: [{suite: a, margin: 0}]\n", "gate.yaml:1: guards.1.margin: got 0, expected a number (> 0)"),
        ("gards: []\n", "gate.yaml:1: gards: unknown key; did you mean guards?"),
        ("guards: [{suite: a, margin: 1}]\non_fail: rtry\n", "gate.yaml:2: on_fail: got 'rtry', expected"),
        (
            "guards: [{suite: a, margin: 1}]\non_fail: {times: 2}\n",
            "gate.yaml:2: on_fail.retry: missing; on_fail needs it",
        ),
        (
            "guards: [{suite: a, margin: 1}]\non_fail: {retry: 1, tims: 2}\n",
            "gate.yaml:2: on_fail.tims: unknown key; did you mean times?",
        ),
        ("stages: []\n", "this pipeline has no gate at its top"),
    ],
)
def test_a_bad_gate_spec(write, text, expected):
    path = write(text, "gate.yaml")
    with pytest.raises(ConfigError) as caught:
        load_gate(path)
    assert expected in str(caught.value).replace(f"{path.parent}/", "")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (MINIMAL, "sft"),
        (MINIMAL + "packing: true\n", "sft"),
        (MINIMAL + "beta: 0.1\n", "dpo"),
        ("base_model: x\ndatasets: [{path: y, type: kto}]\n", "dpo"),
        (GRPO, "grpo"),
        ("base_model: x\ndatasets: [{path: y, type: prompt}]\n", "grpo"),
        ("stages: []\n", "pipeline"),
    ],
)
def test_what_a_yaml_is_for_shows_in_its_keys(write, text, kind):
    assert detect_kind(write(text)) == kind


def test_a_path_given_as_text_is_taken(folder):
    assert load_stage("sft", str(folder / "train.yaml")).path == Path(folder / "train.yaml")


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("grpo", MINIMAL, "if this is meant as sft: posttrain sft train.yaml"),
        ("dpo", MINIMAL.replace("jsonl}", "jsonl, type: chat}"), "if this is meant as sft: posttrain sft train.yaml"),
        ("sft", GRPO, "if this is meant as grpo: posttrain grpo train.yaml"),
        ("sft", MINIMAL + "rpo_alpha: 1\n", "if this is meant as dpo: posttrain dpo train.yaml"),
    ],
)
def test_the_yaml_of_another_stage_is_told_by_its_verb(write, kind, text, expected):
    assert f"train.yaml: {expected}" in refusal(kind, write(text))


@pytest.mark.parametrize("kind", STAGE_KINDS)
def test_a_typo_alone_sends_nobody_to_another_verb(write, kind):
    text = MINIMAL + ("reward_funcs: [a]\n" if kind in ("grpo", "ppo", "online_dpo") else "")
    assert "if this is meant" not in refusal(kind, write(text + "lerning_rate: 1\n"))


def test_rows_of_another_stage_are_refused_at_their_line(write):
    text = "base_model: ./base\ndatasets:\n  - {path: sft_data.jsonl}\n  - {path: sft_data.jsonl, type: chat}\n"
    assert (
        "train.yaml:4: datasets.2.type: chat is not for dpo, which takes preference or alpaca_preference or kto or alpaca_kto"
        in refusal("dpo", write(text))
    )


def test_every_row_format_is_a_type_of_dataset_and_gives_rows():
    types = set(get_args(DatasetKeys.model_fields["type"].annotation)) - {"auto"}
    assert set(FORMATS) == types == set(ROWS_OF_TYPE)


@pytest.mark.parametrize(
    ("given", "kind"),
    [({"teachers": [{"model": "start"}]}, "distill"), ({"reward_funcs": ["exact"]}, "grpo"), ({"reward_funcs": ["exact"], "gae_lambda": 1.0}, "ppo"), ({}, "ebft"), ({"teachers": [], "reward_funcs": ["exact"]}, "grpo")],
)  # fmt: skip
def test_of_kinds_that_take_the_same_keys_one_that_needs_no_other_is_meant(given, kind):
    values = {"base_model": "m", "datasets": [{"path": "p.jsonl"}], "num_generations": 2, "max_completion_length": 8}
    assert marked_kind({**values, **given}) == kind
