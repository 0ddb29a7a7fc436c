"""`posttrain plan CONFIG`: what each stage needs in memory and time, before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.cli.json_output import AsJson, echo_json
from posttrain.cli.model import with_base
from posttrain.errors import ConfigError, ModelError
from posttrain.files import size_text


@dataclass(frozen=True, slots=True)
class Target:
    """Where it would run: a device of the table, or this machine as measured."""

    device: Any
    free_bytes: int
    where: str
    has_bf16: bool


def plan(
    config: Annotated[Path, typer.Argument(help="A stage's YAML, or a pipeline's (all its stages).")],
    device: Annotated[str, typer.Option(help="this, or a100, h100, h200, l4, rtx4090.")] = "this",
    devices: Annotated[int, typer.Option(min=1, help="Devices, for the split between rollout and training.")] = 1,
    tokens: Annotated[
        int, typer.Option(min=0, help="Mean tokens of a row (RL: of a prompt and of an answer); 0 takes the longest.")
    ] = 0,
    stage: Annotated[str | None, typer.Option(help="Kind of stage; found from the keys if left out.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate memory and step time from the model's config.json. Exit code 1 if a stage cannot fit."""
    from posttrain.planner import ModelShape, cannot_fit

    base_model, stages = _stages(config, stage, overrides or [])
    shape = ModelShape.from_config(read_model_config(base_model))
    target = _target(device)
    memories = [_memory(shape, kind, keys, target) for kind, keys in stages]
    refused = any(cannot_fit(memory, target.free_bytes) for memory in memories)
    if as_json:
        rows = [_record(kind, memory, target) for (kind, _), memory in zip(stages, memories, strict=True)]
        echo_json({"base_model": base_model, "num_params": shape.num_params, "on": target.where, "stages": rows})
        raise typer.Exit(1 if refused else 0)
    typer.echo(
        f"{base_model}: {shape.num_params / 1e6:,.1f}M parameters; on {target.where}, {size_text(target.free_bytes)} free"
    )
    for (kind, keys), memory in zip(stages, memories, strict=True):
        for line in [
            *_memory_lines(kind, memory, base_model, target),
            *_time_lines(shape, memory.workload, keys.model_dump(), target, devices, tokens),
        ]:
            typer.echo(line)
    raise typer.Exit(1 if refused else 0)


def _record(kind: str, memory: Any, target: Target) -> dict[str, Any]:
    """What memory a stage needs, in bytes, as JSON data."""
    from posttrain.planner import fits

    return {
        "stage": kind, "trained_params": memory.trained_params, "floor_bytes": memory.floor_bytes,
        "total_bytes": memory.total_bytes, "parts": dict(memory.parts), "free_bytes": target.free_bytes,
        "fits": fits(memory, target.free_bytes),
    }  # fmt: skip


def read_model_config(base_model: str) -> dict[str, Any]:
    """The config.json of a local folder, or of a hub model that is already in the local cache. Raises: ModelError."""
    import json

    folder = Path(base_model)
    path: Any = folder / "config.json"
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(base_model, "config.json")
    if not isinstance(path, (str, Path)) or not Path(path).exists():
        raise ModelError(
            f"base_model {base_model}: got no config.json here, expected a local folder or a model in the hub cache; download it first"
        )
    return json.loads(Path(path).read_text())


