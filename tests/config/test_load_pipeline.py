import random
import re
from pathlib import Path

import pytest

from posttrain.config import describe_keys, load_pipeline, load_stage
from posttrain.config.yaml_lines import dump_yaml, read_yaml
from posttrain.errors import ConfigError


def refusal(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_the_pipeline_of_the_documentation_loads(folder):
    loaded = load_pipeline(folder / "pipeline.yaml")
    keys = loaded.keys
    assert [stage.kind for stage in keys.stages] == ["sft", "dpo", "grpo"]
    sft, dpo, grpo = (stage.keys for stage in keys.stages)
    assert {stage.keys.base_model for stage in keys.stages} == {str(folder / "base")}
    assert (sft.learning_rate, sft.num_train_epochs, dpo.learning_rate, dpo.beta) == (1e-3, 2, 5e-6, 0.1)
    assert (grpo.learning_rate, grpo.max_steps, grpo.num_generations) == (1e-6, 200, 8)
    assert grpo.reward_funcs == [f"{folder}/rewards.py:correct"]
    assert {name: suite.path for name, suite in keys.evals.items()} == {
        name: str(folder / f"evals/{name}.jsonl") for name in ("heldout", "format")
    }
    assert (keys.gate.on_fail.retry, keys.gate.on_fail.with_) == ("sft", {"num_train_epochs": 3})
    assert (keys.register_.alias, keys.register_.registry) == ("champion", str(folder / "registry"))
    assert keys.output_dir == str(folder / "runs/word-problems")
    assert loaded.notes == ()


def test_keys_at_the_top_are_handed_down_and_a_stage_has_the_last_word(write, pipeline_text):
    text = pipeline_text.replace("  - dpo:  {", "  - dpo:  { lora_r: 4,") + "adapter: lora\nlora_r: 8\nseed: 7\n"
    loaded = load_pipeline(write(text))
    assert [stage.keys.lora_r for stage in loaded.keys.stages] == [8, 4, 8]
    assert [stage.keys.adapter for stage in loaded.keys.stages] == ["lora"] * 3
    assert [stage.keys.seed for stage in loaded.keys.stages] == [7] * 3
    assert loaded.keys.seed == 7
    assert loaded.provenance["stages.1.lora_r"] == "train.yaml:15"
    assert loaded.provenance["stages.2.lora_r"] == "train.yaml:6"
    assert loaded.provenance["stages.3.lora_dropout"] == "default"


def test_the_closest_override_wins_whatever_the_order(folder):
    overrides = ["stages.1.learning_rate=3e-3", "learning_rate=1e-3", "grpo.learning_rate=2e-3"]
    loaded = load_pipeline(folder / "pipeline.yaml", overrides)
    assert [stage.keys.learning_rate for stage in loaded.keys.stages] == [3e-3, 1e-3, 2e-3]
    assert {loaded.provenance[f"stages.{place}.learning_rate"] for place in (1, 2, 3)} == {"--set"}


def test_overrides_reach_what_surrounds_the_stages(folder):
    overrides = ["gate.alpha=0.1", "name=other", "evals.heldout.num_samples=4", "base_model=Qwen/Qwen3-0.6B"]
    overrides += ["gate.on_fail.with.lora_r=2", "register.alias=best", "lr=1e-4"]
    loaded = load_pipeline(folder / "pipeline.yaml", overrides)
    keys = loaded.keys
    assert (keys.gate.alpha, keys.name, keys.evals["heldout"].num_samples) == (0.1, "other", 4)
    assert keys.output_dir == str(folder / "runs/other")
    assert {stage.keys.base_model for stage in keys.stages} == {keys.base_model} == {"Qwen/Qwen3-0.6B"}
    assert keys.gate.on_fail.with_ == {"num_train_epochs": 3, "lora_r": 2}
    assert keys.register_.alias == "best"
    assert {stage.keys.learning_rate for stage in keys.stages} == {1e-4}
    assert loaded.provenance["gate.alpha"] == "--set"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("grpo.learning_rat=1", "--set grpo.learning_rat=1: stages.3.learning_rat: unknown key; did you mean learning_rate?"),
        ("stages.9.seed=1", "--set stages.9.seed=1: stages.9.seed: expected stages.PLACE.KEY with a place that exists; there are 1 sft, 2 dpo, 3 grpo"),
        ("stages.x.seed=1", "expected stages.PLACE.KEY"),
        ("grpo=1", "--set grpo=1: grpo: name a key of the grpo stage"),
        ("stages.1=x", "--set stages.1=x: stages.1: name a key of the sft stage"),
        ("gate.alph=1", "--set gate.alph=1: gate.alph: unknown key; did you mean alpha?"),
        ("num_generations=4", "--set num_generations=4: num_generations is a grpo, ppo, online_dpo, distill and ebft key; put it inside the grpo stage"),
        ("sft.base_model=x", "--set sft.base_model=x: base_model: the pipeline decides it; use --set base_model=…"),
        ("learning_rate=fast", "--set learning_rate=fast: learning_rate: got 'fast', expected a number (> 0)"),
    ],
)  # fmt: skip
def test_a_bad_override_is_named_as_such(folder, override, expected):
    assert expected in refusal(folder / "pipeline.yaml", [override])


