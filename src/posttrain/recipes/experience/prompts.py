"""Which prompts an RL run asks, in which order, and which of them taught nothing the last time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

from posttrain.data.dataset import Dataset
from posttrain.protocols import Ranks
from posttrain.rollout.sampling import request_seed
from posttrain.types import PromptRow, RolloutGroup

_KEPT_ONE_IN = 4
_LONGEST_WALK = 16
"""Numbers looked at per prompt that is wanted, before prompts are taken as they come."""


Solved = dict[int, tuple[float, bool]]
"""Row of the data → mean reward of its latest group, and whether all its rewards were equal."""


class PromptStream:
    """The run's endless row of prompts: epoch after epoch, each shuffled by (seed, epoch). Keeps `solved` up to date."""

    def __init__(self, data: Dataset[PromptRow], seed: int, solved: Solved) -> None:
        self._data, self._seed = data, seed
        self._order = lru_cache(maxsize=2)(partial(data.order, seed))
        self.solved = solved

    def __call__(self, number: int) -> PromptRow:
        return self._data.rows[self.row_of(number)]

    def row_of(self, number: int) -> int:
        epoch, place = divmod(number, len(self._data))
        return self._order(epoch)[place]

    def next(self, cursor: int, count: int, *, resample: bool) -> tuple[list[int], int]:
        """`count` numbers from `cursor` on, and where the next ones start.

        With `resample`, of those whose row taught nothing the last time only one in four is asked again.
        """
        end = cursor + (_LONGEST_WALK * count if resample else 0)
        numbers: list[int] = []
        while len(numbers) < count:
            left = count - len(numbers)
            if cursor + left > end or not self._is_passed_over(cursor):
                numbers.append(cursor)
            cursor += 1
        return numbers, cursor

    def note(self, number: int, group: RolloutGroup) -> tuple[int, float, bool] | None:
        """What a group says of its row: mean reward and whether all are equal; None if nothing was scored."""
        totals = [rollout.reward.total for rollout in group.rollouts if rollout.reward.total is not None]
        if not totals:
            return None
        return self.row_of(number), sum(totals) / len(totals), max(totals) - min(totals) < 1e-9

    def learn_from(self, groups: Sequence[tuple[int, RolloutGroup]], ranks: Ranks) -> None:
        """What this rank's groups say of their rows; of all ranks, so that all go on with the same prompts."""
        seen = [note for number, group in groups if (note := self.note(number, group)) is not None]
        notes = [note for rank in ranks.gather(seen) for note in rank]
        self.solved.update({row: (rate, equal) for row, rate, equal in notes})

    def _is_passed_over(self, number: int) -> bool:
        _, equal = self.solved.get(self.row_of(number), (0.0, False))
        return equal and request_seed("resample", self._seed, number) % _KEPT_ONE_IN != 0
