import pytest

from posttrain.config import load_gate, load_pipeline, load_stage
from posttrain.errors import ConfigError


def load(write, base="./base", data="sft_data.jsonl", more=""):
    return load_stage("sft", write(f"base_model: {base}\ndatasets: [{{path: {data}}}]\n{more}"))


def refusal(write, **keys):
    with pytest.raises(ConfigError) as caught:
        load(write, **keys)
    return str(caught.value)


def test_a_hub_id_stays_unless_that_folder_stands_beside_the_yaml(write, folder):
    assert load(write, base="Qwen/Qwen3-8B").keys.base_model == "Qwen/Qwen3-8B"
    (folder / "Qwen/Qwen3-8B").mkdir(parents=True)
    assert load(write, base="Qwen/Qwen3-8B").keys.base_model == str(folder / "Qwen/Qwen3-8B")


def test_paths_are_relative_to_the_yaml_not_to_the_shell(write, folder, monkeypatch, tmp_path_factory):
    path = write(
        "base_model: base\ndatasets: [{path: ./sft_data.jsonl}]\nchat_template: chat.jinja\noutput_dir: out/x\n"
    )
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    keys = load_stage("sft", path).keys
    assert keys.base_model == str(folder / "base")
    assert keys.datasets[0].path == str(folder / "sft_data.jsonl")
    assert keys.chat_template == str(folder / "chat.jinja")
    assert keys.output_dir == str(folder / "out/x")


def test_a_relative_yaml_gives_absolute_paths(write, folder, monkeypatch):
    write("base_model: base\ndatasets: [{path: ./sft_data.jsonl}]\n")
    monkeypatch.chdir(folder)
    assert load_stage("sft", "train.yaml").keys.base_model == str(folder / "base")


def test_home_is_expanded(write, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "data"))
    assert load(write, data="~/sft.jsonl").keys.datasets[0].path == str(folder / "data/sft.jsonl")


def test_a_missing_file_names_the_closest_one(write, folder):
    message = refusal(write, data="./sft_dat.jsonl")
    assert (
        message
        == f"{folder}/train.yaml:2: datasets.1.path: ./sft_dat.jsonl does not exist in {folder}; did you mean sft_data.jsonl?"
    )


def test_a_missing_file_with_nothing_close_lists_what_is_there(write, folder):
    assert f"does not exist in {folder}/data, which has pairs.jsonl, prompts.jsonl, sft.jsonl" in refusal(
        write, data="data/z.csv"
    )


def test_a_missing_folder_is_named(write, folder):
    assert f"gone/a.jsonl does not exist: there is no folder {folder}/gone" in refusal(write, data="gone/a.jsonl")


def test_a_file_in_the_current_folder_is_a_hint(write, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("shell")
    (elsewhere / "0123.csv").touch()
    monkeypatch.chdir(elsewhere)
    assert "it exists in the current folder, but paths are relative to the YAML" in refusal(write, data="0123.csv")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"base": "./bse"}, "base_model: ./bse does not exist in"),
        ({"base": "''"}, "base_model: got an empty path"),
        ({"more": "chat_template: chat.jnja\n"}, "train.yaml:3: chat_template: chat.jnja does not exist in"),
        (
            {"more": "chat_template: chatml\n"},
            "the name of no template; did you mean axolotl_chatml or llamafactory_chatml?",
        ),
        ({"more": "chat_template: axolotl_chtml\n"}, "did you mean axolotl_chatml?"),
        (
            {"more": "eval_datasets: [{path: dev.jsonl}]\n"},
            "train.yaml:3: eval_datasets.1.path: dev.jsonl does not exist in",
        ),
    ],
)
def test_every_path_is_checked_before_any_work(write, keys, expected):
    assert expected in refusal(write, **keys)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("rewards.py", "reward_funcs.2: got rewards.py, expected file.py:function, e.g. rewards.py:correct"),
        ("rewards.py:", "got rewards.py:, expected file.py:function"),
        ("reward.py:correct", "reward_funcs.2: reward.py does not exist in"),
    ],
)
def test_reward_files_are_checked(write, entry, expected):
    path = write(f"base_model: base\ndatasets: [{{path: sft_data.jsonl}}]\nreward_funcs: [boxed, '{entry}']\n")
    with pytest.raises(ConfigError) as caught:
        load_stage("grpo", path)
    assert expected in str(caught.value)


