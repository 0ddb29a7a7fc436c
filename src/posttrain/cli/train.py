"""`posttrain run` and the single stages: load the YAML, show what will run, run it, print what came of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from posttrain.cli.met import met
from posttrain.errors import ConfigError
from posttrain.pipeline import OnChange

if TYPE_CHECKING:
    from posttrain.config.load import LoadedPipeline, LoadedStage
    from posttrain.config.pipeline import PipelineKeys
    from posttrain.distributed.meeting import Meeting
    from posttrain.pipeline.run import Outcome

KeysShown = Literal["none", "set", "all"]
Config = Annotated[Path, typer.Argument(help="The YAML.", show_default=False)]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated.")]
Change = Annotated[OnChange, typer.Option("--on-change", help="What to do if inputs changed since the last start.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no keys before the run.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print the keys that have their defaults too.")]


def _shown(quiet: bool, verbose: bool) -> KeysShown:
    if quiet and verbose:
        raise ConfigError("--quiet prints no keys and --verbose all of them; give one of them")
    return "none" if quiet else "all" if verbose else "set"


def run(
    config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Run a pipeline: stages, evals, gates, registry. Started again, it goes on."""
    from posttrain.config.load_pipeline import load_pipeline

    with met() as meeting:
        loaded = load_pipeline(config, set_ or [])
        _run(loaded.keys, loaded, on_change, _shown(quiet, verbose), meeting)


def sft(
    config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Run one stage of supervised fine-tuning."""
    _single("sft", config, set_, on_change, _shown(quiet, verbose))


def dpo(
    config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Run one stage of preference optimisation."""
    _single("dpo", config, set_, on_change, _shown(quiet, verbose))


def grpo(
    config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Run one stage of RL with verifiable rewards."""
    _single("grpo", config, set_, on_change, _shown(quiet, verbose))


def stage_verb(kind: str) -> Callable[..., None]:
    """The verb of a kind of stage. Raises: ConfigError if there is no such kind."""
    from posttrain.config.kinds import stage_kind

    def verb(
        config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False
    ) -> None:
        _single(kind, config, set_, on_change, _shown(quiet, verbose))

    verb.__doc__ = stage_kind(kind).help
    return verb


def _single(kind: str, config: Path, set_: list[str] | None, on_change: OnChange, shown: KeysShown) -> None:
    from posttrain.config.load import as_pipeline, load_stage

    with met() as meeting:
        loaded = load_stage(kind, config, set_ or [])
        _run(as_pipeline(loaded), loaded, on_change, shown, meeting)


def _run(
    keys: PipelineKeys, loaded: LoadedPipeline | LoadedStage, on_change: OnChange, shown: KeysShown,
    meeting: Meeting | None,
) -> None:  # fmt: skip
    from rich.console import Console

    from posttrain.pipeline.show import live_watch, setup_logging, show_keys

    console, is_main = Console(stderr=True), meeting is None or meeting.is_main
    setup_logging(console, is_main=is_main)
    if shown != "none" and is_main:
        show_keys(loaded, console, defaults=shown == "all")
    # Only now torch: a typo in the YAML is answered at once.
    from posttrain.distributed.ranks import join_ranks
    from posttrain.pipeline.run import run_pipeline
    from posttrain.recipes.stop import EXIT_STOPPED, StoppedPolitely

    with join_ranks(meeting, max(stage.keys.ddp_timeout for stage in keys.stages)) as ranks:
        try:
            watch = live_watch(console, is_main)
            outcome = run_pipeline(keys, ranks, on_change=on_change, watch=watch, project=loaded.project)
        except StoppedPolitely as stopped:
            if is_main:
                console.print(str(stopped))
            raise typer.Exit(EXIT_STOPPED) from stopped
        # A rank that ended before rank 0 did could end it: launchers stop the others when one of them fails on its way out.
        ranks.main_only(lambda: _close(outcome, console))
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def _close(outcome: Outcome, console: Any) -> None:
    from posttrain.report.build import build_report
    from posttrain.report.summary import render_summary

    report = build_report(outcome.folder)
    typer.echo(render_summary(outcome.folder))
    if outcome.reason:
        typer.echo(f"{outcome.status}: {outcome.reason}")
    typer.echo(f"model   {outcome.model_dir}\nreport  {report}")
