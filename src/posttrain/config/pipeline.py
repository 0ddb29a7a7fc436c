"""The keys of a pipeline: stages and what surrounds them."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Literal, cast

from pydantic import SerializeAsAny, field_validator, model_validator

from posttrain.config.episodes import EpisodeKeys
from posttrain.config.kinds import STAGE_KINDS, stage_kind
from posttrain.config.knob import Keys, knob
from posttrain.config.rollout import OF_TRAINING, RolloutKeys
from posttrain.config.stages import TrainKeys
from posttrain.names import FREE, REPOSITORY, STRICT, NameRule, kept_alias


def _checked(rule: NameRule, value: str) -> str:
    if reason := rule.against(value):
        raise ValueError(reason)
    return value


# fmt: off
# One key a line: the tables below are read down, not across.


class SuiteKeys(EpisodeKeys):
    """An eval suite: a path alone, or a path with how to sample."""

    path: str = knob(..., "A JSONL suite, relative to the YAML, or a task of lm-eval (`lm-eval:arc_easy`, `lm-eval:./tasks/mine.yaml`).", example="evals/heldout.jsonl")
    num_samples: int = knob(1, "Completions per item (K); pass@k is reported for k ≤ K.", ge=1)
    temperature: float = knob(0.0, "0 is greedy.", ge=0)
    max_tokens: int = knob(256, "Longest answer in tokens.", ge=1)
    seed: int = knob(0, "Seed of the sampling.", ge=0)


class GuardKeys(Keys):
    """A suite on which the candidate must not be worse than the baseline by more than `margin`."""

    suite: str = knob(..., "Name of a suite in `evals`.", example="heldout")
    margin: float = knob(..., "Largest tolerated loss, in the suite's score units.", gt=0, example=0.02)
    discordance: float | None = knob(None, "Assumed share of items on which the two models differ on this suite; null takes the gate's.", gt=0, le=1)


class PrimaryKeys(Keys):
    """A suite on which the candidate must be better than the baseline by more than `min_delta`."""

    suite: str = knob(..., "Name of a suite in `evals`.", example="heldout")
    min_delta: float = knob(0.0, "Smallest gain worth shipping, in the suite's score units.", ge=0)
    discordance: float | None = knob(None, "Assumed share of items on which the two models differ on this suite; null takes the gate's.", gt=0, le=1)


class OnFailKeys(Keys):
    """Loop back instead of promoting."""

    retry: str | int = knob(..., "Stage to run again: its kind, or its place counted from 1.", example="sft")
    times: int = knob(1, "At most so many times.", ge=1)
    with_: dict[str, Any] = knob({}, "Keys of that stage to change for the retry.", alias="with", example={"num_train_epochs": 3})

    @field_validator("retry")
    @classmethod
    def _is_a_kind(cls, retry: str | int) -> str | int:
        if isinstance(retry, str) and retry not in STAGE_KINDS:
            raise ValueError(f"got {retry!r}, expected one of {', '.join(STAGE_KINDS)} or an integer")
        return retry


class LimitKeys(Keys):
    """What the candidate's answers must not exceed on any suite of the gate; exceeding one is FAIL. null is off."""

    truncated: float | None = knob(None, "Largest share of answers that may be cut off at `max_tokens`.", ge=0, le=1, example=0.1)
    length_ratio: float | None = knob(None, "Largest mean number of tokens of an answer, as a multiple of the baseline's.", gt=0, example=2.0)
    errors: float | None = knob(None, "Largest share of items that may end in an error, each then counting as wrong; null makes any error INVALID.", ge=0, le=1, example=0.01)


