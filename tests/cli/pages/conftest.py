"""A folder with runs and a registry as `posttrain run` leaves them, some of it hostile, and clients of its pages."""

import json
import os
from html.parser import HTMLParser
from importlib.util import find_spec

import pytest

if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "httpx", "llguidance", "prometheus_client")):
    pytest.skip("the pages need posttrain[ui]", allow_module_level=True)

from starlette.testclient import TestClient

from posttrain.cli.agent_folder import ServedFolder
from posttrain.cli.pages.app import make_pages
from posttrain.cli.pages.site import Site
from posttrain.evidence import EvalReport, ItemRecord
from posttrain.files import digest_bytes, digest_tree
from posttrain.gate import GateSpec, Primary, decide, save_verdict
from posttrain.registry import Manifest, Registry
from posttrain.serve.options import ServeOptions
from posttrain.tracking.jsonl import JsonlSink

TOKEN = "the-token-of-the-page"
HOSTILE = "<script>alert(1)</script>"


def report(model, good):
    items = tuple(ItemRecord(f"q{row}", f"p{row}", (float(row < good),)) for row in range(200))
    return EvalReport("heldout", "gate", "sha256:suite", model, "exact", items)


def write_run(folder, name, *, status="passed", steps=30, offset=0.0, **more):
    """A run with one stage of RL: metrics with a NaN, a finding, samples."""
    sink = JsonlSink(folder / "stages" / "01-grpo")
    for step in range(1, steps + 1):
        sink.log(step, {"reward": offset + step / steps, "kl": float("nan") if step == 3 else 0.1, "num_tokens": 100 * step, "memory_peak_bytes": 2**30})  # fmt: skip
        sink.event("sample", step, {"prompt": f"{HOSTILE} {step}?", "completion": f"<b>{step}</b>", "reward": 1.0})
    sink.event("finding", 5, {"rule": "entropy_collapse", "severity": "soft", "message": HOSTILE, "evidence": {"entropy": 0.01}})  # fmt: skip
    sink.close()
    (folder / "stages" / "01-grpo" / "summary.json").write_text(
        json.dumps({"datasets": [], "examples": [{"origin": "d.jsonl:1", "segments": [["What?", False], [HOSTILE, True]]}]})
    )  # fmt: skip
    stage = {"kind": "grpo", "folder": "stages/01-grpo", "status": "done", "steps": steps}
    record = {"name": name, "status": status, "stages": [stage], "gates": [], **more}
    (folder / "pipeline.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(f"name: run\nseed: {int(offset)}\n")
    return folder


def with_gate(run, digest, base, *, waits):
    spec, reports = GateSpec(primary=(Primary("heldout", 0.05),)), (report(digest, 150), report(base, 80))
    verdict = decide(spec, {"heldout": reports[0]}, {"heldout": reports[1]})
    for name, side in zip(("01-grpo", "base"), reports, strict=True):
        side.save(run / "evals" / name / "heldout")
    save_verdict(run / "gates" / "final", verdict, spec, *({"heldout": run / "evals" / n / "heldout"} for n in ("01-grpo", "base")))  # fmt: skip
    record = json.loads((run / "pipeline.json").read_text())
    record["gates"] = [{"after": "final", "folder": "gates/final", "verdict": "PASS"}]
    (run / "pipeline.json").write_text(json.dumps(record))
    if waits:
        pending = {
            "gate": "gates/final",
            "verdict": "PASS",
            "verdict_digest": verdict.digest,
            "reason": "one must approve",
        }
        pending |= {"candidate": {}, "baseline": {}, "approve": 1, "accepted_by": []}
        (run / "pending.json").write_text(json.dumps(pending))
    return verdict


@pytest.fixture
def folder(tmp_path):
    served = tmp_path / "served"
    model = served / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_text("a" * 100)
    digest, base = digest_tree(model), digest_bytes(b"base")
    verdict = with_gate(write_run(served / "runs" / "first", "first"), digest, base, waits=False)
    with_gate(write_run(served / "runs" / "waiting", HOSTILE, status="pending", offset=1.0), digest, base, waits=True)
    book = Registry(served / "registry")
    book.register("words", model, Manifest("sft", {"model": base}, {"model": digest}), verdict)
    book.close()
    (tmp_path / "outside").mkdir()
    write_run(tmp_path / "outside" / "run", "secret-run")
    return served


@pytest.fixture
def make_client(folder, monkeypatch):
    """`make_client(allow_acts=True)`: a browser that has come in by the token."""
    monkeypatch.chdir(folder)

    def make(*, allow_acts=False, let_in=True, **options):
        options = ServeOptions(token=TOKEN, **options)
        site = Site(ServedFolder(folder), TOKEN, registry="registry", allow_acts=allow_acts)
        client = TestClient(make_pages(site, options), "http://127.0.0.1:8200", raise_server_exceptions=False)
        client.site = site
        client.headers["origin"] = "http://127.0.0.1:8200"
        if let_in:
            assert client.get(f"/?token={TOKEN}").status_code == 200
        return client

    return make


class Page(HTMLParser):
    """What a page holds: its tags with attributes, its text, and what is not closed as it was opened."""

    VOID = frozenset({"meta", "link", "input", "br", "img"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.faults, self._open, self.in_labels = [], "", [], [], []
        self.feed(html)
        self.faults += self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if "label" in self._open:
            self.in_labels.append(self.tags[-1][1])
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"/{tag} at {self.getpos()}")

    def handle_data(self, data):
        self.text += data

    def of(self, tag, **attributes):
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]

    def form(self, action):
        """The fields of the form with that action, by name."""
        return dict(self._fields(action))

    def _fields(self, action):
        inside = False
        for tag, found in self.tags:
            if tag == "form":
                inside = found.get("action") == action
            elif inside and tag == "input" and "name" in found:
                yield found["name"], found.get("value", "")


@pytest.fixture(name="page_of")
def page_of_fixture():
    return Page


@pytest.fixture
def run_in():
    return write_run


@pytest.fixture(scope="session")
def chromium_path():
    from shutil import which

    found = (
        os.environ.get("POSTTRAIN_CHROMIUM") or which("chromium") or which("chromium-browser") or which("google-chrome")
    )
    if found is None or find_spec("playwright") is None:
        pytest.skip("needs a browser: make setup-browser")
    return found
