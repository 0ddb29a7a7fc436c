"""The processes of a run: how many its optimizer steps are counted for, and whether all of them were started alike."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import torch

from posttrain.config.pipeline import PipelineKeys
from posttrain.config.resolved import leaves
from posttrain.config.rl import SamplingKeys
from posttrain.distributed.engine_roles import are_placed
from posttrain.errors import ConfigError
from posttrain.files import digest_start
from posttrain.models.load import load_config
from posttrain.models.tensor_parallel import refuse_unless_shared
from posttrain.pipeline.pins import is_version, pins_of
from posttrain.protocols import Ranks

_SEEN_WITHIN_S = 5.0
"""How long a network file system may take to show a file to another machine."""


def counted_for(keys: PipelineKeys, num_processes: int) -> PipelineKeys:
    """Every stage with its `num_processes` as a number: its own, else this one."""
    stages = [
        stage.model_copy(update={"keys": stage.keys.model_copy(update={"num_processes": num_processes})})
        if stage.keys.num_processes is None
        else stage
        for stage in keys.stages
    ]
    return keys.model_copy(update={"stages": stages})


def kept_rows(keys: PipelineKeys, begun_with: int, world_size: int) -> str:
    """What becomes of the global batch of a run that goes on with another number of processes; nothing where it is the same."""
    if begun_with in (0, world_size):
        return ""
    rows = ", ".join(f"{stage.kind} {stage.keys.rows_per_step(world_size)}" for stage in keys.stages)
    return (
        f"begun with {begun_with} process(es), going on with {world_size}: the rows of an optimizer step stay as they were "
        f"({rows}); --on-change new-run begins a run of its own"
    )


def check_cards(keys: PipelineKeys, ranks: Ranks) -> None:
    """Raises: ConfigError where this machine has no place for the servers of a stage. A cluster has placed them already."""
    here = socket.gethostname()
    trainers = ranks.gather(here).count(here)
    if not are_placed():
        refuse_without_room(keys, trainers, torch.cuda.device_count())


def refuse_without_room(keys: PipelineKeys, trainers: int, cards: int) -> None:
    """Raises: ConfigError for servers that have no place on a machine of so many cards beside its trainers, before a stage is trained."""
    for number, stage in enumerate(keys.stages, start=1):
        if not cards or stage.keys.device == "cpu" or not isinstance(stage.keys, SamplingKeys):
            continue
        rollout = stage.keys.rollout
        if rollout.starts_servers and (lack := rollout.cards(trainers).lack(cards)):
            raise ConfigError(f"stages.{number}.{stage.kind}: {lack}")


def check_engines(keys: PipelineKeys, world_size: int) -> None:
    """Raises: ConfigError for a stage that samples, or holds its model, as one training process alone can, before an earlier one is trained."""
    for number, stage in enumerate(keys.stages, start=1):
        if world_size > 1 and (found := stage.keys.of_one_process):
            said, instead = found
            raise ConfigError(
                f"stages.{number}.{stage.kind}: {said} is for one training process, and there are {world_size} of them; set {instead}, or "
                "train in one process"
            )
        shared = stage.keys.sharding
        size = shared.group_size
        if world_size == 1 or size == 1:
            continue
        if world_size % size:
            raise ConfigError(
                f"stages.{number}.{stage.kind}: {shared.group_text} with {world_size} processes; expected a number that divides them"
            )
        refuse_unless_shared(keys.base_model, load_config(stage.keys), shared)


def check_started_alike(ranks: Ranks, keys: PipelineKeys, on_change: str) -> None:
    """Keys, data, models, rewards, suites and versions, compared over the ranks; their code was when they met.

    Raises: ConfigError on every rank, naming one that differs from rank 0 and in what.
    """
    if ranks.world_size == 1:
        return
    first, *others = ranks.gather(_taken_in(keys, on_change))
    for rank, other in enumerate(others, start=1):
        named = [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]
        if named:
            lines = "; ".join(
                f"{name} is {other.get(name, 'absent')}, on rank 0 {first.get(name, 'absent')}" for name in named[:3]
            )
            more = f"; and {len(named) - 3} more" if len(named) > 3 else ""
            raise ConfigError(
                f"rank {rank} was started otherwise than rank 0: {lines}{more}; give every rank the same YAML, files and packages"
            )


def _taken_in(keys: PipelineKeys, on_change: str) -> dict[str, str]:
    """Name → value or digest. Keys by their values, for digests of them would not say what differs."""
    kinds = [stage.kind for stage in keys.stages]
    taken = {"--on-change": on_change}
    for path, value in leaves(keys):
        parts = [str(part + 1) if isinstance(part, int) else part for part in path]
        if path[0] == "stages":
            parts.insert(2, kinds[int(path[1])])
        taken[".".join(parts)] = str(value)
    pins = {name: _pin(name, pin) for name, pin in pins_of(keys).items() if not _is_of_keys(name)}
    return taken | {name if is_version(name) else f"digest of {name}": digest for name, digest in pins.items()}


def _is_of_keys(pin: str) -> bool:
    return pin == "gate" or pin.endswith(".keys")


def _pin(name: str, value: str) -> str:
    return value if is_version(name) else digest_start(value)


def check_folder_is_shared(ranks: Ranks, folder: Path) -> None:
    """Raises: ConfigError on every rank if one does not see what rank 0 writes to the run's folder."""
    if ranks.world_size == 1:
        return
    mark = folder / f".seen-by-all-{ranks.broadcast(time.time_ns())}"
    if ranks.is_main:
        mark.touch()
    ranks.barrier()
    until = time.monotonic() + _SEEN_WITHIN_S
    while not mark.exists() and time.monotonic() < until:
        time.sleep(0.05)
    seen = ranks.gather(mark.exists())
    if ranks.is_main:
        mark.unlink(missing_ok=True)
    if blind := [rank for rank, sees in enumerate(seen) if not sees]:
        raise ConfigError(
            f"rank {blind[0]} does not see what rank 0 writes to {folder}: set output_dir to a folder of a file system that all "
            "machines share"
        )
