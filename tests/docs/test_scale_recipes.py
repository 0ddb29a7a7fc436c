"""The recipes of examples/scale: each parses, fits on the machines that its page names, and says that it was not run there."""

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from posttrain.cli.plan import plan

FOLDER = Path(__file__).parents[2] / "examples" / "scale"
MACHINES = dict(re.findall(r"`posttrain plan (\S+) --gpus (\S+) ", (FOLDER / "README.md").read_text(encoding="utf-8")))
QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 151936, "intermediate_size": 12288,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "dtype": "bfloat16", "max_position_embeddings": 40960,
}  # fmt: skip


def test_every_recipe_is_on_the_page_and_says_that_it_was_not_run():
    recipes = sorted(FOLDER.glob("*.yaml"))
    assert [recipe.name for recipe in recipes] == sorted(MACHINES)
    assert all("not run on this hardware" in recipe.read_text(encoding="utf-8") for recipe in recipes)


@pytest.mark.parametrize("recipe", sorted(MACHINES))
def test_a_recipe_fits_on_its_machines(recipe, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(QWEN3_8B))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    (tmp_path / recipe).write_text((FOLDER / recipe).read_text(encoding="utf-8"))
    app = typer.Typer()
    app.command()(plan)
    options = ["--gpus", MACHINES[recipe], "--set", "base_model=./base", "--json"]
    result = CliRunner().invoke(app, [str(tmp_path / recipe), *options], catch_exceptions=False)
    assert result.exit_code == 0
    (stage,) = json.loads(result.output)["stages"]
    assert stage["fits"]
