"""`posttrain data CONFIG`: the data as the model will see it, and what is wrong with it. `data synth` makes rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from posttrain.cli.data_env import env
from posttrain.cli.data_rows import curate, instruct, synth
from posttrain.cli.json_output import AsJson, echo_json
from posttrain.cli.model import with_base
from posttrain.cli.terminal import printable
from posttrain.cli.unsaid import UnsaidVerb
from posttrain.errors import ConfigError, DataError

_SHOW = "show"


class _Showing(UnsaidVerb):
    """What is no command is a configuration whose data is shown."""

    unsaid = _SHOW


data = typer.Typer(cls=_Showing, add_completion=False, help="Show the data as the model will see it (CONFIG alone); make rows of samples (synth), let a teacher write them (instruct), take out what should not be trained on (curate), write those of an environment's tasks (env).")  # fmt: skip
data.command("synth")(synth)
data.command("curate")(curate)
data.command("instruct")(instruct)
data.command("env")(env)


@data.command(_SHOW)
def show_data(
    config: Annotated[Path, typer.Argument(help="A stage's YAML, or a pipeline's (all its stages).")],
    stage: Annotated[
        str | None,
        typer.Option(
            help="sft, dpo, reward_model, process_reward_model, grpo, ppo, online_dpo, distill or ebft; found from the keys if left out."
        ),
    ] = None,
    write_clean: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the data without the rows that lint found.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Rendered rows to show per stage.")] = 3,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show format, rendered rows with the loss mask, lengths, skips and lint findings. Exit code 64 if refused."""
    # For programs the records alone are printed.
    console = Console(soft_wrap=True, highlight=False, quiet=as_json)
    stages, suites = _stages(config, stage, overrides or [])
    reports, records = [], []
    for number, (kind, keys) in enumerate(stages, start=1):
        title = f"{kind} (stage {number} of {len(stages)})" if len(stages) > 1 else kind
        report, summaries = _show_stage(console, title, keys, suites, examples)
        reports.append(report)
        records.append({"stage": kind, "sources": [s.to_json() for s in summaries], "lint": report.to_json()})
        if write_clean is not None:
            folder = write_clean / f"{number}-{kind}" if len(stages) > 1 else write_clean
            _write_clean(console, report, keys, folder)
    if as_json:
        echo_json(records)
    refusing = dict.fromkeys(finding.rule for report in reports for finding in report.findings if finding.refuses)
    if write_clean is None and refusing:
        raise DataError(
            f"the data is refused: {', '.join(refusing)} above the limit; fix the rows listed under lint, or write a clean "
            "set with --write-clean DIR, or change a limit under `lint:`"
        )


def _stages(
    config: Path, stage: str | None, overrides: list[str]
) -> tuple[list[tuple[str, Any]], dict[str, list[str]]]:
    """(kind, keys) of every stage asked for, and the suites' prompts by name."""
    from posttrain.cli.stage import kind_in
    from posttrain.config import load_pipeline, load_stage
    from posttrain.data.lint_input import plain_text
    from posttrain.evals.suite import load_suite

    kind = kind_in(config, stage, overrides)
    if kind != "pipeline":
        return [(kind, load_stage(kind, config, overrides).keys)], {}
    keys = with_base(load_pipeline(config, overrides).keys)
    stages = [(s.kind, s.keys) for s in keys.stages if stage in (None, s.kind)]
    if not stages:
        raise ConfigError(f"--stage {stage}: {config} has {', '.join(s.kind for s in keys.stages)}; name one of them")
    suites = {name: load_suite(name, Path(suite.path)) for name, suite in keys.evals.items()}
    return stages, {name: [plain_text(item.prompt) for item in suite.items] for name, suite in suites.items()}