def test_rewards_of_the_library_are_names(write, folder):
    path = write("base_model: base\ndatasets: [{path: sft_data.jsonl}]\nreward_funcs: [boxed, 'rewards.py:correct']\n")
    assert load_stage("grpo", path).keys.reward_funcs == ["boxed", f"{folder}/rewards.py:correct"]


def test_an_environment_is_a_file_beside_the_yaml_or_the_address_of_a_server(write, folder):
    (folder / "my_env.py").write_text("class Env: ...")
    own, served, wrong = (
        write(f"base_model: base\ndatasets: [{{path: sft_data.jsonl}}]\nreward_funcs: [boxed]\nenv: '{env}'\n", name)
        for env, name in [("my_env.py:Env", "a.yaml"), ("openenv:http://h:8000", "b.yaml"), ("http://h:8000", "c.yaml")]
    )
    assert load_stage("grpo", own).keys.env == f"{folder}/my_env.py:Env"
    assert load_stage("grpo", served).keys.env == "openenv:http://h:8000"
    with pytest.raises(ConfigError, match=r"expected file\.py:NAME"):
        load_stage("grpo", wrong)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("alias:champion", "alias:champion"),
        ("stage:base", "stage:base"),
        ("./base", "{folder}/base"),
        ("base", "{folder}/base"),
    ],
)
def test_a_baseline_is_an_alias_a_stage_or_a_path(write, folder, baseline, expected):
    gate = load_gate(write(f"baseline: {baseline}\nprimary: [{{suite: a}}]\n", "gate.yaml"))
    assert gate.baseline == expected.format(folder=folder)


def test_a_reward_model_that_a_stage_before_would_make_is_said_to_be_needed_at_the_start(folder):
    path = folder / "train.yaml"
    path.write_text(
        "base_model: ./base\nstages:\n"
        "  - reward_model: {datasets: [{path: data/pairs.jsonl}]}\n"
        "  - grpo: {datasets: [{path: data/prompts.jsonl}], reward_funcs: ['model:./runs/x/stages/01-reward_model/model']}\n"
    )
    with pytest.raises(
        ConfigError,
        match=r"there is no folder .*must be there when the run starts.*posttrain reward_model.*model:stage:reward_model",
    ):
        load_pipeline(path)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("model:stage:reward_model", None),
        ("model:stage:2", None),
        ("model:stage:1", r"got model:stage:1, expected a reward model of an earlier stage: model:stage:2$"),
        ("model:stage:4", "expected a reward model of an earlier stage"),
        ("model:stage:ppo", "expected a reward model of an earlier stage"),
    ],
)
def test_a_reward_may_be_the_model_of_an_earlier_stage_that_trains_a_reward_model(spec, why, folder):
    path = folder / "train.yaml"
    path.write_text(
        "name: paid\nbase_model: ./base\nstages:\n"
        "  - sft: {datasets: [{path: data/sft.jsonl}]}\n"
        "  - reward_model: {datasets: [{path: data/pairs.jsonl}]}\n"
        f"  - grpo: {{datasets: [{{path: data/prompts.jsonl}}], reward_funcs: ['{spec}']}}\n"
        "  - reward_model: {datasets: [{path: data/pairs.jsonl}]}\n"
    )
    if why is None:
        assert load_pipeline(path).keys.stages[2].keys.reward_funcs == [spec]
        return
    with pytest.raises(ConfigError, match=why):
        load_pipeline(path)


