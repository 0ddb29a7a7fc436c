"""The gate's non-inferiority test of a form: the suites answered by the source and by what the form holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.config.pipeline import SuiteKeys
from posttrain.config.stages import ModelKeys
from posttrain.errors import ConfigError
from posttrain.evals.suite import Suite
from posttrain.evidence import GateVerdict
from posttrain.gate.decide import decide, plan_lines
from posttrain.gate.spec import GateSpec, Guard
from posttrain.recipes.measure.evaluate import evaluate
from posttrain.registry.registry import Registry

_DISCORDANCE = 0.05
"""Share of the items on which a form and its source are expected to differ: what the number of items is planned with, not what is tested."""


@dataclass(frozen=True, slots=True)
class FormScores:
    """What is asked, and what must hold. Without a spec each suite may lose less than `margin`."""

    suites: Sequence[tuple[Suite, SuiteKeys]]
    margin: float = 0.02
    spec: GateSpec | None = None

    @property
    def gate(self) -> GateSpec:
        guards = tuple(Guard(suite.name, self.margin, _DISCORDANCE) for suite, _ in self.suites)
        return self.spec or GateSpec(guards=guards)

    def check_enough(self) -> None:
        """Raises: GateError naming how many items are missing, before anything is written."""
        sizes = {suite.name: (len(items := suite.on(self.gate.split)), len({i.cluster for i in items if i.cluster is not None})) for suite, _ in self.suites}  # fmt: skip
        plan_lines(self.gate, sizes)

    def verdict(self, source: Path, form: Path, digests: tuple[str, str], scratch: Path) -> GateVerdict:
        """`digests` are those of the source and of the form; `form` is a folder of what the form holds, to load."""
        split = self.gate.split
        reports = [
            evaluate(ModelKeys(base_model=str(folder)), list(self.suites), split, scratch / name, digest=digest)
            for name, folder, digest in (("form", form, digests[1]), ("source", source, digests[0]))
        ]
        return decide(self.gate, *reports)


def suites_of_version(registry: Path, version: str, folder: Path) -> list[Path]:
    """The suites that are kept with a version of the registry, written to `folder`. Raises: ConfigError where there are none."""
    name, _, number = version.rpartition("@")
    book = Registry(registry)
    try:
        roles = [role for role in book.evidence(name, int(number)) if role.startswith("suite.")]
        found = []
        for role in roles:
            target = folder / f"{role.removeprefix('suite.')}.jsonl"
            path = book.export(name, int(number), role, target)
            if path is not None and path.is_file():
                found.append(path)
    finally:
        book.close()
    if not found:
        raise ConfigError(f"{version} keeps no suite of one file; add --suite FILE")
    return found
