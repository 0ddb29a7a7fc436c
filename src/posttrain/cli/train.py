"""`posttrain run` and the single stages: load the YAML, show what will run, run it, print what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from posttrain.cli.met import met
from posttrain.cli.roles import EachWorker, NumWorkers, OnCluster, OnRay, engine_resources, on_cluster, run_as_roles
from posttrain.errors import EXIT_AGAIN, ConfigError
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


@dataclass(frozen=True)
class _Given:
    """What the command line says beside the YAML."""

    sets: list[str]
    on_change: OnChange
    shown: KeysShown
    cluster: OnCluster | None

    def arguments(self, verb: str, config: Path) -> list[str]:
        """The command line of a worker."""
        shown = {"none": ["--quiet"], "all": ["--verbose"], "set": []}[self.shown]
        sets = [word for one in self.sets for word in ("--set", one)]
        return [verb, str(config), *sets, "--on-change", self.on_change, *shown]


def _given(set_: Sets, on_change: OnChange, quiet: bool, verbose: bool, cluster: OnCluster | None = None) -> _Given:
    if quiet and verbose:
        raise ConfigError("--quiet prints no keys and --verbose all of them; give one of them")
    return _Given(set_ or [], on_change, "none" if quiet else "all" if verbose else "set", cluster)


def run(
    config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False,
    ray: OnRay = None, workers: NumWorkers = 1, worker: EachWorker = "",
) -> None:  # fmt: skip
    """Run a pipeline: stages, evals, gates, registry. Started again, it goes on."""
    _pipeline(config, _given(set_, on_change, quiet, verbose, on_cluster(ray, workers, worker)))


def sft(
    config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False,
    ray: OnRay = None, workers: NumWorkers = 1, worker: EachWorker = "",
) -> None:  # fmt: skip
    """Run one stage of supervised fine-tuning."""
    _single("sft", config, _given(set_, on_change, quiet, verbose, on_cluster(ray, workers, worker)))


def dpo(
    config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False,
    ray: OnRay = None, workers: NumWorkers = 1, worker: EachWorker = "",
) -> None:  # fmt: skip
    """Run one stage of preference optimisation."""
    _single("dpo", config, _given(set_, on_change, quiet, verbose, on_cluster(ray, workers, worker)))


def grpo(
    config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False,
    ray: OnRay = None, workers: NumWorkers = 1, worker: EachWorker = "",
) -> None:  # fmt: skip
    """Run one stage of RL with verifiable rewards."""
    _single("grpo", config, _given(set_, on_change, quiet, verbose, on_cluster(ray, workers, worker)))


def reward_model(
    config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False,
    ray: OnRay = None, workers: NumWorkers = 1, worker: EachWorker = "",
) -> None:  # fmt: skip
    """Train a reward model on preferences."""
    _single("reward_model", config, _given(set_, on_change, quiet, verbose, on_cluster(ray, workers, worker)))


def process_reward_model(
    config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False,
    ray: OnRay = None, workers: NumWorkers = 1, worker: EachWorker = "",
) -> None:  # fmt: skip
    """Train a process reward model on rated steps."""
    _single("process_reward_model", config, _given(set_, on_change, quiet, verbose, on_cluster(ray, workers, worker)))


def ppo(
    config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False,
    ray: OnRay = None, workers: NumWorkers = 1, worker: EachWorker = "",
) -> None:  # fmt: skip
    """Run one stage of RL with a critic."""
    _single("ppo", config, _given(set_, on_change, quiet, verbose, on_cluster(ray, workers, worker)))


def online_dpo(
    config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False,
    ray: OnRay = None, workers: NumWorkers = 1, worker: EachWorker = "",
) -> None:  # fmt: skip
    """Run one stage of DPO on the policy's own completions."""
    _single("online_dpo", config, _given(set_, on_change, quiet, verbose, on_cluster(ray, workers, worker)))


def distill(
    config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False,
    ray: OnRay = None, workers: NumWorkers = 1, worker: EachWorker = "",
) -> None:  # fmt: skip
    """Distil what teachers know into the model."""
    _single("distill", config, _given(set_, on_change, quiet, verbose, on_cluster(ray, workers, worker)))


def ebft(
    config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False,
    ray: OnRay = None, workers: NumWorkers = 1, worker: EachWorker = "",
) -> None:  # fmt: skip
    """Match answers in the features of the given model."""
    _single("ebft", config, _given(set_, on_change, quiet, verbose, on_cluster(ray, workers, worker)))


def stage_verb(kind: str) -> Callable[..., None]:
    """The verb of a kind of stage. Raises: ConfigError if there is no such kind."""
    from posttrain.config.kinds import stage_kind

    def verb(
        config: Config, set_: Sets = None, on_change: Change = "refuse", quiet: Quiet = False, verbose: Verbose = False,
        ray: OnRay = None, workers: NumWorkers = 1, worker: EachWorker = "",
    ) -> None:  # fmt: skip
        _single(kind, config, _given(set_, on_change, quiet, verbose, on_cluster(ray, workers, worker)))

    verb.__doc__ = stage_kind(kind).help
    return verb


def _pipeline(config: Path, given: _Given) -> None:
    from posttrain.config.load_pipeline import load_pipeline

    if given.cluster is not None:
        raise typer.Exit(_on_cluster("run", config, given, load_pipeline(config, given.sets).keys))
    with met() as meeting:
        loaded = load_pipeline(config, given.sets)
        _run(loaded.keys, loaded, given.on_change, given.shown, meeting)


def _single(kind: str, config: Path, given: _Given) -> None:
    from posttrain.config.load import as_pipeline, load_stage

    if given.cluster is not None:
        raise typer.Exit(_on_cluster(kind, config, given, as_pipeline(load_stage(kind, config, given.sets))))
    with met() as meeting:
        loaded = load_stage(kind, config, given.sets)
        _run(as_pipeline(loaded), loaded, given.on_change, given.shown, meeting)


def _on_cluster(verb: str, config: Path, given: _Given, keys: PipelineKeys) -> int:
    """The keys were read here too, so that a typo is answered at once and by one process."""
    assert given.cluster is not None
    engines = engine_resources(keys, given.cluster.worker)
    return run_as_roles(given.cluster, given.arguments(verb, config), Path(keys.output_dir), engines)


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
    from posttrain.recipes.run.stop import StoppedPolitely

    with join_ranks(meeting, max(stage.keys.ddp_timeout for stage in keys.stages)) as ranks:
        try:
            watch = live_watch(console, is_main)
            outcome = run_pipeline(keys, ranks, on_change=on_change, watch=watch, project=loaded.project)
        except StoppedPolitely as stopped:
            if is_main:
                console.print(str(stopped))
            raise typer.Exit(EXIT_AGAIN) from stopped
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
