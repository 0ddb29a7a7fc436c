"""`posttrain init FOLDER`: five questions, and a project that runs, with the lightest stage that serves the goal."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from posttrain.errors import ConfigError, DataError, ModelError

SAMPLES = Path(__file__).with_name("project")
"""What a project starts with where the user has none: rows by goal, and a reward."""
OWN_REWARD = "rewards.py:correct"
ROWS_LOOKED_AT = 200


@dataclass(frozen=True, slots=True)
class Goal:
    """`kind` is the stage that serves it, `keys` what it is given; `by` is what the fourth question asks, empty where nothing is."""

    what: str
    kind: str
    keys: Mapping[str, Any]
    by: str = ""
    sample: str = ""


_FEW = {"num_generations": 8, "num_prompts_per_step": 8, "max_completion_length": 512, "max_steps": 200}
GOALS: dict[str, Goal] = {
    "imitate": Goal("answer as its example rows do, or go on as its texts do", "sft", {"learning_rate": 1e-4, "num_train_epochs": 2}),
    "prefer": Goal("answer more like what was preferred", "dpo", {"learning_rate": 5e-6, "beta": 0.1}),
    "solve": Goal("be right where a program can check the answer", "grpo", {"learning_rate": 1e-5, **_FEW}, "the function that checks: file.py:function, or a name of the library"),
    "distill": Goal("answer as a larger model does", "distill", {"learning_rate": 1e-5, **_FEW, "num_generations": 4}, "the model that teaches: a folder or a hub id", "solve"),
}  # fmt: skip
"""Goal → its row. The order is that in which a goal is guessed from the data."""

LADDER: tuple[Mapping[str, Any], ...] = (
    {"adapter": "lora"},
    {"adapter": "lora", "gradient_checkpointing": True},
    {"adapter": "lora", "gradient_checkpointing": True, "per_device_train_batch_size": 1},
    {"adapter": "qlora", "gradient_checkpointing": True, "per_device_train_batch_size": 1},
)
"""From the fastest to what needs the least memory; the first that fits is taken."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the five questions were answered with; `data` is empty for sample rows."""

    model: str
    data: str
    goal: str
    reward: str
    machine: str


def init(
    folder: Annotated[Path, typer.Argument(help="Folder of the project; made where it is not there.")] = Path("."),
    model: Annotated[str | None, typer.Option(help="A local folder or a hub id.", show_default=False)] = None,
    data: Annotated[
        str | None, typer.Option(help="A file of rows or a hub dataset; `sample` writes a few rows to replace.", show_default=False)
    ] = None,
    goal: Annotated[str | None, typer.Option(help=", ".join(GOALS), show_default=False)] = None,
    reward: Annotated[
        str | None, typer.Option(help="solve: file.py:function or a name of the library; distill: the teacher.", show_default=False)
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="this, cpu, or cards as `plan --gpus` takes them: 1xL4, 8xH100.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take the default of what is left out.")] = False,
) -> None:  # fmt: skip
    """Ask for model, data, goal, reward and machine, and write a project that runs."""
    ask = _Questions(asks=not yes)
    model = model or ask("Model: a local folder or a hub id", "--model")
    data = data or ask("Data: a file of rows or a hub dataset; sample writes a few to replace", "--data", "sample")
    data = "" if data == "sample" else data
    fitting = goals_of(data)
    choices = "; ".join(f"{name}: {row.what}" for name, row in GOALS.items() if name in fitting)
    goal = goal or ask(f"Goal: the model should … ({choices})", "--goal", fitting[0])
    _check_goal(goal, fitting, data, reward)
    by = GOALS[goal].by
    if by and not reward:
        reward = ask(f"Reward: {by}", "--reward", OWN_REWARD if goal == "solve" else None)
    machine = machine or ask("Machine: this, cpu, or cards such as 1xL4 or 8xH100", "--machine", "this")
    for line in write_project(folder, Answers(model, data, goal, reward or "", machine)):
        typer.echo(line)


