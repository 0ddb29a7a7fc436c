"""How a server is started: where it listens, who may ask, and how much at once."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.errors import ConfigError
from posttrain.uris import loopback

TOKEN_VARIABLE = "POSTTRAIN_SERVE_TOKEN"
ENGINE_TOKEN_VARIABLE = "POSTTRAIN_ENGINE_TOKEN"


@dataclass(frozen=True)
class ServeOptions:
    """`max_num_seqs` answers are decoded at once and `max_queue` more may wait; times are in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    max_num_seqs: int = 64
    max_queue: int = 256
    max_model_len: int | None = None
    kv_memory_gib: float = 4.0
    max_body_bytes: int = 4 << 20
    max_loras: int = 8
    stall_s: float = 30.0
    """A client that takes nothing for so long, sends nothing of its body, or is not through with its headers, is hung up on."""
    drain_s: float = 30.0
    follow_s: float = 1.0
    engine: Literal["embedded", "vllm", "sglang"] = "embedded"
    max_lora_rank: int = 64
    """Of vLLM, which keeps this much room for each adapter."""
    start_timeout_s: float = 600.0
    engine_timeout_s: float = 60.0
    """An engine in a process of its own that says nothing for so long is started anew."""
    max_connections: int = 1024
    """Open at once, whether they ask or not."""
    url: str = ""
    """Of somebody else's server of that engine, which answers instead of one of ours."""
    engine_token: str = ""
    prefix_cache_gib: float = 0.5
    """Of the embedded engine, for each model: keys and values of how prompts begin, from one request to the next."""

    @property
    def is_local(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check(self) -> None:
        """Raises: ConfigError for a server that everybody could use, or an engine that is not had so."""
        if self.url:
            loopback(self.url)
        if (self.engine, bool(self.url)) in (("embedded", True), ("sglang", False)):
            raise ConfigError(
                f"--engine {self.engine} {'with' if self.url else 'without'} --url; expected --engine sglang --url "
                "http://127.0.0.1:30000, or --engine vllm with or without --url"
            )
        if not self.is_local and not self.token:
            raise ConfigError(
                f"--host {self.host} is reachable from other machines; give a token: --token-file FILE, or the variable "
                f"{TOKEN_VARIABLE}"
            )


def read_token(path: Path | None, variable: str = TOKEN_VARIABLE, option: str = "--token-file") -> str:
    """From the file, else from the environment. Raises: ConfigError for a file without one."""
    if path is None:
        return os.environ.get(variable, "").strip()
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path} cannot be read: {error}; expected a file with one line") from error
    if not token or any(character.isspace() for character in token):
        raise ConfigError(f"{option} {path}: expected one word, the token")
    return token
