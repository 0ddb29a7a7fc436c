"""The commands of every page, run as they stand there in one tiny project; what cannot run here is listed with why (`pages.py`).

A server is started, asked for nothing more than to say where it listens, and told to end.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from tests.docs.pages import OWN_TEST, SPECIAL, STANDS_FOR, Page
from tests.docs.project import train, untrained
from tests.docs.shown import PAGES, ROOT, in_blocks, in_text, is_mention

from posttrain.cli.app import _run

SERVERS = {"serve": "listening at ", "tinker": "listening at ", "ui": "open http"}
"""A verb that goes on until it is told to end → what it says when it is ready."""
RUN_HERE = [page for page in PAGES if page not in OWN_TEST and in_blocks(page) + in_text(page)]


def shown_in(page):
    """The lines of a page that are whole commands: all of its blocks, and those of its running text."""
    return list(dict.fromkeys([*in_blocks(page), *(line for line in in_text(page) if not is_mention(line))]))


def special(page):
    return SPECIAL.get(page, Page())


def runnable(line, of):
    """The words of each command that a shown line is here."""
    names = {**STANDS_FOR, **of.stands_for}
    parts = [" ".join(part.split(" | ")[0].split()) for part in of.instead.get(line, line).split(" && ")]
    added = next((words for start, words in of.adds.items() if line.startswith(start)), "")
    return [[names.get(word, word) for word in shlex.split(f"{part} {added}")[1:]] for part in parts]


def outcome(line, of, capsys):
    """What is wrong with how a shown command ended, or None."""
    for words in runnable(line, of):
        code = {**dict.fromkeys(SERVERS, served), "mcp": alone}.get(words[0], _run)(words)
        said = capsys.readouterr()
        if code not in of.exits.get(line, (0,)):
            return f"{line}: {shlex.join(words)}: exit code {code}: {said.err[-900:]}{said.out[-300:]}"
    return None


def alone(words):
    """The exit code of a command in a process of its own to which nobody says anything."""
    return subprocess.run([sys.executable, "-m", "posttrain", *words], stdin=subprocess.DEVNULL, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).returncode  # fmt: skip


def served(words):
    """The exit code of a server that was told to end once it was ready; without a word of where it listens, None."""
    chosen = [] if "--port" in words else ["--port", "0"]
    server = subprocess.Popen([sys.executable, "-m", "posttrain", *words, *chosen], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    try:
        said = []
        for line in server.stderr:
            said.append(line)
            if line.startswith(SERVERS[words[0]]):
                server.send_signal(signal.SIGTERM)
                return server.wait(60)
        return f"{server.wait(60)}, never ready: {''.join(said)[-600:]}"
    finally:
        server.kill()
        server.stderr.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = untrained(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(folder)
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("pages")
@pytest.mark.parametrize("page", RUN_HERE)
def test_the_commands_of_the_page_run(page, trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115 - chat and mcp end where nobody says anything
    of = special(page)
    assert [wrong for line in of.before if (wrong := outcome(line, of, capsys))] == []
    assert [wrong for line in shown_in(page) if line not in of.not_run and (wrong := outcome(line, of, capsys))] == []


def test_the_commands_on_data_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(untrained(tmp_path))
    lines = [
        (line, special(page))
        for page in ("README.md", "docs/data-formats.md")
        for line in shown_in(page)
        if line.startswith(("posttrain data", "posttrain explain"))
    ]
    assert len(lines) > 3
    assert [wrong for line, of in lines if (wrong := outcome(line, of, capsys))] == []


def test_what_is_said_of_a_page_is_of_what_it_shows():
    for page, of in SPECIAL.items():
        shown = shown_in(page)
        assert sorted((of.not_run.keys() | of.instead.keys() | of.exits.keys()) - set(shown)) == [], page
        assert of.not_run.keys().isdisjoint(of.instead) and all(of.not_run.values())
        assert [start for start in of.adds if not any(line.startswith(start) for line in shown)] == [], page
        words = {word for line in shown for word in shlex.split(line)}
        assert sorted(of.stands_for.keys() - words) == [], page
    assert SPECIAL.keys().isdisjoint(OWN_TEST) and (SPECIAL.keys() | OWN_TEST.keys()) <= set(PAGES)
    assert [test for test in OWN_TEST.values() if test.startswith("tests/") and not (ROOT / test).is_file()] == []
    assert sum(len(set(shown_in(page)) - special(page).not_run.keys()) for page in RUN_HERE) > 130
