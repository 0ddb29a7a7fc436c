"""Pages that are read: runs, a run, a comparison, the data of a run, the registry. Records in, HTML out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.responses import HTMLResponse, Response

from posttrain.cli.pages.door import REPORT_POLICY
from posttrain.cli.pages.lineage import BOX, draw_lineage
from posttrain.cli.pages.site import Site, as_list
from posttrain.cli.registry import version_history
from posttrain.cli.registry_folder import open_registry
from posttrain.errors import DataError
from posttrain.files import read_json
from posttrain.report import checks, tables, words
from posttrain.report.charts import panels_of
from posttrain.report.diff import compare
from posttrain.report.records import RunRecord, StageRecord, as_mapping
from posttrain.report.series import window_record
from posttrain.tracking.trackers import REPORT_NAME
from posttrain.uris import clean_text, clean_value

RUNS_PER_PAGE, SAMPLES_PER_PAGE = 100, 20
MOST_COMPARED = 8
_READ_S = 0.04
"""Of a request's time, for reading on in metrics that grow; the page asks again until all is read."""
_MOST_POINTS = 2000


def runs_page(site: Site, query: str, page: int) -> HTMLResponse:
    lines = site.runs.lines()
    found = [line for line in lines if line.matches(query.lower().split())]
    pages = max(1, -(-len(found) // RUNS_PER_PAGE))
    page = min(max(1, page), pages)
    shown = found[(page - 1) * RUNS_PER_PAGE : page * RUNS_PER_PAGE]
    return site.page(
        "runs", "Runs", lines=shown, num_found=len(found), num_runs=len(lines), query=query, page=page, pages=pages,
        is_live=any(line.status == "running" for line in shown),
    )  # fmt: skip


def run_page(site: Site, path: str, stage: str, page: int) -> HTMLResponse:
    run = site.reading.record(path, with_metrics=False)
    chosen = _chosen(run, stage)
    samples = list(chosen.samples[::-1]) if chosen else []
    pages = max(1, -(-len(samples) // SAMPLES_PER_PAGE))
    page = min(max(1, page), pages)
    shown = [
        {"step": one.get("step"), "reward": one.get("reward"), "prompt": _clipped(one.get("prompt")), "completion": _clipped(one.get("completion"))}
        for one in samples[(page - 1) * SAMPLES_PER_PAGE : page * SAMPLES_PER_PAGE]
    ]  # fmt: skip
    shares = _shares(run)
    return site.page(
        "run", run.name, run=run, path=site.place.shown(run.folder), stage=chosen, pending=_pending(run), headline=tables.headline(run),
        verdict=words.verdict_of(run.final_gate.verdict) if run.final_gate else "",
        gates=[(gate, [], tables.tests_by_unit(gate, shares)) for gate in run.gates],
        findings=tables.findings(run), watched=_watched(run), certificates=checks.certificate_views(run),
        panels=_panels(chosen), series=_series(site, run, chosen), finding_steps=_finding_steps(chosen), samples=shown,
        page=page, pages=pages, num_samples=len(samples), config_file=_config_file(site, run),
    )  # fmt: skip


def _clipped(turns: Any) -> str:
    """Cleaned before it is cut: half a secret is not found."""
    return tables.clip(clean_text(tables.transcript(turns)))


def _chosen(run: RunRecord, stage: str) -> StageRecord | None:
    """Raises: DataError for a stage that the run has not."""
    found = [one for one in run.stages if stage in ("", one.name)]
    if stage and not found:
        known = ", ".join(one.name for one in run.stages) or "none: no stage has begun"
        raise DataError(f"{run.name}: got no stage {stage!r}; expected one of {known}")
    return found[-1] if found else None


def _pending(run: RunRecord) -> Mapping[str, Any]:
    """The verdict that waits for people; empty if none does."""
    path = run.folder / "pending.json"
    return as_mapping(read_json(path)) if path.exists() else {}


def _shares(run: RunRecord) -> dict[str, bool]:
    reports: dict[str, list[Any]] = {}
    for suites in run.evals.values():
        for (suite, _), report in suites.items():
            reports.setdefault(suite, []).append(report)
    return {suite: words.is_share(*found) for suite, found in reports.items()}


def _watched(run: RunRecord) -> bool:
    return any((_stage_folder(run, stage) / "metrics.jsonl").exists() for stage in run.stages)


def _stage_folder(run: RunRecord, stage: StageRecord) -> Path:
    return run.folder / str(stage.entry.get("folder") or ".")


def _panels(stage: StageRecord | None) -> list[dict[str, Any]]:
    if stage is None:
        return []
    return [{"title": one.title, "meaning": one.meaning, "metrics": one.metrics} for one in panels_of(stage.kind)]


def _series(site: Site, run: RunRecord, stage: StageRecord | None) -> list[dict[str, str]]:
    """What the page's script asks for; names are text to it, never markup."""
    if stage is None:
        return []
    return [{"run": site.place.shown(run.folder), "stage": stage.name, "label": clean_text(run.name)}]


def _finding_steps(stage: StageRecord | None) -> list[int]:
    steps = [one.get("step") for one in stage.findings] if stage else []
    return sorted({step for step in steps if isinstance(step, int)})


def _config_file(site: Site, run: RunRecord) -> str:
    """The resolved YAML of the run, from which it is started again."""
    path = run.folder / "config.yaml"
    return site.place.shown(path) if path.exists() else ""


def curves_record(
    site: Site, path: str, stage: str, names: Sequence[str], low: int | None, high: int | None, points: int
) -> dict[str, Any]:
    """Curves of a stage as JSON data, with what of its file was read in the time that a page waits."""
    run = site.place.run_folder(path)
    inner = site.place.inside(run / "stages" / stage)
    folder = inner if stage and inner.is_dir() else run
    if folder.name != stage:
        raise DataError(f"{path}: got no stage {stage!r}; expected the name of a folder in stages/")
    series = site.series.of(site.place.inside(folder / "metrics.jsonl"))
    series.grow(_READ_S)
    window = series.window(names, low, high, min(max(points, 10), _MOST_POINTS))
    return clean_value(window_record(window, names))


def compare_page(site: Site, paths: Sequence[str], stage: str) -> HTMLResponse:
    """Two runs or more: curves over each other; of the first two what differs in pins, keys and scores."""
    if not paths:
        raise DataError("got no runs to compare; expected two or more: tick them in the list of runs")
    if len(paths) > MOST_COMPARED:
        raise DataError(f"got {len(paths)} runs to compare; expected at most {MOST_COMPARED}")
    runs = [site.reading.record(path, with_metrics=False) for path in dict.fromkeys(paths)]
    names = list(dict.fromkeys(one.name for run in runs for one in run.stages))
    chosen = stage if stage in names else names[-1] if names else ""
    found = [(run, one) for run in runs for one in run.stages if one.name == chosen]
    return site.page(
        "compare", "Compare", runs=[(site.place.shown(run.folder), run) for run in runs], stages=names, stage=chosen,
        panels=_panels(found[0][1]) if found else [],
        series=[one for run, stage in found for one in _series(site, run, stage)],
        rows=[(site.place.shown(run.folder), stage) for run, stage in found], difference=compare(runs[0], runs[1]) if len(runs) > 1 else None,
    )  # fmt: skip


def data_page(site: Site, path: str) -> HTMLResponse:
    run = site.reading.record(path, with_metrics=False)
    examples = [
        (stage.name, view)
        for stage in run.stages
        for example in as_list(stage.data.get("examples"))
        if (view := tables.mask_example(example)).segments
    ]
    return site.page(
        "data", f"Data of {run.name}", path=site.place.shown(run.folder), run=run, data=checks.data_rows(run), lint=checks.lint_rows(run),
        linted=any(stage.lint for stage in run.stages), masks=examples,
    )  # fmt: skip


def report_page(site: Site, path: str) -> Response:
    """The recorded report; of a run that has none yet, what it would be. No script in it runs."""
    from posttrain.report.build import render_report

    run = site.place.run_folder(path)
    written = run / REPORT_NAME
    html = written.read_text("utf-8", "replace") if written.exists() else render_report(site.reading.record(path, with_metrics=True))  # fmt: skip
    return HTMLResponse(clean_text(html), headers={"Content-Security-Policy": REPORT_POLICY})


def registry_page(site: Site, registry: str, name: str) -> HTMLResponse:
    """The versions of a registry and of one name, or of all, which came from which."""
    from posttrain.registry.family import family_of_versions

    folder = site.place.inside(registry or site.registry)
    if not registry and not (folder / "registry.sqlite").exists():
        return site.page("registry", "Registry", registry=site.registry, entries=None, names=[], name="", graph=None, family=[], box=BOX)  # fmt: skip
    with open_registry(folder, for_reading=True) as book:
        entries = book.entries(None)
        names = list(dict.fromkeys(entry.name for entry in entries))
        name = name or (names[0] if names else "")
        family = family_of_versions(book, name) if name else []
    return site.page(
        "registry", "Registry", registry=site.place.shown(folder), entries=entries, names=names, name=name, family=family,
        graph=draw_lineage(family), box=BOX,
    )  # fmt: skip


def version_page(site: Site, registry: str, ref: str) -> HTMLResponse:
    folder = site.place.inside(registry or site.registry)
    with open_registry(folder, for_reading=True) as book:
        entry = book.find(ref)
        history = version_history(book, entry)
    return site.page(
        "version", f"{entry.name}@{entry.version}", registry=site.place.shown(folder), entry=entry, history=history,
        lineage=[(one, tables.flatten(as_mapping(one.get("details")))) for one in history["lineage"]],
        tests=list(as_mapping(history["verdict"]).get("tests") or []), verdict=as_mapping(history["verdict"]),
    )  # fmt: skip
