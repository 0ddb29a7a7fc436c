"""`posttrain plan CONFIG`: what each stage needs in memory and time, before it starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.cli.json_output import AsJson, echo_json
from posttrain.cli.model import has_files, with_base
from posttrain.cli.plan_text import cost_lines, memory_lines, start_lines, time_lines
from posttrain.errors import ConfigError, DataError, ModelError
from posttrain.files import decode_utf8, parse_json, size_text


@dataclass(frozen=True, slots=True)
class Target:
    """Where it would run: devices of the table, or this machine as measured; free bytes of one."""

    cluster: Any
    free_bytes: int
    where: str
    has_bf16: bool
    is_here: bool = False


def plan(
    config: Annotated[Path, typer.Argument(help="A stage's YAML, or a pipeline's (all its stages).")],
    gpus: Annotated[
        str | None, typer.Option(help="8xH100, or for several machines 2x8xH100, 2x8xH100@eth100 (docs/planning.md).")
    ] = None,
    device: Annotated[
        str, typer.Option(help="this, or a100, h100, h200, l4, rtx4090 …: one machine's cards.")
    ] = "this",
    devices: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    tokens: Annotated[
        int, typer.Option(min=0, help="Mean tokens of a row (RL: of a prompt and of an answer); 0 takes the longest.")
    ] = 0,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure this machine's rates first; at most two minutes.")
    ] = False,
    measured: Annotated[
        Path | None, typer.Option(help="Folder of a finished stage of this config here: correct times by what it took.")
    ] = None,
    usd_per_gpu_hour: Annotated[float | None, typer.Option(min=0, help="Price of a device's hour.")] = None,
    stage: Annotated[str | None, typer.Option(help="Kind of stage; found from the keys if left out.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate memory and step time from the model's config.json. Exit code 1 if a stage cannot fit or is refused."""
    from posttrain.planner import cannot_fit

    planned = make_plan(config, target_of(gpus, device, devices, probe), stage, overrides or [], tokens, measured)
    base_model, shape, target, forecasts = planned.base_model, planned.shape, planned.target, planned.forecasts
    refused = any(made.refused for made in forecasts)
    code = 1 if refused or any(cannot_fit(made.memory, target.free_bytes) for made in forecasts) else 0
    if as_json:
        echo_json(planned.record(usd_per_gpu_hour))
        raise typer.Exit(code)
    active = f" ({shape.active_params / 1e6:,.1f}M active)" if shape.num_experts else ""
    lines = [
        f"{base_model}: {shape.num_params / 1e6:,.1f}M parameters{active}; on {target.where}, {size_text(target.free_bytes)} free"
    ]
    for made in forecasts:
        lines += [*memory_lines(made, base_model, target.free_bytes, target.where), *time_lines(made, tokens)]
        lines += cost_lines(made, target.cluster.num_devices, usd_per_gpu_hour)
        lines += [f"  advice  {one.line()}" for one in made.advice]
    lines += [f"  note    {note}" for note in planned.notes]
    verb = "run" if len(forecasts) > 1 or _is_pipeline(config, stage, overrides or []) else forecasts[0].kind
    if target.cluster.num_devices > 1 and not refused:
        placed = max(made.memory.workload.rollout.num_cards for made in forecasts)
        lines += start_lines(config, verb, target.cluster, planned.kept, placed)
    typer.echo("\n".join(lines))
    raise typer.Exit(code)


@dataclass(frozen=True, slots=True)
class StagePlans:
    """What every stage of a config needs at a target."""

    base_model: str
    shape: Any
    target: Target
    forecasts: list[Any]
    kept: int = 0
    """Cards that are kept from training, for servers."""
    notes: tuple[str, ...] = ()
    """Of the configuration: keys without effect, keys of other tools."""

    def record(self, usd_per_gpu_hour: float | None) -> dict[str, Any]:
        """As JSON data, in bytes and seconds."""
        counts = {"num_params": self.shape.num_params, "active_params": self.shape.active_params}
        rows = [_record(made, self.target, usd_per_gpu_hour) for made in self.forecasts]
        return {
            "base_model": self.base_model,
            **counts,
            "on": self.target.where,
            "stages": rows,
            "notes": list(self.notes),
        }


