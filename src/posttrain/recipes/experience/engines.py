"""The engine that a stage samples with, how it samples, and the proof that it samples from the weights in training."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from posttrain.cards import visible_cards
from posttrain.config.rl import RewardedKeys, SamplingKeys
from posttrain.config.rollout import RolloutKeys
from posttrain.config.stages import ModelKeys
from posttrain.distributed.engine_roles import EnginePlaces, are_placed, engine_places
from posttrain.errors import ConfigError, EngineError
from posttrain.models.device import place, release_cached, weight_dtype
from posttrain.models.float32_head import Float32Head, put_head_in_float32
from posttrain.models.generation import stop_token_ids, stored_stop_token_ids
from posttrain.models.load import load_config, load_policy, load_tokenizer
from posttrain.models.policy import Policy
from posttrain.models.stored import stored_dtype
from posttrain.models.text import decoder
from posttrain.protocols import Engine, Ranks, Weights
from posttrain.rollout.cached import Shortcuts
from posttrain.rollout.canary import check_arrival
from posttrain.rollout.drafts import Speculation
from posttrain.rollout.embedded import EmbeddedEngine, score_sequences
from posttrain.rollout.folder import OwnFolder
from posttrain.rollout.in_step import InStepEngine
from posttrain.rollout.interrupt import InterruptedEngine, Interruption
from posttrain.rollout.main_rank import CalledWeights, MainRankEngine
from posttrain.rollout.replicas import Replicas
from posttrain.rollout.serial import SerialEngine
from posttrain.rollout.sglang import SGLangOptions, given_sglang, sglang_version
from posttrain.rollout.vllm.adapter import served_rank
from posttrain.rollout.vllm.connect import ServerOptions, given_server, server_version, start_server, token_of
from posttrain.rollout.vllm.engine import VLLMEngine
from posttrain.rollout.vllm.options import VLLMOptions, require_vllm
from posttrain.rollout.vllm.placed import PlacedServer
from posttrain.rollout.vllm.server import Server
from posttrain.types import Decode, SamplingParams

log = logging.getLogger(__name__)

_ROWS = 64
"""Completions decoded at once where nobody says how many."""


@dataclass(frozen=True)
class EngineSource:
    """What an engine starts from: the keys of a model, and the policy made from them where it is there already."""

    model: ModelKeys
    policy: Policy | None = None


@dataclass(frozen=True)
class _Ask:
    """An engine to be made: what from, how, how many completions at once, where its log goes, and beside how many trainers of this machine."""

    source: EngineSource
    keys: RolloutKeys
    rows: int
    folder: Path | None = None
    trainers: int = 1
    ranks: Ranks | None = None
    speculation: Speculation | None = None


def _embedded(ask: _Ask) -> Engine:
    """On the policy's own weights, those of all ranks where they are dealt; or on a whole copy, where they move while it samples or the keys say so."""
    model, policy = ask.source.model, ask.source.policy
    refuse_untold_experts(ask.keys, place(model).device.type)
    shares = policy is None or not ask.keys.takes_copy(sharded=policy.sharded)
    if policy is None:
        policy = load_policy(model, trainable=False)
    elif not shares:
        is_float32 = isinstance(policy.base.get_output_embeddings(), Float32Head)
        policy = load_policy(model, tokenizer=policy.tokenizer, routed=ask.keys.routed_experts).without_dropout()
        if is_float32:
            put_head_in_float32(policy.base)
    stops = stop_token_ids(policy.base, policy.tokenizer)
    engine = EmbeddedEngine(
        policy, stop_token_ids=stops, batch_size=ask.rows, shares_weights=shares, enforce_eager=ask.keys.enforce_eager,
        shortcuts=Shortcuts(ask.keys.pad_prompts, ask.keys.prepack, ask.keys.native_kernels), prefix_bytes=int(ask.keys.prefix_cache_gib * (1 << 30)),
        speculation=ask.speculation or speculation_of(ask.keys),
    )  # fmt: skip
    if shares and policy.sharded:
        assert ask.ranks is not None, "who trains a sharded policy says with whom"
        return InStepEngine(engine, policy, ask.ranks)
    return _in_turn(ask, engine)


def _vllm(ask: _Ask) -> Engine:
    """In this process, from the folder that the policy was made from; an update brings it what was trained since."""
    tokenizer = _tokenizer(ask)
    engine = VLLMEngine(
        _vllm_options(ask, tokenizer), decoder(tokenizer, special=True), ask.keys.way, ask.keys.delta_anchor
    )
    return _in_turn(ask, engine)


