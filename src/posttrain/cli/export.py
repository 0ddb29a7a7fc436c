"""`posttrain export MODEL --to FORM --out DIR`: a model in another form, written only if it is still the same model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from posttrain.forms.export.scores import FormScores
    from posttrain.forms.found import FoundModel


def export(
    model: Annotated[str, typer.Argument(metavar="NAME[@VERSION|@ALIAS] | FOLDER", help="What to export.")],
    to: Annotated[Literal["safetensors", "gguf", "int8", "fp8", "awq", "gptq"], typer.Option(help="The form.")],
    out: Annotated[Path, typer.Option(help="New folder for the export.")],
    type_: Annotated[
        Literal["q8_0", "f16", "int8", "fp8", "w4g128", "w4g64", "w4g32", "float32", "bfloat16", "float16"] | None,
        typer.Option(
            "--type",
            help="gguf: q8_0 (default) or f16; awq, gptq: 4 bits in groups of 128 (default), 64, 32; safetensors: bfloat16 (default), "
            "float16, float32.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="awq, gptq: the texts that weights are fitted to, as data that SFT reads."),
    ] = None,
    suite: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="JSONL suite for the gate's test; default: those kept with the version."),
    ] = None,
    margin: Annotated[float, typer.Option(min=0.0001, help="What each suite may lose.")] = 0.02,
    spec: Annotated[Path | None, typer.Option(help="YAML of a gate, instead of --margin for each suite.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer to a suite, in tokens.")] = 256,
    without_scores: Annotated[
        bool, typer.Option("--without-scores", help="Ask no suite; the record says that none was asked.")
    ] = False,
    registry: Annotated[Path, typer.Option(help="Folder of the registry.")] = Path("registry"),
) -> None:
    """Write a model in another form, read it again, and hold it to its source.

    Compared are prompts, special ids, tensors, greedy answers and scores. Exit code: 0 ready, 1 it is another model, 2 the suites
    could not decide, 3 invalid, 64 wrong usage; unless 0, nothing is left in --out.
    """
    from posttrain.files import digest_file
    from posttrain.pipeline.show import quiet_libraries

    quiet_libraries()  # before bitsandbytes is imported, which says at once what it would fetch
    from posttrain.forms.export.export import EXPORT_FORMS, export_model
    from posttrain.forms.found import find_model

    types = EXPORT_FORMS[to].types
    if type_ is not None and type_ not in types:
        raise ConfigError(f"--type {type_}: {to} holds numbers as {', '.join(types)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already; give a new folder, nothing is overwritten")
    if without_scores and (suite or spec):
        raise ConfigError("--without-scores beside --suite or --spec: keep one of them")
    found = find_model(model, registry)
    with tempfile.TemporaryDirectory(prefix="posttrain-suites-") as scratch:
        scores = (
            None
            if without_scores
            else _scores(found, suite or [], (margin, spec), max_tokens, (registry, Path(scratch)))
        )
        report = export_model(found, out, to, type_ or next(iter(types)), scores, calibration)
    for check in report.checks:
        typer.echo(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:16}  {check.seen}")
    if report.verdict is not None:
        typer.echo(f"{report.verdict.verdict.value:4}  {'scores':16}  {report.verdict.reason}")
    elif not report.exit_code:
        typer.echo(f"--    {'scores':16}  no suite was asked")
    if report.exit_code:
        typer.echo(f"refused: it would be another model; see {out}.refused.json", err=True)
        raise typer.Exit(report.exit_code)
    typer.echo(f"export  {out}  {report.digest}")
    if found.version:
        _note(registry, found.version, f"export.{to}.{report.type}", report.digest)
        if calibration is not None:
            _note(registry, found.version, f"export.{to}.{report.type}.calibration", digest_file(calibration))


def _scores(
    found: FoundModel, files: list[Path], held_to: tuple[float, Path | None], max_tokens: int, places: tuple[Path, Path]
) -> FormScores:
    """Raises: ConfigError where no suite is named and none is kept with the version."""
    from posttrain.config.load import load_gate
    from posttrain.config.pipeline import SuiteKeys
    from posttrain.evals.suite import load_suite
    from posttrain.forms.export.scores import FormScores, suites_of_version
    from posttrain.gate import GateSpec

    if not files and not found.version:
        raise ConfigError("got no suite to hold the export to; add --suite FILE, or --without-scores")
    paths = files or suites_of_version(places[0], found.version, places[1])
    suites = [(load_suite(path.stem, path), SuiteKeys(path=str(path), max_tokens=max_tokens)) for path in paths]
    margin, spec = held_to
    return FormScores(suites, margin, None if spec is None else GateSpec.from_keys(load_gate(spec)))


def _note(registry: Path, version: str, key: str, digest: str) -> None:
    """The registry's word of it: a tag of the version, with its event."""
    from posttrain.cli.registry_folder import open_registry

    name, _, number = version.rpartition("@")
    with open_registry(registry) as book:
        book.tag(name, int(number), key, digest)
