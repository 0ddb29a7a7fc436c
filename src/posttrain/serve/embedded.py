"""The engine of this process behind rows: a policy, the thread that decodes it, and the adapters beside each other on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from posttrain.config.stages import ModelKeys
from posttrain.models.generation import stop_token_ids
from posttrain.models.load import load_policy
from posttrain.models.policy import Policy
from posttrain.models.slots import AdapterSlots, Factors
from posttrain.rollout.decoding import DecodingRow, Likeliest
from posttrain.serve.backends import StartedEngine
from posttrain.serve.codec import ServedCodec
from posttrain.serve.loop import DecodingLoop, News, kv_tokens
from posttrain.serve.options import ServeOptions
from posttrain.serve.pool import ModelVersion
from posttrain.serve.prompt_scores import prompt_scores

_WINDOW = 4096
"""Where neither the config nor the user says one."""


class EmbeddedRows:
    """Rows of one policy, decoded in a thread of its own. `slots` where it takes adapters."""

    def __init__(self, loop: DecodingLoop, slots: AdapterSlots | None) -> None:
        self.loop, self._slots = loop, slots

    def submit(self, row: DecodingRow, tell: Callable[[News], None]) -> None:
        self.loop.submit(row, tell)

    def cancel(self, row: DecodingRow) -> None:
        self.loop.cancel(row)

    async def prompt_scores(self, ids: tuple[int, ...], num_top: int, adapter: str | None) -> list[Likeliest]:
        loop, slots = self.loop, self._slots
        return await asyncio.wrap_future(loop.call(lambda: prompt_scores(loop.policy, ids, num_top, slots, adapter)))

    async def load_adapter(self, name: str, factors: Factors) -> None:
        slots = self._slots
        assert slots is not None, "it was started with slots"
        await asyncio.wrap_future(self.loop.call(lambda: slots.load(name, factors)))

    async def unload_adapter(self, name: str) -> None:
        slots = self._slots
        assert slots is not None, "it was started with slots"
        await asyncio.wrap_future(self.loop.call(lambda: (slots.unload(name), self.loop.prefixes.forget(name))))

    async def close(self) -> None:
        await asyncio.to_thread(self.loop.close)


async def start_embedded(options: ServeOptions, version: ModelVersion, takes_adapters: bool) -> StartedEngine:
    policy = await asyncio.to_thread(load_policy, ModelKeys(base_model=str(version.folder)), trainable=False)
    slots = AdapterSlots(policy) if takes_adapters else None
    most = kv_tokens(policy.base.config, policy.base.dtype.itemsize, options.kv_memory_gib)
    loop = DecodingLoop(policy, options.max_num_seqs, most, slots, int(options.prefix_cache_gib * (1 << 30)))
    loop.start(asyncio.get_running_loop())
    return StartedEngine(
        EmbeddedRows(loop, slots), policy.tokenizer, lambda tokenizer: _codec(policy, tokenizer, options, most)
    )


def _codec(policy: Policy, tokenizer: Any, options: ServeOptions, most_kv: int) -> ServedCodec:
    config: Any = policy.base.config.get_text_config()
    window = getattr(config, "max_position_embeddings", None) or _WINDOW
    window = min(window, options.max_model_len or window, most_kv)
    return ServedCodec(tokenizer, frozenset(stop_token_ids(policy.base, tokenizer)), window, config.vocab_size)