@dataclass(frozen=True, slots=True)
class _Questions:
    asks: bool

    def __call__(self, question: str, option: str, default: str | None = None) -> str:
        """Raises: ConfigError where there is neither an answer nor a default."""
        line = ""
        if self.asks:
            typer.echo(f"{question}{f' [{default}]' if default else ''}: ", nl=False, err=True)
            line = sys.stdin.readline()
        answer = line.strip() or default
        if answer is None or (self.asks and not line):
            raise ConfigError(
                f"{option} was left out, and there is no answer to read; give it, or --yes for the defaults of the others"
            )
        return answer


def goals_of(data: str) -> list[str]:
    """Goals whose stage reads such rows. Raises: DataError if there is none, or no such file."""
    from posttrain.config.kinds import STAGE_KINDS

    rows = _rows(data)
    if not rows:
        return list(GOALS)
    why: dict[str, str] = {}
    for name, goal in GOALS.items():
        for kind in STAGE_KINDS[goal.kind].rows if goal.kind != "distill" else ("prompts",):
            try:
                _detect(rows, kind)
            except DataError as error:
                why.setdefault(name, str(error))
            else:
                why.pop(name, None)
                break
    if len(why) == len(GOALS):
        raise DataError(next(iter(why.values())))
    return [name for name in GOALS if name not in why]


def _rows(data: str) -> list[Any]:
    """The first rows of a local file; none of a hub dataset, which is read when the project runs."""
    from posttrain.config.datasets import DatasetKeys
    from posttrain.data.opened import read_rows
    from posttrain.data.sources import is_local

    return read_rows(DatasetKeys(path=data, limit=ROWS_LOOKED_AT)) if data and is_local(data) else []


def _detect(rows: list[Any], kind: Any) -> None:
    from posttrain.data.formats import detect_format

    detect_format(rows, kind)


def _check_goal(goal: str, fitting: list[str], data: str, reward: str | None) -> None:
    """Raises: ConfigError."""
    if goal not in GOALS:
        raise ConfigError(f"--goal {goal}: expected one of {', '.join(GOALS)}")
    if goal not in fitting:
        raise ConfigError(
            f"--goal {goal} with {data}: its rows serve {' or '.join(fitting)}; take that, or other data (docs/data-formats.md)"
        )
    if reward and not GOALS[goal].by:
        raise ConfigError(
            f"--reward {reward} with --goal {goal}, which is told by its rows alone; leave it out, or take --goal solve or distill"
        )