def test_an_override_for_a_stage_that_is_not_there(write, pipeline_text):
    text = "\n".join(line for line in pipeline_text.splitlines() if "- dpo" not in line)
    assert "dpo.beta: this pipeline has no dpo stage; it has 1 sft, 2 grpo" in refusal(write(text), ["dpo.beta=1"])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: word-problems\nbase", "nam: x\nbase", "train.yaml:1: nam: unknown key; did you mean name?"),
        ("name: word-problems\nbase", "base", "train.yaml:1: name: missing; every pipeline configuration needs it; e.g. name: word-problems"),
        ("name: word-problems\nbase", "name: ../up\nbase", "train.yaml:1: name: got '../up', expected letters, digits, spaces and . _ -"),
        ("./base", "./bse", "train.yaml:2: base_model: ./bse does not exist in"),
        ("base_model: ./base", "seed: 1", "train.yaml:1: base_model: missing; every pipeline configuration needs it"),
        ("evals/format.jsonl", "evals/frmat.jsonl", "train.yaml:3: evals.format.path: evals/frmat.jsonl does not exist in evals; did you mean format.jsonl?"),
        ("evals/format.jsonl }", "{path: evals/format.jsonl, n: 2} }", "train.yaml:3: evals.format.n: unknown key; valid: env, tools, max_turns, env_timeout_s, env_workers, path, num_samples"),
        ("- sft:  {", "- stf:  {", "train.yaml:5: stages.1: no such stage: stf; expected one of sft, dpo, reward_model, process_reward_model, grpo, ppo, online_dpo, distill, ebft; did you mean sft?"),
        ("- sft:  {", "- sft:\n    dpo:  {", "stages.1: got a mapping with sft, dpo, expected one of sft, dpo, reward_model, process_reward_model, grpo, ppo, online_dpo, distill, ebft with its keys"),
        ("- sft:  {", "- sft\n  - sft:  {", "train.yaml:5: stages.1: got 'sft', expected one of sft, dpo, reward_model, process_reward_model, grpo, ppo, online_dpo, distill, ebft with its keys"),
        ("- sft:  {", "- sft:\n  - sft:  {", "train.yaml:5: stages.1.datasets: missing; every sft configuration needs it"),
        ("- sft:  {", "- sft: 3\n  - sft:  {", "train.yaml:5: stages.1: got 3, expected the keys of sft"),
        ("- sft:  {", "- sft:  { num_generations: 4,", "train.yaml:5: stages.1.num_generations: num_generations is a grpo, ppo, online_dpo, distill and ebft key; this is sft"),
        ("- sft:  {", "- sft:  { output_dir: x,", "train.yaml:5: stages.1.output_dir: the pipeline decides it"),
        ("- sft:  {", "- sft:  { register: x,", "register is a pipeline key"),
        ("gate:\n", "num_generations: 4\ngate:\n", "train.yaml:8: num_generations is a grpo, ppo, online_dpo, distill and ebft key; put it inside the grpo stage"),
        ("gate:\n", "guards: []\ngate:\n", "train.yaml:8: guards: unknown key; it belongs inside gate"),
        ("gate:\n", "learning_rate: fast\ngate:\n", "train.yaml:8: learning_rate: got 'fast', expected a number (> 0)"),
        ("suite: format", "suite: fromat", "train.yaml:10: gate.guards.1.suite: no suite fromat in evals; did you mean format?"),
        ("suite: heldout", "suite: x", "train.yaml:11: gate.primary.1.suite: no suite x in evals; evals has heldout, format"),
        ("retry: sft", "retry: 7", "train.yaml:12: gate.on_fail.retry: no stage 7 before this gate; there are 1 sft, 2 dpo, 3 grpo"),
        ("retry: sft", "retry: rlhf", "train.yaml:12: gate.on_fail.retry: got 'rlhf', expected one of sft, dpo, reward_model, process_reward_model, grpo, ppo, online_dpo, distill, ebft or an integer"),
        ("num_train_epochs: 3", "num_train_epoch: 3", "train.yaml:12: gate.on_fail.with.num_train_epoch: unknown key; did you mean num_train_epochs?"),
        ("num_train_epochs: 3", "num_train_epochs: no", "train.yaml:12: gate.on_fail.with.num_train_epochs: got 'no', expected a number (> 0)"),
        ("num_train_epochs: 3", "beta: 3", "train.yaml:12: gate.on_fail.with.beta: beta is a dpo, grpo, ppo and online_dpo key; this is sft"),
        ("num_train_epochs: 3", "datasets: [{path: data/more.jsonl}]", "gate.on_fail.with.datasets.1.path: data/more.jsonl does not exist"),
        ("num_train_epochs: 3", "base_model: x", "train.yaml:12: gate.on_fail.with.base_model: a retry cannot change it"),
        ("alias:champion", "stage:3", "train.yaml:9: gate.baseline: got stage:3, expected stage:base, stage:1, stage:2 (a stage before this gate's)"),
        ("alias: champion", "alia: champion", "train.yaml:13: register.alia: unknown key; did you mean alias?"),
        ("stages:\n", "stage:\n", "train.yaml:1: stages: missing; a pipeline is a list of stages"),
    ],
)  # fmt: skip
def test_messages_name_line_and_way_out(write, pipeline_text, old, new, expected):
    assert old in pipeline_text
    message = refusal(write(pipeline_text.replace(old, new, 1)))
    assert expected in message


