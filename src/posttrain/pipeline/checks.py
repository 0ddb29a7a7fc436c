"""What is refused before any work: stages in an order that cannot learn, gates that cannot decide, models that do not fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.config.advice import Advised, advise
from posttrain.config.episodes import EpisodeKeys
from posttrain.config.kinds import stage_kind
from posttrain.config.pipeline import GateKeys, PipelineKeys, SuiteKeys
from posttrain.config.rl import RLKeys
from posttrain.config.stages import ModelKeys, TrainKeys
from posttrain.config.starting import OF_THE_GIVEN
from posttrain.data.lint import limits_of
from posttrain.data.load import read_nouns
from posttrain.errors import ConfigError, ModelError
from posttrain.evals.suite import Suite, load_suite
from posttrain.gate.decide import plan_lines
from posttrain.gate.spec import RESERVE_SPLIT, SELECTION_SPLIT
from posttrain.health.rules import rules_for
from posttrain.models.continued import base_keys, is_continued
from posttrain.models.device import place
from posttrain.models.freezing import unfrozen_layers
from posttrain.models.load import (
    load_config,
    load_tokenizer,
    missing_chat_template,
    model_shape,
    refuse_other_media,
)
from posttrain.models.provenance import was_tuned_by_us
from posttrain.models.stored import refuse_quantised, stored_dtype
from posttrain.pipeline.selection import spec_of, without_dev
from posttrain.planner.fit import cannot_fit, fits, shortfall
from posttrain.planner.machine import available_bytes
from posttrain.planner.memory import estimate_memory
from posttrain.planner.shape import ModelShape
from posttrain.planner.workload import Workload
from posttrain.recipes.experience.episodes import environment_spec
from posttrain.recipes.kinds import OBJECTIVES
from posttrain.recipes.measure.evaluate import check_played
from posttrain.recipes.measure.judges import check_judges
from posttrain.recipes.teachers import shapes_beside
from posttrain.tracking.trackers import require_tracker

log = logging.getLogger(__name__)


def check_all(keys: PipelineKeys) -> dict[str, tuple[Suite, SuiteKeys]]:
    """Everything that can be known before the first step. Returns the suites. Raises: PosttrainError."""
    for stage in keys.stages:
        if isinstance(stage.keys, RLKeys):
            check_judges(stage.keys.reward_funcs)
    check_memory(keys)
    check_order(keys)
    check_given(keys)
    check_adapters(keys)
    check_trackers(keys)
    if keys.gate is not None and keys.stages[-1].keys.gate is not None:
        raise ConfigError(
            "gate: the last stage has a gate of its own, so two verdicts would stand after it; keep one of them"
        )
    for gate in gates_of(keys):
        if gate.baseline.startswith("alias:") and keys.register_ is None:
            raise ConfigError(
                f"gate.baseline: {gate.baseline} needs `register:` to say in which registry and under which name to "
                "look; add it, or set baseline: stage:base"
            )
    for stage in keys.stages:
        if isinstance(stage.keys, EpisodeKeys) and stage.keys.plays:
            environment_spec(stage.keys).check()
        limits_of(stage.keys.lint)
        rules_for(stage.kind, stage.keys.health)
        if stage.kind in OBJECTIVES:
            OBJECTIVES[stage.kind](stage.keys)
        read_nouns(stage.keys.datasets, stage.keys.row_kind, stage.keys.rows_looked_at)
        read_nouns(stage.keys.eval_datasets, stage.keys.row_kind)
        if isinstance(stage.keys, RLKeys) and stage.keys.ptx_datasets:
            read_nouns(stage.keys.ptx_datasets, "examples")
    suites = {name: (load_suite(name, Path(suite.path)), suite) for name, suite in keys.evals.items()}
    for suite, how in suites.values():
        check_played(suite, how)
        check_judges([suite.scorer], suite.path.parent)
    for gate in gates_of(keys):
        for line in plan_gate(keys, gate, suites):
            log.info("gate: %s", line)
    return suites


def gates_of(keys: PipelineKeys) -> list[GateKeys]:
    return [gate for gate in (*(stage.keys.gate for stage in keys.stages), keys.gate) if gate is not None]


def plan_gate(keys: PipelineKeys, gate: GateKeys, suites: Mapping[str, tuple[Suite, SuiteKeys]]) -> list[str]:
    """What each test can detect, and how candidates are chosen.

    Raises: GateError with the number of items a margin needs; ConfigError if there is no reserve to extend with.
    """
    sizes = {name: suite.sizes(gate.split) for name, (suite, _) in suites.items()}
    spec = spec_of(keys, gate, suites)
    for name in spec.suites:
        suites[name][0].on(gate.split)  # a split that is not there is said with those that are
    lines = plan_lines(spec, {name: size for name, size in sizes.items() if size[0]})
    if spec.spend:
        lines.append(
            f"no items with split {SELECTION_SPLIT} in {', '.join(without_dev(gate, suites))} to choose on: every attempt is "
            "a look at the items of the verdict, and alpha is spent over the looks"
        )
    if gate.on_inconclusive == "extend" and not any(suites[name][0].sizes(RESERVE_SPLIT)[0] for name in spec.suites):
        raise ConfigError(
            f"gate.on_inconclusive: extend needs items that no verdict has used: no suite of {', '.join(spec.suites)} has "
            f"any with split {RESERVE_SPLIT}; add some, or set on_inconclusive: stop"
        )
    return lines


def check_order(keys: PipelineKeys) -> None:
    """Raises: ConfigError if preference optimisation or RL would start on a raw base."""
    first = next((stage for stage in keys.stages if not stage.keys.is_reward_model), None)
    if first is None or first.keys.may_start_raw or keys.allow_raw_base:
        return
    if was_tuned_by_us(keys.base_model):
        return
    tokenizer = load_tokenizer(first.keys)
    if missing_chat_template(tokenizer):
        raise ConfigError(
            f"{first.kind} would start on a raw base: {keys.base_model} has no chat template, so it was never tuned to answer. "
            "Preferences and rewards then mostly see noise: put an sft stage first, or set allow_raw_base: true"
        )
    log.warning(
        "%s has a chat template but no record of ours; taken as tuned, %s starts on it", keys.base_model, first.kind
    )


def check_given(keys: PipelineKeys) -> None:
    """Raises: ConfigError where a later stage says other than the first what is given; ModelError for a tokenizer that does not fit."""
    first = keys.stages[0].keys
    for number, stage in enumerate(keys.stages, start=1):
        for name in OF_THE_GIVEN:
            said, given = getattr(stage.keys, name), getattr(first, name)
            if said not in (None, given):
                raise ConfigError(
                    f"stages.{number}.{stage.kind}.{name}: {said}, and stage 1 has {given}; it is about the model that the pipeline starts "
                    "from: set it in stage 1, or beside `stages`"
                )
    if first.tokenizer_name_or_path is not None:
        load_tokenizer(first)


def check_adapters(keys: PipelineKeys) -> None:
    """Raises: ConfigError, ModelError where a stage would train on an adapter that the stage before does not leave."""
    before: TrainKeys | None = None
    for number, stage in enumerate(keys.stages, start=1):
        name = f"stages.{number}.adapter_start: continue"
        if before is not None and stage.keys.adapter_start != "continue":
            before = before if stage.keys.is_reward_model else stage.keys
            continue
        if is_continued(stage.keys) and stage.keys.is_reward_model and before is not None:
            raise ConfigError(
                f"{name}: stage {number} is a reward model, and the adapter of stage {number - 1} was trained under a head that gives "
                "tokens; set adapter_start: fresh"
            )
        if before is None:
            base_keys(stage.keys)
        elif is_continued(stage.keys) and before.adapter == "none":
            raise ConfigError(
                f"{name}: stage {number - 1} trains all weights, so there is no adapter to train on; set adapter_start: fresh, "
                f"or adapter: {stage.keys.adapter} for stage {number - 1} too"
            )
        elif is_continued(stage.keys) and before.base_bits != stage.keys.base_bits:
            raise ConfigError(
                f"{name}: stage {number - 1} has adapter: {before.adapter}{_in_8_bits(before)}, this one adapter: {stage.keys.adapter}{_in_8_bits(stage.keys)}; an adapter is "
                "trained on over the base in the precision that it was begun in; set both the same, or adapter_start: fresh"
            )
        before = before if stage.keys.is_reward_model else stage.keys


def _in_8_bits(keys: ModelKeys) -> str:
    return " with load_in_8bit: true" if keys.load_in_8bit else ""


def check_trackers(keys: PipelineKeys) -> None:
    """Raises: MissingExtraError; ConfigError for MLflow without a server."""
    for stage in keys.stages:
        for name in stage.keys.trackers:
            require_tracker(name)
        if "mlflow" in stage.keys.trackers and not (stage.keys.mlflow or os.environ.get("MLFLOW_TRACKING_URI")):
            raise ConfigError(
                f"{stage.kind}.report_to: mlflow, but nothing says where it is; set mlflow: http://HOST:PORT or "
                "sqlite:///mlflow.db, or MLFLOW_TRACKING_URI"
            )


def check_memory(keys: PipelineKeys) -> None:
    """Says what is advised about the keys. Raises: ModelError for a model that is not of text alone, or quantised; ConfigError, in one line, for the first stage that cannot fit."""
    config = load_config(keys.stages[0].keys)
    refuse_other_media(keys.stages[0].keys, config)
    refuse_quantised(keys.stages[0].keys, config)
    for stage in keys.stages:
        if stage.keys.adapter == "none" and stage.keys.unfrozen_layers:
            unfrozen_layers(stage.keys, config.get_text_config().num_hidden_layers)
    num_params = None
    try:
        shape = ModelShape.from_config(model_shape(config))
    except ModelError as uncounted:  # it may be trained all the same
        log.warning("%s; whether it fits in memory is not known before it is loaded", uncounted)
    else:
        _check_fit(keys, shape, config)
        num_params = shape.num_params
    for stage in keys.stages:
        for one in advise(Advised(stage.kind, stage.keys, num_params)):
            log.warning("%s: advice %s", stage.kind, one.line())


def _check_fit(keys: PipelineKeys, shape: ModelShape, config: Any) -> None:
    """Raises: ConfigError."""
    available = available_bytes()
    if available is None or place(keys.stages[0].keys).device.type != "cpu":
        return
    for stage in keys.stages:
        # As it will be loaded: a CPU with bf16 units holds the frozen base of an adapter in the bf16 of its file.
        placement = place(stage.keys, stored_dtype(config) if stage.keys.adapter != "none" else None)
        has_bf16 = placement.autocast_dtype is not None
        demands = stage_kind(stage.kind).demands(stage.keys)
        workload = Workload.from_keys(
            stage.keys.model_dump(), **demands, **shapes_beside(stage.keys), device_has_bf16=has_bf16, on_cpu=True
        )
        estimate = estimate_memory(shape, workload)
        if cannot_fit(estimate, available):
            raise ConfigError(f"{stage.kind}: {shortfall(estimate, available, keys.base_model)}")
        if not fits(estimate, available):
            log.warning("%s: %s", stage.kind, shortfall(estimate, available, keys.base_model))