def make_plan(
    config: Path, target: Target, stage: str | None, overrides: list[str], tokens: int = 0, measured: Path | None = None
) -> StagePlans:
    """Raises: PosttrainError for what a run would refuse before it reads any data; of a model of which only config.json is here, less."""
    from posttrain.planner import ModelShape

    pipeline, chosen, notes = _stages(config, stage, overrides)
    for kind, keys in chosen:
        _refuse_what_no_loss_takes(kind, keys)
    shape = ModelShape.from_config(read_model_config(pipeline.base_model))
    kept = _kept(chosen, target.cluster)
    notes += _check_before_data(pipeline, shape, target, target.cluster.num_devices - kept)
    forecasts = [_forecast(shape, kind, keys, target, tokens, measured, kept) for kind, keys in chosen]
    return StagePlans(pipeline.base_model, shape, target, forecasts, kept, notes)


def _check_before_data(pipeline: Any, shape: Any, target: Target, processes: int) -> tuple[str, ...]:
    """A note where the model's files are not here to be asked. Raises: PosttrainError."""
    from posttrain.config.optimizing import unfrozen_layers

    if not has_files(pipeline.base_model):
        for stage in pipeline.stages:
            if stage.keys.adapter == "none" and stage.keys.unfrozen_layers:
                unfrozen_layers(stage.keys, shape.num_layers)
        return (
            f"only config.json of {pipeline.base_model} is here: whether its tokenizer, and the names of its layers, take these keys is asked when the run starts",
        )
    from posttrain.pipeline.before_data import check_before_data
    from posttrain.pipeline.processes import counted_for

    check_before_data(counted_for(pipeline, processes), here=target.is_here)
    return ()


def _refuse_what_no_loss_takes(kind: str, keys: Any) -> None:
    """By the object that the loop makes of the keys. Torch is loaded for it, so only where a loss has options that may not go together."""
    from posttrain.config.preference import PreferenceKeys
    from posttrain.config.rl import RLKeys

    if isinstance(keys, (RLKeys, PreferenceKeys)):
        from posttrain.recipes.kinds import OBJECTIVES

        if kind in OBJECTIVES:
            OBJECTIVES[kind](keys)


def _kept(stages: list[tuple[str, Any]], cluster: Any) -> int:
    """Cards that the hungriest stage's servers have for themselves, so that at least one is left to train on."""
    from posttrain.config.rl import SamplingKeys

    rollouts = [keys.rollout for _, keys in stages if isinstance(keys, SamplingKeys)]
    taken = max((rollout.cards(1).taken for rollout in rollouts if rollout.starts_servers), default=0)
    return 0 if cluster.device.name == "cpu" else min(taken, cluster.num_devices - 1)


def _record(made: Any, target: Target, usd_per_gpu_hour: float | None) -> dict[str, Any]:
    """What a stage needs, in bytes and seconds, as JSON data."""
    from posttrain.planner import fits

    memory, split = made.memory, made.split
    hours = None if made.total_s is None else made.total_s * target.cluster.num_devices / 3600
    return {
        "stage": made.kind, "trained_params": memory.trained_params, "floor_bytes": memory.floor_bytes,
        "total_bytes": memory.total_bytes, "parts": dict(memory.parts), "host": dict(memory.host), "copied_bytes": memory.copied_bytes, "free_bytes": target.free_bytes,
        "fits": fits(memory, target.free_bytes), "shards": memory.shards, "refused": made.refused, "phases_s": dict(made.phases), "step_s": made.step_s,
        "total_s": made.total_s, "disk_bytes": made.disk_bytes,
        "device_hours": hours, "usd": None if hours is None or usd_per_gpu_hour is None else hours * usd_per_gpu_hour,
        "split": None if split is None else {"rollout": split.rollout, "train": split.train, "batch_s": split.times.overlapped_s},
        "growth": [{"answer_tokens": s.answer_tokens, "rollout": s.rollout, "train": s.train} for s in made.growth],
        "advice": [asdict(one) for one in made.advice],
        "staleness": {str(n): {"batch_s": t.step_s, "trainer_idle": t.trainer_idle} for n, t in made.staleness.items()},
    }  # fmt: skip