def _stages(config: Path, stage: str | None, overrides: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    """The base model, and (kind, keys) of every stage asked for."""
    from posttrain.cli.stage import kind_in
    from posttrain.config import load_pipeline, load_stage

    kind = kind_in(config, stage, overrides)
    if kind != "pipeline":
        keys = load_stage(kind, config, overrides).keys
        return keys.base_model, [(kind, keys)]
    pipeline = with_base(load_pipeline(config, overrides).keys)
    return pipeline.base_model, [(s.kind, s.keys) for s in pipeline.stages if stage in (None, s.kind)]


def _target(device: str) -> Target:
    from posttrain.planner import DEVICES, available_bytes
    from posttrain.planner.machine import probe_cpu

    if device == "this":
        measured = probe_cpu()
        free = available_bytes()
        return Target(measured, int(measured.memory_bytes) if free is None else free, "this machine's processor", False)
    if device not in DEVICES:
        raise ConfigError(f"--device {device}: expected this, or one of {', '.join(DEVICES)}")
    row = DEVICES[device]
    return Target(row, int(row.memory_use * row.memory_bytes), f"one {device}", True)


def _memory(shape: Any, kind: str, keys: Any, target: Target) -> Any:
    from posttrain.config.kinds import STAGE_KINDS
    from posttrain.planner import Workload, estimate_memory

    workload = Workload.from_keys(
        keys.model_dump(),
        **STAGE_KINDS[kind].demands(keys),
        device_has_bf16=target.has_bf16,
        on_cpu=target.device.name == "cpu",
    )
    return estimate_memory(shape, workload)


def _memory_lines(kind: str, memory: Any, base_model: str, target: Target) -> list[str]:
    from posttrain.planner import fits, shortfall

    longest = memory.workload.longest(memory.shape)
    parts = ", ".join(
        f"{name} {size_text(size)}" for name, size in sorted(memory.parts.items(), key=lambda part: -part[1])
    )
    share = memory.trained_params / memory.shape.num_params
    lines = [
        "",
        f"{kind}  trains {memory.trained_params / 1e6:,.1f}M parameters ({share:.1%})",
        f"  memory  {size_text(memory.floor_bytes)} whatever the data, up to {size_text(memory.total_bytes)} with rows of {longest} tokens",
        f"          {parts}",
    ]
    return [
        *lines,
        "  fits    yes"
        if fits(memory, target.free_bytes)
        else f"  fits    {shortfall(memory, target.free_bytes, base_model, target.where)}",
    ]


def _time_lines(shape: Any, workload: Any, keys: dict[str, Any], target: Target, devices: int, mean: int) -> list[str]:
    if workload.samples:
        return _sampling_lines(shape, workload, keys, target, devices, mean)
    from posttrain.planner.steptime import logp_s, train_s

    length = _row_tokens(shape, keys, mean)
    rows = keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"] * (2 if workload.pairs else 1)
    tokens = rows * length
    seconds = train_s(shape, target.device, tokens, length, recompute=keys["gradient_checkpointing"])
    if workload.scores_reference:
        seconds += logp_s(shape, target.device, tokens)
    return [
        f"  time    {_bound(mean)} {_seconds(seconds)} a step ({tokens:,} tokens){_in_all(seconds, keys['max_steps'])}"
    ]


def _sampling_lines(
    shape: Any, workload: Any, keys: dict[str, Any], target: Target, devices: int, mean: int
) -> list[str]:
    from posttrain.planner import best_split, step_time

    traffic = _traffic(shape, keys, mean)
    scoring = int(workload.scores_reference)
    times = step_time(
        shape, target.device, traffic, rollout_devices=devices, train_devices=devices, scoring_models=scoring,
        recompute=keys["gradient_checkpointing"], batch_limit=keys["rollout_batch_size"] if target.where.startswith("this") else 1e9,
    )  # fmt: skip
    train = times.train_s * keys["num_iterations"]
    updates = keys["steps_per_generation"] * keys["num_iterations"]
    batch = times.rollout_s + times.logp_s + train
    lines = [
        f"  time    {_bound(mean)} {_seconds(batch)} a generation batch of {traffic.num_completions} completions: "
        f"rollout {_seconds(times.rollout_s)}, training {_seconds(train + times.logp_s)} ({times.rollout_s / batch:.0%} rollout)"
        f"{_in_all(batch / updates, keys['max_steps'])}"
    ]
    if devices > 1:
        rollout, training, split = best_split(shape, target.device, traffic, devices, scoring)
        gain = times.colocated_s / split.overlapped_s
        better = (
            f"{gain:.2f} times as fast as sharing all {devices}" if gain > 1 else f"slower than sharing all {devices}"
        )
        lines.append(
            f"  split   best {rollout} for rollout and {training} for training: {_seconds(split.overlapped_s)}, {better}, the trainer idle {split.trainer_idle:.0%}"
        )
    return lines


def _traffic(shape: Any, keys: dict[str, Any], mean: int) -> Any:
    """What a generation batch samples; without a mean, every prompt and answer as long as allowed."""
    from posttrain.planner import Traffic

    whole = _row_tokens(shape, keys, 0)
    longest = min(keys["max_completion_length"], whole)
    prompt = min(mean, whole) if mean else max(1, whole - longest)
    return Traffic(
        keys["num_prompts_per_step"], keys["num_generations"], prompt, min(mean or longest, longest), longest
    )


def _row_tokens(shape: Any, keys: dict[str, Any], mean: int) -> int:
    longest = min(keys["sequence_len"], shape.max_positions or keys["sequence_len"])
    return min(mean or longest, longest)


def _bound(mean: int) -> str:
    return "about" if mean else "at most"


def _in_all(seconds: float, steps: int) -> str:
    return f"; {steps} steps {_seconds(seconds * steps)}" if steps > 0 else ""


def _seconds(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min"), (1, "s")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1000:.0f} ms"