def write_project(folder: Path, answers: Answers) -> list[str]:
    """The files of the project, all or none, and what to type next. Raises: ConfigError, DataError, ModelError."""
    from posttrain.config.load_pipeline import load_pipeline

    _check_base(answers)
    _check_answers(answers)
    _check_reward(answers)
    pipeline, kind = folder / "pipeline.yaml", GOALS[answers.goal].kind
    files = _files(answers)
    taken = [name for name in (*files, pipeline.name, "README.md") if os.path.lexists(folder / name)]
    if taken:
        raise ConfigError(f"{folder / taken[0]} is there already; name another folder, or take it away")
    written: list[Path] = []

    def put(name: str, text: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("w" if path in written else "x", encoding="utf-8") as file:
                written.append(path)
                file.write(text)
        except FileExistsError:
            raise ConfigError(f"{path} was made by somebody else just now; name another folder") from None

    try:
        for name, source in files.items():
            put(name, source.read_text(encoding="utf-8"))
        stage = _stage(folder, answers)
        put(pipeline.name, _pipeline(folder, answers, stage))
        rung, found = _fitting(pipeline, kind, answers)
        put(pipeline.name, _pipeline(folder, answers, {**stage, **rung}))
        load_pipeline(pipeline)
        put("README.md", _readme(answers, kind, _name(folder)))
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        for inside in {path.parent for path in written} - {folder}:
            with suppress(OSError):  # somebody has files there
                inside.rmdir()
        raise
    return [*(f"wrote {path}" for path in dict.fromkeys(written)), *found]


def _check_base(answers: Answers) -> None:
    """Raises: ConfigError if the stage would start on a base that never learnt to answer."""
    if answers.goal != "imitate" and _is_raw(answers.model):
        raise ConfigError(
            f"{answers.model} has no chat template, so it was never tuned to answer, and --goal {answers.goal} would mostly see noise; "
            "begin with --goal imitate, and give this goal the model that it makes (runs/NAME/stages/01-sft/model)"
        )


def _is_raw(model: str) -> bool:
    """Whether this is a local base without a chat template. Raises: ConfigError for a tokenizer that cannot be read."""
    place = Path(model).expanduser()
    told = place / "tokenizer_config.json"
    if not place.is_dir() or (place / "chat_template.jinja").exists():
        return False
    try:
        config = json.loads(told.read_bytes()) if told.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{told}: not JSON: {error}; download the model again") from None
    return not isinstance(config, dict) or not cast("dict[str, Any]", config).get("chat_template")


def _check_reward(answers: Answers) -> None:
    """Raises: ConfigError for one that is not there; nothing of it is executed."""
    from posttrain.rewards.resolve import check_spec

    if answers.goal == "solve" and not _own_reward(answers):
        check_spec(answers.reward)


def _own_reward(answers: Answers) -> bool:
    """Whether the project gets a reward of its own."""
    return answers.reward == OWN_REWARD and not Path("rewards.py").exists()


def _check_answers(answers: Answers) -> None:
    """Raises: DataError if the reward that is written has nothing to compare with."""
    columns = {name for _, row in _rows(answers.data) for name in row}
    if _own_reward(answers) and columns and "answer" not in columns:
        raise DataError(
            f"{answers.data}: the reward of a new project compares with a column `answer`, and there is {', '.join(sorted(columns))}; rename it, "
            "or give your own with --reward file.py:function"
        )


def _files(answers: Answers) -> dict[str, Path]:
    """What is copied: where to, and from where."""
    files = {}
    if not answers.data:
        files["data/train.jsonl"] = SAMPLES / f"{GOALS[answers.goal].sample or answers.goal}.jsonl"
    if _brings_a_template(answers):
        files["chat.jinja"] = SAMPLES / "chat.jinja"
    if _own_reward(answers):
        files["rewards.py"] = SAMPLES / "rewards.py"
    return files


def _brings_a_template(answers: Answers) -> bool:
    """Whether conversations are to be rendered for a base that has no chat template; hub models are not looked into."""
    if answers.goal != "imitate" or not _is_raw(answers.model):
        return False
    cells = [cell for _, row in _rows(answers.data) for cell in row.values()]
    return not answers.data or any(isinstance(cell, list) and cell and isinstance(cell[0], dict) for cell in cells)


def _stage(folder: Path, answers: Answers) -> dict[str, Any]:
    goal = GOALS[answers.goal]
    keys: dict[str, Any] = {
        "datasets": [{"path": _place(answers.data, folder) if answers.data else "data/train.jsonl"}]
    }
    if answers.goal == "solve":
        keys["reward_funcs"] = [OWN_REWARD if _own_reward(answers) else _reward(answers.reward, folder)]
    elif answers.goal == "distill":
        keys["teachers"] = [{"model": _place(answers.reward, folder)}]
    elif answers.goal == "prefer" and any("label" in row for _, row in _rows(answers.data)):
        keys["loss_type"] = "kto"
    if _brings_a_template(answers):
        keys["chat_template"] = "chat.jinja"
    if answers.machine == "cpu":
        keys["device"] = "cpu"
    return {**keys, **goal.keys}


def _reward(spec: str, folder: Path) -> str:
    """A reward of the shell as the project's YAML has it."""
    from posttrain.grading.learned import split_learned

    if learned := split_learned(spec):
        return f"{learned[0]}{_place(learned[1], folder)}"
    file, colon, function = spec.rpartition(":")
    return f"{_place(file, folder)}{colon}{function}"


def _place(path: str, folder: Path) -> str:
    """A path of the shell as the project's YAML has it; what is no file here is a name."""
    local = Path(path).expanduser()
    if not path or not local.exists():
        return path
    inside = local.resolve().is_relative_to(folder.resolve())
    return os.path.relpath(local.resolve(), folder.resolve()) if inside else str(local.resolve())


def _name(folder: Path) -> str:
    """The folder's, with `-` for what a name may not hold."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")[:100] or "project"


def _pipeline(folder: Path, answers: Answers, stage: Mapping[str, Any]) -> str:
    from posttrain.config.yaml_lines import dump_yaml

    goal = GOALS[answers.goal]
    head = f"# The model should {goal.what}. `posttrain run pipeline.yaml`; `posttrain explain KEY` says what a key means.\n"
    body = dump_yaml(
        {"name": _name(folder), "base_model": _place(answers.model, folder), "stages": [{goal.kind: dict(stage)}]}
    )
    return head + body + _GATE.format(name=_name(folder))


_GATE = """
# With questions that no stage has seen, the result is judged against the base, and only what passes is registered. A gate that has too
# few items for its margin is refused before the run, with the number it needs.
# evals: {{ heldout: evals/heldout.jsonl }}
# gate:
#   baseline: stage:base
#   primary: [{{ suite: heldout, min_delta: 0.05 }}]
# register: {{ name: {name}, alias: champion }}
"""


def _fitting(pipeline: Path, kind: str, answers: Answers) -> tuple[Mapping[str, Any], list[str]]:
    """The first rung of the ladder that fits the machine, and what to type next. Raises: ConfigError if none does."""
    from posttrain.cli.plan import make_plan, target_of
    from posttrain.cli.plan_text import start_lines
    from posttrain.planner import cannot_fit, fits

    cards = None if answers.machine in ("this", "cpu") else answers.machine
    target, typed = target_of(cards, "this", 1, False), shlex.quote(str(pipeline))
    next_ = [
        f"next: posttrain data {typed}, posttrain plan {typed}",
        *start_lines(Path(typed), "run", target.cluster)[1:],
    ]
    for rung in LADDER:
        sets = [f"{kind}.{key}={str(value).lower()}" for key, value in rung.items()]
        try:
            (made,) = make_plan(pipeline, target, None, sets).forecasts
        except ModelError as error:
            return LADDER[0], [f"not planned: {error}", *next_]
        last = rung is LADDER[-1]
        if not made.refused and (
            fits(made.memory, target.free_bytes) or (last and not cannot_fit(made.memory, target.free_bytes))
        ):
            return rung, next_
    raise ConfigError(
        f"{answers.model} does not fit {target.where} with any of {len(LADDER)} ways to train it, down to a 4-bit base; name a larger --machine or a smaller --model"
    )


def _readme(answers: Answers, kind: str, name: str) -> str:
    rows = "your rows" if answers.data else "`data/train.jsonl`, six rows that show the form: put yours there"
    last = f"runs/{name}/stages/01-{kind}/model"
    lines = [
        f"The model should {GOALS[answers.goal].what}: one stage of {kind}, on {rows}.\n",
        "```",
        "posttrain data pipeline.yaml     # the rows as the model will see them, and what is trained of them",
        "posttrain plan pipeline.yaml     # what it needs in memory and time",
        *(["posttrain run pipeline.yaml      # checks the reward first; Ctrl-C saves and stops, the same command goes on"] if answers.goal == "solve"
          else ["posttrain run pipeline.yaml      # Ctrl-C saves and stops, the same command goes on"]),
        f"posttrain chat {last}",
        "```\n",
    ]  # fmt: skip
    return "\n".join(lines)
