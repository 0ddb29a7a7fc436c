"""What a run refuses by its configuration and its models' files alone, before any row is read: `run`, every stage, `plan` and `import` ask the same list."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from posttrain.config.episodes import EpisodeKeys
from posttrain.config.pipeline import GateKeys, PipelineKeys
from posttrain.config.ppo import PPOKeys
from posttrain.config.preference import PreferenceKeys
from posttrain.config.rl import RewardedKeys, RLKeys, SamplingKeys
from posttrain.config.stages import ModelKeys, TrainKeys
from posttrain.config.starting import OF_THE_GIVEN
from posttrain.data.lint import limits_of
from posttrain.errors import ConfigError
from posttrain.grading.learned import named_stage
from posttrain.health.rules import rules_for
from posttrain.models.continued import base_keys, is_continued
from posttrain.models.device import place
from posttrain.models.load import (
    load_config,
    load_tokenizer,
    missing_chat_template,
    refuse_missing_weights,
    refuse_other_media,
    refuse_without_bitsandbytes,
)
from posttrain.models.provenance import was_tuned_by_us
from posttrain.models.routing import refuse_other_routers
from posttrain.models.skeleton import check_loads
from posttrain.models.stored import refuse_quantised
from posttrain.pipeline.data_checks import with_templates
from posttrain.pipeline.pins import with_given
from posttrain.recipes.critic import refuse_other_critic
from posttrain.recipes.dpo import check_compared_rows
from posttrain.recipes.experience.call_syntax import refuse_unread_calls
from posttrain.recipes.experience.engines import interruption, refuse_not_served, refuse_untold_experts
from posttrain.recipes.experience.episodes import environment_spec
from posttrain.recipes.kinds import OBJECTIVES
from posttrain.recipes.measure.judges import check_judges
from posttrain.recipes.teachers import refuse_other_vocabulary
from posttrain.rewards.resolve import check_spec
from posttrain.tracking.trackers import require_tracker

log = logging.getLogger(__name__)


def check_before_data(keys: PipelineKeys, *, here: bool = True) -> None:
    """Ask every check; those of this machine only where it trains `here`. Raises: PosttrainError."""
    for check in (*BEFORE_DATA, *(ON_THIS_MACHINE if here else ())):
        check(keys)


def check_rewards_named(keys: PipelineKeys) -> None:
    """Raises: ConfigError for a judge's file, or a reward that nothing defines."""
    for stage in keys.stages:
        if isinstance(stage.keys, RLKeys):
            check_judges(stage.keys.reward_funcs)
            for spec in stage.keys.reward_funcs:
                if named_stage(spec) is None:  # that of an earlier stage is not there yet
                    check_spec(spec)


def check_base_model(keys: PipelineKeys) -> None:
    """Raises: ModelError for a model that is not of text alone, or quantised, or whose choices of experts are asked for and not known."""
    config = load_config(keys.stages[0].keys)
    refuse_other_media(keys.stages[0].keys, config)
    for stage in keys.stages:
        refuse_quantised(stage.keys, config)
        if isinstance(stage.keys, SamplingKeys) and (how := stage.keys.rollout.routed_experts) != "off":
            refuse_other_routers(config, how, keys.base_model)


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
    """Raises: ConfigError where a later stage says other than the first what is given."""
    first = keys.stages[0].keys
    for number, stage in enumerate(keys.stages, start=1):
        for name in OF_THE_GIVEN:
            said, given = getattr(stage.keys, name), getattr(first, name)
            if said not in (None, given):
                raise ConfigError(
                    f"stages.{number}.{stage.kind}.{name}: {said}, and stage 1 has {given}; it is about the model that the pipeline starts "
                    "from: set it in stage 1, or beside `stages`"
                )


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


def check_models(keys: PipelineKeys) -> None:
    """Raises: ModelError where the tokenizer, or what is trained of the model, is not what its files have."""
    for index, (stage, template, kwargs) in enumerate(with_templates(keys), start=1):
        tokenizer = load_tokenizer(stage.model_copy(update={"chat_template": template, "chat_template_kwargs": kwargs}))
        if isinstance(stage, EpisodeKeys) and stage.tools:
            refuse_unread_calls(tokenizer)
        if index == 1:  # later ones may have tokens that were added before
            check_beside(stage, tokenizer)
        starts = with_given(keys, index, stage)
        # An adapter that an earlier stage will make is not there yet.
        if index == 1 or stage.adapter_start != "continue":
            check_loads(starts, tokenizer)


def check_beside(keys: TrainKeys, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: ModelError for a teacher or a critic that reads other tokens; ConfigError where a phrase leaves no room for an answer."""
    if isinstance(keys, SamplingKeys):
        for number, teacher in enumerate(keys.teachers, start=1):
            refuse_other_vocabulary(number, teacher, keys, tokenizer)
    if isinstance(keys, PPOKeys):
        refuse_other_critic(keys, tokenizer)
    if isinstance(keys, RewardedKeys):
        interruption(keys, tokenizer)


def check_stages(keys: PipelineKeys) -> None:
    """Raises: ConfigError for keys that a stage's loop does not take together, or that name what there is not."""
    for index, stage in enumerate(keys.stages, start=1):
        if isinstance(stage.keys, EpisodeKeys) and stage.keys.plays:
            environment_spec(stage.keys).check()
        limits_of(stage.keys.lint)
        rules_for(stage.kind, stage.keys.health)
        if stage.kind in OBJECTIVES:
            OBJECTIVES[stage.kind](stage.keys)
        if isinstance(stage.keys, PreferenceKeys) and stage.keys.row_kind == "labels":
            check_compared_rows(stage.keys.rows_per_step(1))
        if isinstance(stage.keys, SamplingKeys) and stage.keys.rollout.engine != "embedded":
            refuse_not_served(with_given(keys, index, stage.keys), stage.keys.rollout.engine)


def check_verdicts(keys: PipelineKeys) -> None:
    """Raises: ConfigError for two verdicts after one stage, or a baseline that nothing says where to look for."""
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


def gates_of(keys: PipelineKeys) -> list[GateKeys]:
    return [gate for gate in (*(stage.keys.gate for stage in keys.stages), keys.gate) if gate is not None]


def check_machine(keys: PipelineKeys) -> None:
    """Raises: ConfigError for a device that is not here, or on which an engine does not do what is asked; ModelError for a library or weights that are not."""
    for stage in keys.stages:
        placement = place(stage.keys)
        if isinstance(stage.keys, SamplingKeys):
            refuse_untold_experts(stage.keys.rollout, placement.device.type)
        refuse_without_bitsandbytes(stage.keys)
    refuse_missing_weights(keys.stages[0].keys)


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


BEFORE_DATA: tuple[Callable[[PipelineKeys], None], ...] = (
    check_rewards_named, check_base_model, check_order, check_given, check_adapters, check_models, check_verdicts, check_stages,
)  # fmt: skip
"""What is the same wherever it trains."""
ON_THIS_MACHINE: tuple[Callable[[PipelineKeys], None], ...] = (check_machine, check_trackers)
"""What depends on what is installed and built in."""
