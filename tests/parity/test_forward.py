"""Packed documents and shared prefixes against transformers' own forward of each sequence alone: loss and gradient."""

import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.config.stages import ModelKeys, TrainKeys
from posttrain.models import tree_attention
from posttrain.models.batch import pack
from posttrain.models.load import load_policy
from posttrain.types import TokenSeq

FAMILIES = ["qwen3", "llama", "mistral", "gemma2", "gemma3_text"]


def _families(shared):
    """Families of sequences, prompts untrained: a lone document, a pair, a group of four; longer than any window."""
    rng = random.Random(5)
    families = []
    for size, prompt_length in ((1, 6), (2, 11), (4, 9), (1, 30)):
        prompt = [rng.randrange(300) for _ in range(prompt_length)]
        answers = [[rng.randrange(300) for _ in range(rng.randint(1, 20))] for _ in range(size)]
        members = [_trained(prompt, answer) for answer in answers]
        families += [members] if shared else [[member] for member in members]
    return families


def _trained(prompt, answer):
    return TokenSeq((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))


def _gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _plain(model, families):
    """One transformers forward per sequence; a weight per token, so that no two positions can be swapped unnoticed."""
    terms = []
    for sequence in (member for family in families for member in family):
        logp = model(input_ids=torch.tensor([sequence.ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        targets = torch.tensor(sequence.ids[1:])
        terms.append(logp.gather(-1, targets[:, None])[:, 0][torch.tensor(sequence.loss_mask[1:])])
    return torch.cat(terms)


def _weighted(logp_M):
    return -(logp_M * torch.linspace(0.5, 1.5, logp_M.numel())).sum() / logp_M.numel()


@pytest.fixture(params=[0.0, math.inf], ids=["a call for each span", "one masked call"])
def small_trees(request, monkeypatch):
    """Small trees are attended to in one way or the other, decided by what a call costs: here by force."""
    monkeypatch.setattr(tree_attention, "_CALL_FLOPS", request.param)
    tree_attention.calls_of.cache_clear()
    yield
    tree_attention.calls_of.cache_clear()


@pytest.mark.usefixtures("small_trees")
@pytest.mark.parametrize("shared", [False, True], ids=["packed", "shared prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient(model_dir, family, shared):
    folder = str(model_dir(family))
    families = _families(shared)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = _plain(plain, families)
    _weighted(expected).backward()

    policy = load_policy(TrainKeys(base_model=folder, datasets=[{"path": "unused.jsonl"}], device="cpu"))
    assert policy.ragged
    logp_M = policy.score(pack(families)).logp_M
    _weighted(logp_M).backward()

    torch.testing.assert_close(logp_M, expected, rtol=1e-5, atol=1e-5)
    theirs, ours = _gradients(plain), _gradients(policy.model)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        error = (ours[name] - theirs[name]).norm() / theirs[name].norm()
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_frozen_weights_score_the_same(model_dir):
    """A reference or an eval loads without gradients and goes the same way."""
    folder = str(model_dir())
    frozen = load_policy(ModelKeys(base_model=folder, device="cpu"), trainable=False)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(
            frozen.score(pack(_families(True))).logp_M, _plain(plain, _families(True)), rtol=1e-5, atol=1e-5
        )
