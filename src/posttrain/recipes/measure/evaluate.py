"""A model folder, suites in, reports out. What was already measured on the same items is not measured again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.config.pipeline import SuiteKeys
from posttrain.config.rollout import RolloutKeys
from posttrain.config.stages import ModelKeys
from posttrain.data.messages import parse_messages, parse_tools
from posttrain.data.render import chat_ids
from posttrain.distributed.ranks import SingleProcess
from posttrain.errors import DataError, EvalError
from posttrain.evals.harness import TaskSuite
from posttrain.evals.run import Evaluator, decoding_of, offered
from posttrain.evals.suite import RANKINGS, Item, Suite
from posttrain.evidence import EvalReport, ItemRecord
from posttrain.files import canonical_json, write_atomic
from posttrain.models.load import load_config, load_tokenizer, missing_chat_template
from posttrain.models.provenance import source_digest
from posttrain.names import ENVIRONMENT, LM_EVAL, QUESTIONS
from posttrain.protocols import Engine, Ranks
from posttrain.recipes.experience.engines import EngineSource, make_engine, named_engine
from posttrain.recipes.experience.episodes import Begin, Episodes, environment_of, environment_spec, sampler
from posttrain.recipes.measure.learned import load_learned
from posttrain.rewards.library import GOLD_COLUMNS
from posttrain.rewards.workers import RewardPool
from posttrain.rollout.sampling import request_seed
from posttrain.types import Completion, Origin, Prompt, Request, SamplingParams, Text

log = logging.getLogger(__name__)

_ROWS = 128
"""Completions decoded at once: evals hold no gradients, so there is room for more than in training."""

EvalProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Asking:
    """Who asks a model, what is shown of it, and what may end it: a call of an engine stands in `ending()`."""

    ranks: Ranks = field(default_factory=SingleProcess)
    progress: EvalProgress = lambda name, done, total: None
    ending: Callable[[], AbstractContextManager[None]] = nullcontext

    def dealt(self, rollout: RolloutKeys) -> bool:
        """Whether each rank asks an engine of its own for its share; a server, or vLLM in a process, is asked by rank 0."""
        return self.ranks.world_size > 1 and rollout.engine == "embedded"


ALONE = Asking()


@dataclass(frozen=True)
class TokenizerCodec:
    """Renders chats with the tokenizer's chat template; without one their texts are lines, and tools are refused."""

    tokenizer: Any

    def encode_prompt(self, prompt: Text, tools: Any = None) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer(prompt)["input_ids"])
        origin = Origin("prompt", 1)
        messages, offered = parse_messages(prompt, origin, "messages"), parse_tools(tools, origin)
        if not missing_chat_template(self.tokenizer):
            return chat_ids(self.tokenizer, messages, offered)
        if offered or any("tool_calls" in message for message in messages):
            raise DataError(
                f"{origin}: the model has no chat template, and tools cannot be written without one; set `chat_template`"
            )
        return self.encode_prompt("\n".join(message["content"] for message in messages))

    def encode_choice(self, prompt: Text, choice: str, tools: Any = None) -> tuple[tuple[int, ...], int]:
        """Text is encoded as one and cut where the prompt alone ends, as in lm-eval; behind a chat stands the choice by itself."""
        if isinstance(prompt, str):
            start = len(self.encode_prompt(prompt.rstrip() or prompt))
            whole = self.encode_prompt(prompt + choice)
            return whole, min(start, len(whole) - 1)
        ids = self.encode_prompt(prompt, tools)
        return (*ids, *self.tokenizer(choice, add_special_tokens=False)["input_ids"]), len(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def _say_if_without_roles(tokenizer: Any, model: str, suite: Suite) -> None:
    chats = sum(not isinstance(item.prompt, str) for item in suite.items)
    if chats and missing_chat_template(tokenizer):
        log.warning(
            "%s has no chat template: the messages of suite %s (%d items) are asked as plain lines, without their roles",
            model, suite.name, chats,
        )  # fmt: skip


def evaluate(
    model: ModelKeys,
    suites: Sequence[tuple[Suite, SuiteKeys]],
    split: str,
    folder: Path,
    asking: Asking = ALONE,
    *,
    order: int = 0,
    digest: str | None = None,
    rollout: RolloutKeys | None = None,
) -> dict[str, EvalReport]:
    """Reports by suite, written to `folder/<suite>-<split>/`. The model is loaded only if one is missing there.

    Of a split such as `gate+reserve` only what the report on `gate` does not hold yet is measured. Another `order` asks
    in another order and in smaller batches. `digest` is the model's, where it is known; `rollout` the engine that answers, ours where none is named.
    All ranks of `asking` call it.
    """
    how, ranks = rollout or RolloutKeys(), asking.ranks
    if ranks.world_size > 1 and not asking.dealt(how):
        alone = replace(asking, ranks=SingleProcess())
        work = partial(evaluate, model, suites, split, folder, alone, order=order, digest=digest, rollout=rollout)
        return ranks.main_only(work)
    digest = digest or source_digest(model.base_model)
    engine = named_engine(how)
    reports = ranks.main_only(partial(_measured, suites, split, folder, (digest, engine)))
    missing = [(suite, keys) for suite, keys in suites if suite.name not in reports]
    if missing:
        rows = _ROWS if not order else _ROWS // 4
        with ExitStack() as held:
            tokenizer, own = load_tokenizer(model), held.enter_context(closing(OwnScorers()))
            of = _Measuring(model, tokenizer, own, rollout, rows, folder, digest)
            evaluator = _loaded(of, asking, held)
            for suite, keys in missing:
                check_played(suite, keys)
                _say_if_without_roles(tokenizer, model.base_model, suite)
                known = ranks.main_only(partial(_known, suite, keys, split, folder, (digest, engine)))
                with closing(environment_of(keys)) as environment:
                    _, episodes = sampler(environment, evaluator.engine, tokenizer, None, keys)
                    played = with_episodes(evaluator, episodes) if episodes else evaluator
                    report = reports[suite.name] = played.run(suite, keys, split, known=known, order=order)
                ranks.main_only(partial(_save, report, suite, folder / f"{suite.name}-{split}"))
    return {suite.name: reports[suite.name] for suite, _ in suites}


@dataclass(frozen=True)
class _Measuring:
    """A model to be measured, and the engine for it."""

    model: ModelKeys
    tokenizer: Any
    own: OwnScorers
    rollout: RolloutKeys | None
    rows: int
    folder: Path
    digest: str


def _save(report: EvalReport, suite: Suite, folder: Path) -> None:
    report.save(folder)
    if str(suite.path).startswith(LM_EVAL):
        _keep_questions(suite, report.split, folder)


def check_played(suite: Suite, keys: SuiteKeys) -> None:
    """Raises: EvalError for a suite whose items nobody samples an answer to, ConfigError for what cannot be played with."""
    check_paid(suite, keys.env)
    if not keys.plays:
        return
    if str(suite.path).startswith(LM_EVAL) or suite.scorer in RANKINGS:
        what = "a task of lm-eval" if str(suite.path).startswith(LM_EVAL) else f"scored by ranking ({suite.scorer})"
        raise EvalError(
            f"evals.{suite.name}: env and tools answer turns of a sampled answer, and this suite is {what}; leave them out"
        )
    environment_spec(keys).check()


def check_paid(suite: Suite, env: str | None) -> None:
    """Raises: EvalError for a suite that is scored by an environment, where there is none."""
    if suite.scorer == ENVIRONMENT and env is None:
        raise EvalError(
            f"{suite.path}: its scorer {ENVIRONMENT!r} is what an environment pays, and it is answered without one; set `env` beside the suite in the YAML"
        )


def with_episodes(evaluator: Evaluator, episodes: Episodes) -> Evaluator:
    """The same, each item answered by an episode."""

    def play(items: Sequence[Item], requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        begins = [
            Begin(_prompt_of(item, episodes.tools), request, request_seed("env", request.seed))
            for item, request in zip(items, requests, strict=True)
        ]
        return episodes.play(begins, params)

    return replace(evaluator, play=play, tools=episodes.tools)


def _prompt_of(item: Item, tools: Sequence[Mapping[str, Any]]) -> Prompt:
    origin = Origin(item.id, 1)
    prompt = item.prompt if isinstance(item.prompt, str) else parse_messages(item.prompt, origin, "messages")
    columns = {**item.columns, "target": item.target}
    return Prompt(origin, prompt, columns, parse_tools(offered(item, tools), origin))


def _keep_questions(suite: Suite, split: str, report: Path) -> None:
    """Beside the report of a task of lm-eval, whose documents are in no file of the project: what was asked, by item."""
    rows = [{"id": item.id, "prompt": item.to_json()["prompt"]} for item in suite.on(split)]
    write_atomic(report / QUESTIONS, "".join(f"{canonical_json(row)}\n" for row in rows))


def summary(reports: Mapping[str, EvalReport]) -> str:
    return ", ".join(f"{name} {report.mean:.3f}" for name, report in reports.items())


def _is_of(report: EvalReport, model_digest: str, suite_digest: str, engine: str) -> bool:
    return (report.model_digest, report.suite_digest, report.engine) == (model_digest, suite_digest, engine)


def _known(suite: Suite, keys: SuiteKeys, split: str, folder: Path, measured: tuple[str, str]) -> dict[str, ItemRecord]:
    """Records of the first of several splits, if this model was measured on it as it is now, by this engine."""
    first = split.split("+")[0]
    report = _stored(folder / f"{suite.name}-{first}") if first != split else None
    if report is None:
        return {}
    model_digest, engine = measured
    same = _is_of(report, model_digest, suite.digest(first, decoding_of(keys)), engine)
    return {item.id: item for item in report.items} if same else {}


def _loaded(of: _Measuring, asking: Asking, held: ExitStack) -> Evaluator:
    """With an engine on every rank, which `held` closes."""
    engines: list[Engine] = []

    def load() -> None:
        with asking.ending():
            engine = make_engine(EngineSource(of.model), keys=of.rollout, rows=of.rows, folder=of.folder)
            engines.append(held.enter_context(closing(engine)))

    asking.ranks.each(load)
    (engine,) = engines

    def ask_task(suite: TaskSuite, keys: SuiteKeys) -> Iterable[ItemRecord]:
        from posttrain.recipes.measure.harness import ask

        return ask(suite, keys, engine, of.tokenizer, load_config(of.model))

    return Evaluator(
        engine, TokenizerCodec(of.tokenizer), of.digest, request_seed, asking.progress, of.own, ask_task,
        ranks=asking.ranks, ending=asking.ending,
    )  # fmt: skip


def _measured(
    suites: Sequence[tuple[Suite, SuiteKeys]], split: str, folder: Path, measured: tuple[str, str]
) -> dict[str, EvalReport]:
    """The reports in `folder` on this model, by this engine."""
    reports: dict[str, EvalReport] = {}
    for suite, keys in suites:
        report = _stored(folder / f"{suite.name}-{split}")
        if report is not None and _is_of(report, measured[0], suite.digest(split, decoding_of(keys)), measured[1]):
            reports[suite.name] = report
    return reports


class OwnScorers:
    """Suites' own scorers, which have the signature of a reward or are a model's opinion, started once each. `target` is a column,
    under every name that a dataset may call it by: what paid in training scores here as it stands."""

    def __init__(self) -> None:
        self._pools: dict[tuple[Path, str, str], RewardPool] = {}

    def __call__(
        self, suite: Suite, items: Sequence[Item], texts: Sequence[str]
    ) -> Sequence[tuple[float | None, str | None]]:
        """Of one completion of each item."""
        names = dict.fromkeys(name for item in items for name in item.columns)
        targets = [item.target for item in items]
        columns: dict[str, list[Any]] = dict.fromkeys(GOLD_COLUMNS, targets)
        columns |= {name: [item.columns.get(name) for item in items] for name in names} | {"target": targets}
        prompts = [item.prompt if isinstance(item.prompt, str) else [dict(m) for m in item.prompt] for item in items]
        completions: list[Any] = [
            text if isinstance(item.prompt, str) else [{"role": "assistant", "content": text}]
            for item, text in zip(items, texts, strict=True)
        ]
        pool = self._pool(suite)
        return [(found.total, found.error) for found in pool.score(prompts, completions, columns)]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def _pool(self, suite: Suite) -> RewardPool:
        folder, options = suite.path.parent, suite.scorer_kwargs
        place = (folder, suite.scorer, canonical_json(options))
        if place not in self._pools:
            kwargs = {suite.scorer: options} if options else None
            self._pools[place] = RewardPool([suite.scorer], kwargs=kwargs, folder=folder, load=load_learned)
        return self._pools[place]


def _stored(folder: Path) -> EvalReport | None:
    """A report from an earlier start; one that does not match its items is measured again."""
    if not (folder / "report.json").exists():
        return None
    try:
        return EvalReport.load(folder)
    except (OSError, ValueError, TypeError, KeyError):
        return None
