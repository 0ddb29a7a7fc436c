"""How a server for Tinker's clients is started, beside what every server of ours is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import ConfigError
from posttrain.names import name_of
from posttrain.serve.options import TOKEN_VARIABLE, ServeOptions

TINKER_KEY = "tml-"
"""How every key begins that the SDK sends."""


@dataclass(frozen=True)
class TinkerOptions:
    """`models`: what clients call a base → its folder or hub id. `folder` is where models are saved."""

    models: Mapping[str, str]
    folder: Path
    serve: ServeOptions
    micro_batch: int = 8
    """Datums that go through the model at once."""
    max_models: int = 8
    """Adapters of clients in memory."""
    max_snapshots: int = 8
    """Of each model, weights to sample from that have no name."""
    max_results_bytes: int = 256 << 20

    def check(self) -> None:
        """Raises: ConfigError."""
        self.serve.check()
        if self.serve.token and not self.serve.token.startswith(TINKER_KEY):
            raise ConfigError(
                f"the token does not begin with {TINKER_KEY}; the SDK sends no other one: make --token-file or {TOKEN_VARIABLE} "
                f"such a word, and give it to clients as TINKER_API_KEY"
            )


def named_models(given: list[str]) -> dict[str, str]:
    """`NAME=SOURCE`, or a source that is its own name: a folder by its last part, a hub id whole. Raises: ConfigError."""
    models: dict[str, str] = {}
    for entry in given:
        name, found, source = entry.partition("=")
        if not found:
            name, source = _own_name(entry), entry
        if not name or not source:
            raise ConfigError(f"{entry}: expected a folder, a hub id, or NAME=FOLDER")
        if name in models:
            raise ConfigError(f"{name} names two models; write one as NAME=FOLDER")
        models[name] = source
    return models


def _own_name(source: str) -> str:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source
    resolved = folder.resolve()
    return name_of(resolved.parent.name if resolved.name == "model" else resolved.name)
