"""What a registry of many versions costs: list, find by alias, show, promote, verify one, check the log. Times in seconds.

python bench/registry_size.py --versions 10000
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.evidence import GateVerdict, TestResult, Verdict
from posttrain.files import digest_bytes, digest_tree
from posttrain.registry import Manifest, Registry

BASE = digest_bytes(b"base")


def filled(folder: Path, num_versions: int) -> Registry:
    """Versions that differ in their lineage and share the bytes of one small model."""
    model = folder / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes(1 << 20))
    made = digest_tree(model)
    registry = Registry(folder / "registry")
    registry.register("words", model, Manifest("sft", {"model": BASE}, {"model": made}))
    with registry.rows.writing() as db:
        for version in range(2, num_versions + 1):
            manifest = Manifest("sft", {"model": BASE}, {"model": made}, details={"seed": version})
            digest = registry.store.put_json(manifest.to_json())
            db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, NULL, ?)", ("words", version, made, digest, "2026"))
            for role, kind, content in (("model", "tree", made), ("manifest", "file", digest)):
                db.execute("INSERT INTO objects VALUES (?, ?, ?, ?, ?)", ("words", version, role, kind, content))
            registry.rows.event("register", "words", version, {"digest": made, "manifest": digest}, None)
    return registry


def verdict_for(made: str) -> GateVerdict:
    test = TestResult(
        "primary", "s", "exact", 100, 100, 0.4, 0.5, 0.1, 0.1, 0.1, 0.1, 0.0, 0.01, Verdict.PASS, "measured"
    )
    return GateVerdict(Verdict.PASS, "measured", made, BASE, digest_bytes(b"spec"), 0.05, (test,))


def timed(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return round(time.perf_counter() - start, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=10_000)
    num_versions = parser.parse_args().versions
    with tempfile.TemporaryDirectory() as folder:
        registry = filled(Path(folder), num_versions)
        last = registry.show("words", num_versions)
        acts: dict[str, Callable[[], Any]] = {
            "list": registry.entries,
            "show": lambda: registry.show("words", num_versions),
            "promote": lambda: registry.promote("words", num_versions, "champion", verdict_for(last.digest)),
            "find alias:": lambda: registry.find("alias:champion"),
            "verify one": lambda: registry.verify("words", num_versions),
            "check the log": registry.rows.check_log,
            "open": lambda: Registry(registry.folder).close(),
        }
        print(json.dumps({"versions": num_versions} | {name: timed(act) for name, act in acts.items()}))
        registry.close()


if __name__ == "__main__":
    main()
