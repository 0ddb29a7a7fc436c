import math

import pytest
import torch

from posttrain.errors import ModelError
from posttrain.models import tree_attention
from posttrain.models.attention import ragged_attention
from posttrain.models.batch import Layout, Tree, pack
from posttrain.models.tree_attention import Window, merge, tree_mask
from posttrain.types import TokenSeq

RAGGED = ("qwen3", "llama", "mistral", "gemma2", "gemma3_text", "qwen3_moe")


def test_the_mask_of_a_tree_by_hand():
    """Prefix 0 1; branch a = 2; branch b = 3 4. Each sees the prefix, itself and what is before it in its branch."""
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4]]
    mask = tree_mask(Tree(10, 12, (13, 15)), None, torch.device("cpu"))
    assert [row.nonzero()[:, 0].tolist() for row in mask] == seen


def test_a_window_counts_positions_not_packed_places():
    """Window 2: a token sees itself and the one before. Branch b's first token follows the prefix's last."""
    seen = [[0], [0, 1], [1, 2], [1, 3], [3, 4]]
    mask = tree_mask(Tree(0, 2, (3, 5)), Window(2), torch.device("cpu"))
    assert [row.nonzero()[:, 0].tolist() for row in mask] == seen


def test_merged_attention_over_two_key_sets_is_attention_over_both():
    torch.manual_seed(0)
    scores, values = torch.randn(4, 9, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    parts = [
        (scores[:, own].softmax(-1) @ values[own], scores[:, own].logsumexp(-1)) for own in (slice(0, 5), slice(5, 9))
    ]
    out, lse = merge(*parts[0], *parts[1])
    torch.testing.assert_close(out, scores.softmax(-1) @ values)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def _by_mask(query, key, value, layout, window=None, softcap=None):
    """Plain float64 attention with the whole mask written out."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = torch.zeros(query.shape[2], query.shape[2], dtype=torch.bool)
    for tree in layout.trees:
        mask[tree.start : tree.stop, tree.start : tree.stop] = tree_mask(
            tree, None if window is None else Window(window), mask.device
        )
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("call_flops", [0.0, math.inf])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"softcap": 2.0}, {"sliding_window": 100}])
def test_every_path_equals_attention_with_the_mask_written_out(options, call_flops, monkeypatch):
    monkeypatch.setattr(tree_attention, "_CALL_FLOPS", call_flops)
    tree_attention.calls_of.cache_clear()
    deep = Tree(19, 22, (24, 25, 27, 30), (0, 1, 1, 0))
    layout = Layout((Tree(0, 6), Tree(6, 10, (13, 13, 18)), Tree(18, 19), deep))
    torch.manual_seed(0)
    leaves = [torch.randn(1, heads, 30, 16, dtype=torch.float64) for heads in (4, 2, 2)]
    single = [leaf.float().requires_grad_() for leaf in leaves]
    double = [leaf.requires_grad_() for leaf in leaves]
    out, _ = ragged_attention(torch.nn.Module(), *single, None, layout=layout, **options)
    expected = _by_mask(*double, layout, options.get("sliding_window"), options.get("softcap"))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    (out * weights.float()).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(single, double, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-4)
    tree_attention.calls_of.cache_clear()


def test_small_trees_are_one_masked_call_on_a_cpu_and_others_a_call_in_itself_and_one_against_the_prefix():
    small, large = Tree(0, 40, (60, 80)), Tree(80, 480, (680, 880))
    calls = tree_attention.calls_of((small, large), 256, torch.float32, None, torch.device("cpu"))
    assert [(c.rows.start, c.rows.stop, hasattr(c, "mask"), c.more) for c in calls] == [
        (0, 80, True, False), (80, 880, False, False), (480, 880, False, True),
    ]  # fmt: skip
    assert calls[1].sequences.lengths_q == (400, 200, 200)


@pytest.mark.parametrize("architecture", RAGGED)
@pytest.mark.parametrize("least_shared", [1, math.inf], ids=["deep", "two levels"])
def test_packed_log_probs_and_gradients_equal_single_runs(
    least_shared, architecture, model_dir, policy_of, oracle, turns
):
    policy, single = policy_of(architecture), oracle(model_dir(architecture))
    assert policy.ragged
    batch = pack(turns, least_shared)
    depth = max(segment.depth for tree in batch.layout.trees for segment in tree.segments())
    assert depth == (4 if least_shared == 1 else 1)
    scores = policy.score(batch)
    torch.testing.assert_close(scores.logp_M, single.logp(turns), atol=1e-4, rtol=1e-4)
    weights = torch.linspace(0.5, 1.5, len(scores.logp_M))
    (scores.logp_M * weights).sum().backward()
    expected = single.gradients(turns)
    ours = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        scale = expected[name].abs().max()
        assert (gradient - expected[name]).abs().max() <= 1e-4 * scale + 1e-6, name


@pytest.mark.parametrize("architecture", RAGGED)
def test_no_document_sees_another(architecture, policy_of, families):
    policy = policy_of(architecture)
    other = TokenSeq(tuple(reversed(families[0][0].ids)), families[0][0].loss_mask)
    with torch.no_grad():
        first = policy.score(pack(families)).logp_M
        second = policy.score(pack([[other], *families[1:]])).logp_M
    own = families[0][0].num_loss_tokens
    assert torch.equal(first[own:], second[own:])
    assert not torch.allclose(first[:own], second[:own])


def test_order_of_families_changes_no_log_prob(policy_of, families):
    policy = policy_of("mistral")
    with torch.no_grad():
        forward = policy.score(pack(families)).logp_M.split([sum(s.num_loss_tokens for s in f) for f in families])
        backward = policy.score(pack(families[::-1])).logp_M.split(
            [sum(s.num_loss_tokens for s in f) for f in families[::-1]]
        )
    for a, b in zip(forward, reversed(backward), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_sinks_and_padded_rows_are_refused():
    query = torch.randn(2, 2, 4, 8)
    with pytest.raises(ModelError, match="one row of packed tokens, got 2 rows"):
        ragged_attention(torch.nn.Module(), query, query, query, None)
    with pytest.raises(ModelError, match="sinks"):
        ragged_attention(torch.nn.Module(), query[:1], query[:1], query[:1], None, s_aux=torch.zeros(2))
