"""Runs for tests of sequence parallelism: scores and gradients of some batches, then stages, by the same ranks.

As a script it takes `{data, rows, jobs}` and writes to the file FOUND what was scored.
"""

import json
import os
import sys
from pathlib import Path

import torch
from tests import stage_runner

from posttrain.distributed.ranks import join_ranks
from posttrain.distributed.sharding import ShardingSpec, sharding_over
from posttrain.models.batch import pack
from posttrain.models.load import load_policy
from posttrain.types import TokenSeq


def _sequence(*ids):
    return TokenSeq(ids, tuple(place > 2 for place in range(len(ids))))


_SHARED = tuple(range(5, 60))
BATCHES = {
    "documents": [[_sequence(*range(3 + i, 20 + 3 * i))] for i in range(4)],
    "trees": [
        [_sequence(*_SHARED, *range(7, 50), 3 + i, *range(9 + i, 40)) for i in range(2)],
        [_sequence(*_SHARED[:9], 8 * i, 5) for i in range(3)],
    ],
    "fewer tokens than ranks": [[_sequence(4, 5, 6, 7)]],
}


def scored(data, rows, ranks):
    """Name and batch → loss, log-probs, gradients. All ranks share each batch."""
    found = {}
    for name, (model, options) in rows.items():
        keys = stage_runner.keys_of("sft", Path(model), Path(data), **options)
        policy = load_policy(keys, sharding=sharding_over(ranks, ShardingSpec(sp_size=ranks.world_size)))
        held = []
        layer = policy.base.get_decoder().layers[0]
        layer.register_forward_pre_hook(lambda module, given, held=held: held.append(given[0].shape[1]))
        for batch_name, families in BATCHES.items():
            held.clear()
            batch = pack(families)
            found[f"{name}, {batch_name}"] = _of_batch(policy, batch)
            tokens = max(len(batch.input_ids_N), ranks.world_size)
            assert sum(ranks.gather(held[0])) == tokens
            assert held[0] <= -(-tokens // ranks.world_size)
    return found


def _of_batch(policy, batch):
    policy.model.train()
    scores = policy.score(batch, entropy=True, top1=True)
    weights = torch.linspace(-1.0, 2.0, len(scores.logp_M))
    loss = (weights * scores.logp_M).sum() + scores.entropy_M.mean()
    if scores.aux_loss is not None:
        loss = loss + scores.aux_loss
    loss.backward()
    gradients = {n: policy.sharding.whole(p.grad).double() for n, p in policy.trainable() if p.grad is not None}
    policy.model.zero_grad(set_to_none=True)
    return {
        "loss": float(loss.detach()),
        "logp": scores.logp_M.tolist(),
        "top1": scores.top1_M.tolist(),
        "gradients": {
            n: [float(g.norm()), float((g * torch.linspace(-1, 1, g.numel()).view_as(g)).sum())]
            for n, g in gradients.items()
        },
    }


def main(job):
    torch.set_num_threads(1)
    with join_ranks() as ranks:
        found = scored(job["data"], job["rows"], ranks)
        for stage in job["jobs"]:
            keys = stage_runner.keys_of(stage["kind"], Path(stage["model"]), Path(stage["data"]), **stage["options"])
            stage_runner.run_stage(stage["kind"], Path(stage["folder"]), keys, stage.get("stop_after"), ranks)
        if ranks.is_main:
            Path(os.environ["FOUND"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
