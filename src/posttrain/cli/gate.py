"""`posttrain gate A B --spec gate.yaml`: is A good enough to replace B? The exit code is the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from posttrain.errors import GateError
from posttrain.types import EvalReport, GateVerdict


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
    from posttrain.gate import render

    if recompute is not None:
        verdict = folders.recompute(recompute)
    elif spec is None or Path() in (candidate, baseline):
        raise GateError(
            "got too little to judge: expected `posttrain gate A B --spec gate.yaml`, or --recompute FOLDER"
        )
    else:
        verdict = _judge(candidate, baseline, spec, out, registry)
    typer.echo(render(verdict))
    raise typer.Exit(verdict.verdict.exit_code)


def _judge(candidate: Path, baseline: Path, spec_path: Path, out: Path | None, registry: Path | None) -> GateVerdict:
    from posttrain.config.load import load_gate
    from posttrain.gate import GateSpec, decide, load_reports, save_verdict

    spec = GateSpec.from_keys(load_gate(spec_path))
    left, right = load_reports(candidate, spec.split), load_reports(baseline, spec.split)
    ours, theirs = ({suite: report for suite, (_, report) in side.items()} for side in (left, right))
    look = 1 if spec.looks == 0 else _look(registry, spec.suites, (ours, theirs))
    verdict = decide(spec, ours, theirs, look=look)
    if out is not None:
        our_paths, their_paths = ({suite: path for suite, (path, _) in side.items()} for side in (left, right))
        save_verdict(out, verdict, spec, our_paths, their_paths, look=look)
    return verdict


def _look(registry: Path | None, suites: Sequence[str], reports: Sequence[Mapping[str, EvalReport]]) -> int:
    from posttrain.registry import Registry

    if registry is None:
        raise GateError("this spec spends alpha over its looks, which are counted in a registry: add --registry DIR")
    judged = [reports[0][suite] for suite in suites if suite in reports[0]]
    if not judged or suites[0] not in reports[1]:
        return 1  # nothing can be judged, which the verdict says; that is not a look
    book = Registry(registry)
    try:
        digests = [report.suite_digest for report in judged]
        return book.record_look(digests, judged[0].model_digest, reports[1][suites[0]].model_digest)
    finally:
        book.close()
