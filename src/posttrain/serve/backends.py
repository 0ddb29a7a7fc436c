"""Models into memory and out: whole models, each with a loop of its own, and adapters beside each other on one base."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError
from posttrain.files import digest_tree, named_if_damaged, read_json
from posttrain.models.load import load_tokenizer
from posttrain.models.slots import Factors, read_factors
from posttrain.serve.codec import ServedCodec
from posttrain.serve.pool import ModelVersion, RowEngine, ServedModel


@dataclass(frozen=True)
class StartedEngine:
    """An engine that answers by a model in memory, and the text of that model with a given tokenizer."""

    rows: RowEngine
    tokenizer: Any
    codec_of: Callable[[Any], ServedCodec]


StartEngine = Callable[[ModelVersion, bool], Awaitable[StartedEngine]]
"""A version that was checked → an engine on it; whether it is to take adapters. Raises: PosttrainError."""


class WholeModels:
    """Each version is a model folder with an engine of its own."""

    def __init__(self, start: StartEngine) -> None:
        self._start = start

    async def load(self, version: ModelVersion) -> ServedModel:
        await asyncio.to_thread(version.check)
        started = await self._start(version, False)
        return ServedModel(version, started.rows, started.codec_of(started.tokenizer))

    async def unload(self, served: ServedModel) -> None:
        await served.rows.close()

    async def close(self) -> None:
        pass


class AdaptersOfOneBase:
    """Each version is an adapter's folder, or the base itself."""

    def __init__(self, start: StartEngine, base: ModelVersion) -> None:
        self._start, self._base = start, base
        self._starting: asyncio.Task[StartedEngine] | None = None

    async def load(self, version: ModelVersion) -> ServedModel:
        if self._starting is None:
            self._starting = asyncio.create_task(self._start_base())
        started = await asyncio.shield(self._starting)
        if version == self._base:
            return ServedModel(version, started.rows, started.codec_of(started.tokenizer))
        factors, tokenizer = await asyncio.to_thread(_read_adapter, version, started.tokenizer)
        await started.rows.load_adapter(version.id, factors)
        return ServedModel(version, started.rows, started.codec_of(tokenizer), version.id)

    async def _start_base(self) -> StartedEngine:
        await asyncio.to_thread(self._base.check)
        return await self._start(self._base, True)

    async def unload(self, served: ServedModel) -> None:
        if served.adapter is not None:
            await served.rows.unload_adapter(served.adapter)

    async def close(self) -> None:
        if self._starting is not None:
            await (await self._starting).rows.close()


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


def _read_adapter(version: ModelVersion, tokenizer: Any) -> tuple[Factors, Any]:
    """Its updates and its tokenizer: training may have given it a chat template of its own."""
    version.check()
    if (version.folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(ModelKeys(base_model=str(version.folder)))
    return read_factors(version.folder), tokenizer
