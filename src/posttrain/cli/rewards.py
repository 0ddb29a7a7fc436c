"""`posttrain rewards check CONFIG`: run the rewards as training will, try to fool them, and write what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from posttrain.config.rl import RLKeys
    from posttrain.rewards.cases import Case, PolicySample
    from posttrain.rewards.certificate import Certificate
    from posttrain.rewards.rescore import Rescored

rewards = typer.Typer(no_args_is_help=True, add_completion=False, help="Check reward functions and certify them.")


@rewards.callback()
def _root() -> None:
    """Check reward functions and certify them."""


@rewards.command()
def check(
    config: Annotated[Path, typer.Argument(help="YAML of an RL stage, or of a pipeline that has one.")],
    samples: Annotated[
        Path | None, typer.Option(help="JSONL of {index or prompt, completion}, written by the starting policy.")
    ] = None,
    policy: Annotated[
        bool, typer.Option("--policy", help="Load base_model and sample from it, as a training run does.")
    ] = False,
    cases: Annotated[int, typer.Option(min=1, help="Prompts to check on.")] = 50,
    out: Annotated[Path | None, typer.Option(help="Where to write the certificate; default: the run's folder.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, overrides the YAML.")] = None,
) -> None:
    """Check the rewards of CONFIG. Exit code: 0 passed (or partial), 1 failed, 64 wrong usage."""
    keys, folder = _rewarded(config, overrides or [])
    path = out or folder / "certificate.json"
    if policy:
        from posttrain.recipes.measure.certify import certify

        certificate = certify(keys, path)
    else:
        certificate = _check(keys, samples, cases, path)
    show_certificate(certificate)
    typer.echo(f"certificate: {path}, in words: {path.with_suffix('.md')}")
    raise typer.Exit(1 if certificate.verdict == "fail" else 0)


@rewards.command()
def rescore(
    run: Annotated[Path, typer.Argument(help="Folder of a run or a stage that ran with keep_rollouts: true.")],
    with_: Annotated[
        list[str], typer.Option("--with", help="A reward, as in reward_funcs; may be given several times.")
    ],
    weights: Annotated[list[float] | None, typer.Option("--weight", help="Weight of each, in order.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Deadline of one completion's reward.")] = 10.0,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes that score.")] = 1,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="JSONL of every completion, before and after.")
    ] = None,
) -> None:
    """Pay the stored rollouts of RUN by other rewards, and say what would have changed. No model is loaded for functions."""
    from posttrain.rewards.learned import LearnedReward
    from posttrain.rewards.rescore import find_calls, paid_anew, write_rescored
    from posttrain.rewards.workers import RewardPool

    def load(spec: str, folder: Path | None, options: Mapping[str, Any]) -> LearnedReward:
        from posttrain.recipes.measure.learned import load_learned

        return load_learned(spec, folder, options)

    calls = find_calls(run)
    with RewardPool(with_, weights or None, None, workers, timeout_s, load=load) as pool:
        rows = paid_anew(calls, pool)
    _show_changes(rows)
    if out is not None:
        write_rescored(rows, out)
        typer.echo(f"every completion: {out}")


def _show_changes(rows: Sequence[Rescored]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    from posttrain.rewards.rescore import largest_changes, what_changed

    console, changes = Console(), what_changed(rows)
    parts = ("first third", "second third", "last third")[: len(next(iter(changes.values()))) - 1]
    table = Table(
        Column("measured", no_wrap=True), "all", *parts, title=f"{len(rows)} stored rollouts under other rewards"
    )
    for name, values in changes.items():
        table.add_row(name, *(f"{value:.4g}" for value in values))
    console.print(table)
    if moved := largest_changes(rows):
        largest = Table("step", "before", "after", "completion", title="paid most otherwise")
        for row in moved:
            text = row.completion if isinstance(row.completion, str) else str(row.completion[-1]["content"])
            largest.add_row(str(row.step + 1), f"{row.before:.4g}", f"{row.after:.4g}", escape(repr(text[:100])))
        console.print(largest)
    if failed := next((row.error for row in rows if row.error), None):
        console.print(f"first that could not be scored: {escape(failed)}", soft_wrap=True)


def _rewarded(config: Path, overrides: Sequence[str]) -> tuple[RLKeys, Path]:
    """The keys of the stage that has rewards, and the run's folder; of a YAML of another kind what the first such kind misses."""
    from posttrain.config.kinds import STAGE_KINDS, stage_kind
    from posttrain.config.load import detect_kind, load_stage
    from posttrain.config.load_pipeline import load_pipeline
    from posttrain.config.rl import RLKeys

    kind = detect_kind(config)
    if kind == "pipeline":
        pipeline = load_pipeline(config, overrides).keys
        stages = [stage.keys for stage in pipeline.stages if stage_kind(stage.kind).rewarded]
        if len(stages) != 1:
            raise ConfigError(
                f"{config}: {len(stages)} of its {len(pipeline.stages)} stages have rewards; expected one: write the stage to check as a YAML of its own"
            )
        keys, folder = stages[0], Path(pipeline.output_dir)
    else:
        rewarded = [row.name for row in STAGE_KINDS.values() if row.rewarded]
        keys = load_stage(kind if kind in rewarded else rewarded[0], config, overrides).keys
        folder = Path(keys.output_dir)
    assert isinstance(keys, RLKeys)
    return keys, folder