class GateKeys(Keys):
    """A gate: what must hold before a model goes on."""

    baseline: str = knob("alias:champion", "`alias:NAME`, `stage:base`, `stage:N`, or a path; without a champion yet, `stage:base`.")
    guards: list[GuardKeys] = knob([], "Suites that must not get worse; each is tested at full alpha (intersection-union).", example=[{"suite": "format", "margin": 0.02}])
    primary: list[PrimaryKeys] = knob([], "Suites that must get better; tested in fixed sequence, after the guards.", example=[{"suite": "heldout", "min_delta": 0.05}])
    alpha: float = knob(0.05, "One-sided level of every test.", gt=0, lt=0.5)
    power: float = knob(0.8, "Power at which the number of items is planned.", gt=0, lt=1)
    discordance: float = knob(0.2, "Assumed share of items on which the two models differ, for planning.", gt=0, le=1)
    icc: float = knob(0.1, "Assumed correlation of the differences within a cluster, for planning.", ge=0, lt=1)
    looks: int = knob(0, "Verdicts allowed on the same items, alpha being spent over them; 0 is no limit, each at full alpha.", ge=0)
    limits: LimitKeys = knob(LimitKeys(), "What the candidate's answers must not exceed on any suite, whatever they score.", example={"truncated": 0.1})
    split: str = knob("gate", "Split of the suites that the verdict is made on; retries and `stop_when: gate_passes` choose on the split `dev`.")
    aa: int = knob(0, "Evaluations of the baseline against itself, with another batch order and seed, before it is compared; a difference blocks.", ge=0)
    on_fail: OnFailKeys | Literal["stop"] = knob("stop", "`stop`, or `{retry: STAGE, times: N, with: {…}}` to run a stage again with changed keys.")
    on_inconclusive: Literal["stop", "continue", "extend", "escalate"] = knob("stop", "`continue` lets later stages run; `extend` judges once more with the items of the split `reserve`; `escalate` waits for a person (`posttrain gate decide`).")
    approve: int = knob(0, "People who must approve before a model goes on, also after PASS, each with name and reason (`posttrain gate decide`); 0 asks nobody.", ge=0, example=2)

    @field_validator("split")
    @classmethod
    def _split_is_a_name(cls, split: str) -> str:
        return _checked(FREE, split)

    @field_validator("baseline")
    @classmethod
    def _alias_is_a_name(cls, baseline: str) -> str:
        kind, _, alias = baseline.partition(":")
        if kind == "alias":
            _checked(STRICT, alias)
        return baseline

    @model_validator(mode="after")
    def _says_something(self) -> GateKeys:
        if not self.guards and not self.primary:
            raise ValueError("a gate needs at least one entry in guards or primary")
        return self


class RegisterKeys(Keys):
    """Where a model that passed goes."""

    name: str = knob(..., "Name of the registered model.", example="word-problems")
    alias: str = knob("champion", "Alias to promote to.")
    registry: str = knob("registry", "Folder of the registry, relative to the YAML.")
    data: Literal["reference", "store"] = knob("reference", "What is kept of the files that stages read: their digests, or (`store`) the files too, so that `posttrain reproduce --level 2` needs no project.")
    hub_model_id: str | None = knob(None, "Repository of the Hugging Face hub (`OWNER/NAME`) that a version is pushed to once it took its alias, with its card; the token is in `HF_TOKEN`.", example="lab/words")
    license: str | None = knob(None, "Licence of the model, for its card; null takes what the model card of a local base says.", example="apache-2.0")

    @field_validator("name", "alias")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        return _checked(STRICT, name)

    @field_validator("hub_model_id")
    @classmethod
    def _is_a_repository(cls, repo: str | None) -> str | None:
        if repo is not None:
            _checked(REPOSITORY, repo)
        return repo

    @field_validator("alias")
    @classmethod
    def _can_be_set(cls, alias: str) -> str:
        if reason := kept_alias(alias):
            raise ValueError(reason)
        return alias


NoticeEvent = Literal["pending", "held", "mirror_failed", "finished"]
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class NotifyKeys(Keys):
    """A hook that is told what becomes of a run: a URL that each notice is POSTed to, or a command. A variable is named; its value stands in no file."""

    url_env: str | None = knob(None, "Environment variable with the URL to POST to (JSON with `text`, as chat servers take it).", example="OPS_WEBHOOK")
    token_env: str | None = knob(None, "Environment variable with a token, sent as `Authorization: Bearer`.", example="OPS_TOKEN")
    command: list[str] | None = knob(None, "Program and arguments, run in the project's folder with the notice on its standard input.", example=["./tell.sh"])
    events: list[NoticeEvent] = knob(["pending", "held", "mirror_failed", "finished"], "What is told: a decision that waits, a model that was registered and got no alias (or a stage on hold), a tracker or hub that did not get all, the end of the run.")
    timeout_s: float = knob(10.0, "Longest time that a hook is given; what it did not take is sent again.", gt=0, le=60)

    @field_validator("url_env", "token_env")
    @classmethod
    def _names_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not _VARIABLE.fullmatch(name):
            raise ValueError("expected the name of an environment variable, such as OPS_WEBHOOK, and not what it holds")
        return name

    @model_validator(mode="after")
    def _is_one_of_two(self) -> NotifyKeys:
        if (self.url_env is None) == (not self.command) or (self.token_env and not self.url_env):
            raise ValueError("expected either url_env (with token_env, if the server wants one) or command")
        return self


