import pytest

from posttrain.errors import ConfigError
from posttrain.uris import holds_secret, refuse_secret, without_secrets


@pytest.mark.parametrize(
    ("uri", "secret"),
    [
        ("http://user:x@host:5000", True),
        ("https://x@host", True),
        ("postgresql://user:x@host/db", True),
        ("postgresql://host/db?sslmode=require&password=x", True),
        ("https://host/data.jsonl?X-Amz-Signature=x", True),
        ("http://[broken:x@host", True),
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


def test_messages_leave_out_who_logs_in():
    text = "a.yaml:3: got 'http://user:x@host:5000/p', expected one of words@champion"
    assert without_secrets(text) == "a.yaml:3: got 'http://…@host:5000/p', expected one of words@champion"