def _in_turn(ask: _Ask, engine: Engine) -> Engine:
    """Where groups are made ahead, threads sample from it."""
    return SerialEngine(engine) if ask.keys.max_staleness else engine


def _vllm_server(ask: _Ask) -> Engine:
    """On servers that the run starts and owns, or on a given one; each comes back with the weights that it had."""
    keys, tokenizer = ask.keys, _tokenizer(ask)
    options, decode = _vllm_options(ask, tokenizer), decoder(tokenizer, special=True)
    how = ServerOptions(keys.timeout_s, keys.start_timeout_s, keys.way, keys.delta_anchor, keys.pause)
    if keys.url is None:
        require_vllm()
        places = engine_places()
        seen = visible_cards(os.environ, torch.cuda.device_count()) if options.device == "cuda" else ()
        starts = [
            _own_server(ask, n, replace(options, cards=_cards_of(ask, n, seen)), how, decode, places)
            for n in range(keys.replicas)
        ]
        if places is None:
            return _restarted(ask, starts, ask.source.policy)
        # One that a trainer left when it was killed serves on, so it comes with any weights.
        return _restarted(ask, starts, _policy_of(ask))
    start = partial(given_server, keys.url, token_of(keys.token_env, keys.token_file), options, how, decode)
    return _given(ask, start)


def _own_server(
    ask: _Ask, number: int, options: VLLMOptions, how: ServerOptions, decode: Decode, places: EnginePlaces | None
) -> Callable[[], Engine]:
    """What starts replica `number`: a child of a supervisor on this machine, or what a keeper of the cluster keeps."""
    name = "vllm_server.log" if ask.keys.replicas == 1 else f"vllm_server-{number}.log"
    how = replace(how, log=ask.folder and ask.folder / name)
    if places is None:
        return partial(start_server, options, how, decode)
    make = partial(_placed_server, places, number)
    return partial(start_server, options, replace(how, shared=ask.folder), decode, make)


def _cards_of(ask: _Ask, number: int, seen: Sequence[str]) -> tuple[str, ...]:
    """Of those that are seen here; () of none. Raises: ConfigError where they are too few."""
    cards = ask.keys.cards(ask.trainers)
    if seen and (lack := cards.lack(len(seen))):
        raise ConfigError(lack)
    return tuple(seen[card] for card in cards.of(number, len(seen)))


def _placed_server(
    places: EnginePlaces, number: int, options: VLLMOptions, how: ServerOptions, folder: OwnFolder, log: Path
) -> Server:
    server = PlacedServer(partial(places.keeper, number), places.here, options, log, how.timeout_s, how.start_timeout_s)
    if how.transfer == "broadcast" and not server.is_near:
        server.close()
        raise EngineError(
            "rollout.transfer: broadcast reaches engines of the trainer's own node, and --ray placed this one on another; set transfer: "
            "file or delta, or --worker placement=strict_pack"
        )
    return server


def _sglang(ask: _Ask) -> Engine:
    """On a given server of SGLang."""
    model, keys, tokenizer = ask.source.model, ask.keys, _tokenizer(ask)
    assert keys.url is not None, "a given server has an address"
    config = load_config(model)
    options = SGLangOptions(
        config.to_json_string(), str(stored_dtype(config)).removeprefix("torch."),
        stored_stop_token_ids(model.base_model, model.revision, config, tokenizer), 2 * ask.rows, keys.start_timeout_s,
    )  # fmt: skip
    token = token_of(keys.token_env, keys.token_file)
    return _given(
        ask, partial(given_sglang, keys.url, token, keys.timeout_s, options, decoder(tokenizer, special=True))
    )


def _given(ask: _Ask, start: Callable[[], Engine]) -> Engine:
    """What the server has is not known to be the model that is asked for."""
    return _restarted(ask, [start], _policy_of(ask))


def _policy_of(ask: _Ask) -> Policy:
    return ask.source.policy or load_policy(ask.source.model, trainable=False)


def _restarted(ask: _Ask, starts: Sequence[Callable[[], Engine]], policy: Policy | None) -> Engine:
    engine = Replicas(starts, _check_again, ask.keys.max_restarts, start_synced=policy is None)
    if policy is not None and ask.source.policy is None:
        with _closed_on_error(engine):
            sync_engine(engine, policy, version=0)
    return engine


