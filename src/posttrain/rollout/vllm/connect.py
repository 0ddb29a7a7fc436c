"""From options or an address to an engine on a server of vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError, EngineError
from posttrain.rollout.folder import OwnFolder
from posttrain.rollout.http import Address, Client
from posttrain.rollout.vllm.asking import Decode
from posttrain.rollout.vllm.options import BACKEND, VLLMOptions
from posttrain.rollout.vllm.server import BASE, GivenServer, OwnServer, Server, await_ready
from posttrain.rollout.vllm.server_engine import Pause, Served, VLLMServerEngine
from posttrain.uris import loopback

_WANTED = {
    "logprobs_mode": ("model_config", "processed_logprobs", "--logprobs-mode processed_logprobs"),
    "generation_config": ("model_config", "vllm", "--generation-config vllm"),
    "backend": ("weight_transfer_config", BACKEND, f'--weight-transfer-config \'{{"backend": "{BACKEND}"}}\''),
}
"""What a server must have been started with: section and value in its configuration, and the flag that sets it."""


@dataclass(frozen=True)
class ServerOptions:
    """How a server is waited for and used. `log`: where one of ours writes, its folder if nobody says.

    `shared`: where weights lie on their way to one that may be on another machine.
    """

    timeout_s: float
    start_timeout_s: float
    transfer: str
    delta_anchor: int
    pause: Pause
    log: Path | None = None
    shared: Path | None = None


MakeServer = Callable[[VLLMOptions, ServerOptions, OwnFolder, Path], Server]
"""(options, how, folder, log) → a server on its way."""


def child_server(options: VLLMOptions, how: ServerOptions, folder: OwnFolder, log: Path) -> Server:
    """A supervised child of this process."""
    return OwnServer(options, folder.path, log, how.timeout_s)


def start_server(
    options: VLLMOptions, how: ServerOptions, decode: Decode, make: MakeServer = child_server
) -> VLLMServerEngine:
    """A server of our own. Raises: EngineGoneError where it does not start."""
    folder = OwnFolder(how.shared)
    server: Server | None = None
    try:
        server = make(options, how, folder, how.log or folder.path / "vllm_server.log")
        await_ready(server, how.start_timeout_s)
        found = _asked(server.client)
        dtype: Any = options.dtype
        served = Served(
            BASE, found.version, dtype, found.max_model_len, options.stop_token_ids, 2 * options.max_num_seqs,
            options.lora_rank is not None, how.transfer, how.delta_anchor, how.pause, options.tensor_parallel_size,
            options.sleeps, options.routed_experts,
        )  # fmt: skip
        return VLLMServerEngine(server, served, decode, folder)
    except BaseException:
        if server is not None:
            server.close()
        folder.remove()
        raise


def given_server(url: str, token: str, options: VLLMOptions, how: ServerOptions, decode: Decode) -> VLLMServerEngine:
    """One that runs already. Raises: EngineGoneError, and EngineError for one that was started otherwise than we need."""
    server = GivenServer(Client(Address(*loopback(url)), token, how.timeout_s))
    await_ready(server, how.start_timeout_s)
    found = _asked(server.client)
    config = _configuration(server.client)
    dtype: Any = str(config["model_config"]["dtype"]).removeprefix("torch.")
    adapters = config["lora_config"]
    served = Served(
        found.model, found.version, dtype, found.max_model_len, options.stop_token_ids, 2 * options.max_num_seqs,
        bool(adapters and options.lora_rank and options.lora_rank <= adapters["max_lora_rank"]), how.transfer, how.delta_anchor, how.pause,
        routed_experts=options.routed_experts,
    )  # fmt: skip
    return VLLMServerEngine(server, served, decode, OwnFolder())


def token_of(variable: str, file: str | None) -> str:
    """The API key of a given server; "" where there is none. Raises: ConfigError for a file that cannot be read."""
    if file is None:
        return os.environ.get(variable, "")
    try:
        return Path(file).expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"rollout.token_file: {file} cannot be read ({error.strerror}); expected the server's API key"
        ) from None


def server_version(url: str, token: str, timeout_s: float) -> str:
    """The version of vLLM that a given server runs. Raises: EngineGoneError."""
    return str(Client(Address(*loopback(url)), token, timeout_s).call("GET", "/version")["version"])


@dataclass(frozen=True)
class _Found:
    version: str
    model: str
    max_model_len: int


def _asked(client: Client) -> _Found:
    version: str = client.call("GET", "/version")["version"]
    if not version.startswith("0.32"):
        raise EngineError(f"the server at {client.address} runs vLLM {version}, expected 0.32")
    base: Mapping[str, Any] = client.call("GET", "/v1/models")["data"][0]
    return _Found(version, base["id"], int(base["max_model_len"]))


def _configuration(client: Client) -> Mapping[str, Any]:
    """Raises: EngineError, with the flags that the server must be started with."""
    found: Mapping[str, Any] = client.call("GET", "/server_info?config_format=json")["vllm_config"]
    wrong = [flag for name, (section, value, flag) in _WANTED.items() if (found[section] or {}).get(name) != value]
    if wrong:
        raise EngineError(
            f"the server at {client.address} was started without {' and '.join(wrong)}; start it as docs/rollout-engines.md says"
        )
    return found
