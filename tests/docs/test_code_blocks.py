"""The blocks of the pages that are no commands: YAML loads by the reader of its kind, Python imports what is there, JSON parses.

A YAML that is a part of one stands in the smallest whole one.
"""

import ast
import importlib
import json
import re

import pytest
import yaml
from tests.docs.shown import PAGES, blocks_of

from posttrain.config.curate import CurateKeys
from posttrain.config.instruct import InstructKeys
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.load import load_gate, load_judge, load_stage, marked_kind
from posttrain.config.load_data import load_data_keys
from posttrain.config.load_pipeline import load_pipeline
from posttrain.config.pipeline import PipelineKeys
from posttrain.config.schema import keys_of
from posttrain.config.synth import SynthKeys
from posttrain.errors import ConfigError
from posttrain.forms.merging.recipe import read_recipe

READERS = {
    "guards": load_gate,
    "primary": load_gate,
    "rubric": load_judge,
    "method": lambda path: load_data_keys(InstructKeys, "instruct", path),
    "keep": lambda path: load_data_keys(SynthKeys, "synth", path),
    "dedup": lambda path: load_data_keys(CurateKeys, "curate", path),
    "merge_method": read_recipe,
}
"""A key that marks a file of its own → its reader. What has none of them is a stage or a pipeline, or a part of one."""
BASE, ROWS = {"base_model": "./base"}, [{"path": "data/train.jsonl"}]
OF_A_PIPELINE = set(keys_of(PipelineKeys)) - set(STAGE_KINDS["sft"].keys.model_fields)
FILE = re.compile(r"(?<![\w/.])[\w./-]+\.(?:jsonl|yaml|csv|py|sh)\b")


def whole(shown):
    """The shown keys in the smallest YAML that has what a run needs, and what it is: `pipeline`, or a kind of stage."""
    if set(shown) & {*OF_A_PIPELINE, "stages"}:
        return "pipeline", {"name": "shown", **BASE, "stages": [{"sft": {"datasets": ROWS}}], **shown}
    kind = marked_kind(shown, "sft") or "sft"
    needed = {"reward_funcs": ["rewards.py:correct"]} if "reward_funcs" in STAGE_KINDS[kind].keys.model_fields else {}
    return kind, {**BASE, "datasets": ROWS, **needed, **shown}


def read(text, folder):
    """Read by what reads such a file, every file and folder that it names being there. Raises: ConfigError."""
    shown = yaml.safe_load(text)
    for name in (*FILE.findall(re.sub(r"https?://\S+", "", text)), "data/train.jsonl", "rewards.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name in ("base", "../base", "runs/rm/model", "rm", "runs/prm"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / "shown.yaml"
    if reader := next((reader for key, reader in READERS.items() if key in shown), None):
        path.write_text(text)
        return reader(path)
    kind, keys = whole(shown)
    # The block as it stands, so that line numbers and comments are those of the page; then what it lacks.
    lacks = {name: value for name, value in keys.items() if name not in shown}
    path.write_text(text + (yaml.safe_dump(lacks) if lacks else ""))
    return load_pipeline(path) if kind == "pipeline" else load_stage(kind, path)


def shown_as(language):
    return [
        pytest.param(text, id=f"{page}-{place}")
        for page in PAGES
        for place, text in enumerate(blocks_of(page, language))
    ]


@pytest.mark.parametrize("text", shown_as("yaml"))
def test_yaml_loads(text, tmp_path):
    (tmp_path / "project").mkdir()
    read(text, tmp_path / "project")


def test_a_yaml_that_is_wrong_is_seen(tmp_path):
    wrong = ("stages: [{sft: {datasets: [{path: a.jsonl}], lora_q: 1}}]", "rollout: {engine: vlllm}", "primary: [{suite: a, min_delta: x}]", "method: guess")  # fmt: skip
    for place, text in enumerate(wrong):
        (tmp_path / str(place)).mkdir()
        with pytest.raises(ConfigError, match=r"lora_q|vlllm|min_delta|method"):
            read(text + "\n", tmp_path / str(place))


@pytest.mark.parametrize("text", shown_as("python"))
def test_python_imports_what_is_there(text):
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            module = pytest.importorskip(str(node.module))
            assert [name for name in names if not hasattr(module, name)] == [], node.module
        for name in names if isinstance(node, ast.Import) else ():
            pytest.importorskip(name)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pt":
            assert hasattr(importlib.import_module("posttrain"), node.attr), node.attr


@pytest.mark.parametrize("text", [*shown_as("json"), *shown_as("jsonl")])
def test_json_parses(text):
    try:
        json.loads(text)
    except json.JSONDecodeError:
        assert [json.loads(line) for line in text.splitlines() if line.strip()]
