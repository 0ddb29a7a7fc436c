"""Ranks that hold shares of a policy sample from it together, layer by layer, each as many rows as it has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain.config.stages import SFTKeys
from posttrain.distributed.ranks import join_ranks
from posttrain.distributed.sharding import ShardingSpec, sharding_over
from posttrain.errors import ConfigError
from posttrain.models.load import load_policy
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.in_step import InStepEngine
from posttrain.types import Request, SamplingParams, in_order

PROMPTS = [(5, 6, 7), (8, 9), (5, 6, 7, 8, 9, 10), (11,), (12, 13)]
PARAMS = SamplingParams(max_tokens=12, temperature=1.0)


def requests(places):
    return [Request(PROMPTS[place], seed=place, max_tokens=(12, 3, 7, 1, 9)[place]) for place in places]


def test_two_ranks_with_other_rows_each_sample_what_a_whole_policy_samples(model_dir, tmp_path):
    job = {"model": str(model_dir("qwen3")), "out": str(tmp_path)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", __name__, json.dumps(job)], check=False, capture_output=True, text=True, timeout=200,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]


def test_a_model_whose_rows_are_encoded_anew_is_refused(model_dir):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    keys = SFTKeys(base_model=str(model_dir("llama", rope_parameters=rope)), datasets=[{"path": "x"}], device="cpu")
    with join_ranks() as ranks:
        policy = load_policy(keys)
        with pytest.raises(
            ConfigError, match=r"encodes long sequences in another way than short ones; set rollout.transfer: copy"
        ):
            InStepEngine(EmbeddedEngine(policy, stop_token_ids=()), policy, ranks)


def sampled(engine, places):
    return [(c.ids, c.logp, c.finish) for c in in_order(engine.generate(requests(places), PARAMS))]


def watch_gathers(policy):
    """The layers that are whole, beside the one that is running, at the start of each; filled as it decodes."""
    from torch.distributed.tensor import DTensor

    layers, found = list(policy.base.get_decoder().layers), []

    def look(layer, *_):
        others = [other for other in layers if other is not layer]
        found.append(sum(not isinstance(next(other.parameters()), DTensor) for other in others))

    for layer in layers:
        layer.register_forward_pre_hook(look)
    return found


def main(job):
    torch.set_num_threads(1)
    keys = SFTKeys(base_model=job["model"], datasets=[{"path": "x"}], device="cpu")
    with join_ranks() as ranks:
        whole = EmbeddedEngine(load_policy(keys), stop_token_ids=())
        policy = load_policy(keys, sharding=sharding_over(ranks, ShardingSpec()))
        engine = InStepEngine(EmbeddedEngine(policy, stop_token_ids=(), batch_size=2), policy, ranks)
        gathered = watch_gathers(policy)
        # More rows than a batch against one, rows against none, none at all.
        for dealt in (((0, 1, 2, 3), (4,)), ((), (0, 2)), ((), ())):
            mine = dealt[ranks.rank]
            expected, found = sampled(whole, mine), sampled(engine, mine)
            assert [(ids, finish) for ids, _, finish in found] == [(ids, finish) for ids, _, finish in expected]
            for (_, logp, _), (_, wanted, _) in zip(found, expected, strict=True):
                assert logp == pytest.approx(wanted, abs=1e-5)
            assert engine.score([(PROMPTS[place], 1) for place in mine if len(PROMPTS[place]) > 1]) == [
                pytest.approx(row, abs=1e-5)
                for row in whole.score([(PROMPTS[p], 1) for p in mine if len(PROMPTS[p]) > 1])
            ]
        assert gathered and max(gathered) <= 1, gathered  # the one that is gathered ahead
        assert len(set(map(len, ranks.gather(gathered)))) == 1


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
