"""What sequences share, against the definition: a token is one and the same where all before it and itself are."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.models.trie import LEAST_SHARED, TrieNode, shared_segments


def arrays(*families):
    return [[np.array(ids, dtype=np.int32) for ids in family] for family in families]


def computed(nodes):
    return sum(node.end - node.begin for node in nodes)


def rebuilt(families, nodes):
    """Each sequence from its leaf back."""
    rows = [ids for family in families for ids in family]
    found = {}
    for leaf in nodes:
        if leaf.is_leaf:
            assert leaf.row not in found
            node, parts = leaf, []
            while node is not None:
                parts.append(rows[node.row][node.begin : node.end])
                before = None if node.parent is None else nodes[node.parent]
                assert node.begin == (0 if before is None else before.end)
                node = before
            found[leaf.row] = np.concatenate(parts[::-1]).tolist()
    return [found[row] for row in range(len(rows))]


def test_two_turns_by_hand():
    """1 2 3 answered by 4; then once by 5 and once by 6. And the first turn answered by 7, the second by 8."""
    family = arrays([(1, 2, 3, 4, 5), (1, 2, 3, 7, 8), (1, 2, 3, 4, 6)])
    assert shared_segments(family, least_shared=1) == [
        TrieNode(0, 0, 3, None, False),
        TrieNode(0, 3, 4, 0, False),
        TrieNode(0, 4, 5, 1, True),
        TrieNode(2, 4, 5, 1, True),
        TrieNode(1, 3, 5, 0, True),
    ]


def test_a_family_that_shares_no_long_segment_is_a_prefix_and_its_sequences_in_their_order():
    family = arrays([(1, 2, 9, 9), (1, 2, 3), (1, 2, 9, 8), (1, 2), (1, 2, 3)])
    assert shared_segments(family) == [
        TrieNode(3, 0, 2, None, False),
        *(TrieNode(row, 2, len(ids), 0, True) for row, ids in enumerate(family[0])),
    ]


def test_a_segment_is_shared_from_so_many_tokens_on():
    def levels(size):
        shared = tuple(range(10, 10 + size))
        nodes = shared_segments(arrays([(1, *shared, 2), (1, *shared, 3), (1, 4)]))
        return [node.parent for node in nodes].count(1)

    assert (levels(LEAST_SHARED - 1), levels(LEAST_SHARED)) == (0, 2)


def test_families_that_share_no_long_segment_stay_apart_however_alike_their_prompts_are():
    families = arrays([(1, 2, 3), (1, 2, 4)], [(1, 2, 3), (1, 2, 4)], [(1, 2, 3)])
    assert [node.parent for node in shared_segments(families)] == [None, 0, 0, None, 3, 3, None]


def test_pairs_from_one_conversation_share_what_came_before():
    """A pair for each turn: the chosen answer of a turn is part of the next pair's prompt."""
    turn = [tuple(range(100 * n, 100 * n + 80)) for n in range(4)]
    pairs = arrays(*([(*sum(turn[:n], ()), *turn[n]), (*sum(turn[:n], ()), 7 + n)] for n in range(1, 4)))
    assert computed(shared_segments(pairs)) == 4 * 80 + 3
    assert computed(shared_segments(pairs, math.inf)) == (1 + 2 + 3) * 80 + 3 * 81


def test_a_family_whose_prompt_is_short_still_computes_it_once_where_it_joins_another():
    """Eight answers to 10 tokens; and a document that goes on like the first of them for long."""
    long = tuple(range(100, 200))
    group = [(*range(10), *long, 5), *((*range(10), 20 + n) for n in range(7))]
    nodes = shared_segments(arrays(group, [(*range(10), *long, 6)]))
    assert computed(nodes) == 10 + 100 + 1 + 1 + 7


@pytest.mark.parametrize("turns, samples", [(1, 8), (2, 4), (3, 3), (5, 2)])
def test_turns_times_samples_cost_a_node_each(turns, samples):
    """A prompt of 100; at each turn every trajectory so far is answered `samples` times, by 70 tokens, the reply included."""
    draw = np.random.default_rng(0)
    rows = [tuple(draw.integers(0, 1000, 100))]
    for _ in range(turns):
        rows = [(*row, n, *draw.integers(0, 1000, 69)) for row in rows for n in range(samples)]
    assert computed(shared_segments(arrays(rows))) == 100 + 70 * sum(samples**turn for turn in range(1, turns + 1))


ids = st.lists(st.integers(0, 2), max_size=9)
families = st.lists(st.lists(ids, min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=200)
@given(families, st.sampled_from([1, 2, 4, math.inf]))
def test_random_sequences_come_back_and_none_costs_more_than_by_prefixes_alone(families, least_shared):
    """And with segments of any length shared, each different beginning of a sequence is computed exactly once."""
    families = arrays(*families)
    nodes = shared_segments(families, least_shared)
    assert rebuilt(families, nodes) == [ids.tolist() for family in families for ids in family]
    assert all(node.parent is None or node.parent < number for number, node in enumerate(nodes))
    by_prefixes = sum(computed(shared_segments([family], math.inf)) for family in families)
    assert computed(nodes) <= by_prefixes
    if least_shared == math.inf:
        assert computed(nodes) == by_prefixes
    if least_shared == 1:
        rows = [tuple(ids.tolist()) for family in families for ids in family]
        assert computed(nodes) == len({row[:size] for row in rows for size in range(1, len(row) + 1)})
