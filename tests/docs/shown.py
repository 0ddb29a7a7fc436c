"""What the pages show: commands in code blocks and in running text, and what the real command line says of one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer

from posttrain.cli.app import VERBS, _UsageError, load_verb
from posttrain.config.kinds import STAGE_KINDS

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md"))
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*|…|\.\.\.")
"""A word that the reader puts his own for: N, RUN_DIR."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str, language: str | None = None) -> list[str]:
    """Its code blocks, of one language or of all."""
    return [text for name, text in BLOCK.findall(text_of(page)) if language in (None, name)]


def in_blocks(page: str) -> list[str]:
    """The commands of its code blocks, continued lines joined, without comments."""
    lines = "\n".join(blocks_of(page)).replace("\\\n", " ")
    return [re.split(r"\s+#", line)[0].strip() for line in re.findall(r"^(?:\$ )?(posttrain .*)$", lines, re.M)]


def in_text(page: str) -> list[str]:
    """The commands of its running text."""
    return [" ".join(line.split()) for line in re.findall(r"`(posttrain [^`]+)`", BLOCK.sub("", text_of(page)))]


def commands_in(line: str) -> list[list[str]]:
    """The words of each command that a shown line stands for, without `posttrain`.

    `a && b` are two; `--yes|--no` are two; `[--x Y]` is given; what a shell adds behind `|`, `>` or `#` is not.
    """
    whole = re.sub(r"\[([^\]]*)\]", r"\1", line)
    parts = [re.split(r"\s+(?:\||>|#)(?:\s|$)", part)[0] for part in whole.split(" && ")]
    return [
        words
        for part in parts
        if part.startswith("posttrain ")
        for words in _each_choice(shlex.split(part)[1:])
        if len(words) > 1
    ]


def _each_choice(words: list[str]) -> list[list[str]]:
    place = next((place for place, word in enumerate(words) if "|" in word), None)
    if place is None:
        return [words]
    return [
        each for one in words[place].split("|") for each in _each_choice([*words[:place], one, *words[place + 1 :]])
    ]


def refusal(words: list[str]) -> str | None:
    """What the command line says against these words before it does anything, or None.

    Words that name a verb and nothing that it works on are no whole command; a placeholder is neither a number nor a folder.
    """
    text = _said_by_the_parser(words)
    placeless = "does not exist" in text and any(PLACEHOLDER.search(word) for word in words)
    return None if not text or placeless or _is_unfinished(text) else f"{' '.join(words)}: {text}"


def is_mention(line: str) -> bool:
    """Running text that names a verb or options of it, and is no whole command."""
    commands = commands_in(line)
    return not commands or any(_is_unfinished(_said_by_the_parser(words)) for words in commands)


def _is_unfinished(said: str) -> bool:
    return any(part in said for part in ("Missing argument", "requires an argument", "unable to parse string"))


def _said_by_the_parser(words: list[str]) -> str:
    verb, *rest = words
    if verb not in VERBS and verb not in STAGE_KINDS:
        return "" if PLACEHOLDER.fullmatch(verb) or verb.startswith("-") else f"no verb {verb}"
    command, context = load_verb(verb), None
    while True:
        try:
            context = command.make_context(verb, list(rest), parent=context)
        except typer.Exit:
            return ""
        except _UsageError as refused:
            return refused.format_message()
        if not hasattr(command, "commands"):
            return ""
        verb, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
