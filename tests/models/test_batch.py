import math

import torch

from posttrain.models.batch import (
    Layout,
    Segment,
    Tree,
    common_prefix,
    fill_by_tokens,
    loss_counts,
    pack,
    split_by_length,
)
from posttrain.types import Counts, TokenSeq


def seq(ids, start):
    return TokenSeq(tuple(ids), tuple(t >= start for t in range(len(ids))))


def test_a_document_is_laid_out_without_its_last_token():
    """Tokens 5 6 7 8, the last two trained: inputs 5 6 7; 7 is predicted from 6 and 8 from 7."""
    batch = pack([[seq([5, 6, 7, 8], 2)]])
    assert batch.input_ids_N.tolist() == [5, 6, 7]
    assert batch.position_ids_N.tolist() == [0, 1, 2]
    assert batch.layout == Layout((Tree(0, 3),))
    assert batch.source_M.tolist() == [1, 2]
    assert batch.target_M.tolist() == [7, 8]
    assert batch.counts == Counts(tokens=2, sequences=1)


def test_filling_by_tokens_splits_and_drops_nothing():
    sizes = [5, 4, 1, 9, 3, 12, 3, 3]
    filled = fill_by_tokens(range(8), sizes.__getitem__, 10)
    assert filled == [[0, 1, 2], [3], [4], [5], [6, 7]]


def test_documents_follow_each_other_and_count_positions_from_zero():
    batch = pack([[seq([5, 6, 7], 1)], [seq([8, 9], 1)]])
    assert batch.input_ids_N.tolist() == [5, 6, 8]
    assert batch.position_ids_N.tolist() == [0, 1, 0]
    assert batch.layout == Layout((Tree(0, 2), Tree(2, 3)))
    assert batch.source_M.tolist() == [0, 1, 2]
    assert batch.seq_M.tolist() == [0, 0, 1]


def test_a_family_stores_its_prompt_once():
    """Prompt 1 2 3, answers 4 5 and 6 7 8. The prompt is 0..2; the branches hold 4 and 6 7.

    4 and 6 are both predicted from the prompt's last token, at packed position 2.
    """
    batch = pack([[seq([1, 2, 3, 4, 5], 3), seq([1, 2, 3, 6, 7, 8], 3)]])
    assert batch.input_ids_N.tolist() == [1, 2, 3, 4, 6, 7]
    assert batch.position_ids_N.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.layout == Layout((Tree(0, 3, (4, 6)),))
    assert batch.source_M.tolist() == [2, 3, 2, 4, 5]
    assert batch.target_M.tolist() == [4, 5, 6, 7, 8]
    assert batch.seq_M.tolist() == [0, 0, 1, 1, 1]


def test_answers_that_begin_alike_share_that_too():
    """Answers 4 5 and 4 6: only their last tokens differ, and those are no inputs, so both branches are empty."""
    batch = pack([[seq([1, 2, 4, 5], 2), seq([1, 2, 4, 6], 2)]])
    assert batch.input_ids_N.tolist() == [1, 2, 4]
    assert batch.layout == Layout((Tree(0, 3, (3, 3)),))
    assert batch.source_M.tolist() == [1, 2, 1, 2]
    assert batch.target_M.tolist() == [4, 5, 4, 6]


def test_a_sequence_that_is_the_prefix_of_another():
    batch = pack([[seq([1, 2, 3], 1), seq([1, 2, 3, 4, 5], 3)]])
    assert batch.input_ids_N.tolist() == [1, 2, 3, 4]
    assert batch.layout == Layout((Tree(0, 2, (2, 4)),))
    assert batch.source_M.tolist() == [0, 1, 2, 3]
    assert batch.target_M.tolist() == [2, 3, 4, 5]


def test_a_family_with_nothing_in_common_becomes_documents():
    batch = pack([[seq([1, 2, 3], 1), seq([4, 5], 1)]])
    assert batch.layout == Layout((Tree(0, 2), Tree(2, 3)))
    assert batch.seq_M.tolist() == [0, 0, 1]


def test_the_first_token_is_never_scored_and_untrained_sequences_still_count():
    families = [[seq([1, 2], 0)], [seq([3, 4], 2)]]
    batch = pack(families)
    assert batch.target_M.tolist() == [2]
    assert batch.num_sequences == 2
    assert batch.lengths_S().tolist() == [1, 0]
    assert loss_counts([s for f in families for s in f]) == batch.counts


