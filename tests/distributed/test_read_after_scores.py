"""What is read of a policy that ranks share, after they scored by it and trained nothing since, is what it holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain.config.stages import SFTKeys
from posttrain.distributed.ranks import join_ranks
from posttrain.distributed.sharding import ShardingSpec, sharding_over
from posttrain.models.load import load_policy
from posttrain.rollout.embedded import score_sequences
from posttrain.rollout.transfer.whole import FileReceiver, FileSender

SCORED = [((5, 6, 7, 8), 1)]


def sent(policy, only, folder):
    """Name → tensor, as two servers get them one after the other, with the canary's scores between them."""
    found = []
    for version in (1, 2):
        got, receiver = {}, FileReceiver()
        take = lambda message, got=got, receiver=receiver: got.update(receiver.take(message))  # noqa: E731
        FileSender(folder).send(policy.weights(only), version, take)
        found.append(got)
        score_sequences(policy, SCORED)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_second_server_gets_what_the_first_one_got_in_the_dtype_that_is_trained(adapter, model_dir, tmp_path):
    options = {} if adapter is None else {"adapter": adapter, "lora_r": 4, "lora_modules_to_save": ["norm"]}
    job = {"model": str(model_dir("qwen3")), "folder": str(tmp_path), "options": options}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", __name__, json.dumps(job)], check=False, capture_output=True, text=True, timeout=200,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]


def main(job):
    torch.set_num_threads(1)
    keys = SFTKeys(base_model=job["model"], datasets=[{"path": "x"}], device="cpu", **job["options"])
    with join_ranks() as ranks:
        folder = Path(job["folder"]) / str(ranks.rank)
        folder.mkdir()
        for dtype in ("float32", "bfloat16"):
            policy = load_policy(keys, sharding=sharding_over(ranks, ShardingSpec(param_dtype=dtype)))
            for only in ("all", "trained"):
                first, second = sent(policy, only, folder)
                assert first.keys() == second.keys() and first, only
                for name, tensor in first.items():
                    assert second[name].dtype == tensor.dtype == torch.float32, (dtype, only, name)
                    assert torch.equal(second[name], tensor), (dtype, only, name)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