def read_model_config(base_model: str) -> dict[str, Any]:
    """The config.json of a local folder, or of a hub model that is already in the local cache. Raises: ModelError."""
    found: Any = Path(base_model) / "config.json"
    if not Path(base_model).is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(base_model, "config.json")
        except HFValidationError:
            found = None
    if not isinstance(found, (str, Path)) or not Path(found).exists():
        raise ModelError(
            f"base_model {base_model}: got no config.json here, expected a local folder or a model in the hub cache; download it first"
        )
    expected = "the config of a transformers model, a JSON object"
    try:
        config = parse_json(decode_utf8(Path(found).read_bytes(), str(found)), str(found), expected)
    except DataError as error:
        raise ModelError(str(error)) from None
    if not isinstance(config, dict):
        raise ModelError(f"{found}: got a {type(config).__name__}, expected {expected}")
    return config


def _is_pipeline(config: Path, stage: str | None, overrides: list[str]) -> bool:
    from posttrain.cli.stage import kind_in

    return kind_in(config, stage, overrides) == "pipeline"


def _stages(
    config: Path, stage: str | None, overrides: list[str]
) -> tuple[Any, list[tuple[str, Any]], tuple[str, ...]]:
    """The pipeline, (kind, keys) of every stage asked for, and what loading them noted."""
    from posttrain.cli.stage import kind_in
    from posttrain.config import load_pipeline, load_stage
    from posttrain.config.load import as_pipeline

    kind = kind_in(config, stage, overrides)
    if kind == "pipeline":
        loaded = load_pipeline(config, overrides)
        pipeline = with_base(loaded.keys)
        chosen = [(s.kind, s.keys) for s in pipeline.stages if stage in (None, s.kind)]
        return pipeline, chosen, loaded.notes
    one = load_stage(kind, config, overrides)
    alone = with_base(as_pipeline(one))
    return alone, [(s.kind, s.keys) for s in alone.stages], one.notes


def target_of(gpus: str | None, device: str, devices: int, probe: bool) -> Target:
    from posttrain.planner import DEVICES, Cluster, parse_cluster

    if gpus is not None:
        if device != "this" or devices != 1 or probe:
            raise ConfigError(
                f"--gpus {gpus} beside --device, --devices or --probe: expected one of them; leave the others out"
            )
        return _cards(parse_cluster(gpus))
    if device != "this":
        if device not in DEVICES:
            raise ConfigError(f"--device {device}: expected this, or one of {', '.join(DEVICES)}")
        return _cards(Cluster(DEVICES[device], devices))
    return _here(devices, probe)


def _cards(cluster: Any) -> Target:
    card = cluster.device
    where = f"one {card.name}" if cluster.num_devices == 1 else f"each card of {cluster}"
    return Target(cluster, int(card.memory_use * card.memory_bytes), where, True)


def _here(devices: int, probe: bool) -> Target:
    from posttrain.planner import Cluster, available_bytes
    from posttrain.planner.machine import probe_cpu

    if not probe:
        found = probe_cpu()
    else:
        from posttrain.cli.probe import probe as measure

        found = measure()
    if found.name != "cpu":
        return replace(_cards(Cluster(found, devices)), where=f"this machine's {found.name}", is_here=True)
    free = available_bytes()
    # Processes on one machine share its memory.
    return Target(
        Cluster(found, devices),
        (int(found.memory_bytes) if free is None else free) // devices,
        "this machine's processor",
        False,
        is_here=True,
    )


def _shapes_beside(keys: Any) -> dict[str, Any]:
    """As `recipes.teachers.shapes_beside`, without what loads a model."""
    from posttrain.config.ppo import PPOKeys
    from posttrain.config.rl import RLKeys, SamplingKeys
    from posttrain.grading.learned import held_models
    from posttrain.planner import ModelShape

    teachers = [one.model for one in keys.teachers if one.is_loaded] if isinstance(keys, SamplingKeys) else []
    judges = held_models(keys.reward_funcs, keys.base_model) if isinstance(keys, RLKeys) else []
    critics = [keys.critic.base_model] if isinstance(keys, PPOKeys) else []
    named = {"teachers": teachers, "judges": judges, "critics": critics}
    return {name: [ModelShape.from_config(read_model_config(one)) for one in models] for name, models in named.items()}


