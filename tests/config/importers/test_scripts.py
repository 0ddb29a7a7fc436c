"""Scripts of several commands, and hydra's whole configurations beside the command lines that say the same."""

import pytest
import yaml

from posttrain.config.importers.convert import import_file
from posttrain.errors import ConfigError

COMMAND = "python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo data.train_files=rows.parquet actor_rollout_ref.model.path=a/b actor_rollout_ref.rollout.n=4 custom_reward_function.path=reward.py"
WHOLE = {
    "defaults": [{"actor@actor_rollout_ref.actor": "dp_actor"}, {"data@data": "legacy_data"}, "_self_"],
    "data": {"train_files": "rows.parquet", "max_prompt_length": 512, "max_response_length": 512, "train_batch_size": 1024, "truncation": "error", "tokenizer": None},
    "actor_rollout_ref": {
        "model": {"_target_": "verl.workers.config.HFModelConfig", "path": "a/b", "external_lib": None},
        "actor": {
            "_target_": "verl.workers.config.FSDPActorConfig", "rollout_n": "${oc.select:actor_rollout_ref.rollout.n,1}", "ppo_mini_batch_size": 256,
            "ppo_epochs": "${oc.select:nowhere.epochs,1}", "optim": {"_target_": "verl.workers.config.FSDPOptimizerConfig", "lr": 1e-6},
        },
        "rollout": {"n": 4, "prompt_length": "${oc.select:data.max_prompt_length,512}", "response_length": "${data.max_response_length}", "quantization": "${actor_rollout_ref.model.external_lib}"},
    },
    "algorithm": {"_target_": "verl.trainer.config.AlgoConfig", "adv_estimator": "grpo"},
    "custom_reward_function": {"path": "reward.py", "name": "compute_score"},
}  # fmt: skip


@pytest.fixture
def bring(tmp_path):
    """`bring(text or keys)` is what the importer makes of them, beside a reward and rows."""
    (tmp_path / "reward.py").write_text("def compute_score(data_source, solution_str, ground_truth): return 1.0\n")
    (tmp_path / "rows.parquet").write_text("")
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump({"base_model": "a/b", "datasets": [{"path": "c/d", "type": "alpaca"}]}))  # fmt: skip

    def make(given, tool=None):
        path = tmp_path / ("theirs.sh" if isinstance(given, str) else "theirs.yaml")
        path.write_text(given if isinstance(given, str) else yaml.safe_dump(given))
        return import_file(path, None, tool)

    return make


def test_hydras_whole_configuration_is_imported_as_the_command_is(bring):
    command = COMMAND + " actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.actor.ppo_epochs=1"
    assert bring(WHOLE).keys == bring(command).keys


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"actor": {"_target_": "mine.Actor"}}, r"actor._target_: mine.Actor has no counterpart here; write what it does into"),
        ({"rollout": {"n": "???"}}, r"rollout.n: \?\?\? names something that is not in the file; write the value itself"),
        ({"rollout": {"n": 4, "prompt_length": 64}}, "rollout.prompt_length: 64: a prompt's length is that of data"),
    ],
)  # fmt: skip
def test_what_hydra_does_not_know_or_another_wrote_is_refused(bring, change, says):
    with pytest.raises(ConfigError, match=says):
        bring({**WHOLE, "actor_rollout_ref": {**WHOLE["actor_rollout_ref"], **change}})


def test_a_group_of_another_is_refused(bring):
    with pytest.raises(ConfigError, match=r"defaults: \[\{actor@actor: mine\}\] has no counterpart"):
        bring({**WHOLE, "defaults": [{"actor@actor": "mine"}]})


@pytest.mark.parametrize("key", ["data.train_batch_size", "actor_rollout_ref.actor.ppo_mini_batch_size", "data.max_prompt_length", "data.max_response_length"])  # fmt: skip
def test_a_size_of_nothing_is_refused(bring, key):
    with pytest.raises(ConfigError, match=rf"{key}: 0 is no size; give a whole number from 1 on, or take it out"):
        bring(f"{COMMAND} {key}=0")


@pytest.mark.parametrize("key", ["train_batch_size", "rollout_batch_size", "n_samples_per_prompt", "generate_max_len"])
def test_a_size_of_nothing_is_refused_of_openrlhf_too(bring, key):
    with pytest.raises(ConfigError, match=rf"{key}: 0 is no size"):
        bring(f"python -m openrlhf.cli.train_ppo_ray --pretrain a/b --{key} 0")


def test_the_naive_manager_gives_no_penalty_on_length(bring):
    buffer = "+reward_model.overlong_buffer.enable=True +reward_model.overlong_buffer.len=128"
    assert "soft_overlong_cache" not in bring(f"{COMMAND} {buffer}").keys
    assert bring(f"{COMMAND} {buffer} reward_model.reward_manager=dapo").keys["soft_overlong_cache"] == 128
    given = buffer.replace("overlong_buffer", "reward_kwargs.overlong_buffer_cfg")
    with pytest.raises(ConfigError, match="reward manager naive takes no such argument, and verl stops"):
        bring(f"{COMMAND} {given}")


def test_a_script_of_two_stages_names_their_lines(bring):
    two = "set -e\naxolotl train sft.yaml\n\naxolotl train sft.yaml --learning-rate 1e-5\n"
    with pytest.raises(ConfigError, match="2 stages, in lines 2, 4; put each into a file of its own"):
        bring(two)


def test_what_prepares_a_stage_is_none(bring):
    assert bring("axolotl preprocess sft.yaml --debug\naxolotl train sft.yaml --seed 3\n").keys["seed"] == 3


def test_arguments_of_a_function_are_refused_and_those_of_the_script_are_none(bring):
    body = 'run() {\n    axolotl train sft.yaml "$@"\n}\n'
    with pytest.raises(
        ConfigError, match=r'theirs.sh:2: .* arguments \("\$@"\) of the function run, which line 4 gives'
    ):
        bring(f"{body}run --learning-rate 1e-5\n")
    assert bring(f"{body}run\n").keys["base_model"] == "a/b"
    made = bring('axolotl train sft.yaml "$@"\n')
    assert made.keys["base_model"] == "a/b"
    assert '# "$@": changed because what the script is called with is not in the file' in made.text


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("MORE='--seed 3 --max-steps 9'", "$MORE"),
        ("MORE='--seed 3'", "${MORE} --max-steps 9"),
        ("MORE=", "--seed 3 $MORE --max-steps 9"),
        ("", "--seed 3 --max-steps 9 ${MORE:-}"),
        ("", "--seed ${SEED:-3} --max-steps ${STEPS-9}"),
        ("ARGS=(--seed $SEED)", '"${ARGS[@]}" --max-steps 9'),
    ],
)
def test_options_in_a_variable_without_quotes_are_its_words(bring, said, words):
    keys = bring(f"SEED=3\n{said}\naxolotl train sft.yaml {words}\n").keys
    assert (keys["seed"], keys["max_steps"]) == (3, 9)


def test_a_variable_in_quotes_is_one_word(bring):
    assert bring("OUT='a $HOME b'\naxolotl train sft.yaml --output-dir \"$OUT\" --seed 3\n").keys["seed"] == 3


@pytest.mark.parametrize("words", ["$@", '"${@:2}"', "$*", '"${MORE[@]}"'])
def test_arguments_of_the_script_are_said_to_be_left_out(bring, words):
    made = bring(f'MORE=("$@")\naxolotl train sft.yaml --seed 3 {words}\n')
    assert made.keys["seed"] == 3 and any("what the script is called with" in note for note in made.notes)
