"""Two ranks play the episodes of one process, and learn the same from them."""

import pytest

SCRIPT = """
import json, os, sys
from stage_runner import main, rows

(job,) = jobs = json.loads(sys.argv[1])
main(jobs)
if os.environ.get("RANK", "0") == "0":
    open(os.environ["FOUND"], "w").write(json.dumps(rows(job["folder"])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", "verifiers", "openenv", "mcp"])
def test_two_ranks_play_and_learn_as_one_process(kind, found_by, playing, tmp_path):
    stage, found = playing(kind), []
    options = stage.options | {"max_steps": 3, "max_completion_length": 50, "dynamic_sampling": False}
    for ranks in (1, 2):
        job = {
            "kind": "grpo",
            "model": str(stage.model),
            "data": str(stage.data),
            "folder": str(tmp_path / f"run-{ranks}"),
        }
        found.append(found_by(ranks, SCRIPT, [job | {"options": options}]))
    alone, both = found
    assert len(alone) == len(both) == 3
    assert any(row[stage.row_key] > (kind == "own") for row in alone)
    for one, two in zip(alone, both, strict=True):
        assert one["env/failed_ratio"] == 0
        for name in (stage.row_key, "env/failed_ratio", "reward", "completions/mean_length", "loss", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


PLAYED = """
import json, os, sys
from pathlib import Path
import torch
from transformers import AutoTokenizer
from posttrain.config.stages import ModelKeys
from posttrain.distributed.ranks import join_ranks
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.spec import EnvironmentSpec
from posttrain.errors import PosttrainError
from posttrain.models.load import load_policy
from posttrain.recipes.experience.episodes import Begin, Episodes
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Origin, Prompt, Request, SamplingParams

torch.set_num_threads(1)
job, found = json.loads(sys.argv[1]), {}
with join_ranks() as ranks:
    policy = load_policy(ModelKeys(base_model=job["model"]))
    engine = EmbeddedEngine(policy.without_dropout(), stop_token_ids=range(0, 600, 2))
    for env, files in job["envs"].items():
        with EnvironmentPool(EnvironmentSpec(f"{files[ranks.rank]}:{env}", ()), 20.0, 1) as pool:
            episodes = Episodes(pool, engine, policy.tokenizer, ranks, 4)
            begins = [
                Begin(Prompt(Origin("p", n), "so", columns={"place": n}), Request((5, 6, 7), n), n)
                for n in ranks.share(range(4))
            ]
            try:
                ended = [c.episode.error for c in episodes.play(begins, SamplingParams(60, 1.0, 1.0))]
            except PosttrainError as error:
                ended = [str(error)]
        found[env] = ranks.gather(ended)
    if ranks.is_main:
        Path(os.environ["FOUND"]).write_text(json.dumps(found))
"""
ENVS = """
class Odd:
    # Of two ranks all of the second's are lost, which is half of them.
    def reset(self, place):
        self.place, self.turns = place, 0

    def step(self, answer):
        self.turns += 1
        if self.place % 2:
            raise ValueError("down")
        return "go on" if self.turns < 2 else None

class Most(Odd):
    def reset(self, place):
        super().reset(2 if place == 2 else 1)
"""
GONE = """
from pathlib import Path
seen = Path(__file__).with_suffix(".seen")
if seen.exists():
    raise RuntimeError("gone for good")
seen.touch()

class Gone:
    def step(self, answer):
        return None
"""


@pytest.mark.slow
def test_what_stops_a_rank_stops_all_and_how_many_are_lost_is_counted_over_them(found_by, model_dir, tmp_path):
    envs, gone = tmp_path / "envs.py", tmp_path / "gone.py"
    envs.write_text(ENVS + "\n\nclass Gone(Odd):\n    pass\n")
    gone.write_text(GONE)  # of the second rank: it can be loaded once, and there are two episodes
    job = {"model": str(model_dir("qwen3"))}
    found = found_by(
        2,
        PLAYED,
        job | {"envs": {"Odd": [str(envs)] * 2, "Most": [str(envs)] * 2, "Gone": [str(envs), str(gone)]}},
    )
    assert found["Odd"][0] == [None, None]
    assert all("ValueError: down" in str(why) for why in found["Odd"][1]), found["Odd"]
    (first,), (second,) = found["Most"]
    assert first == second
    assert first.startswith("3 of 4 episodes were lost")
    (first,), (second,) = found["Gone"]
    assert first == second
    assert "gone for good" in first
