"""Shell scripts that hold the command of another tool: which tool's it is, and the keys that it gives.

Variables that the script sets are put in (`$NAME`, `${NAME}`, `${NAME:-other}`, `$((NAME * 2))`), text that a here-document holds is read as commands, and
what only a shell would know (`$(…)`, `$1`, a variable from elsewhere) stays as it is written.
"""

from __future__ import annotations

import ast
import operator
import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.importers.nested import by_path
from posttrain.config.importers.trl import SCRIPT
from posttrain.config.yaml_lines import parse_value, read_yaml
from posttrain.errors import ConfigError

YAML_SUFFIXES = (".yaml", ".yml", ".json")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?[-=]([^{}]*))?\})")
_ARRAY = re.compile(r"\$\{(\w+)\[@\]\}")
_QUOTED_OR_ALONE = re.compile(
    r"""(?:\\.|"(?:\\.|[^"\\])*"|'[^']*')|(?<!\S)(\$(?:\w+|\{\w+(?::?[-=][^{}"'\s]*)?\}))(?!\S)"""
)
_UNQUOTED = "\0"
"""Before a word that is a variable alone, without quotes around it."""
_ARITHMETIC = re.compile(r"\$\(\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)\)")
_LONGEST_SUM = 200
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_ANSI_QUOTES = re.compile(r"(?:(?<=[\s=])|^)\$'((?:[^'\\]|\\.)*)'")
_LONGEST_QUOTE = 100
"""Lines: each is read with all before it, and a stray apostrophe would have that done to the end of the file."""
_HERE_DOCUMENT = re.compile(r"<<-?\s*['\"]?(\w+)")
_REDIRECTION = re.compile(r"\d?&?>{1,2}.*")
_FUNCTION = re.compile(r"\s*(?:function\s+)?([\w-]+)\s*(?:\(\s*\))?\s*\{\s*$")
_ALL_ARGUMENTS = re.compile(r"\$[@*]|\$\{@")
_ARGUMENTS = re.compile(r"\$[@*]|\$\{[@*](?::\d+)?\}")
"""A word that stands for what the script itself is called with."""
_STEP_BESIDE = re.compile(
    r"axolotl(?:\.cli\.| )(?:preprocess|inference|merge|fetch|evaluate)|(?:llamafactory-cli|tune|trl) (?:export|chat|api|webchat|webui|eval|env|version|help|ls|cp|download|validate|cat|vllm-serve)$"
)
"""Commands of the tools that train nothing: what prepares a stage, or uses what it left."""
_MOST_STAGES = 20
_NOT_READ = r"^(?:verl\.trainer|recipe\.\w+)\.\w+$|(?:^|/)(?:verl/trainer|recipe/\w+)/\w+\.py$"
_VERL = r"(?:main_ppo|fsdp_sft_trainer|sft_trainer)"
_VERLS_OWN = ("ppo_trainer", "ppo_megatron_trainer", "sft_trainer", "sft_trainer_engine")
"""Configurations that lie in verl itself, whose values are its defaults."""
_OVERRIDE = re.compile(r"(\+{0,2}|~)([A-Za-z_][\w./@-]*)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ScriptLine:
    """A command of a script: where it begins, its words with the script's own variables put in, and whether the script's own arguments are among them."""

    number: int
    words: list[str]
    has_arguments: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """How a tool is started: the word that tells it, and what reads the words from there on."""

    mark: str
    tool: str
    read: Callable[[ScriptLine, Path], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class FoundCommand:
    """A known tool's command in a script, and the keys that it gives."""

    tool: str
    line: ScriptLine
    keys: dict[str, Any]


def find_command(path: Path, tool: str | None) -> FoundCommand:
    """The command of the script that is a known tool's. Raises: ConfigError; also where there are several stages."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a YAML or a command line") from None
    found = [(row, line) for line in commands_of(text) if (row := _command_in(line, tool, path))]
    stages = [line for (_, words), line in found if not _STEP_BESIDE.search(" ".join(words[:2]))]
    chosen = [((row, words), line) for (row, words), line in found if not stages or line in stages]
    if chosen:
        (row, _), line = chosen[0]
        read = [_read_command(*one, path) for one in chosen[: _MOST_STAGES if len(stages) > 1 else 1]]
        if any(values != read[0] for values in read):
            numbers = ", ".join(str(other.number) for other in stages)
            raise ConfigError(f"{path}: {len(stages)} stages, in lines {numbers}; put each into a file of its own, and import them one by one")  # fmt: skip
        _refuse_arguments(text, line.number, path)
        return FoundCommand(row.tool, line, read[0])
    known = ", ".join(dict.fromkeys(row.tool for row in COMMANDS))
    raise ConfigError(
        f"{path}: no command of {known} in it; expected one such as `trl sft --model_name_or_path …` or "
        "`deepspeed --module openrlhf.cli.train_sft …`"
    )


def _command_in(line: ScriptLine, tool: str | None, path: Path) -> tuple[Command, list[str]] | None:
    """The tool's row and the words from its mark on. Raises: ConfigError for a trainer of verl's that is not read."""
    for place, word in enumerate(line.words):
        row = next((row for row in COMMANDS if re.search(row.mark, word) and tool in (None, row.tool)), None)
        if row is not None:
            return row, line.words[place:]
        if re.search(_NOT_READ, word):
            raise ConfigError(
                f"{path}:{line.number}: {word}: of verl its main_ppo, fsdp_sft_trainer and sft_trainer are read here; write a YAML for "
                "posttrain grpo (docs/switching.md has the keys side by side)"
            )
    return None


def _read_command(command: tuple[Command, list[str]], line: ScriptLine, path: Path) -> dict[str, Any]:
    row, words = command
    return row.read(ScriptLine(line.number, words), path)


def _refuse_arguments(text: str, number: int, path: Path) -> None:
    """Raises: ConfigError where the command stands in a function that is called with arguments, and `"$@"` stands for them."""
    lines = text.splitlines()
    for start, line in enumerate(lines):
        head = _FUNCTION.match(line)
        if head is None:
            continue
        end = next((place for place in range(start, len(lines)) if lines[place].rstrip() in ("}", "};")), len(lines))
        given = [
            place + 1 for place, other in enumerate(lines) if re.match(rf"\s*{re.escape(head[1])}\s+[^\s(){{]", other)
        ]
        if start < number <= end and given and any(_ALL_ARGUMENTS.search(inner) for inner in lines[start:end]):
            raise ConfigError(f'{path}:{number}: the command ends with the arguments ("$@") of the function {head[1]}, which line {given[0]} gives; write them into the command')  # fmt: skip


def commands_of(text: str) -> list[ScriptLine]:
    r"""The commands of a script with their lines; `\` at the end of a line goes on, and so does an open quote."""
    found: list[ScriptLine] = []
    variables: dict[str, str] = {"HOME": os.path.expanduser("~")}
    lines = text.splitlines()
    start, ends_here = 0, ""
    while start < len(lines):
        here = _HERE_DOCUMENT.search(lines[start])
        ends_here = here[1] if here else ends_here
        if lines[start].strip() == ends_here:
            start += 1
            continue
        end, words = _command_from(lines, start, ends_here)
        for part in _parts(words):
            if not _assigned([word.removeprefix(_UNQUOTED) for word in part], variables):
                spread = _spread(part, variables)
                words = [_put_in(word, variables) for word in spread if not _ARGUMENTS.fullmatch(word)]
                found.append(ScriptLine(start + 1, words, len(words) < len(spread)))
        start = end
    return found


def _command_from(lines: list[str], start: int, ends_here: str) -> tuple[int, list[str]]:
    """The line after a command that begins at `start`, and its words; a quote that is never closed opens none."""
    pending = ""
    for place in range(start, len(lines)):
        if ends_here and lines[place].strip() == ends_here:
            break
        pending += lines[place]
        if pending.rstrip().endswith("\\"):
            pending = pending.rstrip()[:-1] + " "
            continue
        try:
            return place + 1, _words_of(pending)
        except ValueError:
            if place - start > _LONGEST_QUOTE:
                return start + 1, []
            pending += "\n"
    try:
        return max(place, start + 1), _words_of(pending)
    except ValueError:
        return start + 1, []


def _words_of(command: str) -> list[str]:
    """Raises: ValueError for a quote that is not closed."""
    joined = _ARITHMETIC.sub(lambda match: "".join(match[0].split()), command)
    marked = _QUOTED_OR_ALONE.sub(lambda match: _UNQUOTED + match[1] if match[1] else match[0], joined)
    return shlex.split(_ANSI_QUOTES.sub(_unquoted, marked), comments=True)


def _unquoted(match: re.Match[str]) -> str:
    r"""`$'a\nb'` as a word with a line break in it; other escapes than those of breaks and tabs stand for their character."""
    return shlex.quote(re.sub(r"\\(.)", lambda escape: {"n": "\n", "t": "\t"}.get(escape[1], escape[1]), match[1]))


def _parts(words: list[str]) -> list[list[str]]:
    """The commands between `&&`, `|` and the like, without what goes into files."""
    parts: list[list[str]] = [[]]
    skip = False
    for word in words:
        if word in ("&&", "||", "|", "&", ";"):
            parts.append([])
        elif skip or _REDIRECTION.fullmatch(word):
            skip = not skip and word.endswith(">")
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def _spread(words: list[str], variables: Mapping[str, str]) -> list[str]:
    """An array's name alone (`"${ARGS[@]}"`) stands for all its words, and so does a text of options without quotes around it."""
    spread: list[str] = []
    for word in words:
        array, plain = _ARRAY.fullmatch(word), word.removeprefix(_UNQUOTED)
        name = _VARIABLE.fullmatch(plain) if plain != word else None
        if array and array[1] in variables:
            spread += shlex.split(variables[array[1]])
        elif name and (name[3] is not None or (name[1] or name[2]) in variables):
            spread += shlex.split(_put_in(plain, variables))
        else:
            spread.append(plain)
    return spread


def _assigned(words: list[str], variables: dict[str, str]) -> bool:
    """Whether the words only set variables, which are then noted."""
    words = words[1:] if words[0] in ("export", "declare", "local", "readonly") else words
    if not words:
        return True
    pairs = [_ASSIGNMENT.fullmatch(word) for word in words]
    if pairs and pairs[0] and pairs[0][2].startswith("(") and words[-1].endswith(")"):
        inner = [pairs[0][2][1:], *words[1:]]
        variables[pairs[0][1]] = shlex.join(word for word in [*inner[:-1], inner[-1].removesuffix(")")] if word)
        return True
    for pair in pairs:
        if pair:
            variables[pair[1]] = _put_in(pair[2], variables)
    return all(pairs)


def _put_in(word: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        other = match[0] if match[3] is None else match[3]
        return variables.get(name, other)

    return _ARITHMETIC.sub(lambda match: _computed(match, variables), _VARIABLE.sub(value, word))


def _computed(match: re.Match[str], variables: Mapping[str, str]) -> str:
    """`$((2 * LENGTH))` as its number; as it is written where that is not known."""
    text = re.sub(r"[A-Za-z_]\w*", lambda name: variables.get(name[0], name[0]), match[1])
    try:
        return str(_value_of(ast.parse(text, mode="eval").body)) if len(text) <= _LONGEST_SUM else match[0]
    except (SyntaxError, KeyError, ZeroDivisionError):
        return match[0]


def _value_of(node: ast.expr) -> int:
    """Raises: KeyError for all but sums, products and quotients of whole numbers."""
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value_of(node.left), _value_of(node.right))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise KeyError(ast.dump(node))


def _with_options(line: ScriptLine, path: Path) -> dict[str, Any]:
    """A tool that takes a YAML and `--key value`."""
    file = next(
        (word for word in line.words[1:] if Path(word).suffix in YAML_SUFFIXES and not word.startswith("-")), None
    )
    values = _read_beside(file, path) if file is not None else {}
    values |= options(line.words[1:], path, line.number)
    values.pop("config", None)
    return values


def _trl(line: ScriptLine, path: Path) -> dict[str, Any]:
    verb, *rest = line.words
    script = rest.pop(0) if verb.endswith("trl") and rest else re.split(r"[/.]", verb.removesuffix(".py"))[-1]
    script = "online_dpo" if script in ("dpo_online", "online_dpo") else script.partition("_")[0]
    return {**_with_options(ScriptLine(line.number, [verb, *rest]), path), SCRIPT: script}


def _module(line: ScriptLine, path: Path) -> dict[str, Any]:
    """`openrlhf.cli.train_sft --key value`: the module says what is done."""
    return {**options(line.words[1:], path, line.number), SCRIPT: line.words[0].rpartition(".")[2]}


def _tune(line: ScriptLine, path: Path) -> dict[str, Any]:
    """`tune run [torchrun's options] RECIPE --config FILE key=value`."""
    words = line.words
    place = next((n for n, word in enumerate(words) if word.startswith("--config")), None)
    if "run" not in words or place is None or place + ("=" not in words[place]) >= len(words):
        raise ConfigError(f"{path}:{line.number}: expected tune run RECIPE --config FILE key=value …")
    _, equals, file = words[place].partition("=")
    file = file if equals else words[place + 1]
    values = dict(
        by_path(
            _read_beside(
                file, path, "a name of torchtune's own; write it to a file with `tune cp NAME FILE` and name that"
            )
        )
    )
    values[SCRIPT] = words[place - 1]
    return _over(values, overrides(words[place + (1 if equals else 2) :], path, line.number))


def _verl(line: ScriptLine, path: Path) -> dict[str, Any]:
    """`verl.trainer.main_ppo key=value …`, with a configuration of one's own (`--config-path`, `--config-name`) below it."""
    given: dict[str, str] = {}
    words: list[str] = []
    rest = iter(line.words[1:])
    for word in rest:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
        else:
            given[{"-cn": "--config-name", "-cp": "--config-path", "--config-dir": "--config-path"}.get(name, name)] = value if equals else next(rest, "")  # fmt: skip
    if odd := next((name for name in given if name not in ("--config-name", "--config-path")), None):
        raise ConfigError(f"{path}:{line.number}: {odd} is no option of verl's that is known here; take it out")
    stem = given.get("--config-name", "").removesuffix(".yaml")
    file = f"{given.get('--config-path', '.')}/{stem}.yaml"
    here = any(os.path.isfile(home / file) for home in (path.parent, Path.cwd()))
    values = dict(by_path(_read_beside(file, path))) if stem and here else {}
    if stem and not here and stem not in _VERLS_OWN:
        raise ConfigError(f"{path}:{line.number}: {file}: no such file beside the script; name its folder with --config-path")  # fmt: skip
    script = re.split(r"[/.]", line.words[0].removesuffix(".py"))[-1]
    return {**values, **overrides(words, path, line.number), SCRIPT: script}


def _over(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A section's name alone sets its component (`optimizer=torch.optim.SGD`), or takes all its keys out."""
    merged = dict(values)
    for key, value in given.items():
        inner = [name for name in merged if name.startswith(f"{key}.")]
        if value is None:
            merged = {name: kept for name, kept in merged.items() if name not in inner}
        merged[f"{key}._component_" if value is not None and f"{key}._component_" in inner else key] = value
    return merged


def _read_beside(file: str, path: Path, otherwise: str = "") -> dict[str, Any]:
    found = next((home / file for home in (path.parent, Path.cwd()) if os.path.isfile(home / file)), None)
    if found is None and otherwise:
        raise ConfigError(f"{path}: {file}: no such file, so it is {otherwise}")
    return dict(read_yaml(found or Path(file)).data)


def options(words: list[str], path: Path, line: int) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--flag`, `--list a b c`."""
    values: dict[str, Any] = {}
    key = None
    for word in words:
        if word.startswith("--") and word != "--":
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            if key in values:
                raise ConfigError(f"{path}:{line}: --{key} stands twice; keep one")
            values[key] = _value(value) if equals else True
            key = None if equals else key
        elif key is not None:
            before = values[key]
            value = _value(word)
            values[key] = value if before is True else [*(before if isinstance(before, list) else [before]), value]
    return values


def overrides(words: list[str], path: Path, line: int) -> dict[str, Any]:
    """`key=value`, `+key=value`, `++key=value`; `~key` takes a key out. The last one wins, as it does there."""
    values: dict[str, Any] = {}
    for word in words:
        match = _OVERRIDE.fullmatch(word)
        if match is None or (match[3] is None and match[1] != "~"):
            raise ConfigError(f"{path}:{line}: {word!r} is no key=value; take it out")
        values[match[2].lstrip("/")] = None if match[1] == "~" or match[3] == "None" else _value(match[3])
    return values


def _value(word: str) -> Any:
    """Lists, numbers and quotes are YAML's; what is not is text, with the blanks it has."""
    try:
        value = parse_value(word)
    except ConfigError:
        return word
    return word if value == word.strip() else value


COMMANDS: tuple[Command, ...] = (
    Command(r"(?:^|/)llamafactory-cli$", "llamafactory", _with_options),
    Command(r"(?:^|/)axolotl(?:\.cli\.\w+)?$", "axolotl", _with_options),
    Command(r"(?:^|/)tune$", "torchtune", _tune),
    Command(r"^openrlhf\.cli\.train_\w+$", "openrlhf", _module),
    Command(rf"^verl\.trainer\.{_VERL}$|(?:^|/)verl/trainer/{_VERL}\.py$", "verl", _verl),
    Command(
        r"(?:^|/)trl$|(?:^|/)(?:(?:sft|dpo|grpo|kto|orpo|cpo)\w*|reward(?:_modeling)?|online_dpo|rloo|ppo)\.py$|^trl\.scripts\.\w+$",
        "trl",
        _trl,
    ),
)
"""A word of a command line → whose it is. Modules stand before TRL's scripts, whose names others' may hold."""