def _tokenizer(ask: _Ask) -> PreTrainedTokenizerBase:
    """Raises: ConfigError for what vLLM cannot be asked for."""
    refuse_not_served(ask.source.model, ask.keys.engine)
    trained = ask.source.policy
    return trained.tokenizer if trained else load_tokenizer(ask.source.model)


def refuse_not_served(model: ModelKeys, engine: str) -> None:
    """Raises: ConfigError where an engine that reads the files of `base_model` would not start from what the keys make of it."""
    if model.added_tokens:
        raise ConfigError(
            f"rollout.engine: {engine} starts from base_model as it is, which has no rows for added_tokens; train them in an "
            "SFT stage first, or set rollout.engine: embedded"
        )
    if model.tokenizer_name_or_path is not None:
        raise ConfigError(
            f"rollout.engine: {engine} reads the tokenizer that base_model has, and not tokenizer_name_or_path; train in an SFT stage first, whose "
            "model/ has that tokenizer, or set rollout.engine: embedded"
        )
    if model.init_seed is not None:
        raise ConfigError(
            f"rollout.engine: {engine} reads the weights of base_model, and not those of init_seed: {model.init_seed}; train in an SFT stage first, or "
            "set rollout.engine: embedded"
        )


def refuse_untold_experts(keys: RolloutKeys, device: str) -> None:
    """Raises: ConfigError where an engine on such a device does not say which experts it takes."""
    asked = f"rollout.routed_experts: {keys.routed_experts} with rollout.engine: {keys.engine}"
    if keys.routed_experts == "off":
        return
    if keys.engine == "embedded" and device == "cuda" and not keys.enforce_eager:
        raise ConfigError(
            f"{asked} on a GPU, whose recorded graphs do not say which experts they take; set rollout.enforce_eager: true, or "
            "routed_experts: off"
        )
    if keys.engine in ("vllm", "vllm_server") and device == "cpu" and keys.url is None:
        raise ConfigError(
            f"{asked} on a CPU: vLLM says which experts it takes only with its second model runner, which needs Triton; set "
            "routed_experts: off, or engine: embedded"
        )


def _check_again(engine: Engine, weights: Weights) -> None:
    """Raises: EngineError unless the engine decodes with the weights of this policy."""
    if isinstance(weights, CalledWeights):
        check_arrival(engine, weights.scores)
    else:
        assert isinstance(weights, Policy)
        check_arrival(engine, partial(score_sequences, weights))


@contextmanager
def _closed_on_error(engine: Engine) -> Iterator[None]:
    try:
        yield
    except BaseException:
        engine.close()
        raise


def _vllm_options(ask: _Ask, tokenizer: PreTrainedTokenizerBase) -> VLLMOptions:
    model, keys, policy = ask.source.model, ask.keys, ask.source.policy
    config = load_config(model)
    placement = policy.placement if policy else place(model)
    refuse_untold_experts(keys, placement.device.type)
    held = policy.base.dtype if policy else weight_dtype(model, placement, stored_dtype(config), trainable=False)
    computed = str(placement.autocast_dtype or held).removeprefix("torch.")
    return VLLMOptions(
        model=model.base_model,
        stop_token_ids=stored_stop_token_ids(model.base_model, model.revision, config, tokenizer),
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        device=placement.device.type,
        dtype=computed if keys.dtype == "auto" else keys.dtype,
        max_num_seqs=ask.rows,
        max_model_len=keys.max_model_len,
        memory_gib=keys.memory_gib,
        tensor_parallel_size=keys.tensor_parallel_size,
        enforce_eager=keys.enforce_eager,
        lora_rank=served_rank(model) if policy else None,
        sleeps=_sleeps(keys, placement.device.type),
        routed_experts=policy is not None and keys.routed_experts != "off",
    )


def _sleeps(keys: RolloutKeys, device: str) -> bool:
    """A server on the cards that train, in turns with them. The cluster gives servers cards of their own, and a CPU has no cards."""
    takes_turns = keys.starts_servers and keys.placement != "split" and not keys.max_staleness
    return takes_turns and device == "cuda" and not are_placed()


ENGINES: Mapping[str, Callable[[_Ask], Engine]] = {
    "embedded": _embedded,
    "vllm": _vllm,
    "vllm_server": _vllm_server,
    "sglang": _sglang,
}
"""`rollout.engine` → an engine on a source."""


def speculation_of(keys: RolloutKeys) -> Speculation | None:
    """What the embedded engine drafts from, if the keys say so; a stage has it in its checkpoints, so that it goes on to the bit."""
    return Speculation() if keys.speculation == "suffix" else None