@pytest.mark.parametrize(
    ("kind", "keys", "why"),
    [
        ("process_reward_model", "reward_kwargs: {process_reward_model: {aggregate: mean}}, credit: step", None),
        ("process_reward_model", "reward_kwargs: {'model:stage:2': {aggregate: mean}}", r"stages.3.reward_kwargs.model:stage:2: no such entry"),
        ("reward_model", "reward_kwargs: {reward_model: {aggregate: mean}}", r"stages.3.reward_kwargs.reward_model: model:stage:reward_model rates whole answers"),
        ("reward_model", "credit: step", r"stages.3.credit: step: model:stage:reward_model rates whole answers, no steps; name a process_reward_model stage"),
    ],
)  # fmt: skip
def test_steps_are_rated_by_a_stage_that_trains_a_process_reward_model(kind, keys, why, folder):
    path = folder / "train.yaml"
    path.write_text(
        "name: paid\nbase_model: ./base\nstages:\n"
        "  - sft: {datasets: [{path: data/sft.jsonl}]}\n"
        f"  - {kind}: {{datasets: [{{path: data/pairs.jsonl}}]}}\n"
        f"  - grpo: {{datasets: [{{path: data/prompts.jsonl}}], reward_funcs: ['model:stage:{kind}'], {keys}}}\n"
    )
    if why is None:
        assert load_pipeline(path).keys.stages[2].keys.reward_kwargs == {kind: {"aggregate": "mean"}}
        return
    with pytest.raises(ConfigError, match=why):
        load_pipeline(path)


@pytest.mark.parametrize("name", ["rm", "model:./rm"])
def test_options_of_a_reward_model_stand_under_its_folders_name(name, folder):
    (folder / "rm").mkdir()
    path = folder / "grpo.yaml"
    paid = f"reward_funcs: ['model:./rm']\nreward_kwargs: {{'{name}': {{aggregate: mean}}}}\n"
    path.write_text("base_model: ./base\ndatasets: [{path: data/prompts.jsonl}]\n" + paid)
    assert load_stage("grpo", path).keys.reward_kwargs == {name: {"aggregate": "mean"}}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("stage:reward_model", None),
        ("stage:2", None),
        ("stage:3", None),
        ("stage:1", r"got stage:1, expected a reward model or a critic of an earlier stage: stage:2, stage:3$"),
        ("stage:ppo", None),
        ("stage:4", "expected a reward model or a critic of an earlier stage"),
        ("./runs/rm/model", r"there is no folder .*named by it: stage:reward_model"),
    ],
)
def test_a_critic_may_begin_as_what_an_earlier_stage_makes(name, why, folder):
    path = folder / "train.yaml"
    ppo = "  - ppo: {{datasets: [{{path: data/prompts.jsonl}}], reward_funcs: [boxed], {}}}\n"
    path.write_text(
        "name: valued\nbase_model: ./base\nstages:\n"
        "  - sft: {datasets: [{path: data/sft.jsonl}]}\n"
        "  - reward_model: {datasets: [{path: data/pairs.jsonl}]}\n"
        + ppo.format("seed: 1")
        + ppo.format(f"value_model: '{name}'")
    )
    if why is None:
        assert load_pipeline(path).keys.stages[3].keys.value_model == name
        return
    with pytest.raises(ConfigError, match=why):
        load_pipeline(path)


def test_a_stage_by_itself_has_no_earlier_one_that_makes_its_critic(write):
    path = write(
        "base_model: base\ndatasets: [{path: sft_data.jsonl}]\nreward_funcs: [boxed]\nvalue_model: stage:reward_model\n"
    )
    with pytest.raises(ConfigError, match="stage:reward_model"):
        load_stage("ppo", path)


def test_a_stage_by_itself_has_no_earlier_one_that_pays(write):
    path = write("base_model: base\ndatasets: [{path: sft_data.jsonl}]\nreward_funcs: ['model:stage:reward_model']\n")
    with pytest.raises(
        ConfigError, match=r"reward_funcs.1: got model:stage:reward_model, which names .*expected model:FOLDER"
    ):
        load_stage("grpo", path)
