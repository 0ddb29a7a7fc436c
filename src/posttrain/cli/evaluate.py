"""`posttrain eval MODEL --suite FILE …`, or `posttrain eval CONFIG.yaml`: score a model, keep every item, show the table."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.best_of import asked_best_of, show_best_of
from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from posttrain.config.pipeline import SuiteKeys
    from posttrain.config.stages import ModelKeys
    from posttrain.evals.suite import Suite
    from posttrain.evidence import EvalReport

SuitesToRun = list[tuple["Suite", "SuiteKeys"]]


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, hub id, or a YAML (its suites on its base_model).")],
    suite: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="JSONL suite; may be repeated.")] = None,
    split: Annotated[str, typer.Option(help="Split to score.")] = "gate",
    num_samples: Annotated[int | None, typer.Option(min=1, help="Completions per item (K).")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    on: Annotated[str | None, typer.Option("--model", help="With a YAML: the model to score instead.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the reports; default: one per model in runs/evals.")
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option(min=2, help="Show Best-of-n for n up to so many samples (at temperature 1 unless said)."),
    ] = None,
    verifier: Annotated[
        str | None,
        typer.Option(
            help="With --best-of: who chooses: file.py:function, model:FOLDER, judge:FILE.yaml or a scorer; default: the suite's own."
        ),
    ] = None,
    verifier_kwargs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Options of a process reward model that chooses, as in reward_kwargs: aggregate (min, product, last or mean), step_separator; may be repeated.",
        ),
    ] = None,
    grader: Annotated[
        list[str] | None,
        typer.Option(help="With --best-of: who judges the choice too, beside the suite; may be repeated."),
    ] = None,
) -> None:
    """Score a model on eval suites. What the reports in --out already hold is not measured again."""
    keys, plan = plan_of(model, suite or [], on)
    asked = asked_best_of(best_of, verifier, grader or [], num_samples, verifier_kwargs or [])
    if asked is not None:
        num_samples = asked.most
        if temperature is None:
            plan = [(s, k if k.temperature else k.model_copy(update={"temperature": 1.0})) for s, k in plan]
    decoding = {"num_samples": num_samples, "temperature": temperature, "max_tokens": max_tokens}
    plan = [(loaded, _decode_with(suite_keys, decoding)) for loaded, suite_keys in plan]
    for loaded, _ in plan:
        loaded.on(split)  # A split that is not there is said before the weights are read.
    folder = out or _folder(keys.base_model)
    reports = _measure(keys, plan, split, folder)
    typer.echo(f"model    {keys.base_model}\n{table(reports)}")
    if asked is not None:
        show_best_of(asked, reports, [loaded for loaded, _ in plan], folder)
    typer.echo(f"reports  {folder}")


def table(reports: Mapping[str, EvalReport]) -> str:
    """One row per suite: mean with its 95 % interval, items, and pass@k where there are several samples."""
    from posttrain.evals.run import pass_at_ks
    from posttrain.gate.render import aligned
    from posttrain.report.intervals import score_interval

    passes = {name: pass_at_ks(report) if _is_binary(report) else {} for name, report in reports.items()}
    ks = sorted({k for found in passes.values() if len(found) > 1 for k in found})
    rows = [("suite", "split", "scorer", "n", "mean", "95 % interval", *(f"pass@{k}" for k in ks))]
    for name, report in reports.items():
        shown = score_interval(report)
        numbers = (str(shown.num_items), _number(shown.mean), f"[{_number(shown.low)}, {_number(shown.high)}]")
        at_k = (_number(passes[name].get(k, math.nan)) for k in ks)
        rows.append((name, report.split, report.scorer, *numbers, *at_k))
    return "\n".join(aligned(rows, range(3, len(rows[0]))))


def plan_of(model: str, files: Sequence[Path], on: str | None) -> tuple[ModelKeys, SuitesToRun]:
    """What to score, and on what. Raises: ConfigError if one of the two was not said."""
    from posttrain.cli.model import model_keys
    from posttrain.config.pipeline import SuiteKeys
    from posttrain.evals.suite import by_name, load_suite

    if Path(model).suffix in (".yaml", ".yml"):
        keys, suites = _of_yaml(Path(model), on)
    elif on is not None:
        raise ConfigError(f"--model {on} beside {model}: expected a YAML first, or the model alone")
    else:
        keys, suites = model_keys(model), {}
    if files:
        suites = {name: SuiteKeys(path=file) for name, file in by_name(files).items()}
    if not suites:
        raise ConfigError(f"{model}: got no suite; add --suite FILE, or name suites under `evals` of a pipeline")
    return keys, [(load_suite(name, Path(found.path)), found) for name, found in suites.items()]


def _of_yaml(path: Path, on: str | None) -> tuple[ModelKeys, Mapping[str, SuiteKeys]]:
    """The model keys of a pipeline or of a single stage, with the pipeline's suites."""
    from posttrain.cli.model import model_keys, with_base
    from posttrain.config.load import detect_kind, load_stage
    from posttrain.config.load_pipeline import load_pipeline

    kind, suites = detect_kind(path), {}
    if kind == "pipeline":
        pipeline = with_base(load_pipeline(path).keys)
        base, suites, first = pipeline.base_model, pipeline.evals, pipeline.stages[0].keys
    else:
        first = load_stage(kind, path).keys
        base = first.base_model
    how = ("trust_remote_code", "chat_template", "chat_template_kwargs", "bf16", "device", "layer_offloading") + (
        () if on else ("revision", "tokenizer_name_or_path", "init_seed")
    )
    return model_keys(on or base).model_copy(update={name: getattr(first, name) for name in how}), suites


