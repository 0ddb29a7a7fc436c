"""Runs for tests of ranks that share a micro-batch: scores and gradients of some batches, then stages, by the same ranks.

As a script it takes `{spec, data, rows, jobs}` and maybe `exports`, and writes to the file FOUND what was scored.
"""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from tests import stage_runner

from posttrain.config.stages import SFTKeys
from posttrain.distributed.ranks import join_ranks
from posttrain.distributed.sharding import ShardingSpec, sharding_over
from posttrain.models.batch import pack
from posttrain.models.export import save_policy
from posttrain.models.load import load_policy
from posttrain.models.proof import probe_logits
from posttrain.models.reward_head import reward_head
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


def scored(data, rows, ranks, spec):
    """Name and batch → loss, log-probs, gradients. All ranks share each batch, or those of the key in `spec`."""
    found = {}
    for name, (model, options) in rows.items():
        kind, own = options.get("kind", "sft"), {key: value for key, value in options.items() if key != "kind"}
        keys = stage_runner.keys_of(kind, Path(model), Path(data), **own)
        policy = load_policy(keys, sharding=sharding_over(ranks, ShardingSpec(**spec)))
        held = []
        copies = ranks.world_size // spec.get("tensor_parallel_size", ranks.world_size)
        layer = policy.base.get_decoder().layers[0]
        layer.register_forward_pre_hook(lambda module, given, held=held: held.append(given[0].shape[1]))
        for batch_name, families in BATCHES.items():
            held.clear()
            batch = pack(families)
            found[f"{name}, {batch_name}"] = _of_batch(policy, batch, copies)
            if spec.get("sp_size"):
                tokens = max(len(batch.input_ids_N), ranks.world_size)
                assert sum(ranks.gather(held[0])) == tokens
                assert held[0] <= -(-tokens // ranks.world_size)
    return found


def _of_batch(policy, batch, copies):
    """`copies` groups of ranks run it each, and gradients add up."""
    policy.model.train()
    values_M, top1, loss = _rewarded(policy, batch) if reward_head(policy.base) else _scores(policy, batch)
    loss = loss + (torch.linspace(-1.0, 2.0, len(values_M)) * values_M).sum()
    loss.backward()
    gradients = {
        n: policy.sharding.whole(p.grad).double() / copies for n, p in policy.trainable() if p.grad is not None
    }
    policy.model.zero_grad(set_to_none=True)
    return {
        "loss": float(loss.detach()),
        "logp": values_M.tolist(),
        "top1": top1,
        "gradients": {
            n: [float(g.norm()), float((g * torch.linspace(-1, 1, g.numel()).view_as(g)).sum())]
            for n, g in gradients.items()
        },
    }


def _rewarded(policy, batch):
    return policy.rewards(batch), [], torch.zeros(())


def _scores(policy, batch):
    """Log-probs, which of them are the best, and what else there is a gradient of."""
    scores = policy.score(batch, entropy=True, top1=True)
    beside = scores.entropy_M.mean()
    return scores.logp_M, scores.top1_M.tolist(), beside if scores.aux_loss is None else beside + scores.aux_loss


def exported(exports, ranks, spec):
    """Name → what each rank read of the file and held, in bytes; the folder holds the model, moved by a noise of its names."""
    found = {}
    for name, (model, folder, options) in exports.items():
        keys = SFTKeys(base_model=model, datasets=[{"path": "x"}], device="cpu", **options)
        sharding, read = sharding_over(ranks, ShardingSpec(**spec)), []
        cut = sharding.cut

        def cut_and_seen(model, cut=cut, read=read, sharding=sharding):
            model = cut(model)
            read.append(sum(sharding.local(p).nbytes for p in model.parameters()))
            return model

        sharding.cut = cut_and_seen
        policy = load_policy(keys, sharding=sharding)
        for key, parameter in policy.trainable():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
            sharding.fill(parameter, sharding.whole(parameter) + 0.02 * noise)
        save_policy(policy, Path(folder), keys, ranks=ranks, trained=probe_logits(policy.model))
        held = sum(sharding.local(p).nbytes for p in policy.model.parameters())
        found[name] = ranks.gather([*read, held])
    return found


def same(found, one):
    assert found.keys() == one.keys()
    for name, expected in one.items():
        assert found[name]["loss"] == pytest.approx(expected["loss"], rel=1e-6, abs=1e-6), name
        assert found[name]["logp"] == pytest.approx(expected["logp"], rel=1e-6, abs=2e-6), name
        assert found[name]["top1"] == expected["top1"], name
        assert found[name]["gradients"].keys() == expected["gradients"].keys()
        largest = max(norm for norm, _ in expected["gradients"].values())
        for parameter, values in expected["gradients"].items():
            assert found[name]["gradients"][parameter] == pytest.approx(values, rel=1e-5, abs=1e-6 * largest), (
                name,
                parameter,
            )


def started(ranks, job, model, folder, stages):
    """What so many ranks found of a job, started once, and its stages with the folders that they wrote; the last one was stopped."""
    common = {"model": model, "data": job["data"]}
    jobs = [{**common, "kind": k, "folder": str(folder / k), "options": options} for k, options in stages.items()]
    jobs.append({**jobs[0], "folder": str(folder / "stopped"), "stop_after": 1})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*launcher, "-m", __name__, json.dumps({**job, "jobs": jobs})], check=False, capture_output=True, text=True,
        timeout=400, cwd=Path(__file__).parents[2], env={**os.environ, "FOUND": str(folder / "found.json")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "found.json").read_text()), jobs


def learned_alike(runner, found, one):
    assert [row.keys() for row in runner.rows(found)] == [row.keys() for row in runner.rows(one)]
    for mine, expected in zip(runner.rows(found), runner.rows(one), strict=True):
        for name, value in expected.items():
            assert mine[name] == pytest.approx(value, rel=5e-6 if name == "loss" else 1e-4, abs=2e-6), name
    assert runner.losses(found) == pytest.approx(runner.losses(one), rel=1e-6, abs=1e-6)
    for name, tensor in runner.weights(one).items():
        assert (runner.weights(found)[name] - tensor).abs().max() < 2e-5, name


def main(job):
    torch.set_num_threads(1)
    with join_ranks() as ranks:
        found = scored(job["data"], job["rows"], ranks, job["spec"])
        if "exports" in job:
            found |= exported(job["exports"], ranks, job["spec"])
        for stage in job["jobs"]:
            keys = stage_runner.keys_of(stage["kind"], Path(stage["model"]), Path(stage["data"]), **stage["options"])
            stage_runner.run_stage(stage["kind"], Path(stage["folder"]), keys, stage.get("stop_after"), ranks)
        if ranks.is_main:
            Path(os.environ["FOUND"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
