"""`posttrain gate A B --spec gate.yaml`: is A good enough to replace B? The exit code is the verdict.

`posttrain gate decide RUN` answers a verdict that waits for a person, `posttrain gate aa` asks a model against itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.unsaid import UnsaidVerb
from posttrain.errors import GateError
from posttrain.evidence import EvalReport, GateVerdict

_JUDGE = "judge"


class _Judging(UnsaidVerb):
    """What is no command is two folders to judge."""

    unsaid = _JUDGE


app = typer.Typer(
    name="gate",
    add_completion=False,
    cls=_Judging,
    help="Judge a candidate's eval reports against a baseline's: `posttrain gate A B --spec FILE`.",
)


@app.command(_JUDGE)
def gate(
    candidate: Annotated[Path, typer.Argument(metavar="A", help="Folder with the candidate's eval reports.")] = Path(),
    baseline: Annotated[Path, typer.Argument(metavar="B", help="Folder with the baseline's eval reports.")] = Path(),
    spec: Annotated[Path | None, typer.Option(help="YAML with guards and primary, or a pipeline with a gate.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write the verdict to.")] = None,
    registry: Annotated[Path | None, typer.Option(help="Registry that counts looks, for a spec with looks.")] = None,
    recompute: Annotated[Path | None, typer.Option(help="Recompute the verdict in this folder instead.")] = None,
) -> None:
    """Judge A against B, item by item. Exit code: 0 PASS, 1 FAIL, 2 INCONCLUSIVE, 3 INVALID, 64 wrong usage."""
    from posttrain.gate import folder as folders
    from posttrain.gate import verdict_table

    if recompute is not None:
        verdict = folders.recompute(recompute)
    elif spec is None or Path() in (candidate, baseline):
        raise GateError(
            "got too little to judge: expected `posttrain gate A B --spec gate.yaml`, or --recompute FOLDER"
        )
    else:
        verdict = _judge(candidate, baseline, spec, out, registry)
    typer.echo(verdict_table(verdict))
    raise typer.Exit(verdict.verdict.exit_code)


@app.command("decide")
def decide_by_person(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run whose verdict waits.")],
    by: Annotated[str, typer.Option(help="Who decides.")],
    reason: Annotated[str, typer.Option(help="Why; it is kept in the lineage and in the registry.")],
    accept: Annotated[bool, typer.Option("--accept/--reject", help="Whether the model may go on.")],
) -> None:
    """Decide on a verdict that waits (`approve: N`, `on_inconclusive: escalate`). The run is then started again to go on."""
    from posttrain.pipeline.escalation import decide_pending

    decided = decide_pending(run, accepted=accept, by=by, reason=reason)
    typer.echo(f"{'accepted' if accept else 'rejected'} by {decided.decision.by}: {decided.decision.reason}")
    if decided.waits:
        typer.echo(f"{len(decided.approvers)} of {decided.needed} people have accepted it; it waits for the others")
    else:
        typer.echo("start the run again to go on: posttrain run CONFIG")


@app.command()
def aa(
    model: Annotated[str, typer.Argument(help="Model folder, hub id, or a YAML (its suites on its base_model).")],
    suite: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="JSONL suite; may be repeated.")] = None,
    on: Annotated[str | None, typer.Option("--model", help="With a YAML: the model to check instead.")] = None,
    split: Annotated[str, typer.Option(help="Split to score.")] = "gate",
    times: Annotated[int, typer.Option(min=1, help="Evaluations beside the first.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the reports.")] = Path("runs/aa"),
) -> None:
    """Score a model against itself, batch order and seed varied. Exit code: 0 no difference, 1 it differs from itself."""
    from posttrain.cli.evaluate import measure_again, plan_of
    from posttrain.gate.aa import aa_check

    keys, plan = plan_of(model, suite or [], on)
    first, *others = measure_again(keys, plan, split, out, times)
    comparisons = times * len(plan)
    results = [aa_check(first[name], other[name], comparisons=comparisons) for other in others for name in first]
    typer.echo("\n".join(result.words for result in results))
    failed = sum(not result.passed for result in results)
    typer.echo(f"{failed} of {len(results)} comparisons found a difference; reports in {out}")
    raise typer.Exit(1 if failed else 0)


def _judge(candidate: Path, baseline: Path, spec_path: Path, out: Path | None, registry: Path | None) -> GateVerdict:
    from posttrain.config.load import load_gate
    from posttrain.gate import GateSpec, decide, load_reports, plan_lines, save_verdict

    spec = GateSpec.from_keys(load_gate(spec_path))
    left, right = load_reports(candidate, spec.split), load_reports(baseline, spec.split)
    ours, theirs = ({suite: report for suite, (_, report) in side.items()} for side in (left, right))
    if all(suite in side for suite in spec.suites for side in (ours, theirs)):  # else the verdict says which is missing
        plan_lines(spec, {suite: _size(ours[suite]) for suite in spec.suites})
    look = 1 if spec.looks == 0 else _look(registry, spec.suites, (ours, theirs))
    verdict = decide(spec, ours, theirs, look=look)
    if out is not None:
        our_paths, their_paths = ({suite: path for suite, (path, _) in side.items()} for side in (left, right))
        save_verdict(out, verdict, spec, our_paths, their_paths, look=look)
    return verdict


def _size(report: EvalReport) -> tuple[int, int]:
    """Number of items and of clusters."""
    return len(report.items), len({item.cluster for item in report.items if item.cluster is not None})


def _look(registry: Path | None, suites: Sequence[str], reports: Sequence[Mapping[str, EvalReport]]) -> int:
    from posttrain.registry import JudgedSuite, Registry

    if registry is None:
        raise GateError("this spec spends alpha over its looks, which are counted in a registry: add --registry DIR")
    judged = [reports[0][suite] for suite in suites if suite in reports[0]]
    if not judged or suites[0] not in reports[1]:
        return 1  # nothing can be judged, which the verdict says; that is not a look
    book = Registry(registry)
    try:
        asked = [JudgedSuite.of(report) for report in judged]
        look = book.record_look(asked, judged[0].model_digest, reports[1][suites[0]].model_digest)
        typer.echo("".join(f"{line}\n" for line in book.renewals(asked)), err=True, nl=False)
        return look
    finally:
        book.close()
