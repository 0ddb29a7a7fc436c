"""Every command of a bench that a page or its own first words show is taken by its parser."""

import argparse
import importlib
import re
import shlex

import pytest
from tests.docs.shown import PAGES, ROOT, text_of

COMMAND = re.compile(r"python (?:\.\./\.\./)?bench/(\w+)\.py((?: [^\s`#;|)]+)*)")


class Taken(Exception):
    """The parser took its words: nothing is run."""


def _shown():
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py")}
    with_parser = [name for name, text in scripts.items() if "ArgumentParser(" in text]
    found = {match.groups() for text in [*map(text_of, PAGES), *scripts.values()] for match in COMMAND.finditer(text)}
    plain = {(name, re.sub(r"[\[\],]|\.$", "", words).replace(" PID", " 1").strip()) for name, words in found}
    return sorted((name, words) for name, words in plain if name in with_parser)


def _read_by_its_parser(name, words, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def taken(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Taken

    with monkeypatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "bench"))
        patched.setattr(argparse.ArgumentParser, "parse_args", taken)
        patched.setattr("sys.argv", [f"{name}.py", *shlex.split(words)])
        importlib.import_module(name).main()


@pytest.mark.parametrize("name, words", _shown(), ids=lambda value: value)
def test_a_command_is_taken(name, words, monkeypatch):
    with pytest.raises(Taken):
        _read_by_its_parser(name, words, monkeypatch)


def test_what_it_does_not_know_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        _read_by_its_parser("learning", "--serch distill", monkeypatch)
    assert "--serch" in capsys.readouterr().err
