"""Sharded, the head never makes [tokens × vocabulary] either, and what comes out is what one process computes."""

import pytest

SCRIPT = """
import json, os, sys, torch
from pathlib import Path
from posttrain.config.stages import SFTKeys
from posttrain.distributed.ranks import join_ranks
from posttrain.distributed.sharding import sharding_over
from posttrain.models import policy as module
from posttrain.models.batch import pack
from posttrain.models.load import load_policy
from posttrain.objectives import logprobs
from posttrain.types import TokenSeq

def fused(hidden, weight, targets, temperature, with_entropy):
    "As a kernel that makes no logits: from the gathered weight, outside of the chunks."
    logp = (hidden @ weight.t() / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], torch.special.entr(logp.exp()).sum(-1)

torch.set_num_threads(1)
found = {}
with join_ranks() as ranks:
    for name, folder in json.loads(sys.argv[1]).items():
        keys = SFTKeys(base_model=folder, datasets=[{"path": "x"}], bf16=False, device="cpu")
        made = load_policy(keys, sharding=sharding_over(ranks))
        plain, module._from_logits = module._from_logits, None  # whoever makes plain logits calls it
        rng = torch.Generator().manual_seed(0)
        rows = [tuple(torch.randint(1, 200, (n,), generator=rng).tolist()) for n in (9, 5, 12)]
        batch = pack([[TokenSeq(ids, (False, *[True] * (len(ids) - 1)))] for ids in rows])
        scores = made.score(batch, entropy=True)
        (scores.logp_M.sum() + scores.entropy_M.sum()).backward()
        module._from_logits = plain
        norm = made.sharding.clip_grad_norm([p for _, p in made.trainable()], 0.0)
        made.model.zero_grad()  # now: after a forward without a backward the parameters in place are the gathered ones
        with torch.no_grad():
            again = made.score(batch).logp_M
        by_chunks, logprobs.fused_head = logprobs.fused_head, lambda *head: fused
        other = made.score(batch, entropy=True, top1=True)
        (other.logp_M.sum() + other.entropy_M.sum()).backward()
        logprobs.fused_head = by_chunks
        assert torch.equal(other.top1_M, scores.top1_M)
        apart = float((other.logp_M - scores.logp_M).abs().max() + (other.entropy_M - scores.entropy_M).abs().max())
        norm_apart = abs(made.sharding.clip_grad_norm([p for _, p in made.trainable()], 0.0) / norm - 1)
        found[name] = [
            scores.logp_M.tolist(), scores.entropy_M.tolist(), norm, float((again - scores.logp_M).abs().max()), apart, norm_apart,
        ]
    if ranks.is_main:
        Path(os.environ["FOUND"]).write_text(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("architectures", [["llama", "qwen3"]])
def test_two_ranks_score_through_the_chunked_head_and_a_fused_one_as_one_process_does(
    architectures, model_dir, found_by
):
    folders = {name: str(model_dir(name)) for name in architectures}
    one, two = (found_by(ranks, SCRIPT, folders) for ranks in (1, 2))
    for name in architectures:
        for a, b in zip(one[name][:2], two[name][:2], strict=True):
            assert b == pytest.approx(a, abs=1e-5)
        # Both ranks score the same rows, and their gradients add up.
        assert two[name][2] == pytest.approx(2 * one[name][2], rel=1e-4)
        assert two[name][3] < 1e-5
        # A fused head is given the gathered matrix, and its gradient goes back to the shards.
        assert max(*one[name][4:], *two[name][4:]) < 1e-4
