"""A planted secret is looked for in every file that a run leaves, and in all that it says."""

import base64
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from posttrain.cli.app import main

SECRET = "s3cret-7c1f4e"
URIS = (
    f"http://user:{SECRET}@127.0.0.1:9",
    f"https://{SECRET}@mlflow.example",
    f"postgresql://user:{SECRET}@db.example/mlflow",
    f"postgresql://db.example/mlflow?password={SECRET}",
)
SFT = {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-2, "max_steps": 8, "lr_scheduler_type": "constant"}
GATE = {"baseline": "alias:champion", "primary": [{"suite": "yes", "min_delta": 0.35}]}


def where_it_is(folder):
    """Files below `folder` in which the secret stands, plain or as a server is sent it."""
    forms = (SECRET.encode(), base64.b64encode(f"user:{SECRET}".encode()))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [
        str(path) for path in files if any(form in path.read_bytes() or form in str(path).encode() for form in forms)
    ]


@pytest.fixture
def server():
    """Lets nobody in, and keeps what it was sent."""
    headers = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            headers.append(self.headers["Authorization"])
            body = json.dumps(
                {"error_code": "UNAUTHENTICATED", "message": f"not {self.headers['Authorization']}"}
            ).encode()
            self.send_response(401)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}", headers
    served.shutdown()
    served.server_close()


def test_credentials_from_the_environment_reach_mlflow_and_nothing_else(
    project, server, tmp_path, monkeypatch, capfd, caplog
):
    uri, headers = server
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.DEBUG, "posttrain")
    made = project([{"sft": SFT}], gate=GATE, register={"name": "yes", "alias": "champion"}, mlflow=uri)
    assert made.command() == 0
    with pytest.raises(SystemExit) as waits:
        main(["registry", "mirror", uri, "--registry", str(made.folder / "registry")])
    assert waits.value.code == 75  # events wait
    assert made.events("promote")
    assert f"Basic {base64.b64encode(f'user:{SECRET}'.encode()).decode()}" in headers
    said = "".join(capfd.readouterr()) + caplog.text
    assert SECRET not in said and "mlflow has nothing of this run" in said
    assert where_it_is(tmp_path) == []


@pytest.mark.parametrize("uri", URIS)
def test_a_uri_with_a_password_is_refused_before_anything_is_written(project, tmp_path, capfd, uri):
    made = project([{"sft": SFT}], mlflow=uri)
    assert made.command() == 64
    said = "".join(capfd.readouterr())
    assert "pipeline.yaml:" in said and "mlflow" in said and "MLFLOW_TRACKING_PASSWORD" in said and SECRET not in said
    assert where_it_is(tmp_path) == [str(made.folder / "pipeline.yaml")]


@pytest.mark.parametrize(
    "keys",
    [{"mlfow": URIS[0]}, {"max_steps": URIS[0]}, {"datasets": [{"path": URIS[0]}]}, {"base_model": URIS[0]}],
    ids=lambda keys: next(iter(keys)),
)
def test_a_password_under_another_key_is_not_repeated(project, tmp_path, capfd, keys):
    made = project([{"sft": {**SFT, **keys}}])
    assert made.command() == 64
    assert SECRET not in "".join(capfd.readouterr())
    assert where_it_is(tmp_path) == [str(made.folder / "pipeline.yaml")]


def test_a_password_on_the_command_line_is_refused(project, tmp_path, capfd):
    made = project([{"sft": SFT}])
    for arguments in (["run", str(made.path), "--set", f"mlflow={URIS[0]}"], ["registry", "mirror", URIS[0]]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 64
    assert SECRET not in "".join(capfd.readouterr())
    assert where_it_is(tmp_path) == []
