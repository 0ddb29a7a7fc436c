"""The commands of the most used pages, run as they stand there in one tiny project; what cannot run here is listed with why.

A command that a page gets later is run too, unless it is given a reason in `NOT_RUN`. The tutorial has a test of its own.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from posttrain.cli.app import _run

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
PAGES = ("README.md", "docs/data-formats.md", "docs/gate.md", "docs/registry.md")

THINGS = ("posttrain data synth", "posttrain data curate", "posttrain data instruct", "posttrain gate aa")
"""Sub-verbs that running text calls by their name, which no more shows a command than a verb alone does."""
HUB, MENTION = "needs the Hugging Face hub", "names options, not a whole command"
NOT_RUN = {
    "posttrain init my-project": "asks at a terminal; with its answers as options it is run",
    "posttrain eval --best-of N --verifier V": MENTION,
    'posttrain gate decide RUN --accept|--reject --by NAME --reason "…"': "a form; one of it is run",
    "posttrain gate decide RUN --accept": MENTION,
    "posttrain registry push words@champion --push-to-hub lab/words": HUB,
    "posttrain registry push words@3 --push-to-hub lab/words": HUB,
    "posttrain merge --register": MENTION,
}
"""Command as its page shows it → why it is not run here. A verb alone, in running text, is no command."""
STANDS_FOR = {
    "CONFIG": "pipeline.yaml", "DIR": "clean", "REF": "words@3", "[NAME]": "", "[FOLDER]": "", "URI": "sqlite:///mlflow.db", "http://mlflow:5000": "sqlite:///mlflow.db",
    "s3://bucket/models": "remote", "Qwen/Qwen3-8B": "base", "rows.jsonl": "data/sft.jsonl",
}  # fmt: skip
"""A word of a shown command that the reader puts his own for, or a server → what the tiny project has for it."""
INSTEAD = {
    "posttrain gate decide runs/new --accept --by Ada --reason \"safe to try\"": "posttrain gate decide runs/waits --accept --by Ada --reason 'safe to try'",
    "posttrain reproduce REF --level 0|1|2 [--registry DIR] [--project DIR] [--out DIR]": "posttrain reproduce words@3 --level 1",
}  # fmt: skip
"""A form with choices, or one that needs another run than its neighbours → one command of that form."""
EXITS = {
    "posttrain doctor": (0, 1),
    "posttrain registry compare words@3 words@2 --margin 0.02": (2,),  # 32 items are too few to tell
}
"""Command → the exit codes that its page gives it, where they are not 0 alone."""

SFT = "datasets: [{ path: data/sft.jsonl, type: chat }], learning_rate: 1e-4, max_steps: 2, per_device_train_batch_size: 8"
PIPELINE = f"""
base_model: ./base
evals: {{ heldout: {{ path: evals/heldout.jsonl, max_tokens: 12 }}, clean: {{ path: evals/clean.jsonl, max_tokens: 12 }} }}
stages:
  - sft: {{ {SFT} }}
"""
RL = """
  - dpo: { datasets: [{ path: data/pairs.jsonl, type: preference }], max_steps: 2, per_device_train_batch_size: 8 }
  - grpo:
      datasets: [{ path: data/prompts.jsonl, type: prompt }]
      reward_funcs: [rewards.py:correct]
      num_generations: 4
      per_device_train_batch_size: 8
      max_steps: 2
      max_completion_length: 12