class StageKeys(TrainKeys):
    """What a stage has besides when it stands in a pipeline.

    Every model key may stand at the top of the pipeline (it is handed down) or in a stage (which wins).
    """

    gate: GateKeys | None = knob(None, "A gate after this stage.")


class ConfiguredStage(Keys):
    """A stage as it is run: its kind and its keys."""

    kind: str
    keys: SerializeAsAny[StageKeys]

    @field_validator("kind")
    @classmethod
    def _is_a_kind(cls, kind: str) -> str:
        return stage_kind(kind).name


class PipelineKeys(Keys):
    """A whole pipeline."""

    name: str = knob(..., "Name of the run: letters, digits, spaces and . _ -, at most 100.", example="word-problems")
    base_model: str = knob(..., "Where the first stage starts: a local folder, a hub id, or a version of the registry (`NAME@ALIAS`, `NAME@3`, `alias:NAME`).", also="model_name_or_path (TRL, LLaMA-Factory)", example="./base")
    stages: list[ConfiguredStage] = knob(..., "The stages in order; each starts from the one before.", min_length=1, example=[{"sft": {"datasets": [{"path": "data/sft.jsonl"}]}}])
    evals: dict[str, SuiteKeys] = knob({}, "Suites by name: `NAME: path` or `NAME: {path, num_samples, …}`.", example={"heldout": "evals/heldout.jsonl"})
    eval_rollout: RolloutKeys = knob(RolloutKeys(), "The engine that answers the suites; keys as those of `rollout` in a grpo stage. Reports of two engines are never compared.", example={"engine": "vllm"})
    gate: GateKeys | None = knob(None, "The gate after the last stage.")
    register_: RegisterKeys | None = knob(None, "Where a model that passed is registered.", alias="register")
    notify: dict[str, NotifyKeys] = knob({}, "Hooks by name that are told what becomes of the run.", example={"ops": {"url_env": "OPS_WEBHOOK"}})
    stop_when: Literal["end", "gate_passes"] = knob("end", "`gate_passes` judges every stage and ends at the first that passes.")
    allow_raw_base: bool = knob(False, "Let DPO or RL start on a base that was never tuned to answer.")
    output_dir: str = knob("", "Folder of the run, relative to the YAML; empty means `runs/NAME` with the name of the pipeline.", example="runs/first")
    seed: int = knob(42, "Every random choice follows from this seed; handed down to the stages.", ge=0)

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        return _checked(FREE, name)

    @field_validator("eval_rollout")
    @classmethod
    def _has_no_trainer(cls, rollout: RolloutKeys) -> RolloutKeys:
        for name, value in rollout.given(*OF_TRAINING):
            raise ValueError(f"eval_rollout.{name}: {value} does nothing, for evals train nothing; remove it, or set it in the rollout of a grpo stage")
        return rollout

    @field_validator("evals", "notify")
    @classmethod
    def _have_names(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            _checked(FREE, name)
        return named


# fmt: on


def in_pipeline(kind: str) -> type[StageKeys]:
    """The keys of a stage of this kind in a pipeline. Raises: ConfigError if there is no such kind."""
    return _with_gate(stage_kind(kind).keys)


def kinds_in_pipeline() -> list[type[StageKeys]]:
    """Those of every kind."""
    return [in_pipeline(kind) for kind in STAGE_KINDS]


@cache
def _with_gate(keys: type[TrainKeys]) -> type[StageKeys]:
    name = f"{keys.__name__.removesuffix('Keys')}StageKeys"
    bases: tuple[Any, ...] = (keys, StageKeys)
    return cast("type[StageKeys]", type(name, bases, {"__doc__": keys.__doc__, "__module__": __name__}))
