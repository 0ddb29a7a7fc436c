"""Which prompts a run asks: all of them epoch after epoch, and without those that were solved where those retire."""

from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.distributed.ranks import SingleProcess
from posttrain.recipes.experience.prompts import PromptStream

ROWS = 6


class _Data:
    """Six rows in an order that is another in each epoch."""

    rows = tuple(range(ROWS))

    def __len__(self):
        return ROWS

    def order(self, seed, epoch):
        return [(place + epoch) % ROWS for place in range(ROWS)]


def _stream(solved=None, retired_at: float | None = 0.9):
    data: Any = _Data()
    return PromptStream(data, 7, {} if solved is None else solved, retired_at)


def _group(*rewards) -> Any:
    return SimpleNamespace(rollouts=[SimpleNamespace(reward=SimpleNamespace(total=reward)) for reward in rewards])


def _asked(stream, cursor, count):
    numbers, cursor = stream.next(cursor, count, resample=False)
    return [stream.row_of(number) for number in numbers], cursor


def test_what_was_solved_is_asked_no_more_and_what_was_not_is():
    stream = _stream()
    rows, cursor = _asked(stream, 0, ROWS)
    assert rows == list(range(ROWS)) and cursor == ROWS
    rates = {0: (1, 1, 1, 1), 1: (1, 1, 1, 0.5), 2: (1, 1, 1, 0.6), 3: (0, None), 4: (None, None), 5: (0.9, 0.9)}
    stream.learn_from([(row, _group(*rewards)) for row, rewards in rates.items()], SingleProcess())
    assert stream.metrics() == {"prompts/retired": 3 / ROWS}
    left = {1, 3, 4}
    for _ in range(4):
        rows, cursor = _asked(stream, cursor, 3)
        assert set(rows) == left


def test_who_goes_on_with_what_was_kept_asks_the_same():
    stream = _stream()
    stream.learn_from([(0, _group(1.0)), (3, _group(1.0)), (4, _group(0.0))], SingleProcess())
    again = _stream(dict(stream.solved))
    assert [_asked(stream, 6, 5), _asked(stream, 17, 2)] == [_asked(again, 6, 5), _asked(again, 17, 2)]


def test_a_group_that_was_under_way_does_not_bring_its_row_back():
    stream = _stream()
    stream.learn_from([(0, _group(1.0))], SingleProcess())
    stream.learn_from([(0, _group(0.0))], SingleProcess())
    assert stream.solved[0] == (1.0, True)


@pytest.mark.parametrize("num_left", [0, 1])
def test_where_two_epochs_have_less_left_than_a_batch_it_is_filled_up(num_left):
    stream = _stream(dict.fromkeys(range(num_left, ROWS), (1.0, True)))
    rows, cursor = _asked(stream, 0, 4)
    assert len(rows) == 4 and cursor <= 2 * ROWS + 1
    assert set(range(num_left)) <= set(rows)


def test_without_a_rate_nothing_retires():
    stream = _stream(dict.fromkeys(range(ROWS), (1.0, True)), retired_at=None)
    assert _asked(stream, ROWS, ROWS)[0] == [(place + 1) % ROWS for place in range(ROWS)]
    assert stream.metrics() == {}
