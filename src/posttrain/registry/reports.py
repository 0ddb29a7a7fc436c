"""The eval reports that are kept with versions, read back with every item."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from posttrain.evidence import EvalReport
from posttrain.registry.reader import RegistryReader

EVALS = "evals"
"""Role of a run's eval reports in the evidence of a version."""


def stored_reports(registry: RegistryReader, models: Collection[str], split: str) -> dict[str, list[EvalReport]]:
    """Digest of a model → the reports on it, whichever version keeps them (a baseline's lie with the candidate), newest last.

    Raises: RegistryError if one is damaged.
    """
    found: dict[str, dict[str, EvalReport]] = {model: {} for model in models}
    for role, kind, digest in registry.rows.all_objects():
        files: Mapping[str, str] = registry.store.tree(digest) if (role, kind) == (EVALS, "tree") else {}
        for name, content in files.items():
            folder = name.removesuffix("report.json")
            if folder == name or f"{folder}items.jsonl" not in files:
                continue
            header: dict[str, Any] = registry.store.get_json(content, name)
            if header["model_digest"] in found and header["split"] == split:
                report = _read(registry, content, files[f"{folder}items.jsonl"], folder)
                found[report.model_digest][report.digest] = report
    return {model: list(reports.values()) for model, reports in found.items()}


def _read(registry: RegistryReader, header: str, items: str, where: str) -> EvalReport:
    registry.store.verify_object(items, f"{where}items.jsonl")
    with tempfile.TemporaryDirectory() as scratch:
        for name, digest in (("report.json", header), ("items.jsonl", items)):
            shutil.copyfile(registry.store.object_path(digest), Path(scratch) / name)
        return EvalReport.load(Path(scratch))
