"""Files that training reads, kept with a version: it is trained again when the project is gone."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from posttrain.cli.app import main
from posttrain.config.load_pipeline import load_pipeline
from posttrain.errors import ChangedInputsError, ConfigError
from posttrain.files import read_json
from posttrain.pipeline.stored_data import check_can_be_stored, stored_base, stored_files

QUICK = {"learning_rate": 1e-2, "max_steps": 8, "lr_scheduler_type": "constant", "per_device_train_batch_size": 8}
GATE = {"baseline": "alias:champion", "primary": [{"suite": "yes", "min_delta": 0.35}]}
STORED = {"name": "yes", "data": "store"}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="module")
def kept(make_project, tmp_path_factory):
    """A run whose data lies partly outside of its project, and whose version keeps all of it. Its project is gone."""
    folder = tmp_path_factory.mktemp("kept")
    outside = folder / "elsewhere/sft.jsonl"
    run = make_project(
        folder / "project", [{"sft": {"datasets": [{"path": str(outside)}], **QUICK}}], gate=GATE, register=STORED
    )
    outside.parent.mkdir()
    (run.folder / "sft.jsonl").rename(outside)
    run.values["stages"][0]["sft"]["eval_datasets"] = [{"path": "dev.jsonl"}]
    (run.folder / "dev.jsonl").write_text(outside.read_text().replace("What is", "How much is"))
    run.run()
    shutil.move(run.folder / "registry", folder / "registry")
    shutil.rmtree(run.folder)
    shutil.rmtree(outside.parent)
    return replace(run, folder=folder)


def test_a_version_with_its_data_is_trained_again_without_its_project(kept, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "reproduce",
                "yes@1",
                "--level",
                "2",
                "--registry",
                str(kept.folder / "registry"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
    said = capsys.readouterr().out
    assert "same     weights of sft: sha256:" in said, said
    assert caught.value.code == 0
    tree = {path.relative_to(tmp_path / "out/data").as_posix() for path in (tmp_path / "out/data").rglob("*.jsonl")}
    assert {path.partition("/")[0] for path in tree} == {"dev.jsonl", "outside"}
    (named,) = read_json(tmp_path / "out/data/paths.json")
    assert named.endswith("elsewhere/sft.jsonl")


def test_the_bytes_that_are_kept_are_verified(kept):
    book = kept.registry()
    digest = book.evidence("yes", 1)["data"][1]
    assert sorted(Path(name).name for name in book.store.tree(digest)) == ["dev.jsonl", "paths.json", "sft.jsonl"]
    assert book.verify("yes", 1).num_files > 0
    book.close()


def test_everything_that_a_stage_reads_is_kept_with_its_neighbours(project):
    rows = [{"sft": {"datasets": [{"path": "sft.jsonl"}], "chat_template": "chat.jinja", "eval_suite": "yes.jsonl", "max_steps": 1}},
            {"grpo": {"datasets": [{"path": "prompts.jsonl"}], "reward_funcs": ["pay.py:paid"], "ptx_datasets": [{"path": "sft.jsonl"}]}}]  # fmt: skip
    run = project(rows)
    (run.folder / "chat.jinja").write_text(TEMPLATE)
    (run.folder / "pay.py").write_text(
        "from rewards import spread\n\n\ndef paid(**columns):\n    return spread(**columns)\n"
    )
    keys = load_pipeline(run.path).keys
    run.out.mkdir(parents=True)
    from posttrain.pipeline.pins import data_pins
    from posttrain.pipeline.state import StageEntry

    def entry(place, stage):
        return StageEntry(place, stage.kind, 1, "", "done", "", inputs=data_pins(stage.keys))

    entries = [entry(place, stage) for place, stage in enumerate(keys.stages, start=1)]
    found = stored_files(keys, run.folder, run.out, entries)
    assert sorted(found) == [
        "chat.jinja", "paths.json", "pay.py", "prompts.jsonl", "rewards.py", "sft.jsonl", "yes.jsonl"
    ]  # fmt: skip
    assert read_json(run.out / "paths.json") == {}, "files of the project lie at their own path"
    (run.folder / "prompts.jsonl").write_text((run.folder / "prompts.jsonl").read_text() + "\n")
    with pytest.raises(
        ChangedInputsError, match=r"data.prompts.jsonl of the grpo stage changed since it began.*data: reference"
    ):
        stored_files(keys, run.folder, run.out, entries)


def test_rows_of_the_hub_are_not_kept_and_that_is_said_before_training(project):
    run = project(
        [{"sft": {"datasets": [{"path": "sft.jsonl"}, {"path": "someone/rows"}]}}], gate=GATE, register=STORED
    )
    keys = load_pipeline(run.path).keys
    with pytest.raises(ConfigError, match=r"someone/rows of the sft stage lies elsewhere.*data: reference"):
        check_can_be_stored(keys)
    run.values["register"] = {"name": "yes"}
    check_can_be_stored(load_pipeline(run.path).keys)


def test_a_base_that_is_another_version_is_taken_from_the_store(kept):
    book = kept.registry()
    (first,) = book.chain("yes", 1)
    assert stored_base(book, [first]) is None
    later = replace(first, inputs={**first.inputs, "model": book.show("yes", 1).digest})
    assert stored_base(book, [later]) == book.show("yes", 1).path
    book.close()


def test_the_configuration_of_the_version_is_kept_as_it_was(kept, tmp_path):
    book = kept.registry()
    config = yaml.safe_load(book.export("yes", 1, "config", tmp_path / "config.yaml").read_text())
    book.close()
    assert config["register"]["data"] == "store"
    assert config["stages"][0]["sft"]["eval_datasets"][0]["path"] == "./dev.jsonl"
