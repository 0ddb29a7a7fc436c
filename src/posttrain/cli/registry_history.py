"""`posttrain registry tree | trend | compare`: versions beside each other, from what is stored alone. Nothing is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.json_output import AsJson, echo_json
from posttrain.cli.registry_folder import DEFAULT, Folder, Ref, open_registry
from posttrain.errors import RegistryError
from posttrain.files import digest_start

if TYPE_CHECKING:
    from posttrain.evidence import EvalReport, RegistryEntry
    from posttrain.registry.family import Relative
    from posttrain.report.intervals import Interval

ModelName = Annotated[str, typer.Argument(help="Name of the model.")]
OnSplit = Annotated[str, typer.Option(help="Split of the reports.")]
MARGIN = 0.05


def show_tree(name: ModelName, registry: Folder = DEFAULT, as_json: AsJson = False) -> None:
    """Which version came from which: parents and descendants, also of other names."""
    from posttrain.registry.family import family_of_versions

    with open_registry(registry, for_reading=True) as book:
        family = family_of_versions(book, name)
    if not family:
        raise RegistryError(f"no {name} in {registry}: `posttrain registry list` names what there is")
    if as_json:
        echo_json([_relative(member) for member in family])
        return
    for base in dict.fromkeys(member.base for member in family if not member.parents):
        typer.echo(base)
        roots = [member for member in family if not member.parents and member.base == base]
        typer.echo("\n".join(line for root in roots for line in _branch(root, family, 1)))


def _branch(member: Relative, family: Sequence[Relative], depth: int) -> Iterable[str]:
    """A version and what came from it, each under the first of its parents."""
    aliases = f"  [{', '.join(member.entry.aliases)}]" if member.entry.aliases else ""
    others = f"  (also from {', '.join(member.parents[1:])})" if member.parents[1:] else ""
    yield f"{'  ' * depth}{member.ref}  {' → '.join(member.stages)}{aliases}{others}"
    for child in family:
        if child.parents[:1] == (member.ref,):
            yield from _branch(child, family, depth + 1)


def _relative(member: Relative) -> dict[str, Any]:
    entry = member.entry
    version = {"name": entry.name, "version": entry.version, "digest": entry.digest, "aliases": list(entry.aliases)}
    return version | {"base": member.base, "stages": list(member.stages), "parents": list(member.parents)}


@dataclass(frozen=True, slots=True)
class _Point:
    """A version on a suite. `change` is since the point before on the same items; None where there is none."""

    ref: str
    suite_digest: str
    score: Interval
    change: Interval | None


def show_trend(
    name: ModelName,
    suite: Annotated[str, typer.Option(help="Suite to follow.")],
    split: OnSplit = "gate",
    registry: Folder = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """A suite over the versions: mean and 95 % interval, and the paired change since the version before."""
    from posttrain.registry.reports import stored_reports

    with open_registry(registry, for_reading=True) as book:
        entries = book.entries(name)
        reports = stored_reports(book, {entry.digest for entry in entries}, split)
    points = _points(entries, reports, suite)
    if not points:
        known = sorted({report.suite for found in reports.values() for report in found})
        raise RegistryError(
            f"got no report on {suite!r}, split {split!r}, of any version of {name}; there are {', '.join(known) or 'none'}"
        )
    if as_json:
        echo_json([_finite(asdict(point)) for point in points])
        return
    before = ""
    for point in points:
        if before not in ("", point.suite_digest):
            typer.echo("-- another version of the suite: not comparable with the lines above")
        change = "" if point.change is None else f"  change {_interval(point.change, '+.4f')}"
        typer.echo(f"{point.ref}  {_interval(point.score, '.4f')}  {point.score.num_items} items{change}")
        before = point.suite_digest


def _points(entries: Iterable[RegistryEntry], reports: Mapping[str, Sequence[EvalReport]], suite: str) -> list[_Point]:
    """One per version and state of the suite, the newest report of each."""
    from posttrain.report.intervals import difference_interval, score_interval

    latest: dict[str, EvalReport] = {}
    points: list[_Point] = []
    for entry in entries:
        for digest, report in {r.suite_digest: r for r in reports[entry.digest] if r.suite == suite}.items():
            before = latest.get(digest)
            change = None if before is None else difference_interval(before, report)
            points.append(_Point(f"{entry.name}@{entry.version}", digest, score_interval(report), change))
            latest[digest] = report
    return points


def show_looks(registry: Folder = DEFAULT, as_json: AsJson = False) -> None:
    """How often verdicts were made on the items of each suite, and which suite renewed which."""
    with open_registry(registry, for_reading=True) as book:
        counts = book.all_looks()
    if as_json:
        echo_json([asdict(one) for one in counts])
        return
    for one in counts:
        renews = f"  renews {digest_start(one.renews)}" if one.renews else ""
        typer.echo(f"{one.name or '?'}  {digest_start(one.digest)}  {one.num_looks} looks since {one.since}{renews}")


def compare_versions(
    candidate: Ref,
    baseline: Ref,
    suite: Annotated[list[str] | None, typer.Option(help="Only this suite; may be repeated.")] = None,
    margin: Annotated[float, typer.Option(help="Loss on a suite that still counts as not worse.")] = MARGIN,
    split: OnSplit = "gate",
    registry: Folder = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Whether the first version is not worse than the second, by the gate's test on stored items. Exit codes as `posttrain gate`.

    It counts no look and promotes nothing.
    """
    from posttrain.gate import GateSpec, Guard, decide, verdict_table
    from posttrain.registry.reports import stored_reports

    with open_registry(registry, for_reading=True) as book:
        ours, theirs = book.find(candidate), book.find(baseline)
        reports = stored_reports(book, {ours.digest, theirs.digest}, split)
    sides = _same_suites(reports[ours.digest], reports[theirs.digest])
    common = [name for name in sides if suite is None or name in suite]
    if missing := sorted(set(suite or ()) - set(common)) or ([] if common else ["any suite"]):
        raise RegistryError(
            f"{candidate} and {baseline} have no reports on {', '.join(missing)} that are both on split {split!r}; "
            f"both are kept for {', '.join(sides) or 'none'}: evaluate both (`posttrain eval`) and judge with `posttrain gate`"
        )
    spec = GateSpec(guards=tuple(Guard(name, margin) for name in common), split=split)
    verdict = decide(spec, *({name: sides[name][place] for name in common} for place in (0, 1)))
    if as_json:
        echo_json(verdict.to_json())
    else:
        typer.echo(verdict_table(verdict))
    raise typer.Exit(verdict.verdict.exit_code)


def _same_suites(ours: Sequence[EvalReport], theirs: Sequence[EvalReport]) -> dict[str, tuple[EvalReport, EvalReport]]:
    """Suite → the newest reports of both, on the same state of the suite where there are such."""
    found: dict[str, tuple[EvalReport, EvalReport]] = {}
    for left in ours:
        for right in theirs:
            same = left.suite_digest == right.suite_digest
            known = found.get(left.suite)
            if left.suite == right.suite and (same or known is None or known[0].suite_digest != known[1].suite_digest):
                found[left.suite] = (left, right)
    return found


def _interval(found: Interval, form: str) -> str:
    if math.isnan(found.low):
        return f"{found.mean:{form}} [–]"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _finite(value: Any) -> Any:
    """NaN as null: JSON has no word for it."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
