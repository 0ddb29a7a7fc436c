"""A process reward model as a reward: its steps are those of its training, and pay what transformers says of them."""

import json
import math
from contextlib import closing

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from posttrain.errors import ConfigError, ModelError
from posttrain.evals.suite import load_suite
from posttrain.evidence import EvalReport, ItemRecord
from posttrain.recipes.measure.best_of import verified_items
from posttrain.recipes.measure.evaluate import OwnScorers
from posttrain.recipes.measure.learned import load_learned
from posttrain.rewards.workers import RewardPool


def chat(text):
    return [{"role": "user", "content": text}]


def say(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def stage(runner, model_dir, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prm")
    options = {"max_steps": 2, "adapter": "lora", "lora_r": 4, "step_separator": "\n\n"}
    runner.run_stage(
        "process_reward_model",
        folder,
        runner.keys_of("process_reward_model", model_dir("qwen3"), data_dir, **options),
    )
    return folder


ASKED = [chat("What is 1 plus 2?"), chat("What is 1 plus 2?"), "1 plus 2?", chat("What is 2 plus 2?")]
SAID = [say("1 plus 2 is 3.\n\nYes!\n\n"), say("No.\n\n \n\nI say 4.\nSo."), "3.\n\nNo.", say("4")]
STEPS = [["1 plus 2 is 3.", "Yes!"], ["No.", "I say 4.\nSo."], ["3.", "No."], ["4"]]


def by_transformers(folder, prompt, steps):
    """p of each step, as TRL lays out a row: steps and separators tokenised by themselves."""
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)  # fmt: skip
    ids, ends = list(tokenizer(text, add_special_tokens=False)["input_ids"]), []
    for step in steps:
        for piece in (step, "\n\n"):
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        ends.append(len(ids) - 1)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, ends].softmax(-1)[:, 1].tolist()


AGGREGATES = {"min": min, "product": math.prod, "last": lambda p: p[-1], "mean": lambda p: sum(p) / len(p)}


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_it_pays_what_transformers_says_of_the_steps(aggregate, stage):
    expected = [by_transformers(stage / "model", *row) for row in zip(ASKED, STEPS, strict=True)]
    options = {} if aggregate == "min" else {"model": {"aggregate": aggregate}}
    with RewardPool([f"model:{stage / 'model'}"], kwargs=options, load=load_learned) as pool:
        found = [one.total for one in pool.score(ASKED, SAID)]
    assert found == pytest.approx([AGGREGATES[aggregate](steps) for steps in expected], abs=1e-5)
    assert max(found) - min(found) > 1e-3, "rewards that are all alike prove nothing"


def test_as_a_scorer_it_has_the_options_of_its_suite_and_as_a_verifier_those_of_the_command(stage, tmp_path):
    spec, columns = f"model:{stage / 'model'}", {"scorer": "exact", "target": "4"}
    rows = [{"id": str(n), "messages": ASKED[0], **columns} for n in range(2)]
    path = tmp_path / "suite.jsonl"
    found = {}
    for name in AGGREGATES:
        own = {"scorer": spec, "scorer_kwargs": {"aggregate": name}}
        path.write_text("".join(json.dumps(row | own) + "\n" for row in rows))
        suite = load_suite("steps", path)
        with closing(OwnScorers()) as scorers:
            found[name] = [score for score, _ in scorers(suite, suite.items, [SAID[0][0]["content"], "4"])]
    p = by_transformers(stage / "model", ASKED[0], STEPS[0])
    assert [found[name][0] for name in AGGREGATES] == pytest.approx([of(p) for of in AGGREGATES.values()], abs=1e-5)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite, texts = load_suite("steps", path), (SAID[0][0]["content"], "4")
    records = tuple(ItemRecord(str(n), "", (0.0, 1.0), completions=texts) for n in range(2))
    report = EvalReport("steps", "gate", "", "", "exact", records)
    seen, _ = verified_items(report, suite, spec, [spec], {"aggregate": "mean"})
    assert list(seen.verifier) == pytest.approx(found["mean"], abs=1e-5)
    assert list(seen.graders[spec]) == pytest.approx(found["min"], abs=1e-5), "a grader has no options"


