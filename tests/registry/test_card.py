from dataclasses import replace

import pytest
import yaml

from posttrain.files import digest_json
from posttrain.registry.card import model_card


@pytest.fixture
def card(registry, model, lineage, passing, base):
    folder = model("rl")
    certificate = {"verdict": "pass"}
    chain = lineage(folder, ("sft", "grpo"), certificate=digest_json(certificate))
    details = {
        "base_model": "Qwen/Qwen3-0.6B", "license": "apache-2.0", "datasets": ["data/sft.jsonl"], "learning_rate": 1e-3,
        "wall_s": 61.25, "command": "posttrain run pipeline.yaml",
    }  # fmt: skip
    first = replace(chain[0], details=details)
    entry = registry.register(
        "words", folder, [first, chain[1].after(first)], passing(chain[1].outputs["model"], base), [certificate]
    )
    registry.promote("words", 1, "champion", passing(entry.digest, base))
    return model_card(registry, "words", 1)


def test_front_matter_is_hugging_faces(card):
    matter = yaml.safe_load(card.split("---")[1])
    assert matter["base_model"] == "Qwen/Qwen3-0.6B"
    assert (matter["license"], matter["datasets"]) == ("apache-2.0", ["data/sft.jsonl"])
    assert matter["tags"] == ["posttrain", "sft", "grpo"]
    result = matter["model-index"][0]["results"][0]
    assert (result["dataset"]["name"], result["metrics"][0]["value"]) == ("heldout", 0.5)


def test_the_tables_come_from_the_records(card, registry):
    entry = registry.show("words", 1)
    chain = registry.chain("words", 1)
    assert f"| sft | `{chain[0].outputs['model'][7:19]}` | learning_rate 0.001 | 61.25 |" in card
    assert "| primary | heldout | exact | 1000 | 0.4 | 0.5 | 0.1 | 0.07 to 0.13 | 0.075 | 0.05 | PASS |" in card
    assert "Reward certificate: **pass**." in card
    assert "Aliases: champion." in card
    for digest in (entry.digest, chain[1].digest, chain[0].inputs["data"]):
        assert f"`{digest}`" in card
    assert "```\nposttrain run pipeline.yaml\n```" in card
    assert "posttrain registry verify words@1" in card


def test_no_gate_and_a_hold_are_said(registry, model, lineage):
    registry.register("words", model("a"), lineage(model("a")))
    registry.tag("words", 1, "hold", "reward hacking")
    card = model_card(registry, "words", 1)
    assert "No gate has judged this version." in card
    assert "**On hold:** reward hacking" in card
    assert "model-index" not in card