def _check(keys: RLKeys, samples: Path | None, limit: int, path: Path) -> Certificate:
    from posttrain.recipes.measure.learned import reward_pool
    from posttrain.rewards.certificate import check_rewards
    from posttrain.rewards.written import write

    cases = read_cases(keys, limit)
    sampled = read_samples(samples, cases) if samples else []
    with reward_pool(keys) as pool:
        certificate = check_rewards(pool, cases, sampled)
    write(certificate, path)
    return certificate


def read_cases(keys: RLKeys, limit: int) -> tuple[Case, ...]:
    """Prompts of eval_datasets where there are any, else of datasets, spread evenly. Raises: DataError."""
    from posttrain.data.formats import detect_format, parse_rows
    from posttrain.data.opened import read_rows
    from posttrain.rewards.cases import cases_of

    prompts: list[Any] = []
    for source in keys.eval_datasets or keys.datasets:
        rows = read_rows(source)
        prompts += parse_rows(rows, detect_format(rows, "prompts", source.type).name, source)[0]
    stride = max(1, len(prompts) // limit)
    return cases_of(prompts[::stride], limit)


def read_samples(path: Path, cases: Sequence[Case]) -> list[PolicySample]:
    """Completions of the starting policy, matched to the cases by `index` or by `prompt`. Raises: DataError."""
    from posttrain.files import read_json_lines
    from posttrain.rewards.cases import PolicySample

    if not path.is_file():
        raise DataError(f"{path}: no such file; expected JSONL with index or prompt, and completion")
    by_prompt = {_key(case.prompt): number for number, case in enumerate(cases)}
    found: list[PolicySample] = []
    for number, row in read_json_lines(path):
        try:
            index = row["index"] if "index" in row else by_prompt.get(_key(row["prompt"]))
            completion = row["completion"]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: expected {{index or prompt, completion}}, got {json.dumps(row)[:80]} ({error!r})"
            ) from None
        if index is not None and 0 <= index < len(cases):
            found.append(
                PolicySample(index, completion if isinstance(completion, str) else str(completion[-1]["content"]))
            )
    if not found:
        raise DataError(
            f"{path}: no completion belongs to any of the {len(cases)} prompts checked; use index, or the same prompts"
        )
    return found


def _key(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps([dict(message) for message in prompt], sort_keys=True)


def show_certificate(certificate: Certificate) -> None:
    """The tables of a certificate, what failed and what to know, on the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from posttrain.rewards.written import KINDS, rate

    console = Console()
    table = Table(
        "mutation", "class", "texts", "violations", "rate", title=f"rewards: {', '.join(certificate.config['rewards'])}"
    )
    for row in certificate.mutations:
        table.add_row(
            row.name,
            KINDS[row.kind][0],
            str(row.num),
            f"[red]{row.violations}[/red]" if row.violations else "0",
            rate(row),
        )
    console.print(table)
    numbers = Table("measured", "value")
    for name, value in certificate.measures.items():
        numbers.add_row(name, f"{value:.4g}")
    console.print(numbers)
    for label, lines, style in (("failed", certificate.failures, "red"), ("note", certificate.warnings, "yellow")):
        for line in lines:
            console.print(f"[{style}]{label}:[/{style}] {escape(line)}", soft_wrap=True)
    console.print(f"verdict: [bold]{certificate.verdict}[/bold]   rewards {certificate.reward_digest[:19]}")
