"""The example on tools as it is shipped: cut short in the quick tests, whole in the long ones."""

import json
import re
from pathlib import Path

import pytest
import yaml

from posttrain.cli.app import main
from posttrain.gate import exact
from posttrain.gate.pairing import pair
from posttrain.report.records import read_run

EXAMPLE = Path(__file__).parents[2] / "examples" / "tool-use"


@pytest.fixture
def example(shipped):
    return shipped("tool-use")


def run(config, *options):
    with pytest.raises(SystemExit) as caught:
        main(["run", str(config), "--quiet", *options])
    return caught.value.code


def numbers_of(path):
    """The two numbers of each line's question."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {tuple(re.findall(r"\d+", (row.get("messages") or row["prompt"])[0]["content"])) for row in rows}


def share_right(report):
    return sum(item.scores[0] for item in report.items) / len(report.items)


def test_no_product_of_the_suite_is_in_the_data():
    asked = numbers_of(EXAMPLE / "evals" / "heldout.jsonl")
    assert len(asked) == 300
    assert all(not asked & numbers_of(path) for path in (EXAMPLE / "data").iterdir())


def test_cut_short_it_still_goes_all_the_way(example):
    values = yaml.safe_load((example / "pipeline.yaml").read_text())
    sft, grpo = values["stages"][0]["sft"], values["stages"][1]["grpo"]
    sft |= {"max_steps": 2, "per_device_train_batch_size": 8}
    sft.pop("num_train_epochs")
    grpo |= {"max_steps": 2, "num_generations": 2, "num_prompts_per_step": 2, "per_device_train_batch_size": 4}
    values["evals"].pop("no_tool")
    values["gate"] |= {"guards": [{"suite": "heldout", "margin": 0.4}], "primary": []}
    (example / "pipeline.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    suite = example / "evals" / "heldout.jsonl"
    suite.write_text("".join(suite.read_text().splitlines(keepends=True)[:40]))
    assert run(example / "pipeline.yaml") == 0
    record = read_run(example / "runs" / "calculator")
    assert (record.status, record.problems) == ("passed", ())
    assert [certificate["verdict"] for certificate in record.certificates.values()] == ["pass"]
    assert record.registered is not None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_calling_the_tool_is_learned_and_promoted(example, seed):
    assert run(example / "pipeline.yaml", "--set", f"seed={seed}") == 0
    record = read_run(example / "runs" / "calculator")
    assert record.registered is not None and record.registered["alias"] == "champion"
    sft, grpo = (record.evals[stage.name] for stage in record.stages)
    pairs = pair(grpo["heldout", "gate"], sft["heldout", "gate"], "gate")
    good, bad = pairs.discordant
    assert exact.interval(good, bad, len(pairs.differences))[0] > 0.2
    assert share_right(grpo["no_tool", "gate"]) < 0.05


@pytest.mark.slow
def test_without_the_tool_the_products_are_not_learned(example):
    assert run(example / "unaided.yaml") == 0
    record = read_run(example / "runs" / "unaided")
    (sft,) = (record.evals[stage.name] for stage in record.stages)
    assert share_right(sft["heldout", "gate"]) < 0.2
