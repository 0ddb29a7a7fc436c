"""A version pushed with the hub's own client to a server on this machine that answers as the hub documents, up to the network's edge."""

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
import yaml

from posttrain.cli.app import main
from posttrain.config import hub
from posttrain.config.load_pipeline import load_pipeline
from posttrain.errors import ConfigError, RegistryError
from posttrain.files import digest_tree
from posttrain.pipeline.hub_push import push_to_hub
from posttrain.registry import Manifest, Registry

TOKEN = "hf_planted_secret_0123456789"
REPO = "lab/words"


class Hub:
    """What a repository holds after each commit, and what the client asked with."""

    def __init__(self):
        self.files, self.commits, self.tokens, self.created, self.large = {}, [], set(), {}, {}
        self.refuse = {}

    def answer(self, handler, method, path, body):
        self.tokens.add(handler.headers.get("Authorization", ""))
        if path in self.refuse:
            return self.refuse[path], {"error": f"no write access for {TOKEN}"}
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return 200, {"url": f"{self.url}/{REPO}", "name": REPO, "id": REPO}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith(f"/api/models/{REPO}/preupload/"):
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                      "shouldIgnore": False, "oid": None} for f in asked]  # fmt: skip
            return 200, {"files": modes}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            link = {"upload": {"href": f"{self.url}/put/"}}
            return 200, {"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{link['upload']['href']}{one['oid']}"}}} for one in objects
            ]}  # fmt: skip
        if method == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            self.large[path.rpartition("/")[2]] = body
            return 200, {}
        if path.startswith(f"/api/models/{REPO}/commit/"):
            return 200, self.commit([json.loads(line) for line in body.splitlines()])
        if path.startswith(f"/api/models/{REPO}"):
            return 200, self.info()
        return 404, {"error": path}

    def commit(self, lines):
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    self.files[value["path"]] = self.large[value["oid"]]
                case "deletedFile":
                    del self.files[value["path"]]
        self.commits.append(lines)
        return {
            "success": True,
            "commitOid": self.sha,
            "commitUrl": f"{self.url}/{REPO}/commit/{self.sha}",
            "hookOutput": "",
        }

    @property
    def sha(self):
        return f"{len(self.commits):040d}"

    def info(self):
        siblings = []
        for name, data in {".gitattributes": b"", **self.files}.items():
            row = {
                "rfilename": name,
                "size": len(data),
                "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
            }
            if name.endswith(".safetensors"):
                row["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(row)
        return {
            "id": REPO,
            "modelId": REPO,
            "sha": self.sha,
            "siblings": siblings,
            "tags": [],
            "private": False,
            "downloads": 0,
        }


@pytest.fixture
def there(monkeypatch):
    """A hub on this machine, to which the client's endpoint points."""
    answering = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _do(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            code, answer = answering.answer(self, self.command, self.path.partition("?")[0], body)
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    answering.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # The client reads HF_ENDPOINT and these when it is imported, which an earlier test has done.
    for name, value in (("ENDPOINT", answering.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_ENDPOINT", answering.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\n")  # as it is read from a file
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub.why_unreachable.cache_clear()
    yield answering
    server.shutdown()
    server.server_close()


@pytest.fixture
def registry(tmp_path):
    """`words@1`: a model of two files, made from a base of the hub, with an adapter."""
    for name, files in {
        "model": {"config.json": "{}", "model.safetensors": "weights", "README.md": "of the base"},
        "adapter": {
            "adapter_config.json": json.dumps({"r": 4, "base_model_name_or_path": None}),
            "adapter_model.safetensors": "AB",
        },
    }.items():
        (tmp_path / name).mkdir()
        for path, text in files.items():
            (tmp_path / name / path).write_text(text)
    made = digest_tree(tmp_path / "model")
    adapter = digest_tree(tmp_path / "adapter")
    details = {"base_model": "Qwen/Qwen3-0.6B", "datasets": ["data/sft.jsonl", "someone/rows"], "license": "apache-2.0"}
    first = Manifest("sft", {"model": "sha256:base"}, {"model": made, "adapter_total": adapter}, details=details)
    book = Registry(tmp_path / "registry")
    book.register("words", tmp_path / "model", first, evidence={"adapter_total": tmp_path / "adapter"})
    yield book
    book.close()


def test_a_model_is_pushed_whole_with_its_card_and_read_back(there, registry):
    there.files = {"model-00001-of-00002.safetensors": b"of an earlier version", "config.json": b"old"}
    address = push_to_hub(registry, registry.show("words", 1), REPO, private=True)
    assert address == f"{there.url}/{REPO}/commit/{there.sha}"
    assert sorted(there.files) == ["README.md", "config.json", "model.safetensors"], "and nothing of an earlier version"
    assert there.files["model.safetensors"] == b"weights"
    assert there.created["visibility"] == "private"
    matter = yaml.safe_load(there.files["README.md"].decode().split("---")[1])
    assert matter["base_model"] == "Qwen/Qwen3-0.6B"
    assert (matter["library_name"], matter["license"], matter["datasets"]) == (
        "transformers",
        "apache-2.0",
        ["someone/rows"],
    )
    assert there.tokens >= {f"Bearer {TOKEN}"}
    assert registry.show("words", 1).tags["hub"] == f"{REPO}@{there.sha}"
    assert registry.rows.check_log().num_entries == 2


def test_an_adapter_is_pushed_as_peft_finds_it(there, registry):
    push_to_hub(registry, registry.show("words", 1), REPO, adapter=True)
    assert sorted(there.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert json.loads(there.files["adapter_config.json"]) == {"r": 4, "base_model_name_or_path": "Qwen/Qwen3-0.6B"}
    matter = yaml.safe_load(there.files["README.md"].decode().split("---")[1])
    assert matter["library_name"] == "peft"
    assert registry.show("words", 1).tags == {"hub.adapter": f"{REPO}@{there.sha}"}


def test_the_token_is_written_nowhere(there, registry, tmp_path, capsys):
    there.refuse = {f"/api/models/{REPO}/commit/main": 403}
    with pytest.raises(SystemExit) as caught:
        main(["registry", "push", "words@1", "--push-to-hub", REPO, "--registry", str(registry.folder)])
    assert caught.value.code == 64
    said = capsys.readouterr()
    assert "the hub did not take words@1" in said.err
    there.refuse = {}
    with pytest.raises(SystemExit) as caught:
        main(["registry", "push", "words@1", "--push-to-hub", REPO, "--registry", str(registry.folder)])
    assert caught.value.code == 0
    again = capsys.readouterr()
    assert f"words@1 is at {there.url}/{REPO}/commit/" in again.out
    assert TOKEN not in said.out + said.err + again.out + again.err
    planted = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert planted == []


def test_what_the_hub_holds_otherwise_is_said(there, registry):
    keeps = there.commit

    def loses(lines):
        answer = keeps(lines)
        there.files["model.safetensors"] = b"other bytes"
        return answer

    there.commit = loses
    with pytest.raises(RegistryError, match=r"model.safetensors there are not what was pushed"):
        push_to_hub(registry, registry.show("words", 1), REPO)
    assert registry.show("words", 1).tags == {}


def test_without_a_token_a_name_or_an_adapter_nothing_is_sent(there, registry, monkeypatch):
    entry = registry.show("words", 1)
    for repo in ("words", "lab/words/more", "https://huggingface.co/lab/words", ""):
        with pytest.raises(RegistryError, match="expected the name of a repository of the hub, OWNER/NAME"):
            push_to_hub(registry, entry, repo)
    bare = registry.register("bare", entry.path, Manifest("sft", {"model": "sha256:base"}, {"model": entry.digest}))
    with pytest.raises(RegistryError, match="no adapter of its whole lineage"):
        push_to_hub(registry, bare, REPO, adapter=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RegistryError, match="set HF_TOKEN in the environment"):
        push_to_hub(registry, entry, REPO)
    assert there.commits == []
    assert there.created == {}


def test_a_hub_that_cannot_be_reached_is_one_line(registry, there, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(RegistryError, match=r"cannot be reached \(Connection refused\); nothing was pushed"):
        push_to_hub(registry, registry.show("words", 1), REPO)
    os.environ.pop("HF_HUB_OFFLINE", None)


# --- from a run ----------------------------------------------------------------------------------------------------

QUICK = {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-2, "max_steps": 8, "lr_scheduler_type": "constant",
         "per_device_train_batch_size": 8}  # fmt: skip
GATE = {"baseline": "alias:champion", "primary": [{"suite": "yes", "min_delta": 0.35}]}


def test_a_run_pushes_what_took_its_alias_and_a_hub_that_refuses_does_not_fail_it(there, project, capsys):
    run = project([{"sft": QUICK}], gate=GATE, register={"name": "yes", "hub_model_id": REPO})
    there.refuse = {f"/api/models/{REPO}/commit/main": 403}
    assert run.command() == 0
    assert "posttrain registry push yes@1 --push-to-hub lab/words" in capsys.readouterr().err
    there.refuse = {}
    assert run.command() == 0, "started again it pushes what was not taken"
    assert len(there.commits) == 1
    assert "model.safetensors" in there.files
    assert run.command() == 0
    assert len(there.commits) == 1, "and not again"
    assert all(TOKEN.encode() not in path.read_bytes() for path in run.folder.rglob("*") if path.is_file())


def test_a_run_without_a_token_is_refused_before_it_trains(project, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    run = project([{"sft": QUICK}], gate=GATE, register={"name": "yes", "hub_model_id": REPO})
    with pytest.raises(ConfigError, match=r"register.hub_model_id: pushing to lab/words needs a token"):
        run.run()
    assert not run.out.exists()
    run.values["register"]["hub_model_id"] = "words"
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        load_pipeline(run.path)
