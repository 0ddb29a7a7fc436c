"""The steps of a stage whose rows are read as they are trained on: which rows those are is a function of (data, seed, step), as anywhere.

A share of the rows (a process's, as the run was begun) is read in windows of `buffer_size` rows, each shuffled and cut into
micro-batches; the cursor in the checkpoint says where the window in hand begins and how far into it the run is.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.config.stages import SFTKeys
from posttrain.data.gathered import Gathered, joined
from posttrain.data.load import sft_plan
from posttrain.data.rendered import render_rows
from posttrain.data.stream import RowStream, as_source
from posttrain.data.template import use_template
from posttrain.errors import CheckpointError, DataError
from posttrain.models.batch import fill_by_tokens
from posttrain.protocols import Ranks
from posttrain.recipes.balance import family_cost, rank_metrics
from posttrain.recipes.batches import best_fit, flat
from posttrain.types import TokenSeq

log = logging.getLogger(__name__)


class StreamedSchedule:
    """As `Schedule`, for rows that are not counted before; steps are asked for in order."""

    def __init__(self, keys: SFTKeys, tokenizer: Any, ranks: Ranks) -> None:
        use_template(tokenizer, keys.chat_template, keys.chat_template_kwargs)
        self._keys, self._ranks = keys, ranks
        self._num_shares = keys.shares_of_step(ranks.world_size * keys.sharding.group_size)
        self._own = {
            number: _ShareReader(keys, tokenizer, number, self._num_shares)
            for number in range(ranks.rank, self._num_shares, ranks.world_size)
        }
        self._next, self._cursors, self._passes = 0, [dict[str, Any]()] * self._num_shares, 0

    def total_steps(self, keys: SFTKeys) -> int:
        return keys.max_steps

    def go_on(self, cursor: Mapping[str, Any] | None) -> None:
        """To where a checkpoint was made, or to the beginning. Raises: CheckpointError for one of other shares."""
        if cursor is None:
            return
        if len(cursor["shares"]) != self._num_shares:
            raise CheckpointError(
                f"the checkpoint's rows were dealt to {len(cursor['shares'])} processes, and this start has {self._num_shares}; "
                f"set num_processes: {len(cursor['shares'])}, and gradient_accumulation_steps as it was"
            )
        self._next, self._cursors = cursor["next"], list(cursor["shares"])
        for number, share in self._own.items():
            share.go_to(self._cursors[number])

    @property
    def cursor(self) -> dict[str, Any]:
        """Where the rows go on behind the last step that was asked for, as JSON."""
        return {"next": self._next, "shares": self._cursors}

    def step(self, number: int) -> list[list[TokenSeq]]:
        """The micro-batches of optimizer step `number` over all ranks; every `num_shares`-th is one share's. All ranks call it."""
        assert number >= self._next, "steps are asked for in order"
        micros: list[list[TokenSeq]] = []
        while self._next <= number:
            micros = self._take()
            self._next += 1
        return micros

    def balance(self, micros: Sequence[Sequence[TokenSeq]], world_size: int) -> dict[str, float]:
        """How evenly a step's micro-batches cost the ranks, and how many rows have been left out until now."""
        skipped = float(sum(sum(cursor["skipped"].values()) for cursor in self._cursors))
        values = {"rows_skipped": skipped} if skipped else {}
        if world_size == 1:
            return values
        costs = [[family_cost([len(row.ids)]) for row in flat(micros[rank::world_size])] for rank in range(world_size)]
        return values | rank_metrics(costs)

    def epoch_after(self, number: int) -> float:
        """Passes that every share has made over its rows; what a part of one is, nobody knows."""
        return float(self._passes)

    def _take(self) -> list[list[TokenSeq]]:
        count = self._keys.gradient_accumulation_steps
        own = {
            number: ([share.next_micro() for _ in range(count)], share.cursor, share.passes)
            for number, share in self._own.items()
        }
        # Each rank reads and tokenises its own rows; what a step is divided by needs those of all.
        found = {number: taken for rank in self._ranks.gather(own) for number, taken in rank.items()}
        shares = [found[number] for number in range(self._num_shares)]
        self._cursors = [cursor for _, cursor, _ in shares]
        self._passes = min(passes for *_, passes in shares)
        return [micros[turn] for turn in range(count) for micros, _, _ in shares]


