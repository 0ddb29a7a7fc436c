"""NEFTune's noise: what transformers adds to a row alone, of each row's own length in a batch, and to nothing but training."""

import math

import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from posttrain.config.stages import SFTKeys
from posttrain.models.batch import pack
from posttrain.models.embedding_noise import noisy_embeddings, row_lengths
from posttrain.models.load import load_policy
from posttrain.types import TokenSeq

ALPHA = 5.0


@pytest.fixture
def policy(model_dir):
    def load(architecture="qwen3", **keys):
        made = load_policy(SFTKeys(base_model=str(model_dir(architecture)), datasets=[{"path": "x.jsonl"}], **keys))
        made.embedding_noise = ALPHA
        return made

    return load


def row(length, first=5):
    return TokenSeq(tuple(range(first, first + length)), (False, *[True] * (length - 1)))


def embedded(policy, rows):
    """The noise that the first layer gets beside the embeddings of `rows`, and the batch."""
    seen = []
    layer = policy.base.get_decoder().layers[0]
    look = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    batch = pack([[one] for one in rows], least_shared=math.inf)
    policy.score(batch)
    look.remove()
    clean = policy.base.get_input_embeddings()(batch.input_ids_N)
    return (torch.cat([one[0] for one in seen]) - clean).detach(), batch


def test_a_row_alone_gets_what_transformers_adds(policy):
    made = policy()
    made.model.train()
    torch.manual_seed(3)
    noise, batch = embedded(made, [row(12)])
    module = made.base.get_input_embeddings()
    module.train()
    module.neftune_noise_alpha = ALPHA
    torch.manual_seed(3)
    clean = module(batch.input_ids_N[None])
    theirs = (neftune_post_forward_hook(module, None, clean) - clean)[0]
    # The row has one token more than is put in: its last one predicts nothing.
    theirs = theirs * math.sqrt(len(noise) / (len(noise) + 1))
    torch.testing.assert_close(noise, theirs, rtol=1e-4, atol=1e-6)
    assert noise.abs().max() > 0


def test_rows_in_one_batch_get_noise_of_their_own_lengths(policy):
    made = policy()
    made.model.train()
    torch.manual_seed(3)
    noise, batch = embedded(made, [row(6), row(120)])
    lengths = row_lengths(batch.position_ids_N)
    bound = ALPHA / torch.sqrt(lengths.float() * noise.shape[-1])
    assert (noise.abs() <= bound[:, None] * 1.001).all()
    short = lengths == lengths.min()
    for which in (short, ~short):  # uniform: its standard deviation is the bound over sqrt(3)
        relative = (noise[which] / bound[which][:, None]).std()
        assert relative.item() == pytest.approx(1 / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("keys", [{}, {"adapter": "lora", "lora_r": 4}], ids=["full", "lora"])
def test_neither_scoring_nor_validation_sees_noise(policy, keys):
    made = policy(**keys)
    batch = pack([[row(12)]])
    made.model.eval()
    quiet = made.score(batch).logp_M
    made.embedding_noise = 0.0
    assert torch.equal(made.score(batch).logp_M, quiet)
    made.embedding_noise = ALPHA
    made.model.train()
    with torch.no_grad():
        assert torch.equal(made.score(batch).logp_M, quiet)
    assert not torch.equal(made.score(batch).logp_M, quiet)
    assert not made.base.get_input_embeddings()._forward_hooks


def test_a_model_that_takes_one_sequence_at_a_time_has_it_too(policy):
    made = policy("mamba")
    assert not made.ragged
    made.model.train()
    noisy = made.score(pack([[row(12)], [row(7)]])).logp_M
    made.embedding_noise = 0.0
    assert not torch.equal(noisy, made.score(pack([[row(12)], [row(7)]])).logp_M)


def test_nothing_is_hooked_where_there_is_no_alpha(policy):
    made = policy()
    made.model.train()
    with noisy_embeddings(made.base, 0.0, torch.arange(4)):
        assert not made.base.get_input_embeddings()._forward_hooks
