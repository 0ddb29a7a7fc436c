import pytest

from posttrain.errors import ConfigError, RewardError
from posttrain.names import reward_names
from posttrain.rewards.resolve import check_spec, load_reward, reward_digest


@pytest.fixture
def write(tmp_path):
    def write(text, name="r.py"):
        (tmp_path / name).write_text(text)
        return f"{name}:f"

    return write


def test_a_function_of_a_file_is_called_by_name(write, tmp_path):
    reward = load_reward(
        write(
            "def f(completions, answer, bonus=0): return [float(c == a) + bonus for c, a in zip(completions, answer)]"
        ),
        {"bonus": 2},
        tmp_path,
    )
    assert reward(["p"], ["x"], answer=["x"], other=[1]) == [3.0]
    assert reward.needs == (("answer",),)
    assert load_reward("boxed")(["p"], [r"\boxed{1}"], answer=["1"]) == [1.0]


def test_an_async_function_is_awaited(write, tmp_path):
    reward = load_reward(
        write("import asyncio\nasync def f(completions, **columns):\n    await asyncio.sleep(0)\n    return [1.0]"),
        folder=tmp_path,
    )
    assert reward(["p"], ["x"]) == [1.0]


VERL_ROWS = {
    "data_source": ["mine"] * 2,
    "reward_model": [{"style": "rule", "ground_truth": "4"}, {"style": "rule", "ground_truth": "5"}],
    "extra_info": [{"index": 0, "bonus": 0.5}, None],
}


def test_a_reward_in_verls_signature_is_asked_per_completion_with_verls_columns(write, tmp_path):
    text = """
def f(data_source, solution_str, ground_truth, extra_info=None, scale=1.0):
    assert data_source == "mine" and isinstance(extra_info, dict)
    return {"score": scale * (solution_str == ground_truth) + extra_info.pop("bonus", 0), "acc": 1}
"""
    reward = load_reward(write(text), {"scale": 2}, tmp_path)
    assert reward.needs == (("data_source",), ("ground_truth", "reward_model"))
    completions = [[{"role": "assistant", "content": "4"}], "4"]
    assert reward(["p"] * 2, completions, **VERL_ROWS, other=[1, 2]) == [2.5, 0.0]
    assert VERL_ROWS["extra_info"][0]["bonus"] == 0.5, "the row is not the reward's to change"
    assert reward(["p"] * 2, completions, **VERL_ROWS, ground_truth=["no", "4"]) == [0.5, 2.0]
    with pytest.raises(RewardError, match="needs the column ground_truth or reward_model; the dataset has data_source"):
        reward(["p"], ["4"], data_source=["mine"])


def test_an_async_reward_of_verls_that_takes_all_is_given_all(write, tmp_path):
    text = "async def f(solution_str, **given): return float(sorted(given) == ['data_source', 'extra_info', 'ground_truth'])"
    assert load_reward(write(text), folder=tmp_path)(["p"] * 2, ["4", "5"], **VERL_ROWS) == [1.0, 1.0]


def test_a_reward_of_verls_takes_its_options_among_all_that_it_takes(write, tmp_path):
    text = "def f(data_source, solution_str, ground_truth, extra_info=None, **options): return options['scale']"
    assert load_reward(write(text), {"scale": 2}, tmp_path)(["p"] * 2, ["4", "5"], **VERL_ROWS) == [2, 2]


def test_an_extra_info_that_is_no_object_is_given_as_it_is(write, tmp_path):
    reward = load_reward(write("def f(solution_str, extra_info): return float(len(extra_info))"), folder=tmp_path)
    assert reward(["p"] * 3, ["4"] * 3, extra_info=['{"a": 1}', [1, 2], None]) == [8, 2, 0]


def test_a_parameter_that_verl_does_not_give_is_refused_before_the_run(write, tmp_path):
    text = "def f(solution_str, ground_truth, tokenizer): return 1.0"
    with pytest.raises(ConfigError, match="nothing gives the parameter 'tokenizer'; set it in reward_kwargs"):
        load_reward(write(text), folder=tmp_path)
    assert load_reward(write(text), {"tokenizer": None}, tmp_path)(["p"] * 2, ["4"] * 2, **VERL_ROWS) == [1, 1]


@pytest.mark.parametrize("holder", [None, "{}", {"style": "rule"}])
def test_a_row_of_verls_without_ground_truth_is_an_error_that_says_so(write, tmp_path, holder):
    reward = load_reward(write("def f(solution_str, ground_truth): return 1.0"), folder=tmp_path)
    with pytest.raises(RewardError, match="a row has no ground truth"):
        reward(["p"], ["4"], reward_model=[holder], ground_truth=[None])