class _ShareReader:
    """The micro-batches of one share, one after the other. Holds one window of rows."""

    def __init__(self, keys: SFTKeys, tokenizer: Any, number: int, num_shares: int) -> None:
        self._keys, self._tokenizer, self._plan, self._number = keys, tokenizer, sft_plan(keys), number
        self._is_sequential = keys.train_sampling_strategy == "sequential"
        self._stream = RowStream(keys.datasets, keys.seed, number, num_shares)
        self._formats: dict[int, str] = {}
        self._skipped: Counter[str] = Counter()
        self._window, self._taken, self._micros = -1, 0, list[list[TokenSeq]]()
        self._begin: dict[str, Any] = {}
        self._read_anything_in = 0

    @property
    def passes(self) -> int:
        return self._stream.passes

    @property
    def cursor(self) -> dict[str, Any]:
        return {**self._begin, "window": self._window, "taken": self._taken, "skipped": dict(self._skipped)}

    def go_to(self, cursor: Mapping[str, Any]) -> None:
        self._stream.go_to(cursor["places"], cursor["drawn"])
        self._window = cursor["window"] - 1
        self._read_window()
        # What the window skipped is counted in the cursor already.
        self._taken, self._skipped = cursor["taken"], Counter(cursor["skipped"])

    def next_micro(self) -> list[TokenSeq]:
        """Raises: DataError where a whole pass gives nothing to train."""
        while self._taken >= len(self._micros):
            self._read_window()
        self._taken += 1
        return self._micros[self._taken - 1]

    def _read_window(self) -> None:
        self._micros = []  # gone before the next ones come
        self._begin = {"places": [list(place) for place in self._stream.places], "drawn": self._stream.drawn}
        self._window, self._taken = self._window + 1, 0
        rows = [row for part in self._rendered() for row in part]
        if not self._is_sequential:
            random.Random(f"{self._keys.seed}/{self._number}/window/{self._window}").shuffle(rows)
        if self._keys.is_wrapped:
            blocks: list[TokenSeq] = []
            part = Gathered(lambda _, block: blocks.append(block))
            part.keep_blocks(joined(rows, self._keys.sequence_len))
            self._count(part)
            rows = blocks
        self._micros = self._cut(rows)
        if rows:
            self._read_anything_in = self.passes
        elif self.passes > self._read_anything_in + 1:
            raise DataError(
                f"{', '.join(source.path for source in self._keys.datasets)}: a whole pass gave nothing to train: {dict(self._skipped)}; "
                "fix the rows, `type`, `train_on` or `sequence_len`"
            )

    def _rendered(self) -> list[list[TokenSeq]]:
        """The rows of the next window, by source. Raises: DataError where the format changes on the way."""
        rendered: list[list[TokenSeq]] = []
        taken = self._stream.take(self._keys.buffer_size)
        for number, (source, found) in enumerate(zip(self._keys.datasets, taken, strict=True)):
            # That the rows have the columns which `columns` names was asked of the first ones, before training.
            read = as_source(source, found, is_first=False)
            self._skipped["blank lines"] += len(read.blank_lines)
            if not read.rows:
                continue
            rows: list[TokenSeq] = []
            part = Gathered(lambda _, row, rows=rows: rows.append(row))
            found_format = render_rows(self._plan, source, read, self._tokenizer, part)
            name = found_format.partition(" ")[0]
            if self._formats.setdefault(number, name) != name:
                raise DataError(
                    f"{read.rows[0][0]}: rows from here on are {name}, and those before were {self._formats[number]}; expected one "
                    "format per source; split it, or name the format with `type`"
                )
            self._count(part)
            rendered.append(rows)
        return rendered

    def _count(self, part: Gathered) -> None:
        """Of what was left out, how much for which reason; a reason is told when it comes up."""
        for reason, at in part.skipped.items():
            if reason not in self._skipped:
                log.warning("left out: %s (%s and others like it; `rows_skipped` counts them)", reason, at[0])
            self._skipped[reason] += len(at)

    def _cut(self, rows: list[TokenSeq]) -> list[list[TokenSeq]]:
        size = self._keys.per_device_train_batch_size
        if not self._keys.packing:
            return [rows[at : at + size] for at in range(0, len(rows), size)]
        if self._is_sequential:
            return fill_by_tokens(rows, lambda row: len(row.ids), size * self._keys.sequence_len)
        bins = best_fit(range(len(rows)), lambda row: len(rows[row].ids), size * self._keys.sequence_len)
        # The first bins hold the long rows and the last ones what is left over: no stretch of steps should.
        random.Random(f"{self._keys.seed}/{self._number}/packing/{self._window}").shuffle(bins)
        return [[rows[row] for row in micro] for micro in bins]
