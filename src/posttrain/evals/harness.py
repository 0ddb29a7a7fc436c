"""Tasks of lm-eval as suites: `lm-eval:arc_easy`, `lm-eval:./tasks/mine.yaml`, either with `?num_fewshot=5&metric=acc_norm`.

Needs the extra `[eval]`. What asks a model with them is `posttrain.recipes.measure.harness`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from posttrain.config.hub import prepare
from posttrain.errors import EvalError, MissingExtraError
from posttrain.evals.suite import Item, Suite
from posttrain.files import digest_json
from posttrain.names import LM_EVAL
from posttrain.numerics import installed_version

_FEWSHOT_SEED = 1234
"""lm-eval's own default, so that its command asks with the same examples."""


@dataclass(frozen=True)
class TaskSpec:
    """A task by name or by its YAML, and how it is asked. `metric` and `filter`: lm-eval's own, its first where nothing is said."""

    task: str
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    metric: str = ""
    filter: str = ""

    @staticmethod
    def parse(text: str, where: str) -> TaskSpec:
        """Raises: EvalError for an option that there is not."""
        task, _, query = text.removeprefix(LM_EVAL).partition("?")
        options: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
        known = {
            "num_fewshot": _number,
            "apply_chat_template": _flag,
            "fewshot_as_multiturn": _flag,
            "metric": str,
            "filter": str,
        }
        for name, value in options.items():
            if name not in known:
                raise EvalError(f"{where}: {text}: no option {name}; expected {', '.join(known)}")
            try:
                options[name] = known[name](value)
            except (ValueError, KeyError):
                raise EvalError(f"{where}: {text}: {name}={value}; expected a number, or true or false") from None
        return TaskSpec(task, **options)


def _number(text: str) -> int:
    return int(text)


def _flag(text: str) -> bool:
    return {"true": True, "false": False}[text]


@dataclass(frozen=True, slots=True)
class TaskSuite(Suite):
    """A suite whose items are the documents of a task, all in the split `gate`; lm-eval asks and scores."""

    task: Any
    spec: TaskSpec

    def scorer_digest(self) -> str:
        """Of the task's YAML with the source of its functions, of how it is asked, and of lm-eval."""
        config = {name: value for name, value in self.task.dump_config().items() if name != "metadata"}
        asked = [
            self.spec.num_fewshot,
            self.spec.apply_chat_template,
            self.spec.fewshot_as_multiturn,
            self.spec.metric,
            self.spec.filter,
        ]
        return digest_json([installed_version("lm_eval"), json.dumps(config, sort_keys=True, default=str), asked])


def load_task_suite(name: str, text: str) -> TaskSuite:
    """Raises: EvalError for a task that there is not, that cannot be fetched, or that gives no score to an item."""
    where = f"evals.{name}"
    spec = TaskSpec.parse(text, where)
    task = _loaded(spec, where)
    metrics = [entry["metric"] for entry in task.config.metric_list or ()]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise EvalError(
            f"{where}: {text}: the perplexity of a text is no score of an item, which a gate compares; name another task"
        )
    if spec.metric and spec.metric not in map(str, metrics):
        raise EvalError(f"{where}: {text}: the task has no metric {spec.metric}; it has {', '.join(map(str, metrics))}")
    asked = f"{LM_EVAL}{text.removeprefix(LM_EVAL).rpartition('/')[2]}"
    items = tuple(_item(task, number, doc, asked) for number, doc in enumerate(task.eval_docs))
    if not items:
        raise EvalError(f"{where}: {text}: the task has no documents")
    return TaskSuite(name, Path(text), items, task, spec)


def _loaded(spec: TaskSpec, where: str) -> Any:
    if find_spec("lm_eval") is None:
        raise MissingExtraError(f"{where}: lm-eval's tasks need it; install it with: pip install 'posttrain[eval]'")
    is_file = spec.task.endswith((".yaml", ".yml"))
    unreachable = "" if is_file else prepare()
    manager = _task_manager(not is_file)
    if not is_file and spec.task not in manager.task_index:
        raise EvalError(
            f"{where}: lm-eval has no task {spec.task!r}; `lm_eval ls tasks` lists them, and a task of your own is a .yaml"
        )
    try:
        found = manager.load(spec.task)
    except Exception as error:  # a task's own code, and the hub's client, raise what they like
        said = " ".join(str(error).split())[:300]
        cause = f"the hub cannot be reached ({unreachable}), and its data is not cached here" if unreachable else said
        raise EvalError(f"{where}: the data of lm-eval's task {spec.task} cannot be had: {cause}") from error
    tasks = list(found["tasks"].values())
    if len(tasks) != 1:
        raise EvalError(
            f"{where}: {spec.task} is a group of {len(tasks)} tasks; make one suite of each: {', '.join(sorted(found['tasks'])[:8])}, …"
        )
    if getattr(tasks[0], "UNSAFE_CODE", False):
        raise EvalError(f"{where}: {spec.task} runs what a model writes outside of any sandbox; it is not run here")
    tasks[0].set_fewshot_seed(seed=_FEWSHOT_SEED)
    if spec.num_fewshot is not None:
        tasks[0].set_config(key="num_fewshot", value=spec.num_fewshot)
    elif tasks[0].get_config("num_fewshot") is None:
        tasks[0].set_config(key="num_fewshot", value=0)
    return tasks[0]


@cache
def _task_manager(with_defaults: bool) -> Any:
    """lm-eval reads all its thousands of files to know their names."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_defaults)


def _item(task: Any, number: int, doc: Mapping[str, Any], text: str) -> Item:
    """The question without its few-shot examples: what pairs two models' answers, and what training data must not hold."""
    choices = [str(choice) for choice in task.doc_to_choice(doc)] if task.config.doc_to_choice is not None else []
    asked, target = task.doc_to_text(doc), task.doc_to_target(doc)
    prompt = choices[asked] if isinstance(asked, int) and choices else str(asked)
    right = (
        choices[target]
        if isinstance(target, int) and 0 <= target < len(choices)
        else json.dumps(target)
        if isinstance(target, list)
        else str(target)
    )
    columns = {"doc": json.loads(json.dumps(doc, default=str))}
    return Item(str(number), prompt, right, text, "gate", None, tuple(choices), columns)