def test_a_key_handed_down_is_one_problem(write, pipeline_text):
    message = refusal(write(pipeline_text + "learning_rate: fast\nlora_r: x\n"))
    assert len([line for line in message.splitlines() if "lora_r" in line]) == 1


def test_all_errors_are_listed_at_once(write, pipeline_text):
    text = (
        pipeline_text.replace("./base", "./bse").replace("beta: 0.1", "bta: 0.1").replace("suite: format", "suite: x")
    )
    lines = refusal(write(text)).splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "6", "10"]


def test_describe_lists_every_key_once(folder):
    rows = describe_keys(load_pipeline(folder / "pipeline.yaml"))
    names = [key for key, _, _ in rows]
    assert len(names) == len(set(names))
    assert {"stages.3.epsilon", "evals.heldout.temperature", "gate.power", "register.alias"} <= set(names)
    assert ("stages.2.beta", 0.1, "pipeline.yaml:6") in rows
    assert "stages.1.base_model" not in names


def test_notes_name_the_stage(write, pipeline_text):
    loaded = load_pipeline(write(pipeline_text.replace("beta: 0.1", "pref_beta: 0.1, discopop_tau: 0.1")))
    assert loaded.notes == (
        "pref_beta is LLaMA-Factory's name; read as beta",
        "stages.2: discopop_tau: no effect, because loss_type is not discopop",
    )


def test_the_examples_of_the_page_load(write):
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    flat, pipeline = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert load_stage("sft", write(flat)).keys.adapter == "qlora"
    assert len(load_pipeline(write(pipeline)).keys.stages) == 3


JUNK = (
    None,
    True,
    3,
    2.5,
    "x",
    "",
    [],
    {},
    [1],
    [{}],
    {"a": 1},
    {"retry": {"a": 1}},
    {"sft": None},
    "stage:x",
    {"path": 3},
)


def places(value, path=()):
    """The path of every value below `value`."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(item, (*path, key))


@pytest.mark.parametrize("seed", range(40))
def test_whatever_stands_in_the_file_the_error_is_ours(folder, seed):
    rng = random.Random(seed)
    data = read_yaml(folder / "pipeline.yaml").data
    path = rng.choice(list(places(data)))
    holder = data
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = rng.choice(JUNK)
    broken = folder / "broken.yaml"
    broken.write_text(dump_yaml(data))
    try:
        loaded = load_pipeline(broken)
    except ConfigError as error:
        assert all(line.startswith(str(broken)) for line in str(error).splitlines())
    else:
        assert len(describe_keys(loaded)) > len(loaded.keys.stages)
