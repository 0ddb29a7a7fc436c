"""A reward model as a reward: what it says is what transformers says, its digest is pinned, and runs with it go on as they were."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from posttrain.config.pipeline import SuiteKeys
from posttrain.config.stages import ModelKeys
from posttrain.errors import ConfigError, RewardError
from posttrain.evals.suite import load_suite
from posttrain.grading.learned import learned_digest
from posttrain.pipeline.pins import data_pins
from posttrain.recipes.measure.evaluate import evaluate
from posttrain.recipes.measure.learned import load_learned
from posttrain.rewards.cases import cases_of
from posttrain.rewards.certificate import check_rewards
from posttrain.rewards.check import Thresholds
from posttrain.rewards.rescore import find_calls, paid_anew
from posttrain.rewards.workers import RewardPool
from posttrain.types import Origin, Prompt


def chat(text):
    return [{"role": "user", "content": text}]


def say(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def reward_model(runner, model_dir, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm")
    runner.run_stage("reward_model", folder, runner.keys_of("reward_model", model_dir("qwen3"), data_dir, max_steps=2))
    return folder / "model"


ASKED = [chat("What is 1 plus 2?")] * 3 + [chat("What is 2 plus 2?")]
SAID = [say("3"), say("It is three, of course."), say("3"), say("4")]


def test_it_pays_what_transformers_says_of_prompt_and_answer(reward_model):
    with RewardPool([f"model:{reward_model}"], load=load_learned) as pool:
        found = pool.score(ASKED, SAID)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    for prompt, answer, breakdown in zip(ASKED, SAID, found, strict=True):
        text = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False).removesuffix("\n")
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0]
        assert breakdown.total == pytest.approx(float(expected), abs=1e-4)
    assert len({round(breakdown.total, 4) for breakdown in found}) == 3, "rewards that are all alike prove nothing"


def test_beside_functions_it_is_weighed_and_what_it_cannot_read_is_unscored(reward_model, tmp_path):
    (tmp_path / "r.py").write_text("def long(completions): return [float(len(c[0]['content'])) for c in completions]")
    specs = [f"model:{reward_model}", "r.py:long"]
    said = [say("3"), say("\ud800"), say("3 " * 4000)]
    with RewardPool(specs, [0.5, 2.0], folder=tmp_path, load=load_learned) as pool:
        good, broken, long = pool.score(ASKED[:3], said)
    assert good.total == pytest.approx(0.5 * good.parts["model"] + 2.0)
    assert broken.total is None and "model:" in broken.error
    assert long.total is None and "the reward model takes" in long.error


def test_a_reward_that_is_no_number_leaves_the_completion_unscored(reward_model, tmp_path):
    broken = Path(shutil.copytree(reward_model, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["score.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with RewardPool([f"model:{broken}"], load=load_learned) as pool:
        found = pool.score(ASKED, SAID)
        assert [one.total for one in found] == [None] * 4 and "broken: the model says nan" in found[0].error
        with pytest.raises(RewardError, match="4 of 4 completions are unscored"):
            pool.score(ASKED, SAID, max_unscored=0.1)


def test_its_digest_is_that_of_the_run_and_moves_with_its_weights(reward_model, runner, model_dir, data_dir, tmp_path):
    copied = tmp_path / "rm"
    copied.mkdir()
    for file in reward_model.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    keys = runner.keys_of("grpo", model_dir("qwen3"), data_dir, reward_funcs=[f"model:{copied}"])
    before = data_pins(keys)["rewards"]
    assert learned_digest(f"model:{copied}") == learned_digest(f"model:{reward_model}")
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    assert data_pins(keys)["rewards"] != before


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "is a Qwen3ForCausalLM; expected a sequence-classification model"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "has 3 labels"),
        ({"id2label": None}, "has 2 labels"),
    ],
)
def test_a_model_that_is_no_reward_model_is_refused_before_anything_is_loaded(change, why, reward_model, tmp_path):
    config = json.loads((reward_model / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=why):
        RewardPool([f"model:{tmp_path}"], load=load_learned)
    with pytest.raises(ConfigError, match="no folder"):
        RewardPool(["model:./nowhere"], folder=tmp_path, load=load_learned)


def test_a_stage_of_a_pipeline_names_nothing_outside_of_it():
    with (
        pytest.raises(ConfigError, match="a stage is named within a pipeline"),
        RewardPool(["model:stage:reward_model"], load=load_learned),
    ):
        pass


def test_options_for_a_model_are_refused(reward_model):
    with pytest.raises(ConfigError, match="takes no options"):
        RewardPool([f"model:{reward_model}"], kwargs={"model": {"scale": 2}}, load=load_learned)


def test_a_run_that_it_pays_goes_on_after_a_stop_as_if_it_had_not_stopped(train, runner, reward_model):
    rewards = {"reward_funcs": [f"model:{reward_model}", "spread"], "reward_weights": [1.0, 0.5]}
    whole = train("grpo", name="whole", **rewards)
    train("grpo", name="cut", stop_after=2, **rewards)
    cut = train("grpo", name="cut", **rewards)
    assert runner.losses(whole) == runner.losses(cut)
    assert [row["rewards/model/mean"] for row in runner.rows(whole)] == [
        row["rewards/model/mean"] for row in runner.rows(cut)
    ]
    assert any(runner.losses(whole))


def test_an_eval_scores_by_it_and_its_digest_is_the_suites(reward_model, model_dir, tmp_path):
    rows = [
        {"id": str(n), "messages": chat(f"What is {n}?"), "target": "x", "scorer": f"model:{reward_model}"}
        for n in range(3)
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = load_suite("s", tmp_path / "s.jsonl")
    assert suite.scorer_digest() == learned_digest(f"model:{reward_model}")
    model = ModelKeys(base_model=str(model_dir("qwen3")))
    report = evaluate(model, [(suite, SuiteKeys(path=str(suite.path), max_tokens=5))], "gate", tmp_path / "out")["s"]
    with RewardPool([f"model:{reward_model}"], load=load_learned) as pool:
        expected = pool.score(
            [chat(f"What is {n}?") for n in range(3)], [say(item.completions[0]) for item in report.items]
        )
    assert [item.scores[0] for item in report.items] == pytest.approx([found.total for found in expected], abs=1e-4)


@pytest.mark.slow
def test_ahead_of_the_trainer_it_pays_the_same_each_time(train, runner, reward_model):
    options = {"reward_funcs": [f"model:{reward_model}"], "rollout": {"max_staleness": 1}, "max_steps": 4}
    one, two = (train("grpo", name=name, **options) for name in ("one", "two"))
    assert len(runner.losses(one)) == 4
    assert runner.rows(one)[0]["rewards/model/mean"] == runner.rows(two)[0]["rewards/model/mean"]


@pytest.mark.parametrize("pays_for", ["length", "nothing"])
def test_a_reward_model_that_pays_for_length_is_refused(pays_for, runner, model_dir, data_dir, tmp_path):
    """Learned from pairs whose longer answer is the better one; with a head of zeros it pays for nothing, and knows nothing."""
    rows = [
        {
            "prompt": chat(f"What is {n} plus 2?"),
            "chosen": say(f"{n + 2}" + " It is so." * 6),
            "rejected": say(str(n + 2)),
        }
        for n in range(24)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = {"length": 12, "nothing": 1}[pays_for]
    keys = runner.keys_of(
        "reward_model",
        model_dir("qwen3"),
        data_dir,
        datasets=[{"path": str(tmp_path / "pairs.jsonl")}],
        max_steps=steps,
    )
    runner.run_stage("reward_model", tmp_path / "rm", keys)
    model = tmp_path / "rm/model"
    if pays_for == "nothing":
        tensors = load_file(model / "model.safetensors")
        save_file(
            tensors | {"score.weight": torch.zeros_like(tensors["score.weight"])},
            model / "model.safetensors",
            {"format": "pt"},
        )
    prompts = [
        Prompt(Origin("p", n), tuple(chat(f"What is {n} plus 2?")), {"answer": str(n + 2)}) for n in range(11, 17)
    ]
    with RewardPool([f"model:{model}"], load=load_learned) as pool:
        found = check_rewards(pool, cases_of(prompts), thresholds=Thresholds(mutation_cases=4, repeats=2))
    if pays_for == "nothing":
        assert found.verdict == "partial", found.failures
        assert any("it judges something else" in warning for warning in found.warnings)
    else:
        assert found.verdict == "fail"
        assert found.measures["model: fooled by length"] > 0.5
        assert any(failure.startswith("model is fooled by length") for failure in found.failures)


def test_what_a_run_kept_is_what_it_was_paid_for_also_after_a_stop(train, runner, data_dir):
    train("grpo", name="cut", stop_after=2, keep_rollouts=True)
    folder = train("grpo", name="cut", keep_rollouts=True)
    with RewardPool([f"{data_dir}/rewards.py:spread"]) as pool:
        rows = paid_anew(find_calls(folder), pool)
    assert len(rows) == 4 * 8, "each step's completions once"
    assert [row.after for row in rows] == [row.before for row in rows]
    means = [row["reward"] for row in runner.rows(folder)]
    assert [sum(r.before for r in rows if r.step == step) / 8 for step in range(4)] == pytest.approx(means)


def test_what_each_reward_adds_to_the_spread_is_logged_and_adds_up_to_1(train, runner, reward_model):
    for row in runner.rows(
        train("grpo", max_steps=2, reward_funcs=[f"model:{reward_model}", "spread"], reward_weights=[0.5, 2.0])
    ):
        assert row["rewards/model/share"] + row["rewards/spread/share"] == pytest.approx(1.0)
        assert row["rewards/spread/share"] > 0.5
        assert {"reward_length_information", "rewards/model/length_information"} <= row.keys()
