"""Every command that a page shows is one that is there: `posttrain …` by its own parser, scripts, make's targets and extras by name."""

import re
import tomllib

import pytest
from tests.docs.shown import PAGES, ROOT, blocks_of, commands_in, in_blocks, in_text, refusal, text_of

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([\w-]+):", MAKEFILE, re.M))
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])


def refused(lines):
    """What the parsers of these lines' verbs do not take: verbs, options, choices, numbers, too many or too few words."""
    return [said for line in lines for words in commands_in(line) if (said := refusal(words))]


@pytest.mark.parametrize("page", PAGES)
def test_its_commands_are_taken_by_the_command_line(page):
    assert refused([*in_blocks(page), *in_text(page)]) == []


def test_the_parser_finds_what_is_wrong():
    wrong = {
        "posttrain runn pipeline.yaml": "no verb runn",
        "posttrain run pipeline.yaml --one-change rerun": "No such option: --one-change",
        "posttrain gate aa pipeline.yaml --time 2  # twice": "No such option: --time",
        "posttrain serve a --port 99999999": "--port",
        "posttrain export MODEL --to gguf": "Missing option '--out'",
        "posttrain export MODEL --to gguf|zip --out DIR": "'zip' is not one of",
        "posttrain report a b c": "unexpected extra argument",
    }
    for line, said in wrong.items():
        [found] = refused([line])
        assert said in found
    fine = ["posttrain data CONFIG --write-clean DIR && echo --done", "posttrain eval MODEL --best-of N [--verifier V] | head", "posttrain gate decide"]  # fmt: skip
    assert refused(fine) == []
    assert sum(len(in_blocks(page)) + len(in_text(page)) for page in PAGES) > 300


def words_of(page):
    """Lines of its code blocks and what its running text sets as code."""
    return "\n".join([*blocks_of(page), *re.findall(r"`([^`\n]+)`", text_of(page))])


@pytest.mark.parametrize("page", PAGES)
def test_its_scripts_targets_tests_and_extras_are_there(page):
    words = words_of(page)
    scripts = re.findall(r"python (?:\.\./\.\./)?((?:bench|docs|examples)/\S+\.py)([^\n#]*)", words)
    assert [script for script, _ in scripts if not (ROOT / script).is_file()] == []
    gone = [
        (script, option)
        for script, rest in scripts
        for option in re.findall(r"--[\w-]+", rest)
        if not any(f'"{option}"' in path.read_text(encoding="utf-8") for path in (ROOT / script).parent.glob("*.py"))
    ]
    assert gone == []
    assert (
        sorted(set(re.findall(r"\bmake ((?:test|bench|gpu|setup|demo|docs|lock|check|format)[\w-]*)", words)) - TARGETS)
        == []
    )
    assert [path for path in re.findall(r"\b(tests/[\w/.-]*\w)", words) if not (ROOT / path).exists()] == []
    named = {
        one
        for many in re.findall(r"posttrain\[([\w,-]+)\]|'\.\[([\w,-]+)\]'", words)
        for one in ",".join(many).split(",")
    }
    assert sorted(named - EXTRAS - {""}) == []


def test_the_demo_ends_with_commands_that_exist():
    demo = MAKEFILE.partition("\ndemo:")[2].partition("\n\n")[0]
    shown = re.findall(r'@echo "  (.*)"', demo)
    assert shown[0] == ". $(BIN)/activate && cd examples/quickstart"
    assert len(shown) > 2
    assert refused(shown[1:]) == []
