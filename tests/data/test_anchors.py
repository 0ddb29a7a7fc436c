"""Which answers a row has."""

import pytest

from posttrain.data.anchors import answer_spans, strided_spans
from posttrain.types import TokenSeq


def row(mask):
    return TokenSeq(tuple(range(len(mask))), tuple(one == "t" for one in mask))


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("..ttt", [(2, 5)]),
        ("..tt.t.", [(2, 4), (5, 6)]),
        ("tttt", [(1, 4)]),
        ("t..t", [(3, 4)]),
        ("....", []),
        ("t", []),
    ],
)
def test_an_answer_is_a_run_of_trained_tokens_behind_something(mask, expected):
    assert answer_spans(row(mask)) == expected


@pytest.mark.parametrize(
    ("mask", "how", "expected"),
    [
        ("tttttttttt", (2, 3, 1, 0), [(1, 3), (4, 6), (7, 9)]),  # up to the last that is whole
        ("tttttttttt", (2, 3, 4, 0), [(4, 6), (7, 9)]),
        ("...ttttttt", (2, 2, 1, 0), [(3, 5), (5, 7), (7, 9)]),  # from the answer on
        ("...ttttttt", (2, 2, 1, 2), [(5, 7), (7, 9)]),
        ("...ttttttt", (2, 2, 6, 2), [(6, 8), (8, 10)]),
        ("...ttt..tt", (2, 1, 1, 0), [(3, 5), (4, 6), (8, 10)]),  # all of it is the answer's
        ("tttt", (4, 1, 1, 0), []),
        ("....", (1, 1, 1, 0), []),
    ],
)
def test_strided_answers_are_as_long_as_asked_and_trained_throughout(mask, how, expected):
    assert strided_spans(row(mask), *how) == expected


def test_the_paper_counts_as_many_anchors():
    """(length − answer − context) // stride + 1 of a text that is trained whole."""
    for length in (24, 25, 31, 32, 100):
        assert len(strided_spans(row("t" * length), 8, 8, 8, 0)) == (length - 16) // 8 + 1