def _forecast(shape: Any, kind: str, keys: Any, target: Target, tokens: int, measured: Path | None, kept: int) -> Any:
    from posttrain.config.advice import Advised, advise
    from posttrain.config.kinds import STAGE_KINDS
    from posttrain.planner import Workload
    from posttrain.planner.forecast import forecast
    from posttrain.planner.measured import AS_PREDICTED, correction_from

    dumped = keys.model_dump()
    workload = Workload.from_keys(
        dumped,
        **STAGE_KINDS[kind].demands(keys),
        **_shapes_beside(keys),
        device_has_bf16=target.has_bf16,
        on_cpu=target.cluster.device.name == "cpu",
    )
    found = AS_PREDICTED
    if measured is not None:
        found = correction_from(_metrics(measured), shape, target.cluster.without(kept), workload, dumped, tokens)
        typer.echo(
            f"{kind}: that run took {found.train:.2f} times what is predicted of training and {found.rollout:.2f} of rollout; times are corrected"
        )
    made = forecast(shape, target.cluster, kind, workload, dumped, tokens, found, kept)
    given = Advised(kind, keys, shape.num_params, made.memory.trained_params, _data_bytes(keys))
    return replace(
        made, refused=_refused(keys, workload, target, shape, made.memory.shards), advice=tuple(advise(given))
    )


def _data_bytes(keys: Any) -> int | None:
    """Of files on this machine, as they are; None where a part is elsewhere, compressed, or taken in part."""
    files = [Path(source.path) for source in keys.datasets if source.limit is None]
    if len(files) < len(keys.datasets) or any(
        not f.is_file() or f.suffix in (".gz", ".zst", ".parquet") for f in files
    ):
        return None
    return sum(file.stat().st_size for file in files)


def _refused(keys: Any, workload: Any, target: Target, shape: Any, processes: int) -> str:
    """Why so many processes are not started with these keys; nothing where they are."""
    if not workload.on_cpu and (lack := _no_place(workload, target, shape)):
        return lack
    if processes == 1:
        return ""
    if keys.of_one_process is not None:
        said, instead = keys.of_one_process
        return f"{said} is for one training process: a run of {processes} is refused; set {instead}"
    for name in ("dp_shard_size", "sp_size", "tensor_parallel_size"):
        size = getattr(keys.sharding, name)
        if isinstance(size, int) and processes % size:
            return f"sharding.{name}: {size} with {processes} processes; set a number that divides them"
    return _not_shared(keys) if keys.sharding.group_size > 1 else ""


def _no_place(workload: Any, target: Target, shape: Any) -> str:
    """Why the servers of vLLM cannot be where the keys put them."""
    from posttrain.planner.engine import engine_parts

    rollout, cluster = workload.rollout, target.cluster
    cards = rollout.cards(1)
    if rollout.starts_servers and cards.is_split and cluster.nodes > 1:
        left = cluster.num_devices - cards.taken
        if left < 1 or (left % cluster.nodes and left % cluster.per_node):
            return f"rollout.placement: split keeps {cards.taken} of {cluster.num_devices} cards on {cluster.nodes} machines; keep as many of each, or whole machines"
        lack = replace(cards, is_split=False).lack(cluster.per_node)
    else:
        lack = cards.lack(cluster.per_node)
    if lack or not (rollout.starts_servers and cards.is_split):
        return lack
    alone = replace(rollout, placement="colocated", replicas=1)
    held = engine_parts(shape, alone, bf16=workload.bf16, on_cpu=False)
    needs = sum(size for name, size in held.items() if name.startswith("vllm_"))
    if needs <= target.free_bytes:
        return ""
    return f"a server of vLLM needs {size_text(needs)} on each of its cards, which have {size_text(target.free_bytes)}; raise rollout.tensor_parallel_size or lower memory_gib"


def _not_shared(keys: Any) -> str:
    """Why processes do not share a micro-batch; the model is asked, which takes seconds."""
    from posttrain.models.load import load_config
    from posttrain.models.tensor_parallel import refuse_unless_shared

    try:
        refuse_unless_shared(keys.base_model, load_config(keys), keys.sharding)
    except ModelError as error:
        return str(error)
    return ""


def _metrics(run: Path) -> list[dict[str, float]]:
    from posttrain.tracking.jsonl import read_jsonl

    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"--measured {run}: got no metrics.jsonl there, expected the folder of a finished stage, such as runs/first/stages/01-sft"
        )
    return read_jsonl(path)
