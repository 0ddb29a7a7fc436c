"""The command as a shell sees it; what it serves is tested in tests/serve/tinker."""

from importlib.util import find_spec

import pytest

from posttrain.cli.app import main

needs_it = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("fastapi", "llguidance", "tinker")), reason="it needs posttrain[tinker]"
)


def run(*argv):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    return caught.value.code


def test_its_help_says_what_it_is_for(capsys):
    assert run("tinker", "--help") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "Train for clients of Tinker's SDK" in output
    for option in ("--out", "--token-file", "--micro-batch", "--max-models", "--max-queue"):
        assert option in output


@needs_it
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/model"], "base_model: nowhere/model"),
        (["a=x", "a=y"], "a names two models"),
        (["x", "--host", "0.0.0.0"], "give a token"),
    ],
)
def test_what_cannot_be_served_opens_no_port(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("tinker", *arguments, "--port", 0) == 64
    assert message in capsys.readouterr().err


@needs_it
def test_a_token_that_the_sdk_would_not_send_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").write_text("sesame\n")
    assert run("tinker", "x", "--token-file", "token", "--port", 0) == 64
    assert "the token does not begin with tml-" in capsys.readouterr().err
