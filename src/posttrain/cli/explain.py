"""`posttrain explain KEY`: meaning, default, range, and what other tools call it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.cli.json_output import AsJson, echo_json
from posttrain.config.explain import Explanation, KeyUse, all_keys
from posttrain.config.explain import explain as explain_key


def explain(
    key: Annotated[
        str | None, typer.Argument(help="A key, e.g. `learning_rate`, `gate.alpha`, or another tool's name for it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a key means, its default, its range and what other tools call it; without a key, list them all."""
    if as_json:
        echo_json(explain_record(key))
        return
    console = Console(soft_wrap=True, highlight=False)
    if key is None:
        for place, names in all_keys().items():
            console.print(Text(place, style="bold"))
            console.print(Text("  " + ", ".join(names)))
        return
    explanation = explain_key(key)
    console.print(_title(explanation))
    for place, use in enumerate(explanation.uses):
        if place:
            console.print()
        console.print(_table(use))


def explain_record(key: str | None) -> Any:
    """A key as JSON data; without one, the names of all keys by place. Raises: ConfigError for a name that is none."""
    return all_keys() if key is None else asdict(explain_key(key))


def _title(explanation: Explanation) -> Text:
    title = Text(explanation.key, style="bold")
    asked = explanation.asked.rpartition(".")[2]
    return title if asked == explanation.key else title + Text(f"   (asked as {asked})", style="dim")


def _table(use: KeyUse) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = [
        ("meaning", use.meaning),
        ("where", ", ".join(use.places)),
        ("type", use.type),
        ("default", _defaults(use)),
        ("example", use.example),
        ("also called", ", ".join(str(name) for name in use.also)),
    ]
    for label, value in rows:
        if value:
            table.add_row(label, Text(value))
    return table


def _defaults(use: KeyUse) -> str:
    if len(set(use.defaults.values())) == 1:
        return next(iter(use.defaults.values()))
    return ", ".join(f"{default} ({place})" for place, default in use.defaults.items())