def _decode_with(keys: SuiteKeys, given: Mapping[str, Any]) -> SuiteKeys:
    """The suite's decoding with what the command line changes. Raises: ConfigError if the samples would all be equal."""
    changed = keys.model_copy(update={name: value for name, value in given.items() if value is not None})
    if changed.num_samples > 1 and changed.temperature == 0:
        raise ConfigError(
            f"num_samples={changed.num_samples} at temperature 0 gives the same answer {changed.num_samples} times; "
            "set --temperature, for example 0.7"
        )
    return changed


def _folder(model: str) -> Path:
    """A folder of its own for each model; `03-grpo` says more than `model`."""
    path = Path(model).resolve() if Path(model).is_dir() else Path(model)
    name = path.parent.name if path.name == "model" else path.name
    return Path("runs/evals") / f"{name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _measure(keys: ModelKeys, plan: SuitesToRun, split: str, folder: Path, order: int = 0) -> dict[str, EvalReport]:
    from rich.console import Console

    from posttrain.pipeline.show import setup_logging
    from posttrain.recipes.measure.evaluate import Asking
    from posttrain.recipes.measure.evaluate import evaluate as score

    console = Console(stderr=True)
    setup_logging(console)

    def progress(name: str, done: int, total: int) -> None:
        console.print(f"eval {name} {done}/{total}", markup=False, highlight=False)

    return score(keys, plan, split, folder, Asking(progress=progress), order=order)


def measure_again(
    keys: ModelKeys, plan: SuitesToRun, split: str, folder: Path, times: int
) -> list[dict[str, EvalReport]]:
    """The reports of `times` + 1 evaluations, each with another batch order and seed; what is on disk is not redone."""
    return [
        _measure(keys, [(suite, _seeded(found, number)) for suite, found in plan], split, folder / str(number), number)
        for number in range(times + 1)
    ]


def _seeded(keys: SuiteKeys, number: int) -> SuiteKeys:
    return keys.model_copy(update={"seed": keys.seed + number})


def _is_binary(report: EvalReport) -> bool:
    """pass@k is about right or wrong; a graded score has none."""
    return all(score in (0.0, 1.0) for item in report.items for score in item.scores)


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"
