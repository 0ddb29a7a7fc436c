"""The thread that decodes: rows of all requests of one model, joined and left between steps.

Knows nothing of text, HTTP or who asks. Everything that touches the model happens in this thread.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from posttrain.models.lengths import length_rule
from posttrain.models.policy import Policy
from posttrain.models.slots import AdapterSlots
from posttrain.rollout.decoding import Decoding, DecodingRow, Likeliest
from posttrain.rollout.prefixes import PrefixCache
from posttrain.types import Finish

log = logging.getLogger(__name__)
T = TypeVar("T")

_PREFILL_TOKENS = 2048
"""Of new prompts between two steps: what is being answered must not wait for a long prompt alone."""


@dataclass(frozen=True, slots=True)
class News:
    """What came of a row since the last news: tokens, and how it ended. `failure` says why it will not go on, `refusal` why it never will."""

    ids: tuple[int, ...] = ()
    likeliest: tuple[Likeliest, ...] = ()
    finish: Finish | None = None
    failure: str = ""
    refusal: str = ""

    @property
    def is_last(self) -> bool:
        return self.finish is not None or bool(self.failure or self.refusal)


@dataclass(eq=False)
class _SubmittedRow:
    row: DecodingRow
    tell: Callable[[News], None]
    told: int = 0

    @property
    def need(self) -> int:
        """Tokens whose keys and values it may come to hold of its own."""
        return self.row.ends.max_tokens


class DecodingLoop:
    """`max_rows` at once, and never more keys and values than `max_tokens` have; the others wait in order."""

    def __init__(
        self, policy: Policy, max_rows: int, max_tokens: int, slots: AdapterSlots | None = None, prefix_bytes: int = 0
    ) -> None:
        self.policy, self.slots = policy, slots
        self.prefixes = PrefixCache(policy, prefix_bytes)
        self._max_rows, self._max_tokens = max_rows, max_tokens
        self._alone = not policy.ragged or length_rule(policy.base.config) is not None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: deque[_SubmittedRow] = deque()
        self._running: dict[DecodingRow, _SubmittedRow] = {}
        self._decoding: Decoding | None = None
        self._telling: list[tuple[Callable[[News], None], News]] = []
        self.num_steps = 0
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """News are told in `loop`'s thread."""
        self._loop = loop
        self._thread.start()

    def submit(self, row: DecodingRow, tell: Callable[[News], None]) -> None:
        self._inbox.put(lambda: self._waiting.append(_SubmittedRow(row, tell)))

    def cancel(self, row: DecodingRow) -> None:
        """Free what a row holds; nothing more is told of it."""
        self._inbox.put(lambda: self._forget(row))

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Do `work` between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                with torch.no_grad(), self.policy.placement.autocast():
                    future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - whoever asked for it is told
                future.set_exception(error)

        self._inbox.put(run)
        return future

    def close(self) -> None:
        """Stop the thread; who still waits is told so."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def _run(self) -> None:
        while self._take_orders():
            self._admit()
            try:
                with torch.no_grad(), self.policy.placement.autocast():
                    self._step()
            except Exception as error:  # told to those who wait; the next ones are answered
                log.exception("a decoding step failed")
                self._fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", [*self._running.values()])
            self._tell()
        self._fail("the server is shutting down", [*self._running.values(), *self._waiting])
        self._tell()

    def _take_orders(self) -> bool:
        """All that came in; waits for the next where there is nothing to do. False when it is over."""
        is_idle = not self._running and not self._waiting
        if is_idle:
            self._decoding = None  # with it goes the memory of the cache
        while is_idle or not self._inbox.empty():
            order = self._inbox.get()
            if order is None:
                return False
            order()
            is_idle = False
        return True

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_rows and self._fits(self._waiting[0]):
            asked = self._waiting.popleft()
            if self._decoding is None:
                self._decoding = Decoding(self.policy, alone=self._alone, adapters=self.slots, prefixes=self.prefixes)
            self._running[asked.row] = asked
            self._decoding.join(asked.row)

    def _fits(self, new: _SubmittedRow) -> bool:
        """Rows lie in one dense block as long as the longest, prompts beside it (`rollout/kv.py`)."""
        if not self._running:
            return True
        all_asked = [*self._running.values(), new]
        block = len(all_asked) * max(asked.need for asked in all_asked)
        return block + sum(len(asked.row.request.prompt_ids) for asked in all_asked) <= self._max_tokens

    def _step(self) -> None:
        if self._decoding is None or not self._running:
            return
        self._decoding.advance(self._max_rows, _PREFILL_TOKENS)
        self.num_steps += 1
        for asked in list(self._running.values()):
            row, told = asked.row, asked.told
            if len(row.ids) > told or row.finish is not None:
                asked.told = len(row.ids)
                news = News(tuple(row.ids[told:]), tuple(row.likeliest[told : asked.told]), row.finish)
                self._telling.append((asked.tell, news))
            if row.finish is not None:
                del self._running[row]

    def _forget(self, row: DecodingRow) -> None:
        if self._running.pop(row, None) is not None and self._decoding is not None:
            self._decoding.leave(row)
        self._waiting = deque(asked for asked in self._waiting if asked.row is not row)

    def _fail(self, why: str, all_asked: list[_SubmittedRow]) -> None:
        self._telling += [(asked.tell, News(failure=why)) for asked in all_asked]
        self._running, self._decoding = {}, None

    def _tell(self) -> None:
        """All news of a step at once: waking the other thread costs more than a token."""
        telling, self._telling = self._telling, []
        if telling and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_tell_all, telling)


def _tell_all(telling: list[tuple[Callable[[News], None], News]]) -> None:
    for tell, news in telling:
        tell(news)


def kv_tokens(config: Any, itemsize: int, memory_gib: float) -> int:
    """How many tokens' keys and values fit into this much memory."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(memory_gib * (1 << 30) / (2 * text.num_hidden_layers * heads * width * itemsize))
