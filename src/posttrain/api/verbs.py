"""The command's verbs as functions: one for each kind of stage, `run`, `evaluate`, `gate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.api.inputs import as_keys
from posttrain.api.run import Run
from posttrain.config.load import as_pipeline, load_gate, load_stage
from posttrain.config.load_pipeline import load_pipeline
from posttrain.config.pipeline import PipelineKeys, SuiteKeys
from posttrain.config.stages import ModelKeys
from posttrain.evals.suite import by_name, load_suite
from posttrain.evidence import EvalReport, GateVerdict
from posttrain.gate import GateSpec, decide

INPUTS = "inputs"
"""Folder beside the runs for data and functions that were given as Python values."""


def sft(config: str | Path | None = None, *, show: bool = True, **keys: Any) -> Run:
    """One stage of supervised fine-tuning; `keys` are those of the YAML and stand above it. Raises: PosttrainError."""
    return _stage("sft", config, keys, show)


def dpo(config: str | Path | None = None, *, show: bool = True, **keys: Any) -> Run:
    """One stage of preference optimisation; as `sft`."""
    return _stage("dpo", config, keys, show)


def reward_model(config: str | Path | None = None, *, show: bool = True, **keys: Any) -> Run:
    """A reward model from preferences; as `sft`."""
    return _stage("reward_model", config, keys, show)


def process_reward_model(config: str | Path | None = None, *, show: bool = True, **keys: Any) -> Run:
    """A process reward model from rated steps; as `sft`."""
    return _stage("process_reward_model", config, keys, show)


def distill(config: str | Path | None = None, *, show: bool = True, **keys: Any) -> Run:
    """One stage of distillation from `teachers`; as `sft`."""
    return _stage("distill", config, keys, show)


def ebft(config: str | Path | None = None, *, show: bool = True, **keys: Any) -> Run:
    """One stage of energy-based fine-tuning on rows with answers; as `sft`."""
    return _stage("ebft", config, keys, show)


def grpo(config: str | Path | None = None, *, show: bool = True, **keys: Any) -> Run:
    """One stage of RL with verifiable rewards; `reward_funcs` may hold Python functions. As `sft`."""
    return _stage("grpo", config, keys, show)


def ppo(config: str | Path | None = None, *, show: bool = True, **keys: Any) -> Run:
    """One stage of RL with a critic; as `grpo`."""
    return _stage("ppo", config, keys, show)


def online_dpo(config: str | Path | None = None, *, show: bool = True, **keys: Any) -> Run:
    """One stage of DPO on the policy's own completions; as `grpo`."""
    return _stage("online_dpo", config, keys, show)


def run_pipeline(config: str | Path, *, show: bool = True, **keys: Any) -> Run:
    """A whole pipeline from its YAML; `keys` are overrides, a stage's keys as a dict: `grpo={"max_steps": 20}`."""
    overrides = [f"{name}={_text(value)}" for name, value in _flat(keys)]
    loaded = load_pipeline(Path(config), overrides)
    return _run(loaded.keys, show, loaded.project)


def evaluate(
    model: str | Path | Run, suites: Sequence[str | Path] | str | Path, *, split: str = "gate",
    out: str | Path | None = None, **decoding: Any,
) -> dict[str, EvalReport]:  # fmt: skip
    """Reports by suite, every item kept; `decoding` are keys of a suite (num_samples, temperature, max_tokens, seed).

    What the reports in `out` (default `runs/evals/NAME`) already hold is not measured again. Raises: PosttrainError.
    """
    from posttrain.recipes.measure.evaluate import evaluate as measure

    source = model.model if isinstance(model, Run) else model
    files = [suites] if isinstance(suites, (str, Path)) else list(suites)
    plan = [
        (load_suite(name, Path(file)), SuiteKeys.model_validate({"path": file, **decoding}))
        for name, file in by_name(files).items()
    ]
    for suite, _ in plan:
        suite.on(split)
    folder = Path(out) if out else Path("runs/evals") / f"{Path(str(source)).parent.name}-{Path(str(source)).name}"
    return measure(ModelKeys(base_model=str(source)), plan, split, folder)


def judge(
    candidate: Mapping[str, EvalReport], baseline: Mapping[str, EvalReport],
    spec: str | Path | Mapping[str, Any] | GateSpec,
) -> GateVerdict:  # fmt: skip
    """Whether the candidate is good enough to replace the baseline; `spec` is a YAML, its keys, or a `GateSpec`."""
    rules = spec
    if not isinstance(rules, GateSpec):
        rules = GateSpec.from_keys(load_gate(rules if isinstance(rules, Mapping) else Path(rules)))
    return decide(rules, candidate, baseline)


def _stage(kind: str, config: str | Path | None, keys: Mapping[str, Any], show: bool) -> Run:
    folder = Path(config).parent if config else Path()
    values = as_keys(keys, (folder / "runs" / INPUTS).resolve())
    loaded = load_stage(kind, Path(config) if config else None, given=values)
    return _run(as_pipeline(loaded), show, loaded.project)


def _run(keys: PipelineKeys, show: bool, project: Path) -> Run:
    from rich.console import Console

    from posttrain.distributed.ranks import join_ranks
    from posttrain.pipeline.run import Watch, run_pipeline
    from posttrain.pipeline.show import live_watch, setup_logging

    if show:
        setup_logging(Console(stderr=True))
    with join_ranks() as ranks:
        watch = live_watch(Console(stderr=True), ranks.is_main) if show else Watch(say=lambda text: None)
        outcome = run_pipeline(keys, ranks, watch=watch, project=project)
    return Run(outcome.folder, outcome.status, outcome.verdict, outcome.model_dir, outcome.reason)


def _flat(keys: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for name, value in keys.items()
        for pair in (_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)])
    ]


def _text(value: Any) -> str:
    import json

    return str(value) if isinstance(value, (str, Path)) else json.dumps(value)