def test_an_adapter_pays_what_its_merged_model_pays(stage):
    with (
        RewardPool([f"model:{stage / 'adapter'}"], load=load_learned) as adapter,
        RewardPool([f"model:{stage / 'model'}"], load=load_learned) as merged,
    ):
        found, expected = ([one.total for one in pool.score(ASKED, SAID)] for pool in (adapter, merged))
    assert found == pytest.approx(expected, rel=1e-3)


def test_another_separator_cuts_otherwise(stage):
    spec = [f"model:{stage / 'model'}"]
    with RewardPool(spec, load=load_learned) as pool:
        known = pool.score(ASKED[1:2], [say("I say 4.\nSo.")])[0].total
    with RewardPool(spec, kwargs={"model": {"step_separator": "\n"}}, load=load_learned) as pool:
        assert pool.score(ASKED[1:2], [say("I say 4.\nSo.")])[0].total != pytest.approx(known, abs=1e-4)


def test_an_answer_without_a_step_or_too_long_is_unscored(stage):
    with RewardPool([f"model:{stage / 'model'}"], load=load_learned) as pool:
        empty, long, good = pool.score(ASKED[:3], [say(" \n\n"), say("3 " * 4000), "3."])
    assert empty.total is None and "the answer has no step" in empty.error
    assert long.total is None and "the reward model takes" in long.error
    assert 0 < good.total < 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"aggregate": "max"}, "aggregate: got 'max', expected one of min, product, last, mean"),
        ({"step_separator": ""}, "step_separator: got '', expected the text behind each step"),
        ({"separator": "x"}, "a process reward model has step_separator and aggregate"),
    ],
)
def test_options_that_it_has_not_are_refused_before_anything_is_loaded(options, why, stage):
    with pytest.raises(ConfigError, match=why):
        RewardPool([f"model:{stage / 'model'}"], kwargs={"model": options}, load=load_learned)


def test_a_model_with_other_labels_and_one_that_rates_no_steps_are_refused(stage, tmp_path):
    config = json.loads((stage / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b", "2": "c"}}))
    with pytest.raises(ConfigError, match="has 3 labels; expected a process reward model, which has two"):
        RewardPool([f"model:{tmp_path}"], load=load_learned)
    config |= {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "reward"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="takes no options: it rates whole answers, no steps"):
        RewardPool([f"model:{tmp_path}"], kwargs={tmp_path.name: {"aggregate": "min"}}, load=load_learned)


def test_a_critic_does_not_begin_with_it(train, stage):
    with pytest.raises(ModelError, match="did not load"):
        train("ppo", value_model=str(stage / "model"), max_steps=1)


def test_a_policy_is_trained_with_it(train, runner, stage):
    rows = runner.rows(train("grpo", reward_funcs=[f"model:{stage / 'model'}"], max_steps=2))
    assert 0 < rows[-1]["rewards/model/mean"] < 1


def test_credit_by_step_gives_tokens_of_one_completion_several_advantages(train, runner, stage):
    """The policy is taught otherwise than by one reward for all."""
    paid = {"reward_funcs": [f"model:{stage / 'model'}"], "reward_kwargs": {"model": {"step_separator": "e"}}, "max_completion_length": 24, "max_steps": 1}  # fmt: skip
    by_step, again, whole = (
        train("grpo", name=name, credit=credit, **paid)
        for name, credit in (("steps", "step"), ("again", "step"), ("whole", "episode"))
    )
    weights = [runner.weights(folder) for folder in (by_step, again, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert runner.rows(by_step)[-1]["env/paid_turns"] == 1.0


def test_credit_by_step_refuses_a_model_of_whole_answers_before_anything_is_loaded(train, stage, tmp_path):
    config = json.loads((stage / "model" / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "reward"}}
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"credit: step: .* rates whole answers"):
        train("grpo", credit="step", reward_funcs=[f"model:{tmp_path / 'rm'}"], max_steps=1)
