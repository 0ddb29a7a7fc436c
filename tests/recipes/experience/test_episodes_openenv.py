"""Episodes with a server of OpenEnv: its calls are acts, which pay and end them; a stage learns from it, and an eval is answered with it."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

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

SERVER = Path(__file__).parents[2] / "environments" / "openenv_protocol.py"
NEEDED = ("websockets", "fastapi", "uvicorn")
pytestmark = pytest.mark.skipif(
    not all(map(find_spec, NEEDED)), reason="needs posttrain[openenv], and posttrain[serve] for the server"
)


@pytest.fixture
def serve():
    started = []

    def address(kind):
        started.append(subprocess.Popen([sys.executable, str(SERVER), kind, "32"], stdout=subprocess.PIPE))
        return f"openenv:http://127.0.0.1:{int(started[-1].stdout.readline())}"

    yield address
    for process in started:
        process.kill()
        process.communicate()


class Acting:
    """Calls `act` with 1 in each turn, written as Qwen's template writes it."""

    def __init__(self, tokenizer):
        self.tokenizer, self.written = tokenizer, []

    def generate(self, requests, params):
        text = '<tool_call>\n{"name": "act", "arguments": {"dx": 1}}\n</tool_call><|im_end|>'
        for place, _ in enumerate(requests):
            ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            self.written.append(ids)
            yield Completion(ids, tuple(-0.5 for _ in ids), "stop", 3, place)


@pytest.mark.parametrize(
    ("max_turns", "paid", "turns", "finish"), [(8, 2.0, 2, "stop"), (2, 2.0, 2, "stop"), (1, 1.0, 1, "length")]
)
def test_a_call_that_is_an_act_pays_and_ends_the_episode_in_the_last_turn_too(
    max_turns, paid, turns, finish, serve, tokenizer
):
    tokenizer = with_template(tokenizer, "templates/qwen3")
    engine: Any = Acting(tokenizer)
    with EnvironmentPool(EnvironmentSpec(serve("walk")), 20.0, 1) as pool:
        asked = ({"role": "user", "content": 'You stand at {"x": 0, "y": 0}. Go east.'},)
        prompt = Prompt(Origin("p.jsonl", 1), asked, {}, pool.tools)
        begin = Begin(prompt, Request(chat_ids(tokenizer, asked, pool.tools), 5), 6)
        (played,) = Episodes(pool, engine, tokenizer, None, max_turns).play([begin], SamplingParams(2000))
    assert played.episode is not None
    assert (played.episode.env_reward, played.episode.turns, played.finish) == (paid, turns, finish)
    assert [t for t, mine in zip(played.ids, played.episode.sampled, strict=True) if mine] == [
        t for turn in engine.written for t in turn
    ]
    assert played.episode.error is None and played.episode.failed_calls == 0


PROMPTS = [{"prompt": [{"role": "user", "content": f"Talk. {n}"}], "answer": "1", "seed": n} for n in range(8)]
REWARD = """
def by_text(prompts, completions, env_reward, **columns):
    assert len(env_reward) == len(completions)
    return [len(completion[-1]["content"]) % 5 / 5 for completion in completions]
"""


def test_a_stage_learns_from_a_servers_episodes_twice_to_the_bit(runner, model_dir, tmp_path, serve):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rewards.py").write_text(REWARD)
    (tmp_path / "data" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    keys = runner.keys_of(
        "grpo", model_dir("qwen3"), tmp_path / "data", env=serve("echo"),
        max_completion_length=60, max_steps=2, reward_funcs=["by_text"], sequence_len=200,
    )  # fmt: skip
    results = [runner.run_stage("grpo", tmp_path / name, keys) for name in ("one", "two")]
    rows = runner.rows(tmp_path / "one")
    assert all(row["env/failed_ratio"] == 0 and row["env/turns"] > 1 for row in rows)
    assert results[0].model_digest == results[1].model_digest


def test_a_server_scores_a_suite_by_what_it_paid(model_dir, tmp_path, serve):
    row = {"id": "1", "messages": PROMPTS[3]["prompt"], "seed": 3, "scorer": "environment"}
    (tmp_path / "suite.jsonl").write_text(json.dumps(row) + "\n")
    suite = load_suite("talk", tmp_path / "suite.jsonl")
    keys = SuiteKeys(path=str(suite.path), env=serve("echo"), max_tokens=300, temperature=1.0, num_samples=8)
    report = evaluate(ModelKeys(base_model=str(model_dir("qwen3"))), [(suite, keys)], "gate", tmp_path)["talk"]
    assert report.items[0].error is None and any(score > 0 for score in report.items[0].scores)
