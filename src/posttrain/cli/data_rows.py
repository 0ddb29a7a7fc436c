"""`posttrain data synth CONFIG`: rows to train on, made of a model's own samples; `curate CONFIG`: a set without what must leave it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.cli.json_output import AsJson, echo_json
from posttrain.errors import ConfigError

SetOptions = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key.")]


def synth(
    config: Annotated[Path, typer.Argument(help="YAML of what is sampled and kept.", show_default=False)],
    remake: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LINE", help="Make this line of rows.jsonl again, or `all`, and say whether it is the same."
        ),
    ] = None,
    overrides: SetOptions = None,
    as_json: AsJson = False,
) -> None:
    """Sample completions, score them, and write those worth training on. Exit code 1 if a remade row differs."""
    from posttrain.config.load_data import load_data_keys
    from posttrain.config.synth import SynthKeys
    from posttrain.synthesis.synth import synthesize

    keys = load_data_keys(SynthKeys, "data synth", config, overrides or [])
    if remake:
        _remake(keys, remake, as_json)
        return
    report = synthesize(keys, lambda done, total: typer.echo(f"sampled {done}/{total} parts", err=True))
    _show_report(report, keys.output_dir, as_json)


def curate(
    config: Annotated[Path, typer.Argument(help="YAML of the rows and of what must leave them.", show_default=False)],
    overrides: SetOptions = None,
    as_json: AsJson = False,
) -> None:
    """Take repeats, eval prompts, odd lengths and bad answers out of a set; each row that leaves is kept with its reason."""
    from posttrain.config.curate import CurateKeys
    from posttrain.config.load_data import load_data_keys
    from posttrain.synthesis.curate import curate_rows

    keys = load_data_keys(CurateKeys, "data curate", config, overrides or [])
    _show_report(curate_rows(keys), keys.output_dir, as_json)


def instruct(
    config: Annotated[Path, typer.Argument(help="YAML of the teacher and of what it is shown.", show_default=False)],
    overrides: SetOptions = None,
    as_json: AsJson = False,
) -> None:
    """Let a teacher write instructions, from prompts or to given answers. Started again, nothing is asked twice."""
    from posttrain.config.instruct import InstructKeys
    from posttrain.config.load_data import load_data_keys
    from posttrain.synthesis.instruct import write_instructions

    keys = load_data_keys(InstructKeys, "data instruct", config, overrides or [])
    _show_report(write_instructions(keys), keys.output_dir, as_json)


def _show_report(report: Mapping[str, Any], folder: str, as_json: bool) -> None:
    from posttrain.config.synth import LEFT, ROWS

    if as_json:
        echo_json(report)
        return
    for line in report_lines(report):
        typer.echo(line)
    typer.echo(f"rows     {Path(folder) / ROWS}\nleft     {Path(folder) / LEFT}")


def _remake(keys: Any, wanted: list[str], as_json: bool) -> None:
    from posttrain.synthesis.synth import remake

    if bad := [line for line in wanted if line != "all" and not (line.isdigit() and int(line))]:
        raise ConfigError(f"--remake {bad[0]}: expected the number of a line of rows.jsonl, counted from 1, or all")
    found = remake(keys, [] if "all" in wanted else sorted({int(line) for line in wanted}))
    differ = [line for line, same in found if not same]
    if as_json:
        echo_json({"remade": len(found), "differ": differ})
    else:
        typer.echo(f"remade {len(found)} rows, {len(found) - len(differ)} the same to the byte")
        for line in differ:
            typer.echo(f"line {line} differs")
    if differ:
        raise typer.Exit(1)


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The numbers of a report, one a line; what left by reason."""
    lines: list[str] = []
    for key, value in report.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping):
            lines += [f"{name} {of}: {_shown(number)}" for of, number in value.items()]
        else:
            lines.append(f"{name}: {_shown(value)}")
    return lines


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
