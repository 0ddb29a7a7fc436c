"""Every `posttrain …` line that a page shows is one the command takes: its verb, its sub-verb, its options, its arguments.

Every YAML block of docs/ that is a config, or part of one, holds keys that exist.
"""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from posttrain.cli.app import VERBS, load_verb
from posttrain.config.curate import CurateKeys
from posttrain.config.instruct import InstructKeys
from posttrain.config.judge import JudgeKeys
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.pipeline import GateKeys, PipelineKeys
from posttrain.config.synth import SynthKeys
from posttrain.forms.merging.recipe import RECIPE_KEYS

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]
PLACEHOLDERS = {
    "CONFIG",
    "KEY",
    "URI",
    "REF",
    "DIR",
    "RUN",
    "RUN_A",
    "RUN_B",
    "RUN_DIR",
    "VERB",
    "NAME",
    "MODEL",
    "…",
    "...",
}


def lines_of(page):
    """Commands in code blocks, with continued lines joined, and in running text."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    shown = re.findall(r"^(?:\$ )?(posttrain .*)$", blocks, re.MULTILINE)
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return shown + [" ".join(line.split()) for line in re.findall(r"`(posttrain [^`]+)`", prose)]


SHOWN = [(page, line) for page in PAGES for line in lines_of(page)]


def words_of(line):
    """Without comments, and without what a shell adds."""
    return re.split(r"\s+(?:&&|\||>|#)", line)[0].strip()


def problem(line):
    """What is wrong with a shown command, or None."""
    words = shlex.split(words_of(line), comments=True)[1:]
    if not words or words[0].startswith("-"):
        return None
    verb, *rest = words
    choice = next((place for place, word in enumerate(words) if "|" in word and not word.startswith("-")), None)
    if choice is not None:
        lines = [[*words[:choice], one, *words[choice + 1 :]] for one in words[choice].split("|")]
        return next(filter(None, (problem(f"posttrain {shlex.join(line)}") for line in lines)), None)
    if verb not in VERBS:
        return None if verb.isupper() or verb in PLACEHOLDERS else f"no verb {verb}"
    command = load_verb(verb)
    while commands := getattr(command, "commands", None):
        # `posttrain gate CANDIDATE BASELINE` is its sub-verb `judge`, unsaid.
        named = rest.pop(0) if rest and rest[0] in commands else getattr(command, "unsaid", "")
        if named not in commands:
            return None if not rest else f"{verb} has no {rest[0]}"
        command = commands[named]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help",
        "-h",
    }
    given = {word.split("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)}
    given = {part for word in given for part in word.split("|") if part.startswith("-")}
    unknown = sorted(given - known)
    return f"{verb} has no {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_shown_exist(page):
    assert [(line, wrong) for at, line in SHOWN if at == page and (wrong := problem(line))] == []


def test_the_check_finds_what_is_wrong():
    assert len(SHOWN) > 30
    assert problem("posttrain runn pipeline.yaml") == "no verb runn"
    assert problem("posttrain run pipeline.yaml --one-change rerun") == "run has no --one-change"
    assert problem("posttrain gate aa pipeline.yaml --time 2  # twice") == "gate has no --time"
    assert problem("posttrain data CONFIG --write-clean DIR && echo --done") is None


def keys_of(block):
    """(keys, values) of every mapping in the block that stands where a config's keys stand."""
    value = yaml.safe_load(block)
    return value if isinstance(value, dict) else {}


TOP = set(PipelineKeys.model_fields) | {field.alias for field in PipelineKeys.model_fields.values() if field.alias}
STAGE = {name for row in STAGE_KINDS.values() for name in row.keys.model_fields} | {"gate"}
CONFIGS = [
    (page, block)
    for page in PAGES
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize(("page", "block"), CONFIGS, ids=lambda value: value.name if isinstance(value, Path) else "")
def test_keys_of_yaml_that_is_shown_exist(page, block):
    shown = keys_of(block)
    assert shown, "a YAML block holds keys"
    if set(shown) & {"guards", "primary"}:  # the spec of a gate, as a file of its own
        assert sorted(set(shown) - set(GateKeys.model_fields)) == []
        return
    if "rubric" in shown:  # a judge's file
        assert sorted(set(shown) - set(JudgeKeys.model_fields)) == []
        return
    if "method" in shown:  # of data instruct
        assert sorted(set(shown) - set(InstructKeys.model_fields)) == []
        return
    if "keep" in shown:  # of data synth
        assert sorted(set(shown) - set(SynthKeys.model_fields)) == []
        return
    if "dedup" in shown:  # of data curate
        assert sorted(set(shown) - set(CurateKeys.model_fields)) == []
        return
    if "merge_method" in shown:  # mergekit's
        assert sorted(set(shown) - set(RECIPE_KEYS)) == []
        return
    assert sorted(set(shown) - TOP - STAGE) == []
    for stage in shown.get("stages") or []:
        for kind, keys in stage.items():
            assert kind in STAGE_KINDS and sorted(set(keys) - set(STAGE_KINDS[kind].keys.model_fields) - {"gate"}) == []


def test_the_demo_ends_with_commands_that_exist():
    demo = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\n")[0]
    shown = re.findall(r'@echo "  (.*)"', demo)
    assert shown[0] == ". $(BIN)/activate && cd examples/quickstart"
    assert len(shown) > 2
    assert [(line, wrong) for line in shown[1:] if (wrong := problem(line))] == []