def test_an_object_without_score_is_an_error_that_names_what_it_has(write, tmp_path):
    reward = load_reward(write("def f(solution_str): return {'acc': 1}"), folder=tmp_path)
    with pytest.raises(RewardError, match="an object with 'acc'; expected a number, or an object with 'score'"):
        reward(["p"], ["4"])


def test_a_missing_column_is_named_with_those_present(write, tmp_path):
    reward = load_reward(write("def f(completions, answer): return [1.0]"), folder=tmp_path)
    with pytest.raises(RewardError, match=r"r\.py:1: reward 'f' needs the column answer; the dataset has level, topic"):
        reward(["p"], ["x"], topic=["t"], level=["l"])
    with pytest.raises(RewardError, match="needs the column answer or target or solution or ground_truth or label"):
        load_reward("boxed")(["p"], ["x"])


def test_what_an_environment_pays_is_no_column_to_rename_and_what_to_do_is_said(write, tmp_path):
    own = load_reward(write("def f(completions, env_reward): return [1.0]"), folder=tmp_path)
    for reward in (own, load_reward("environment")):
        with pytest.raises(RewardError, match=r"what an environment pays.* set reward_check: off; .* not promoted"):
            reward(["p"], ["x"], answer=["2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def g(completions): pass", "no function 'f' \\(it defines g\\)"),
        ("def ff(completions): pass", "did you mean 'ff'"),
        ("def f(:", r"r\.py:1: the file is not valid Python"),
        (
            "import os\nimport no_such_module\ndef f(completions): pass",
            r"r\.py:2: importing the reward file raised ModuleNotFoundError",
        ),
        ("raise SystemExit(3)\ndef f(completions): pass", "importing the reward file raised SystemExit"),
        ("\ndef f(texts): pass", r"r\.py:2: f\(texts\) has no parameter `completions`"),
        ("def f(prompts, completions, /): pass", "positional-only"),
        ("f = 3", "f is int, expected a function"),
        ("class f: pass", "f is type, expected a function"),
    ],
)
def test_what_cannot_be_loaded(write, tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(write(text), folder=tmp_path)


def test_what_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"no file .*/none\.py; paths are relative to the YAML"):
        check_spec("none.py:f", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'boxed'"):
        check_spec("boxd")


def test_an_unknown_option_is_named(write, tmp_path):
    with pytest.raises(ConfigError, match="unknown option 'bonsu'; it takes bonus"):
        load_reward(write("def f(completions, bonus=1): pass"), {"bonsu": 1}, tmp_path)
    with pytest.raises(ConfigError, match="unknown option 'max_len'; it takes max_length, cache"):
        load_reward("soft_overlong", {"max_len": 1})


def test_names():
    assert reward_names(["a.py:f", "boxed"]) == ["f", "boxed"]
    assert reward_names(["a.py:f", "b.py:f"]) == ["a.f", "b.f"]
    models = [
        "model:/runs/prm-v1.5",
        "model:Qwen/Qwen2.5-Math-PRM-7B",
        "model:stage:process_reward_model",
        "model:stage:2",
    ]
    assert reward_names(models) == ["prm-v1.5", "Qwen2.5-Math-PRM-7B", "process_reward_model", "2"]
    assert reward_names(["judge:/x/rubric.v2.yaml", "model:a/model", "model:b/model"]) == [
        "rubric.v2",
        "model",
        "model_",
    ]


def test_the_digest_sees_all_that_decides(write, tmp_path):
    spec = write("import helper\ndef f(completions): return helper.g(completions)")
    write("def g(c): return [1.0]", "helper.py")
    digests = {
        reward_digest([spec], folder=tmp_path),
        reward_digest([spec], {"f": {"a": 1}}, folder=tmp_path),
        reward_digest([spec], None, [2.0], tmp_path),
        reward_digest([spec, "boxed"], folder=tmp_path),
    }
    assert len(digests) == 4
    assert reward_digest([spec], None, [1.0], tmp_path) in digests
    assert reward_digest([spec], {"r.py:f": {"a": 1}}, folder=tmp_path) in digests
    write("def g(c): return [0.0]", "helper.py")
    assert reward_digest([spec], folder=tmp_path) not in digests


def test_the_digest_does_not_run_or_place_the_file(write, tmp_path):
    spec = write("raise RuntimeError\ndef f(completions): pass")
    other = tmp_path / "other"
    other.mkdir()
    (other / "r.py").write_bytes((tmp_path / "r.py").read_bytes())
    assert reward_digest([spec], folder=tmp_path) == reward_digest([spec], folder=other)
