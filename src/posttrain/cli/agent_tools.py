"""What an agent may read: runs, metrics, verdicts, registry, plan, explain. Each answers what the verb's `--json` or the report reads."""

# Annotations stand as values here: pydantic makes the tools' schemas of them.
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from posttrain.cli.agent_folder import ServedFolder
from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.report.records import RunRecord, StageRecord

RunPath = Annotated[str, Field(description="Folder of a run, relative to the folder served.")]
RegistryPath = Annotated[str, Field(description="Folder of the registry.")]
ConfigPath = Annotated[str, Field(description="YAML of a pipeline or of one stage.")]
Overrides = Annotated[list[str], Field(description="KEY=VALUE, each as `--set` takes it.")]


class ReadTools:
    """The tools that change nothing, over one folder. A method's first line is what the agent is told."""

    def __init__(self, place: ServedFolder) -> None:
        self.place = place

    @property
    def table(self) -> tuple[Callable[..., Any], ...]:
        return (self.runs, self.metrics, self.verdicts, self.registry, self.plan, self.explain)

    def runs(
        self, *, run: Annotated[str, Field(description="Only this run's folder; else all that are found.")] = ""
    ) -> Any:
        """Runs with their status, stages, last metrics, verdicts, and what was registered."""
        folders = [Path(run)] if run else list(self.place.runs())
        return [self._summary(self._record(folder)) for folder in folders]

    def metrics(
        self, *, run: RunPath,
        stage: Annotated[str, Field(description="Name of a stage's folder, such as 03-grpo; the last one if left out.")] = "",
        names: Annotated[list[str], Field(description="Only these metrics; all if left out.")] = [],  # noqa: B006
        last: Annotated[int, Field(ge=1, le=1000, description="How many logged steps, counted from the end.")] = 20,
    ) -> Any:  # fmt: skip
        """Logged steps of a stage under TRL's names, and what the health rules found and did."""
        found = self._stage(self._record(run), stage)
        if unknown := sorted(set(names) - found.metrics.names().keys()):
            known = ", ".join(sorted(found.metrics.names())) or "none: nothing was logged yet"
            raise DataError(f"{run}, {found.name}: got no metric {', '.join(unknown)}; expected some of {known}")
        kept = {"step", *names}
        rows = [{name: row[name] for name in row if not names or name in kept} for row in found.metrics[-last:]]
        return {
            "stage": found.name, "status": found.status, "num_logged": len(found.metrics), "rows": rows,
            "findings": found.findings[-last:], "actions": found.actions[-last:],
        }  # fmt: skip

    def verdicts(self, *, run: RunPath) -> Any:
        """Every verdict of a run: PASS, FAIL, INCONCLUSIVE or INVALID, the reason, each test's numbers, the gate's spec."""
        return [asdict(gate) for gate in self._record(run).gates]

    def registry(
        self, *, ref: Annotated[str, Field(description="NAME@VERSION, NAME@ALIAS or alias:ALIAS; all versions if left out.")] = "",
        registry: RegistryPath = "registry",
    ) -> Any:  # fmt: skip
        """Registered versions with aliases and tags; of one version also its lineage, verdict and events."""
        from posttrain.cli.registry import version_history, version_record
        from posttrain.cli.registry_folder import open_registry

        with open_registry(self.place.inside(registry), for_reading=True) as book:
            return version_history(book, book.find(ref)) if ref else [version_record(one) for one in book.entries(None)]

    def plan(
        self, *, config: ConfigPath, overrides: Overrides = [],  # noqa: B006
        gpus: Annotated[str, Field(description="8xH100, 2x8xH100, …; this machine if left out.")] = "",
    ) -> Any:  # fmt: skip
        """Memory and time of each stage before it starts; bytes and seconds. `fits: false` says that it cannot run there."""
        from posttrain.cli.plan import make_plan, target_of

        target = target_of(gpus or None, "this", 1, False)
        return make_plan(self.place.inside(config), target, None, self.place.overrides(overrides)).record(None)

    def explain(
        self,
        *,
        key: Annotated[str, Field(description="A key, or another tool's name for it; all keys if left out.")] = "",
    ) -> Any:
        """What a key of the YAML means, its type, defaults, an example, and what other tools call it."""
        from posttrain.cli.explain import explain_record

        return explain_record(key or None)

    def _record(self, run: str | Path) -> "RunRecord":
        return self.record(run, with_metrics=True)

    def record(self, run: str | Path, *, with_metrics: bool) -> "RunRecord":
        """A run no part of which lies outside. Raises: ConfigError, DataError."""
        from posttrain.report.records import read_run

        record = read_run(self.place.run_folder(run), with_metrics=with_metrics)
        for stage in record.stages:  # pipeline.json names their folders
            self.place.inside(record.folder / str(stage.entry.get("folder") or "."))
        return record

    def _stage(self, record: "RunRecord", name: str) -> "StageRecord":
        found = [stage for stage in record.stages if name in ("", stage.name)]
        if not found:
            known = ", ".join(stage.name for stage in record.stages) or "none: no stage has begun"
            raise DataError(f"{self.place.shown(record.folder)}: got no stage {name!r}; expected one of {known}")
        return found[-1]

    def _summary(self, record: "RunRecord") -> dict[str, Any]:
        stages = [
            {
                "name": stage.name, "kind": stage.kind, "status": stage.status, "attempt": stage.attempt, "steps": stage.steps,
                "wall_s": stage.wall_s, "tokens": stage.tokens, "num_findings": len(stage.findings),
                "last": dict(stage.metrics[-1]) if stage.metrics else None,
            }
            for stage in record.stages
        ]  # fmt: skip
        verdicts = [
            {"after": one.after, "verdict": one.verdict["verdict"], "reason": one.verdict["reason"]}
            for one in record.gates
        ]
        waits = (record.folder / "pending.json").exists()
        return {
            "run": self.place.shown(record.folder), "name": record.name, "status": record.status, "stages": stages, "verdicts": verdicts,
            "waits_for_a_decision": waits, "registered": record.registered, "problems": record.problems,
        }  # fmt: skip
