"""`posttrain eval … --best-of N`: what choosing by a verifier is worth, by n, with the bound of its KL and where it turns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from posttrain.errors import ConfigError
from posttrain.names import ENVIRONMENT, JUDGE, REWARD_MODEL, told_apart

if TYPE_CHECKING:
    from posttrain.evals.best_of import BestOf, VerifiedItem
    from posttrain.evals.suite import Suite
    from posttrain.evidence import EvalReport
    from posttrain.report.intervals import Interval


@dataclass(frozen=True)
class AskedBestOf:
    """Up to how many samples, who chooses (None: the suite's scorer), who judges beside the suite, and the verifier's options."""

    most: int
    verifier: str | None
    graders: tuple[str, ...]
    verifier_kwargs: Mapping[str, str] = field(default_factory=dict[str, str])


def asked_best_of(
    most: int | None,
    verifier: str | None,
    graders: Sequence[str],
    num_samples: int | None,
    verifier_kwargs: Sequence[str] = (),
) -> AskedBestOf | None:
    """Raises: ConfigError for options that do nothing, and for a verifier or grader that is not there."""
    if most is None:
        given = {"--verifier": verifier, "--grader": graders, "--verifier-kwargs": verifier_kwargs}
        for name, value in given.items():
            if value:
                raise ConfigError(f"{name} does nothing without --best-of N; add it")
        return None
    if num_samples not in (None, most):
        raise ConfigError(
            f"--num-samples {num_samples} beside --best-of {most}, which samples {most}; remove one of them"
        )
    place = _place(verifier) if verifier else None
    return AskedBestOf(most, place, tuple(dict.fromkeys(map(_place, graders))), _options(place, verifier_kwargs))


def _options(verifier: str | None, given: Sequence[str]) -> dict[str, str]:
    """Of `KEY=VALUE` each. Raises: ConfigError where the verifier has no such option."""
    from posttrain.grading.learned import check_learned_options, split_learned
    from posttrain.names import reward_name

    options: dict[str, str] = {}
    for text in given:
        name, equals, options[name] = text.partition("=")
        if not equals:
            raise ConfigError(f"--verifier-kwargs: got {text!r}, expected KEY=VALUE, e.g. aggregate=product")
    if options and (verifier is None or not split_learned(verifier)):
        raise ConfigError(
            f"--verifier-kwargs: {verifier or 'the scorer of the suite'} takes no options; expected --verifier model:FOLDER of a process reward model"
        )
    if options and verifier is not None:
        check_learned_options(reward_name(verifier), verifier, options, key="--verifier-kwargs")
    return options


def _place(spec: str) -> str:
    from posttrain.config.paths import reward_place
    from posttrain.grading.scorers import SCORERS
    from posttrain.rewards.resolve import check_spec

    if spec == ENVIRONMENT:
        raise ConfigError(
            f"{spec}: what an environment pays is no opinion of a text; leave it out, a suite with this scorer has it anyway"
        )
    if spec not in SCORERS:
        spec = reward_place(spec, Path.cwd())
        check_spec(spec)
    return spec


def show_best_of(asked: AskedBestOf, reports: Mapping[str, EvalReport], suites: Sequence[Suite], folder: Path) -> None:
    """The curve of each suite, and `best-of-SUITE-SPLIT.json` with every item's scores."""
    from posttrain.evals.best_of import best_of_curve
    from posttrain.files import write_json
    from posttrain.gate.render import aligned
    from posttrain.recipes.measure.best_of import verified_items

    for suite in suites:
        report = reports[suite.name]
        items = verified_items(report, suite, asked.verifier, asked.graders, asked.verifier_kwargs)
        curve = best_of_curve(items, asked.most)
        names = list(curve[0].graders)
        short = short_names([*names, *([asked.verifier] if asked.verifier else [])])
        chosen_by = short[asked.verifier] if asked.verifier else f"{suite.scorer} (suite)"
        rows = [("n", "KL ≤", f"verifier {chosen_by}", *(f"{short[name]}, 95 %" for name in names))]
        for at in curve:
            rows.append(
                (
                    str(at.n),
                    f"{at.kl:.3f}",
                    _mean(at.verifier, items),
                    *(_mean(at.graders[name], items) for name in names),
                )
            )
        typer.echo(
            "\n".join([f"\nbest of n on {suite.name} ({len(items)} items)", *aligned(rows, range(len(rows[0])))])
        )
        unscored = sum(score is None for item in items for score in item.verifier)
        if unscored:
            typer.echo(f"{unscored} samples without a score of the verifier, which never chooses them")
        for name in names:
            if (turn := over_optimised_from(curve, name, items)) is not None:
                typer.echo(
                    f"over-optimised: {short[name]} is best at n = {turn}; beyond it the verifier chooses what only the verifier likes"
                )
        write_json(folder / f"best-of-{suite.name}-{report.split}.json", _record(asked, report, items, curve, short))


def short_names(specs: Iterable[str]) -> dict[str, str]:
    """What a column can hold: without the folders, but for those that tell one from another."""
    paths = {spec: spec.removeprefix(_prefix(spec)) for spec in specs}
    names = told_apart(paths.values())
    return {spec: _prefix(spec) + names[path] for spec, path in paths.items()}


def _prefix(spec: str) -> str:
    return next((prefix for prefix in (REWARD_MODEL, JUDGE) if spec.startswith(prefix)), "")


def over_optimised_from(curve: Sequence[BestOf], grader: str, items: Sequence[VerifiedItem]) -> int | None:
    """The n beyond which the grader loses more than by chance: item by item, the 95 % interval of its loss to the last n is above 0."""
    from posttrain.evals.best_of import turns_down

    turn = turns_down(curve, grader)
    if turn is None:
        return None
    best = next(at for at in curve if at.n == turn).graders[grader]
    lost = [before - after for before, after in zip(best, curve[-1].graders[grader], strict=True)]
    return turn if _interval(lost, items).low > 0 else None


def _mean(values: Sequence[float], items: Sequence[VerifiedItem]) -> str:
    shown = _interval(values, items)
    return f"{shown.mean:.4f} [{shown.low:.4f}, {shown.high:.4f}]"


def _interval(values: Sequence[float], items: Sequence[VerifiedItem]) -> Interval:
    from posttrain.report.intervals import t_interval

    clustered = any(item.cluster is not None for item in items)
    return t_interval(values, [item.cluster or item.id for item in items] if clustered else None)


def _record(
    asked: AskedBestOf,
    report: EvalReport,
    items: Sequence[VerifiedItem],
    curve: Sequence[BestOf],
    short: Mapping[str, str],
) -> dict[str, object]:
    return {
        "report": report.digest,
        "verifier": short[asked.verifier] if asked.verifier else None,
        "verifier_kwargs": dict(asked.verifier_kwargs),
        "curve": [
            {
                "n": at.n,
                "kl_bound": at.kl,
                "verifier": sum(at.verifier) / len(items),
                "graders": {short[name]: sum(values) / len(items) for name, values in at.graders.items()},
            }
            for at in curve
        ],
        "items": [
            {
                "id": item.id,
                "verifier": list(item.verifier),
                "graders": {short[n]: list(s) for n, s in item.graders.items()},
            }
            for item in items
        ],
    }