def make_engine(
    source: EngineSource, *, keys: RolloutKeys | None = None, rows: int = _ROWS, folder: Path | None = None,
    ranks: Ranks | None = None, speculation: Speculation | None = None,
) -> Engine:  # fmt: skip
    """The engine that a stage, an eval, a certificate or a chat samples with.

    Without keys it is ours, and eager: nobody could switch graphs off. `folder` is where a process of the engine's own writes its log.
    `speculation` is what ours drafts from, where it is to outlive the engine; else it has one of its own if the keys say so. `ranks` are those that train a sharded policy: a server is one for all of them. Raises: ConfigError for what there cannot be under ranks.
    """
    if keys is not None and keys.enforce_eager and place(source.model).device.type == "cpu":
        log.warning("enforce_eager: no effect, because engines compile nothing and record no graphs on a CPU")
    policy, here = source.policy, socket.gethostname()
    trainers = ranks.gather(here).count(here) if ranks is not None else 1
    ask = _Ask(source, keys or RolloutKeys(enforce_eager=True), rows, folder, trainers, ranks, speculation)
    start = partial(ENGINES[ask.keys.engine], ask)
    if policy is None or not policy.sharded or ask.keys.engine == "embedded":
        return start()
    if ask.keys.engine == "vllm":
        raise ConfigError(
            f"rollout.engine: vllm samples in the one process that trains, and there are {policy.sharding.num_shards} of them; "
            "set rollout.engine: vllm_server, one server for all of them"
        )
    assert ranks is not None, "who trains a sharded policy says with whom"
    return MainRankEngine(start, policy, ranks)


def named_engine(keys: RolloutKeys) -> str:
    """As an eval report names what `make_engine` makes of these keys. Raises: MissingExtraError, EngineGoneError."""
    if keys.engine == "embedded":
        return ""
    version_of = sglang_version if keys.engine == "sglang" else server_version
    given = keys.url and version_of(keys.url, token_of(keys.token_env, keys.token_file), keys.timeout_s)
    return f"{keys.engine} {given or require_vllm()}"


def sampling_params(keys: SamplingKeys) -> SamplingParams:
    """How an RL stage samples: for training, for its certificate, and for its checks while it runs."""
    return SamplingParams(
        max_tokens=keys.max_completion_length, temperature=keys.temperature, top_p=keys.top_p, top_k=keys.top_k,
        min_p=keys.min_p, stop=tuple(keys.stop),
    )  # fmt: skip


def interruption(keys: RewardedKeys, tokenizer: PreTrainedTokenizerBase) -> Interruption | None:
    """What cuts thoughts short, if anything does. Raises: ConfigError where nothing could be said behind the phrase."""
    if keys.thinking_budget is None:
        return None
    phrase = tuple(tokenizer.encode(keys.interruption, add_special_tokens=False))
    if keys.thinking_budget + len(phrase) >= keys.max_completion_length:
        raise ConfigError(
            f"thinking_budget: {keys.thinking_budget} and an interruption of {len(phrase)} tokens leave nothing of max_completion_length: "
            f"{keys.max_completion_length} for an answer; lower thinking_budget, or raise max_completion_length"
        )
    end, decode = keys.interruption.split()[-1], decoder(tokenizer, special=True)
    return Interruption(keys.thinking_budget, keys.thinking_budget_spread, phrase, lambda ids: end in decode(ids))


def interrupted(engine: Engine, keys: RewardedKeys, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """The engine as a stage samples from it. Raises: ConfigError."""
    found = interruption(keys, tokenizer)
    return engine if found is None else InterruptedEngine(engine, found)


def greedy(params: SamplingParams) -> SamplingParams:
    """The same with the most likely token every time: how a stage is validated."""
    return SamplingParams(params.max_tokens, 0.0, stop_token_ids=params.stop_token_ids, stop=params.stop)


def sync_engine(engine: Engine, policy: Policy, version: int) -> dict[str, float]:
    """Bring the engine to the weights of the trained policy, as `version`; what that took, as metrics. All ranks call it.

    Raises: EngineError if a canary shows that they did not arrive.
    """
    started = time.monotonic()
    if engine.describe().sleeps:
        release_cached()
    moved = engine.update(policy, version)
    gap = check_arrival(engine, partial(score_sequences, policy))
    return {
        "sync/moved_bytes": float(moved.num_bytes), "sync/moved_share": moved.share,
        "sync/wall_s": time.monotonic() - started, "sync/canary_gap": gap,
    }  # fmt: skip
