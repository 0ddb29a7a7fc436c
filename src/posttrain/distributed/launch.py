"""How this process was started, read from the environment before torch is loaded: alone, or as one of several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.errors import ConfigError

_MEETING = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_OF_A_LAUNCH = re.compile(r"MASTER_(ADDR|PORT)|(GROUP_|LOCAL_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|TORCHELASTIC_.*")
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000


@dataclass(frozen=True, slots=True)
class Launch:
    """One of `world_size` processes that meet at `address:port`; `local_rank` counts those of this machine.

    `store_is_there` says that the launcher keeps a store at that place; without one, rank 0 opens it. `attempt` counts
    restarts by the launcher.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    store_is_there: bool = False
    attempt: str = "0"


def without_launch(environ: Mapping[str, str]) -> dict[str, str]:
    """For a child that is none of the processes that were started together: torch would take it for the one that started it."""
    return {name: value for name, value in environ.items() if not _OF_A_LAUNCH.fullmatch(name)}


def read_launch(environ: Mapping[str, str], command: Sequence[str] = ()) -> Launch | None:
    """None for a process that is alone. `command` is what the user typed, for the line to type instead.

    Raises: ConfigError where several processes may have been meant and this one cannot be one of them.
    """
    if "WORLD_SIZE" in environ:
        return _of_torchrun(environ, command)
    if _number(environ, "SLURM_STEP_NUM_TASKS", default=1) > 1:
        return _of_slurm(environ)
    _check_is_alone(environ, command)
    return None


def _of_torchrun(environ: Mapping[str, str], command: Sequence[str]) -> Launch | None:
    """As torchrun and `accelerate launch` say it, and whoever sets these variables by hand."""
    world_size = _number(environ, "WORLD_SIZE", least=1)
    if world_size == 1:
        return None
    if missing := [name for name in _MEETING if not environ.get(name)]:
        raise ConfigError(
            f"WORLD_SIZE={world_size} says that this is one of {world_size} processes, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; start them with: {torchrun_line(command, world_size)}; for one process, unset WORLD_SIZE"
        )
    rank = _number(environ, "RANK")
    if rank >= world_size:
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={world_size}; ranks count from 0")
    return Launch(
        rank, world_size, _number(environ, "LOCAL_RANK", default=0), environ["MASTER_ADDR"],
        _number(environ, "MASTER_PORT"), environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )  # fmt: skip


def _of_slurm(environ: Mapping[str, str]) -> Launch:
    """As a step of `srun` says it; they meet on its first node, at a port that follows from the job's number."""
    step, job = _number(environ, "SLURM_STEP_ID", default=0), _number(environ, "SLURM_JOB_ID")
    port = _FIRST_PORT + (job * 64 + step) % _NUM_PORTS
    return Launch(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=_number(environ, "SLURM_STEP_NUM_TASKS", least=1),
        local_rank=_number(environ, "SLURM_LOCALID", default=0),
        address=environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "localhost")),
        port=_number(environ, "MASTER_PORT", default=port),
    )


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: `gpu[07-09,12],cpu1` starts with `gpu07`."""
    return re.sub(r"\[(\w+).*", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def _check_is_alone(environ: Mapping[str, str], command: Sequence[str]) -> None:
    """Raises: ConfigError if a launcher left its traces, but did not say which process this is."""
    traces = sorted(name for name in environ if name.startswith("ACCELERATE_") or name == "MASTER_PORT")
    if traces:
        raise ConfigError(
            f"{', '.join(traces)} {'is' if len(traces) == 1 else 'are'} set and WORLD_SIZE is not: one process was started where several may have been "
            f"asked for. Start several with: {torchrun_line(command)}; for one, start posttrain without a launcher and unset {traces[0]}"
        )
    tasks = _number(environ, "SLURM_NTASKS", default=1)
    if tasks > 1 and "SLURM_STEP_ID" not in environ:
        raise ConfigError(
            f"SLURM_NTASKS={tasks} and this is no step of srun: one process was started where {tasks} were asked for. Start them "
            f"with: srun {_shown(command)}; for one: srun --ntasks=1 {_shown(command)}"
        )


def not_read(environ: Mapping[str, str]) -> str:
    """What `accelerate launch` passes on of its configuration, which keys of the YAML decide here; nothing where it passes nothing on."""
    names = sorted(name for name in environ if name.startswith(("ACCELERATE_", "FSDP_")))
    if not names:
        return ""
    shown = ", ".join(f"{name}={environ[name]}" for name in names)
    return f"of accelerate, not read, the YAML decides: {shown}; posttrain import CONFIG_FILE writes the keys for it"


def torchrun_line(command: Sequence[str] = (), num_processes: int | str = "N") -> str:
    """What starts `command` on several processes of one machine."""
    return f"torchrun --nproc-per-node {num_processes} --no-python {_shown(command)}"


def _shown(command: Sequence[str]) -> str:
    return " ".join(("posttrain", *command)) if command else "posttrain …"


def _number(environ: Mapping[str, str], name: str, *, default: int | None = None, least: int = 0) -> int:
    """Raises: ConfigError unless the variable is a whole number, of at least `least`."""
    value = environ.get(name, "")
    if not value and default is not None:
        return default
    if not re.fullmatch(r"\d{1,9}", value) or int(value) < least:
        raise ConfigError(
            f"{name}={value}: got {value!r} in the environment, expected a whole number from {least} on; unset it to start one process"
        )
    return int(value)
