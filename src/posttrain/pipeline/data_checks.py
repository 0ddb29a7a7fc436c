"""What the stages would train on and be paid by, checked before the first of them starts; lint is kept beside each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.config.pipeline import PipelineKeys
from posttrain.config.resolved import to_data
from posttrain.config.rl import RLKeys
from posttrain.config.stages import TrainKeys
from posttrain.config.starting import OF_THE_GIVEN
from posttrain.data.dataset import sequences
from posttrain.data.held_out import load_eval_sets
from posttrain.data.lint import LintReport, lint_stage
from posttrain.data.lint_input import plain_text
from posttrain.data.load import LOADERS
from posttrain.files import digest_json, write_json
from posttrain.grading.learned import check_learned_options, named_stage
from posttrain.models.load import load_config, load_tokenizer
from posttrain.models.vocabulary import check_ids
from posttrain.names import reward_names
from posttrain.pipeline.selection import Suites
from posttrain.pipeline.state import DONE, RunState
from posttrain.recipes.experience.golds import gold_check
from posttrain.recipes.measure.certify import check_ahead, require
from posttrain.rewards.resolve import options_by_name


def check_rewards_ahead(keys: PipelineKeys, state: RunState | None, say: Callable[[str], None]) -> None:
    """Check the rewards of each RL stage that has another one to wait for; its certificate is made when that is done.

    Raises: RewardError.
    """
    for index, (stage, template, kwargs) in enumerate(with_templates(keys), start=1):
        if isinstance(stage, RLKeys):
            _check_options_of_stages(stage)
        before = None if state is None else state.stage(index - 1)
        next_to_start = index == 1 or (before is not None and before.status == DONE)
        if isinstance(stage, RLKeys) and stage.reward_check != "off" and not next_to_start:
            if all(named_stage(spec) is not None for spec in stage.reward_funcs):
                say(f"rewards of stage {index}: checked when the stage that trains them is done")
                continue
            with_template = stage.model_copy(update={"chat_template": template, "chat_template_kwargs": kwargs})
            certificate = check_ahead(with_template)
            say(
                f"rewards of stage {index}: {certificate.verdict} before any training, without completions of its policy"
            )
            require(certificate)


def _check_options_of_stages(keys: RLKeys) -> None:
    """Options of rewards that earlier stages train would be read only then. Raises: ConfigError."""
    options = options_by_name(keys.reward_kwargs)
    for name, spec in zip(reward_names(keys.reward_funcs), keys.reward_funcs, strict=True):
        if named_stage(spec) is not None and name in options:
            check_learned_options(name, spec, options[name])


def with_templates(keys: PipelineKeys) -> Iterator[tuple[TrainKeys, str | None, dict[str, Any]]]:
    """Each stage's keys with its chat template; without one of its own it has that of the stage before, saved with it."""
    template: str | None = None
    kwargs: dict[str, Any] = {}
    given = {name: getattr(keys.stages[0].keys, name) for name in OF_THE_GIVEN}
    for stage in keys.stages:
        kwargs = {**({} if stage.keys.chat_template else kwargs), **stage.keys.chat_template_kwargs}
        template = stage.keys.chat_template or template
        yield stage.keys.model_copy(update=given), template, kwargs


class DataChecks:
    """Each set of keys is linted once per process."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._done: dict[str, LintReport] = {}

    def check_stages(self, keys: PipelineKeys, suites: Suites) -> None:
        """Raises: DataError for what must not be trained on; ConfigError for a lint that does not exist."""
        for stage, template, kwargs in with_templates(keys):
            self._report(stage, suites, template, kwargs).raise_if_refused()

    def check_stage(self, keys: TrainKeys, suites: Suites, folder: Path | None) -> None:
        """The same for one stage as it is about to run; writes `lint.json` into `folder`. Raises: DataError, ConfigError."""
        report = self._report(keys, suites, keys.chat_template, keys.chat_template_kwargs)
        if folder is not None:
            write_json(folder / "lint.json", report.to_json())
        report.raise_if_refused()

    def _report(self, keys: TrainKeys, suites: Suites, template: str | None, kwargs: Mapping[str, Any]) -> LintReport:
        name = digest_json({key: value for key, value in to_data(keys).items() if key != "base_model"})
        if name not in self._done:
            self._done[name] = lint_keys(
                keys.model_copy(update={"chat_template": template, "chat_template_kwargs": kwargs}), suites
            )
            for line in self._done[name].notes():
                self._say(f"lint {keys.row_kind}: {line}")
        return self._done[name]


def lint_keys(keys: TrainKeys, suites: Suites) -> LintReport:
    """Lint one stage's data against the suites, and for RL with its own rewards. Raises: DataError, ConfigError, RewardError."""
    tokenizer: Any = load_tokenizer(keys.model_copy(update={"chat_template": None}))
    own_template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    load = LOADERS[keys.row_kind]
    data = load(keys, tokenizer)
    held_out = load_eval_sets(load, keys, tokenizer).values()
    rows = load_config(keys).get_text_config().vocab_size
    check_ids(
        keys, tokenizer, rows, (sequence for part in (data, *held_out) for row in part for sequence in sequences(row))
    )
    return lint_stage(
        keys,
        tokenizer,
        data,
        suites={name: [plain_text(item.prompt) for item in suite.items] for name, (suite, _) in suites.items()},
        check_golds=gold_check(keys),
        own_template=own_template,
    )
