"""`--ray`: the verb that was typed, as ranks and engines on a cluster of Ray, or on this machine without it (`--ray local`)."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.errors import ConfigError
from posttrain.uris import variable_names_secret

if TYPE_CHECKING:
    from posttrain.config.pipeline import PipelineKeys
    from posttrain.distributed.roles import RoleResources

OnRay = Annotated[str | None, typer.Option("--ray", metavar="auto|HOST:PORT|local", help="Run as workers of a Ray cluster, or of this machine without Ray (local).")]  # fmt: skip
NumWorkers = Annotated[int, typer.Option("--workers", min=1, help="With --ray: trainer processes.")]
EachWorker = Annotated[str, typer.Option("--worker", metavar="cpus=N,gpus=N,placement=NAME", help="With --ray: what each takes, and where: pack, spread, strict_pack, strict_spread.")]  # fmt: skip

_FORWARDED = ("ACCELERATE_", "GLOO_", "HF_", "MKL_", "MLFLOW_", "NCCL_", "OMP_", "POSTTRAIN_", "PYTORCH_", "TOKENIZERS_", "TORCH_", "TRANSFORMERS_", "VLLM_")  # fmt: skip
"""Variables of the terminal that the workers get, but those that hold a secret: what Ray carries is not encrypted."""


PROGRAM = ("{python}", "-P", "-m", "posttrain.cli.app")
"""What every rank runs, before the arguments."""
_MAX_RESTARTS = 3
"""How often all ranks are started again, and a lost keeper of an engine is made again."""


@dataclass(frozen=True)
class OnCluster:
    """What the command line says of where a verb runs."""

    address: str
    workers: int
    worker: str


def on_cluster(ray: str | None, workers: int, worker: str) -> OnCluster | None:
    """None for a verb that runs in this process. Raises: ConfigError."""
    if ray is None:
        if workers > 1 or worker:
            raise ConfigError(
                "--workers and --worker say how --ray places processes; add --ray auto (or local), or start with torchrun"
            )
        return None
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "--ray under a launcher (WORLD_SIZE is set): Ray starts the processes itself; start one posttrain, without torchrun"
        )
    return OnCluster(ray, workers, worker)


def run_as_roles(on: OnCluster, arguments: Sequence[str], folder: Path, engines: Sequence[RoleResources]) -> int:
    """Run `posttrain ARGUMENTS` as `on` says, with a place for each engine; the run's own folder is `folder`. Returns its exit code."""
    from posttrain.distributed.engine_roles import LEASE_S as ENGINE_LEASE_S
    from posttrain.distributed.engine_roles import EngineRoles, engine_name, places_variable
    from posttrain.distributed.keeper import LocalCluster
    from posttrain.distributed.on_ray import CALL_S, LEASE_S, RayCluster
    from posttrain.distributed.rank_group import KeptRole, RankGroup, RankProgram
    from posttrain.distributed.roles import Role
    from posttrain.recipes.run.stop import StopFlag

    resources, placement = worker_resources(on.worker)
    make = LocalCluster if on.address == "local" else RayCluster
    cluster = make(on.address, f"posttrain-{uuid.uuid4().hex[:12]}")
    engines = [] if on.address == "local" else engines
    stop, events = StopFlag(), _RoleEvents(folder)

    def keep_engine(number: int) -> KeptRole:
        place = on.workers + number
        return cluster.keeper(place, engine_name(number), engines[number], ENGINE_LEASE_S)

    try:
        cluster.reserve([resources] * on.workers + list(engines), placement)
        kept = EngineRoles(
            [Role(engine_name(n), events.tell) for n in range(len(engines))], keep_engine, CALL_S, _MAX_RESTARTS
        )
        variables = _forwarded(os.environ) | places_variable(cluster.address, cluster.namespace, len(engines))
        program = RankProgram((*PROGRAM, *arguments), os.getcwd(), variables, _MAX_RESTARTS)
        roles = [Role(f"rank-{rank}", events.tell) for rank in range(on.workers)]
        with stop.listening(), closing(kept):
            return RankGroup(
                program, roles, lambda rank: cluster.keeper(rank, f"rank-{rank}-{roles[rank].state.lease}", resources), _write,
                lambda: stop.is_set, kept.look, LEASE_S, CALL_S,
            ).run()  # fmt: skip
    finally:
        events.close()
        cluster.close()


def engine_resources(keys: PipelineKeys, worker: str) -> list[RoleResources]:
    """What the engines that a run starts as servers of their own take, as many as its hungriest stage or its evals have at once. Raises: ConfigError."""
    from posttrain.config.rl import SamplingKeys
    from posttrain.distributed.roles import RoleResources

    rollouts = [
        keys.eval_rollout,
        *(stage.keys.rollout for stage in keys.stages if isinstance(stage.keys, SamplingKeys)),
    ]
    own = [rollout for rollout in rollouts if rollout.starts_servers]
    if not own:
        return []
    has_cards = worker_resources(worker)[0].gpus > 0
    if has_cards and any(rollout.placement == "colocated" for rollout in own):
        raise ConfigError(
            "rollout.placement: colocated with --ray and cards; the cluster gives each server cards of its own: set placement: split (or auto), "
            "or start with torchrun"
        )
    gpus = max(rollout.tensor_parallel_size for rollout in own) if has_cards else 0
    return [RoleResources(cpus=1.0, gpus=float(gpus))] * max(rollout.replicas for rollout in own)


def worker_resources(text: str) -> tuple[RoleResources, str]:
    """What `--worker` says: what each worker takes, and the strategy. Raises: ConfigError."""
    from posttrain.distributed.on_ray import STRATEGIES
    from posttrain.distributed.roles import RoleResources

    expected = "cpus=N, gpus=N and placement=NAME, with commas between them"
    said: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in ("cpus", "gpus", "placement") or name in said:
            raise ConfigError(f"--worker {text}: got {part!r}, expected {expected}")
        said[name] = value
    placement = said.pop("placement", "pack")
    if placement not in STRATEGIES:
        raise ConfigError(f"--worker {text}: placement is {placement!r}, expected one of {', '.join(STRATEGIES)}")
    try:
        amounts = {name: float(value) for name, value in said.items()}
    except ValueError:
        amounts = {"cpus": -1.0}
    if any(not 0 <= amount < 1e6 for amount in amounts.values()) or not any({"cpus": 1.0, **amounts}.values()):
        raise ConfigError(f"--worker {text}: expected numbers from 0 on, not all of them 0")
    return RoleResources(**amounts), placement


def _forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(_FORWARDED) and not variable_names_secret(name)
    }


def _write(stream: str, data: bytes) -> None:
    to = sys.stdout if stream == "out" else sys.stderr
    to.buffer.write(data)
    to.flush()


class _RoleEvents:
    """`events.jsonl` of the run's folder, as soon as rank 0 has made that: a start that is refused leaves none."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._waiting = folder, list[Mapping[str, Any]]()

    def tell(self, details: Mapping[str, Any]) -> None:
        self._waiting.append(details)
        if self._folder.is_dir():
            self.close()

    def close(self) -> None:
        from posttrain.tracking.jsonl import JsonlSink

        if self._waiting and self._folder.is_dir():
            sink = JsonlSink(self._folder)
            for details in self._waiting:
                sink.event("role", 0, details)
            sink.close()
            self._waiting.clear()
