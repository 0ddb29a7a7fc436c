"""Episodes with an environment of verifiers, which takes turns whole: the sampled ids are kept, budgets are scored, and a stage learns from it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli.data_env import env as write_rows
from posttrain.config.pipeline import SuiteKeys
from posttrain.config.stages import ModelKeys
from posttrain.data.render import chat_ids
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.spec import EnvironmentSpec
from posttrain.evals.suite import load_suite
from posttrain.recipes.experience.episodes import Begin, Episodes
from posttrain.recipes.measure.evaluate import evaluate
from posttrain.types import Completion, Origin, Prompt, Request, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
from episode_templates import with_template

ENVS = Path(__file__).parents[2] / "environments" / "verifiers_envs"
PYTHON = Path(__file__).parents[3] / ".venv-verifiers" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.is_file(), reason="needs make setup-verifiers")
GUESS = f"verifiers:{PYTHON} {ENVS / 'guess_env.py'}"
ASKED = ({"role": "user", "content": "Guess a number from 0 to 9."},)


class Saying:
    """Says these texts, one a turn, whatever it reads; a text without an end is one that was cut short."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.written = tokenizer, list(texts), []

    def generate(self, requests, params):
        text = self.texts[len(self.written)]
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        self.written.append(ids)
        yield Completion(ids, tuple(-0.5 for _ in ids), "stop" if text.endswith("<|im_end|>") else "length", 3, 0)


@pytest.fixture(scope="module")
def guessing():
    with EnvironmentPool(EnvironmentSpec(GUESS), 60.0, 1) as pool:
        yield pool


def play(pool, tokenizer, texts, asked=ASKED, task=4, max_turns=8, max_tokens=2000):
    tokenizer = with_template(tokenizer, "templates/qwen3")
    engine: Any = Saying(tokenizer, texts)
    prompt = Prompt(Origin("p.jsonl", 1), asked, {"task": task}, pool.tools)
    begin = Begin(prompt, Request(chat_ids(tokenizer, asked, pool.tools), 5), 6)
    (played,) = Episodes(pool, engine, tokenizer, None, max_turns).play([begin], SamplingParams(max_tokens))
    assert played.episode is not None and played.episode.error is None
    sampled = [t for t, mine in zip(played.ids, played.episode.sampled, strict=True) if mine]
    assert sampled == [t for turn in engine.written for t in turn]
    return played, tokenizer


def test_the_ids_between_two_turns_are_the_templates_and_the_end_pays(guessing, tokenizer):
    played, tokenizer = play(guessing, tokenizer, ["7<|im_end|>", "2<|im_end|>", "4<|im_end|>"])
    assert (played.finish, played.episode.turns, played.episode.env_reward) == ("stop", 3, 1.0)
    assert played.episode.turn_rewards == (None, None, 1.0)
    assert played.episode.env_metrics == {"found": 1.0, "tries": 3.0}
    assert [m["content"] for m in played.episode.messages] == ["7", "lower", "2", "higher", "4"]
    text = tokenizer.decode(played.ids)
    assert text.startswith("7<|im_end|>\n<|im_start|>user\nlower<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("texts", "max_turns", "max_tokens", "reward", "finish"),
    [
        (["7<|im_end|>", "4<|im_end|>"], 2, 2000, 1.0, "stop"),
        (["7<|im_end|>", "2<|im_end|>"], 2, 2000, 0.0, "length"),
        (["4"], 8, 2000, 1.0, "length"),
        (["7<|im_end|>"], 8, 12, 0.0, "length"),
    ],
    ids=["right in the last turn", "wrong in the last turn", "cut short", "no room for the answer"],
)
def test_an_episode_that_a_budget_ends_is_scored_by_the_environment(
    texts, max_turns, max_tokens, reward, finish, guessing, tokenizer
):
    played, _ = play(guessing, tokenizer, texts, max_turns=max_turns, max_tokens=max_tokens)
    assert (played.finish, played.episode.env_reward) == (finish, reward)
    assert played.episode.env_metrics["tries"] == float(len(texts))


@pytest.mark.slow
def test_calls_of_one_turn_go_to_the_environment_together(tokenizer):
    calls = "".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {{"item": "pear"}}}}\n</tool_call>\n'
        for name in ("shop_price", "x")
    )
    with EnvironmentPool(EnvironmentSpec(f"verifiers:{PYTHON} {ENVS / 'shop_env.py'}"), 120.0, 1) as pool:
        asked = ({"role": "user", "content": "What is the price of one pear?"},)
        played, tokenizer = play(pool, tokenizer, [f"{calls.strip()}<|im_end|>", "It is 12.<|im_end|>"], asked, 1)
    assert (played.finish, played.episode.env_reward, played.episode.calls) == ("stop", 1.0, 2)
    assert "<tool_response>\n12\n</tool_response>" in tokenizer.decode(played.ids)


@pytest.mark.slow
def test_an_environment_scores_a_suite_by_what_it_paid(model_dir, tmp_path):
    write_rows(GUESS, tmp_path / "suite.jsonl", 6, suite=True)
    suite = load_suite("guess", tmp_path / "suite.jsonl")
    keys = SuiteKeys(
        path=str(suite.path), env=GUESS, max_tokens=60, max_turns=2, temperature=1.0, num_samples=4, env_timeout_s=120.0
    )
    model = ModelKeys(base_model=str(model_dir("qwen3")))
    one, two = (evaluate(model, [(suite, keys)], "gate", tmp_path / name)["guess"] for name in ("one", "two"))
    assert [item.scores for item in one.items] == [item.scores for item in two.items]
    for item in one.items:
        assert item.error is None and len(item.scores) == 4
        assert [float(text.strip() == item.id) for text in item.completions] == list(item.scores)


@pytest.mark.slow
def test_a_stage_learns_from_an_environment_twice_to_the_bit(runner, model_dir, tmp_path):
    (tmp_path / "data").mkdir()
    rows = [{"prompt": list(ASKED), "task": task} for task in range(8)]
    (tmp_path / "data" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data" / "rewards.py").write_text(
        "def tries(completions, env_metrics, **columns):\n"
        "    return [len(completion[0]['content']) % 5 / 5 + one['tries'] for completion, one in zip(completions, env_metrics)]\n"
    )
    keys = runner.keys_of(
        "grpo", model_dir("qwen3"), tmp_path / "data", env=GUESS, max_turns=2, env_timeout_s=120.0,
        max_completion_length=60, max_steps=2, reward_funcs=["tries"], sequence_len=200,
    )  # fmt: skip
    results = [runner.run_stage("grpo", tmp_path / name, keys) for name in ("one", "two")]
    logged = runner.rows(tmp_path / "one")
    assert all(row["env/failed_ratio"] == 0 and row["env/tries"] >= 1 for row in logged)
    assert results[0].model_digest == results[1].model_digest
