"""Models into memory and out: whole models, each with a loop of its own, and adapters beside each other on one base."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError
from posttrain.files import digest_tree, named_if_damaged, read_json
from posttrain.models.generation import stop_token_ids
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.models.policy import Policy
from posttrain.models.slots import AdapterSlots, read_factors
from posttrain.serve.codec import ServedCodec
from posttrain.serve.loop import DecodingLoop, kv_tokens
from posttrain.serve.options import ServeOptions
from posttrain.serve.pool import ModelVersion, ServedModel

_WINDOW = 4096
"""Where neither the config nor the user says one."""


class WholeModels:
    """Each version is a model folder, decoded by a thread of its own."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options

    async def load(self, version: ModelVersion) -> ServedModel:
        policy = await asyncio.to_thread(_checked_policy, version)
        return _started(version, policy, self._options)

    async def unload(self, served: ServedModel) -> None:
        await asyncio.to_thread(served.loop.close)

    async def close(self) -> None:
        pass


class AdaptersOfOneBase:
    """Each version is an adapter's folder, or the base itself."""

    def __init__(self, options: ServeOptions, base: ModelVersion) -> None:
        self._options, self._base = options, base
        self._starting: asyncio.Task[ServedModel] | None = None

    async def load(self, version: ModelVersion) -> ServedModel:
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        base = await asyncio.shield(self._starting)
        if version == self._base:
            return base
        loop, slots = base.loop, base.loop.slots
        assert slots is not None, "it was started with slots"
        factors, tokenizer = await asyncio.to_thread(_read_adapter, version, loop.policy)
        await asyncio.wrap_future(loop.call(lambda: slots.load(version.id, factors)))
        return ServedModel(version, loop, _codec(loop.policy, tokenizer, self._options), version.id)

    async def _start(self) -> ServedModel:
        policy = await asyncio.to_thread(_checked_policy, self._base)
        return _started(self._base, policy, self._options, AdapterSlots(policy))

    async def unload(self, served: ServedModel) -> None:
        slots, name = served.loop.slots, served.adapter
        if name is not None and slots is not None:
            await asyncio.wrap_future(served.loop.call(lambda: slots.unload(name)))

    async def close(self) -> None:
        if self._starting is not None:
            await asyncio.to_thread((await self._starting).loop.close)


def of_folder(name: str, folder: Path) -> ModelVersion:
    """A folder as it is now. Its files are read again when it is loaded: what is served is what was named.

    Raises: ModelError for a stage's model that is not what the stage recorded.
    """
    digest, record = digest_tree(folder), folder.parent / "result.json"
    if folder.name == "model" and record.is_file():
        with named_if_damaged(record, f"serve a copy of {folder} elsewhere if you know what it is"):
            made = read_json(record)["model_digest"]
        if made != digest:
            raise ModelError(
                f"{folder} is {digest}, but {record} says that the stage made {made}: its files changed since; serve the registered "
                "version, or a copy elsewhere if you mean the changed one"
            )
    return ModelVersion(name, digest, folder, check=lambda: check_digest(folder, digest))


def check_digest(folder: Path, digest: str) -> None:
    if (found := digest_tree(folder)) != digest:
        raise ModelError(f"{folder} is {found}, expected {digest}: its files have changed; start the server again")


def _checked_policy(version: ModelVersion) -> Policy:
    version.check()
    return load_policy(ModelKeys(base_model=str(version.folder)), trainable=False)


def _read_adapter(version: ModelVersion, policy: Policy) -> tuple[Mapping[str, Any], Any]:
    """Its updates and its tokenizer: training may have given it a chat template of its own."""
    version.check()
    has_tokenizer = (version.folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(ModelKeys(base_model=str(version.folder))) if has_tokenizer else policy.tokenizer
    return read_factors(version.folder), tokenizer


def _started(
    version: ModelVersion, policy: Policy, options: ServeOptions, slots: AdapterSlots | None = None
) -> ServedModel:
    size = policy.base.dtype.itemsize
    most = kv_tokens(policy.base.config, size, options.kv_memory_gib)
    loop = DecodingLoop(policy, options.max_num_seqs, most, slots)
    loop.start(asyncio.get_running_loop())
    return ServedModel(version, loop, _codec(policy, policy.tokenizer, options))


def _codec(policy: Policy, tokenizer: Any, options: ServeOptions) -> ServedCodec:
    config: Any = policy.base.config.get_text_config()
    window = getattr(config, "max_position_embeddings", None) or _WINDOW
    most = kv_tokens(policy.base.config, policy.base.dtype.itemsize, options.kv_memory_gib)
    window = min(window, options.max_model_len or window, most)
    return ServedCodec(tokenizer, frozenset(stop_token_ids(policy.base, tokenizer)), window, config.vocab_size)
