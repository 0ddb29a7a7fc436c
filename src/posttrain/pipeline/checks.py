"""What is refused before any work: what the configuration and the model's files say, data and suites that are not there, gates that cannot decide, models that do not fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.config.advice import Advised, advise
from posttrain.config.kinds import stage_kind
from posttrain.config.pipeline import GateKeys, PipelineKeys, SuiteKeys
from posttrain.config.rl import RLKeys
from posttrain.data.load import read_nouns
from posttrain.errors import ConfigError, ModelError
from posttrain.evals.suite import Suite, load_suite
from posttrain.gate.decide import plan_lines
from posttrain.gate.spec import RESERVE_SPLIT, SELECTION_SPLIT
from posttrain.models.device import place
from posttrain.models.load import load_config, model_shape
from posttrain.models.stored import stored_dtype
from posttrain.pipeline.before_data import check_before_data, gates_of
from posttrain.pipeline.selection import spec_of, without_dev
from posttrain.planner.fit import cannot_fit, fits, shortfall
from posttrain.planner.machine import available_bytes
from posttrain.planner.memory import estimate_memory
from posttrain.planner.shape import ModelShape
from posttrain.planner.workload import Workload
from posttrain.recipes.measure.evaluate import check_played
from posttrain.recipes.measure.judges import check_judges
from posttrain.recipes.teachers import shapes_beside

log = logging.getLogger(__name__)


def check_all(keys: PipelineKeys) -> dict[str, tuple[Suite, SuiteKeys]]:
    """Everything that can be known before the first step. Returns the suites. Raises: PosttrainError."""
    check_before_data(keys)
    check_memory(keys)
    for stage in keys.stages:
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


def check_memory(keys: PipelineKeys) -> None:
    """Says what is advised about the keys. Raises: ConfigError, in one line, for the first stage that cannot fit here."""
    config = load_config(keys.stages[0].keys)
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
