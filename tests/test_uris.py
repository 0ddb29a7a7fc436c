import pytest
from markupsafe import escape

from posttrain.errors import ConfigError
from posttrain.uris import (
    clean_text,
    clean_value,
    command_holds_secret,
    holds_secret,
    loopback,
    names_secret,
    refuse_secret,
    variable_names_secret,
    without_secrets,
)


@pytest.mark.parametrize(
    ("uri", "secret"),
    [
        ("http://user:x@host:5000", True),
        ("https://x@host", True),
        ("postgresql://user:x@host/db", True),
        ("postgresql://host/db?sslmode=require&password=x", True),
        ("https://host/data.jsonl?X-Amz-Signature=x", True),
        ("http://[broken:x@host", True),
        ("openenv:http://user:x@host:8000", True),
        ("openenv:http://host:8000?token=x", True),
        ("openenv:http://[broken:x@host", True),
        ("openenv:http://host:8000", False),
        ("postgresql://user@host/db", False),
        ("http://host:5000/a@b", False),
        ("https://host/data.jsonl?design=x&monkey=y", False),
        ("sqlite:///a:b@c.db", False),
        ("words@champion", False),
        ("Write to http://user:x@host if you like.", False),
    ],
)
def test_a_uri_with_a_password_is_known_from_one_without(uri, secret):
    assert holds_secret(uri) is secret
    if secret:
        with pytest.raises(ConfigError, match="password or token"):
            refuse_secret(uri)


@pytest.mark.parametrize(
    ("command", "secret"),
    [
        ("mcp:npx search --api-key x", True),
        ("mcp:npx search --api-key=x", True),
        ("mcp:env SEARCH_API_KEY=x npx search", True),
        ("mcp:python server.py https://user:x@host", True),
        ("mcp:python server.py --max-tokens 5 --tokenizer=x https://host", False),
        ("mcp:python token", False),
        ('mcp:npx mcp-remote https://host --header "Authorization: Bearer abc.def"', True),
        ('mcp:npx mcp-remote https://host --header "Authorization: Bearer ${AUTH}"', False),
    ],
)
def test_a_command_with_a_password_is_known_from_one_without(command, secret):
    assert command_holds_secret(command) is secret


def test_messages_leave_out_who_logs_in():
    text = "a.yaml:3: got 'http://user:x@host:5000/p', expected one of words@champion"
    assert without_secrets(text) == "a.yaml:3: got 'http://…@host:5000/p', expected one of words@champion"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "http://localhost:8000/", "http://[::1]:8000", "http://127.9.9.9:8000"]
)
def test_a_server_of_this_machine_is_taken(url):
    assert loopback(url)[1] == 8000


@pytest.mark.parametrize(
    "url", ["http://10.0.0.7:8000", "http://0.0.0.0:8000", "http://localhost.evil.org:8000", "http://2130706433:8000"]
)
def test_a_server_elsewhere_is_refused_with_the_way_round(url):
    with pytest.raises(ConfigError, match=r"expected one on this machine: .* ssh -L"):
        loopback(url)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "https://127.0.0.1:8000", "http://127.0.0.1", "http://127.0.0.1:x", "http://u:secret@127.0.0.1:1", "http://[::1:8000", "http://127.0.0.1:1/v1"],
)  # fmt: skip
def test_what_is_no_address_of_a_server_is_refused_without_its_password(url):
    with pytest.raises(ConfigError, match=r"expected http://HOST:PORT") as found:
        loopback(url)
    assert "secret" not in str(found.value)


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "hf_token", "MLFLOW_TRACKING_PASSWORD", "MY_PWD", "pwd", "api_key", "access-key", "token"]
)
def test_what_may_hold_a_secret_is_known_by_its_name(name):
    assert names_secret(name)
    assert variable_names_secret(name)


@pytest.mark.parametrize(
    "name", ["pad_token", "eos_token", "BOS_TOKEN", "tokenizer", "num_tokens", "max_tokens", "monkey"]
)
def test_tokens_of_a_tokenizer_are_no_secrets(name):
    assert not names_secret(name)


def test_the_folders_of_the_shell_are_no_secrets_and_pwd_in_an_address_is_one():
    assert not variable_names_secret("PWD")
    assert not variable_names_secret("OLDPWD")
    assert holds_secret("mssql://host/db?PWD=sesame")


def test_no_secret_is_in_a_text_that_is_shown_or_sent(monkeypatch):
    secret = "hunter2-of-the-server"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("PWD", "/home/me")
    assert clean_text("/home/me/runs: not there") == "/home/me/runs: not there"
    assert clean_text(f"got {secret} at mlflow=http://me:pw@host/x") == "got … at mlflow=…"
    assert clean_value({"api_key": "abc", "tokens": 3, "x": [float("nan"), "s3://b/k?token=abc"]}) == {
        "api_key": "…", "tokens": 3, "x": [None, "…"],
    }  # fmt: skip


def test_no_secret_is_in_a_page_either(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", """a&b<c>"d'""")
    said = str(escape("""got a&b<c>"d' & x at https://host/x?a=1&token=zz"""))
    assert clean_text(f"<p>{said}</p>") == "<p>got … &amp; x at …</p>"