def test_common_prefix():
    assert common_prefix([(1, 2, 3), (1, 2, 4), (1, 2)]) == 2
    assert common_prefix([(1, 2), (3,)]) == 0
    assert common_prefix([(7, 7), (7, 7)]) == 2
    assert common_prefix([(1, 2), ()]) == 0
    assert common_prefix([[1, 9, 2], (1, 9, 3)]) == 2


def test_a_tree_of_three_levels_stores_each_shared_segment_once():
    """Prompt 1 2; answers 3 4 5 and 3 4 6 8, and between them 7. The first and the last go on together up to 3 4."""
    rows = [seq([1, 2, 3, 4, 5, 0], 2), seq([1, 2, 7, 0], 2), seq([1, 2, 3, 4, 6, 8, 0], 4)]
    batch = pack([rows], least_shared=1)
    assert batch.input_ids_N.tolist() == [1, 2, 3, 4, 5, 6, 8, 7]
    assert batch.position_ids_N.tolist() == [0, 1, 2, 3, 4, 4, 5, 2]
    assert batch.layout == Layout((Tree(0, 2, (4, 5, 7, 8), (0, 1, 1, 0)),))
    assert batch.leaves == (0, 2, 1)
    assert batch.seq_M.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert batch.source_M.tolist() == [1, 2, 3, 4, 1, 7, 3, 5, 6]
    assert batch.target_M.tolist() == [3, 4, 5, 0, 7, 0, 6, 8, 0]


def test_families_share_what_is_long():
    """Two pairs behind one system prompt of 70 tokens: it is the prefix, their own prompts continue it."""
    system = tuple(range(100, 170))
    pairs = [[seq([*system, *prompt, answer, 0], 71) for answer in (4, 5)] for prompt in ((1, 2), (3,))]
    batch = pack(pairs)
    assert batch.layout == Layout((Tree(0, 70, (72, 73, 74, 75, 76, 77), (0, 1, 1, 0, 4, 4)),))
    assert batch.leaves == (0, 1, 2, 3)
    assert [len(tree.ends) for tree in pack(pairs, least_shared=math.inf).layout.trees] == [2, 2]


def test_segments_of_a_tree():
    assert Tree(2, 5).segments() == [Segment(2, 5, 5)]
    two, three = Tree(2, 5, (7, 7, 9)), Tree(0, 4, (7, 9, 14, 20), (0, 1, 1, 0))
    assert two.segments() == [Segment(2, 5, 9), Segment(5, 7, 7, 1, 3), Segment(7, 7, 7, 1, 3), Segment(7, 9, 9, 1, 3)]
    assert three.segments() == [
        Segment(0, 4, 20), Segment(4, 7, 14, 1, 4), Segment(7, 9, 9, 2, 7), Segment(9, 14, 14, 2, 7), Segment(14, 20, 20, 1, 4),
    ]  # fmt: skip
    assert (Tree(2, 5).leaves(), two.leaves(), three.leaves()) == ([0], [1, 2, 3], [2, 3, 4])
    assert (two.path(0), two.path(2), three.path(3)) == ([0], [0, 2], [0, 1, 3])


def test_sequences_of_a_deep_tree_apart_by_their_length():
    rows = [seq([1, 2, 3, 4, 5, 0], 2), seq([1, 2, 7, 0], 2), seq([1, 2, 3, 4, 6, 8, 0], 4), seq([1, 0], 1)]
    parts = split_by_length(pack([rows], least_shared=1), lambda length: length > 4)
    (long, long_places), (short, short_places) = parts
    for part, kept, places in ((long, (0, 2), long_places), (short, (1, 3), short_places)):
        expected = pack([[rows[number] for number in kept]], least_shared=1)
        assert part.num_sequences == 2 and part.leaves == expected.leaves
        assert part.input_ids_N[part.source_M].tolist() == expected.input_ids_N[expected.source_M].tolist()
        assert part.target_M.tolist() == expected.target_M.tolist()
        assert part.seq_M.tolist() == expected.seq_M.tolist()
        assert part.position_ids_N[part.source_M].tolist() == expected.position_ids_N[expected.source_M].tolist()
        assert len(places) == len(part.target_M)
    assert long.input_ids_N.tolist() == [1, 2, 3, 4, 5, 6, 8]
    assert short.input_ids_N.tolist() == [1, 2, 7]


def test_moving_a_batch_moves_every_tensor():
    batch = pack([[seq([5, 6, 7, 8], 2)]]).to(torch.device("meta"))
    assert {
        t.device.type for t in (batch.input_ids_N, batch.position_ids_N, batch.source_M, batch.target_M, batch.seq_M)
    } == {"meta"}
