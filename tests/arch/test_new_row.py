"""CONTRIBUTING's recipes, tried: a row that is added to a table at run time acts, and nothing else had to be told of it."""

import json

import pytest
import torch

from posttrain.config.datasets import ROWS_OF_TYPE, DatasetKeys
from posttrain.config.pipeline import SuiteKeys
from posttrain.config.rollout import RolloutKeys
from posttrain.config.stages import ModelKeys
from posttrain.data.formats import FORMATS, Format, detect_format, parse_rows
from posttrain.data.parse import parse_text
from posttrain.evals.run import Evaluator
from posttrain.evals.suite import load_suite
from posttrain.grading.scorers import SCORERS
from posttrain.health import rules
from posttrain.health.rules import RULES, Rule
from posttrain.models.load import load_policy
from posttrain.objectives.policy import POLICY_LOSSES, PolicyLoss
from posttrain.objectives.preference import PREFERENCE_LOSSES, PreferenceRow
from posttrain.objectives.surrogates import SURROGATES, Surrogate, no_flags
from posttrain.recipes.experience.engines import ENGINES
from posttrain.recipes.measure.evaluate import TokenizerCodec
from posttrain.rewards.library import REWARDS, RewardRow
from posttrain.rewards.resolve import load_reward
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.sampling import request_seed
from posttrain.types import Completion, EngineInfo, Origin, Severity


@pytest.fixture
def train_with(runner, model_dir, data_dir, tmp_path):
    """Runs one step of a stage; `changes` are values whose names the schema lists, so that only a row of it would know them."""

    def run(kind, changes, **options):
        keys = runner.keys_of(kind, model_dir("qwen3"), data_dir, **{"max_steps": 1, **options})
        runner.run_stage(kind, tmp_path / kind, keys.model_copy(update=changes))
        return tmp_path / kind

    return run


def test_a_preference_loss_is_a_function_and_a_row(train_with, runner, monkeypatch):
    def of_three(pairs, spec):
        return 3.0 + spec.beta * 0.0 * pairs.d

    monkeypatch.setitem(PREFERENCE_LOSSES, "of_three", PreferenceRow(of_three))
    assert runner.losses(train_with("dpo", {"loss_type": "of_three"})) == [3.0]


def test_a_policy_loss_is_a_surrogate_and_two_rows(train_with, runner, monkeypatch):
    def of_two(ratio_M, advantage_M, logp_M, spec):
        return torch.full_like(ratio_M, 2.0) + 0.0 * logp_M

    monkeypatch.setitem(SURROGATES, "of_two", Surrogate(of_two, no_flags))
    monkeypatch.setitem(POLICY_LOSSES, "of_two", PolicyLoss("of_two", "token_mean", "this test"))
    assert runner.losses(train_with("grpo", {"loss_type": "of_two"})) == pytest.approx([2.0])


def test_a_reward_is_a_function_and_a_row(monkeypatch):
    def starts_with_gold(prompts, completions, *, answer, **columns):
        return [
            None if not gold else float(text.startswith(gold)) for text, gold in zip(completions, answer, strict=True)
        ]

    row = RewardRow(starts_with_gold, (("answer",),), low=0.0, high=1.0, meaning="Starts with the gold answer")
    monkeypatch.setitem(REWARDS, "starts_with_gold", row)
    reward = load_reward("starts_with_gold")
    assert reward(["q"] * 3, ["7!", "8", "7"], answer=["7", "7", ""]) == [1.0, 0.0, None]


def test_a_health_rule_is_a_check_and_a_row(train_with, monkeypatch):
    def any_loss(history, *, above):
        loss = history.newest.metrics["loss"]
        return {"loss": loss} if loss > above else None

    row = Rule(
        "any_loss", ("examples",), any_loss, {"above": 0.5}, Severity.SOFT, "hold", "the loss is {loss:.2f}", "Look."
    )
    monkeypatch.setattr(rules, "RULES", (*RULES, row))
    folder = train_with("sft", {}, health={"any_loss": {"above": 0.1}})
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    [finding] = [event for event in events if event.get("rule") == "any_loss" and event["kind"] == "finding"]
    assert finding["message"].startswith("the loss is ") and finding["action"] == "hold"


def test_a_scorer_is_a_function_and_a_row(model_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(SCORERS, "half", lambda text, target, columns: 0.5)
    path = tmp_path / "s.jsonl"
    item = {"id": "a", "messages": [{"role": "user", "content": "What is 1?"}], "target": "1", "scorer": "half"}
    path.write_text(json.dumps(item) + "\n")
    policy = load_policy(ModelKeys(base_model=str(model_dir("qwen3"))), trainable=False)
    evaluator = Evaluator(
        EmbeddedEngine(policy, stop_token_ids=(2,)), TokenizerCodec(policy.tokenizer), "m", request_seed
    )
    report = evaluator.run(load_suite("s", path), SuiteKeys(path=str(path), max_tokens=2), "gate")
    assert report.mean == 0.5


class Parrot:
    """An engine on the policy's own weights that takes the embedded engine's completions and says that it is another."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    @property
    def policy_version(self):
        return self._engine.policy_version

    def describe(self):
        return EngineInfo("parrot", "1", "float32", "processed", 63, exact_resume=True)

    def generate(self, requests, params):
        for ended in self._engine.generate(requests, params):
            yield Completion(ended.ids[:2], ended.logp[:2], "length", ended.policy_version, ended.request)


def test_an_engine_is_a_class_and_a_row(train_with, runner, monkeypatch):
    monkeypatch.setitem(ENGINES, "parrot", lambda ask: Parrot(ENGINES["embedded"](ask)))
    rollout = RolloutKeys().model_copy(update={"engine": "parrot"})
    [row] = [row for row in runner.rows(train_with("grpo", {"rollout": rollout})) if "loss" in row]
    assert row["completions/max_length"] == 2.0


def test_a_data_format_is_a_parser_and_a_row(monkeypatch):
    monkeypatch.setitem(ROWS_OF_TYPE, "verse", ("examples",))
    monkeypatch.setitem(
        FORMATS,
        "verse",
        Format(ROWS_OF_TYPE["verse"], (("verse",),), lambda row, at: parse_text({"text": row["verse"]}, at)),
    )
    rows = [(Origin("verses.jsonl", 1), {"verse": "Tyger"})]
    assert detect_format(rows, "examples").name == "verse"
    [[example], skipped] = parse_rows(rows, "verse", DatasetKeys(path="verses.jsonl"))
    assert "Tyger" in repr(example) and skipped == []