def _show_stage(
    console: Console, title: str, keys: Any, suites: dict[str, list[str]], examples: int
) -> tuple[Any, list[Any]]:
    from posttrain.data.held_out import load_eval_sets
    from posttrain.data.lint import lint_stage
    from posttrain.data.load import LOADERS
    from posttrain.models.load import load_tokenizer
    from posttrain.recipes.experience.golds import gold_check

    tokenizer = load_tokenizer(keys.model_copy(update={"chat_template": None}))
    own_template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    load = LOADERS[keys.row_kind]
    loaded = load(keys, tokenizer)
    console.rule(title) if console.is_terminal else console.print(f"== {title}")
    for source in loaded.summary.sources:
        console.print(_text(f"{source.path}: {source.format}"))
    for row in loaded.rows[:examples]:
        _show_row(console, tokenizer, row)
    summaries = list(loaded.summary.sources)
    for part in load_eval_sets(load, keys, tokenizer).values():
        summaries += part.summary.sources
    console.print(_lengths(summaries))
    for line in _skips(summaries):
        console.print(_text(line))
    console.print(_text(f"cache: {loaded.summary.cache}", style="dim"))
    report = lint_stage(
        keys, tokenizer, loaded, suites=suites, check_golds=gold_check(keys), gold_rows=None, own_template=own_template
    )
    console.print(_text("lint: nothing found" if not report.findings else "lint:"))
    for finding in report.findings:
        console.print(_text(f"  {finding.line()}", style="red" if finding.refuses else "yellow"))
    return report, summaries


def _show_row(console: Console, tokenizer: Any, row: Any) -> None:
    """Trained text is green; without colours it stands in ⟦ ⟧."""
    from posttrain.data.dataset import sequences

    for seq in sequences(row):
        text = _text(f"{seq.origin} · {len(seq.ids)} tokens, {seq.num_loss_tokens} trained\n", style="dim")
        for trained, ids in _stretches(seq.ids, seq.loss_mask):
            piece = printable(tokenizer.decode(ids))
            if not console.is_terminal and trained:
                piece = f"⟦{piece}⟧"
            text.append(piece, style="green not dim" if trained else "not dim")
        console.print(text)
    if not hasattr(row, "ids") and hasattr(row[0], "columns"):
        console.print(_text(f"columns for the rewards: {dict(row[0].columns)}", style="dim"))


def _text(shown: str, style: str = "") -> Text:
    """Text of the data on its way to a terminal."""
    return Text(printable(shown), style)


def _stretches(ids: tuple[int, ...], mask: tuple[bool, ...]) -> Iterator[tuple[bool, list[int]]]:
    """Runs of tokens that are trained alike; characters of several tokens stay whole."""
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            yield mask[start], list(ids[start:end])
            start = end


def _lengths(summaries: list[Any]) -> Table:
    table = Table(
        Column("source", overflow="fold"), "rows", "of", "tokens", "trained", "p50", "p90", "p99", "max", box=None
    )
    for s in summaries:
        lengths = [f"{s.lengths[name]:,}" for name in ("p50", "p90", "p99", "max")]
        table.add_row(
            printable(s.path), f"{s.rows_kept:,}", f"{s.rows_read:,}", f"{s.tokens:,}", f"{s.loss_tokens:,}", *lengths
        )
    return table


def _skips(summaries: list[Any]) -> Iterator[str]:
    for summary in summaries:
        for reason, skipped in summary.skipped.items():
            yield f"skipped {skipped.count:,} rows of {summary.path}: {reason} ({', '.join(skipped.first)})"
        for note, count in summary.notes.items():
            yield f"{summary.path}: {note}: {count:,}"


def _write_clean(console: Console, report: Any, keys: Any, folder: Path) -> None:
    from posttrain.data.lint import write_clean

    for cleaned in write_clean(report, keys.datasets, folder):
        console.print(_text(f"wrote {cleaned.path}: {cleaned.num_kept:,} rows, {cleaned.num_removed:,} taken out"))
    console.print(_text(f"wrote {folder / 'removed.json'}"))
