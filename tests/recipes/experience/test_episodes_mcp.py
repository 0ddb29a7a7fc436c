"""Evals with the tools of an MCP server: a model that calls its calculator answers what it could not without."""

import json
from pathlib import Path

import pytest

from posttrain.config.pipeline import SuiteKeys
from posttrain.config.stages import ModelKeys
from posttrain.evals.suite import load_suite
from posttrain.recipes.measure.evaluate import evaluate

SUITE = Path(__file__).parents[3] / "examples" / "tool-use" / "evals" / "heldout.jsonl"


@pytest.mark.slow
def test_a_suite_is_answered_with_a_servers_tool(playing, tmp_path):
    stage = playing("mcp")
    lines = SUITE.read_text().splitlines(keepends=True)[:24]
    (tmp_path / "suite.jsonl").write_text("".join(lines))
    suite = load_suite("products", tmp_path / "suite.jsonl")
    model = ModelKeys(base_model=str(stage.model))
    with_tool = SuiteKeys(path=str(suite.path), tools=stage.options["tools"], max_turns=3, max_tokens=60)
    alone = SuiteKeys(path=str(suite.path), max_tokens=60)
    one, two, none = (
        evaluate(model, [(suite, keys)], "gate", tmp_path / name)["products"]
        for name, keys in (("one", with_tool), ("two", with_tool), ("none", alone))
    )
    assert all(item.error is None for item in one.items)
    assert one.mean > 0.2 > none.mean == 0.0, json.dumps([one.mean, none.mean])
    assert [item.scores for item in one.items] == [item.scores for item in two.items]