"""
GATE = "guards: [{ suite: clean, margin: 0.9 }]"
"""What any two models of this size pass: commands are tried here, not what they say of a model."""
RUNS = {
    "word-problems": (0, f"{RL}gate: {{ {GATE} }}\nregister: {{ name: word-problems }}\n"),
    "champion": (0, f"gate: {{ {GATE} }}\nregister: {{ name: words }}\n"),
    "second": (0, f"gate: {{ {GATE} }}\nregister: {{ name: words, registry: second }}\n"),
    "new": (0, f"gate: {{ {GATE} }}\nregister: {{ name: words, registry: new }}\n"),
    "waits": (4, f"gate: {{ {GATE}, approve: 1 }}\nregister: {{ name: words }}\n"),
}
"""Run → its exit code, and what its YAML holds below the SFT stage. `second` and `new` are pulled: a version without an alias."""
BEFORE = [
    "posttrain registry push words@1 stores/second --registry second",
    "posttrain registry pull words@1 stores/second",
    "posttrain registry push words@1 stores/new --registry new",
    "posttrain registry pull words@1 stores/new",
    "posttrain gate runs/new/evals/01-sft runs/champion/evals/01-sft --spec gate.yaml --out runs/new/gate",
]
"""What was done before the pages begin."""


def shown_in(page):
    """The commands of a page: all of its code blocks, and those of its running text that are more than a verb."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S))
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    named = [" ".join(line.split()) for line in re.findall(r"`(posttrain [^`]+)`", prose)]
    lines = re.findall(r"^(?:\$ )?(posttrain .*)$", blocks, re.M) + [line for line in named if len(line.split()) > 2]
    return [re.split(r"\s+#", line)[0].strip() for line in lines if line not in THINGS]


def runnable(line):
    words = shlex.split(INSTEAD.get(line, line))[1:]
    return [word for word in (STANDS_FOR.get(word, word) for word in words) if word]


def outcome(line, capsys):
    """What is wrong with how a shown command ended, or None."""
    code = _run(runnable(line))
    said = capsys.readouterr()
    return None if code in EXITS.get(line, (0,)) else f"{line}: exit code {code}: {said.err[-600:]}{said.out[-300:]}"


def _rows(name, folder, heads):
    lines = (QUICKSTART / name).read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = [line for mark, number in heads.items() for line in [row for row in lines if mark in row][:number]]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("".join(chosen), encoding="utf-8")


def untrained(folder):
    """The quickstart's base with a few of its rows, and the configurations that the pages speak of."""
    shutil.copytree(QUICKSTART / "base", folder / "base")
    shutil.copy(QUICKSTART / "rewards.py", folder)
    for name in ("sft", "pairs", "prompts"):
        _rows(f"data/{name}.jsonl", folder, {"": 48})
    for name in ("heldout", "clean"):
        _rows(f"evals/{name}.jsonl", folder, {'"dev"': 6, '"gate"': 32})
    for seed, (name, (_, rest)) in enumerate(RUNS.items()):
        (folder / f"{name}.yaml").write_text(f"name: {name}\nseed: {seed}{PIPELINE}{rest}")
    shutil.copy(folder / "word-problems.yaml", folder / "pipeline.yaml")
    (folder / "sft.yaml").write_text(f"{{ base_model: ./base, {SFT} }}\n")
    (folder / "gate.yaml").write_text(GATE + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The tiny project with its runs and its registry: `word-problems@1`, and `words` with a champion and two versions without an alias."""
    folder = untrained(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, (expected, _) in RUNS.items():
            assert _run(["run", f"{name}.yaml", "--quiet"]) == expected, name
        for line in BEFORE:
            assert _run(shlex.split(line)[1:]) == 0, line
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("pages")
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_the_page_run(page, trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    assert [wrong for line in shown_in(page) if line not in NOT_RUN and (wrong := outcome(line, capsys))] == []


def test_the_commands_on_data_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(untrained(tmp_path))
    lines = [
        line for page in PAGES for line in shown_in(page) if line.startswith(("posttrain data", "posttrain explain"))
    ]
    assert len(lines) > 3
    assert [wrong for line in lines if (wrong := outcome(line, capsys))] == []


def test_what_is_not_run_or_otherwise_is_what_the_pages_show():
    shown = {line for page in PAGES for line in shown_in(page)}
    assert sorted((NOT_RUN.keys() | INSTEAD.keys() | EXITS.keys()) - shown) == []
    assert NOT_RUN.keys().isdisjoint(INSTEAD) and all(NOT_RUN.values())
    words = {word for line in shown for word in shlex.split(line)}
    assert sorted(STANDS_FOR.keys() - words) == []
    assert len(shown - NOT_RUN.keys()) > 40
