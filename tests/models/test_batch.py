import torch

from posttrain.models.batch import Layout, Tree, common_prefix, loss_counts, pack
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


def test_branches_of_a_tree():
    assert list(Tree(2, 5, (7, 7, 9)).branches()) == [(5, 7), (7, 7), (7, 9)]
    assert Tree(2, 5).stop == 5


def test_moving_a_batch_moves_every_tensor():
    batch = pack([[seq([5, 6, 7, 8], 2)]]).to(torch.device("meta"))
    assert {
        t.device.type for t in (batch.input_ids_N, batch.position_ids_N, batch.source_M, batch.target_M, batch.seq_M)
    } == {"meta"}
