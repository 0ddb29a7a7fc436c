"""`posttrain run` killed at the writes of its registration, its promotion, its card and its report, and started again."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from posttrain.cli.app import main
from posttrain.errors import PosttrainError
from posttrain.files import digest_tree
from posttrain.pipeline import lineage
from posttrain.pipeline.state import RunState
from posttrain.registry.registry import Registry

SFT = {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-2, "max_steps": 8, "per_device_train_batch_size": 8,
       "lr_scheduler_type": "constant"}  # fmt: skip
GATE = {"baseline": "alias:champion", "primary": [{"suite": "yes", "min_delta": 0.35}]}


def _projects():
    path = Path(__file__).parents[1] / "pipeline/conftest.py"
    spec = importlib.util.spec_from_file_location("pipeline_projects", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", str(folder / "pipeline.yaml"), "--quiet"])
    assert ended.value.code == 0


class _NotYetError(PosttrainError):
    """Where the run is stopped, so that each child has little to do before it registers."""


@pytest.fixture(scope="module")
def judged(model_dir, tmp_path_factory):
    """A project whose run has its verdict, and has not registered its model."""
    folder = tmp_path_factory.mktemp("judged") / "project"
    folder.mkdir()
    _projects().make_files(folder, num_items=36)
    values = {
        "name": "yes", "base_model": str(model_dir("qwen3")), "sequence_len": 64, "seed": 1, "stages": [{"sft": SFT}],
        "evals": {"yes": {"path": "yes.jsonl", "max_tokens": 6}}, "gate": GATE, "register": {"name": "yes"},
    }  # fmt: skip
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def refuse(*_):
        raise _NotYetError("not yet")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lineage, "register_model", refuse)
        with pytest.raises(SystemExit) as ended:
            main(["run", str(folder / "pipeline.yaml"), "--quiet"])
    assert ended.value.code == 64
    assert RunState.load(folder / "runs/yes").registered is None
    return folder


@pytest.fixture
def driver(harness, judged, tmp_path_factory):
    # Once in this process, so that no child has to import.
    first = shutil.copytree(judged, tmp_path_factory.mktemp("first") / "project")
    run(first)

    def prepare(folder):
        if not folder.exists():
            shutil.copytree(judged, folder)

    return harness.Driver("promotion", run, lambda folder: trace_of(folder, harness), prepare)


def trace_of(folder: Path, harness) -> dict:
    """What is registered and promoted, whole; what the run says of it; a whole page, and nothing left lying about."""
    out, book = folder / "runs/yes", Registry(folder / "registry")
    state = RunState.load(out)
    try:
        entries = [(entry.version, entry.digest, entry.aliases) for entry in book.entries()]
        verified = [book.verify("yes", version).num_files for version, _, _ in entries]
        events = [(event.action, event.version) for event in book.rows.events()]
        looks = book._db.execute("SELECT count(*) FROM looks").fetchone()[0]
        loaded = [digest_tree(book.resolve(f"yes@{version}").path) for version, _, _ in entries]
    finally:
        book.close()
    page, card = (out / "report.html").read_text(), (out / "MODEL_CARD.md").read_text()
    shown = re.search(r'<th scope="row">registry</th>.*?</tr>', page, re.DOTALL)
    return {
        "status": state.status,
        "stages": [(entry.status, entry.attempt, entry.output_digest) for entry in state.stages],
        "verdicts": [(entry.folder, entry.verdict, entry.candidate, entry.baseline) for entry in state.gates],
        "registered": dict(state.registered),
        "entries": entries,
        "verified": verified,
        "loaded": loaded,
        "events": events,
        "looks": looks,
        "page": (page.endswith("</html>\n") or page.endswith("</html>"), shown and shown.group()),
        "card": re.sub(r"\d{4}-\d\d-\d\dT[\d:+]+", "…", card),
        "metrics": [
            json.loads(line)["loss"] for line in (out / "stages/01-sft/metrics.jsonl").read_text().splitlines()
        ],
        "leftovers": harness.leftovers(out),
    }


TARGETS = (
    "INSERT INTO versions", "INSERT OR REPLACE INTO aliases", "INSERT INTO events", "COMMIT", "rename registry/objects",
    "rename registry/models", "rename runs/yes/MODEL_CARD.md", "rename runs/yes/pipeline.json", "rename runs/yes/report.html",
)  # fmt: skip
"""The writes at which something appears for others."""


@pytest.mark.slow
def test_killed_at_promotion_and_at_the_report_there_is_one_promotion_and_a_whole_page(driver, harness, tmp_path):
    """Each *kind* of write that others see, once."""
    died = {}

    def wanted(point):
        # Which object it is makes no difference; which transaction or which save of the state does.
        kind = re.sub(r"[0-9a-f]{2}/[0-9a-f]{64}|[0-9a-f]{64}", "N", point)
        return point.startswith(TARGETS) and died.setdefault(kind, point) == point

    def first(point):
        for line in (tmp_path / "killed.points").read_text().splitlines():
            wanted(line)
        return wanted(point)

    expected, _ = harness.uninterrupted(driver, tmp_path / "straight")
    check_is_right(expected)
    tally = harness.kill_at_points(driver, tmp_path / "killed", expected, first)
    assert tally.differences == []
    assert tally.kills >= 9
    for target in TARGETS:
        assert any(point.startswith(target) for point in tally.points), target


@pytest.mark.slow
def test_killed_at_every_write_of_promotion_and_report_nothing_is_lost(driver, harness, tmp_path):
    expected, longest_s = harness.uninterrupted(driver, tmp_path / "straight")
    check_is_right(expected)
    tally = harness.kill_at_points(driver, tmp_path / "killed", expected)
    assert (tally.differences, tally.kills > 60) == ([], True)
    at_random = harness.kill_at_random(driver, tmp_path / "random", expected, 20, longest_s)
    assert (at_random.differences, at_random.kills) == ([], 20)


def check_is_right(trace):
    assert trace["events"] == [("look", 0), ("register", 1), ("promote", 1)]
    assert (trace["status"], trace["page"][0], trace["leftovers"]) == ("passed", True, [])
    assert trace["registered"]["alias"] == "champion"
    assert trace["looks"] == 1
    assert "yes version 1" in trace["page"][1]
