"""Old configurations. The table of changes is still empty, so the mechanism is tested with tables of its own."""

import dataclasses

import pytest

from posttrain.config import load_pipeline, load_stage, resolved_yaml
from posttrain.config.datasets import DatasetKeys
from posttrain.config.migrate import MIGRATIONS, Migration, drift, migrate, renamed
from posttrain.config.pipeline import GateKeys, OnFailKeys, PipelineKeys, in_pipeline
from posttrain.config.resolved import SCHEMA
from posttrain.config.schema import keys_of
from posttrain.config.settings import Problems, read_settings
from posttrain.config.stages import SFTKeys, TrainKeys
from posttrain.errors import ConfigError

MINIMAL = "base_model: ./base\ndatasets: [{path: sft_data.jsonl}]\n"
TABLE = (
    Migration(1, TrainKeys, "lr", "learning_rate", "it has TRL's name"),
    Migration(2, DatasetKeys, "file", "path", "hub ids are read too"),
    Migration(2, SFTKeys, "fancy", None, "it did nothing"),
    Migration(2, GateKeys, "level", "alpha", "levels are shares, not per cent", lambda per_cent: per_cent / 100),
    Migration(3, TrainKeys, "warmup_ratio", "warmup_ratio", "it was in per cent", lambda per_cent: per_cent / 100),
    Migration(
        3, TrainKeys, "schedule", "lr_scheduler_type", "it has TRL's name", {"half-cosine": "cosine"}.__getitem__
    ),
)


def read(path, groups):
    settings, problems = read_settings(path)[0], Problems()
    notes = migrate(settings, groups, problems, TABLE)
    return settings, problems, notes


@pytest.fixture
def old(write):
    """`old(text)` writes a configuration and reads it with the table; an old schema is one of the keys."""

    def make(text, groups=(SFTKeys,)):
        return read(write(text, "old.yaml"), list(groups))

    return make


def test_a_renamed_key_is_read_as_the_new_one_with_its_line(old):
    settings, problems, notes = old(f"schema: 0\nlr: 1e-3\n{MINIMAL}")
    assert problems.found == {}
    assert settings.values["learning_rate"] == 1e-3
    assert "lr" not in settings.values and "schema" not in settings.values
    assert settings.origin(("learning_rate",)).short == "old.yaml:2"
    assert notes == [
        "lr: 0.001 is read as learning_rate: 0.001; lr is now learning_rate since schema 1: it has TRL's name"
    ]


def test_inside_lists_of_groups_too(old):
    settings, _, notes = old(
        "schema: 1\nbase_model: ./base\ndatasets:\n- {file: a.jsonl, limit: 3}\n- {path: b.jsonl}\n"
    )
    assert settings.values["datasets"] == [{"limit": 3, "path": "a.jsonl"}, {"path": "b.jsonl"}]
    assert settings.origin(("datasets", 0, "path")).line == 4
    assert notes[0].startswith("datasets.1.file: a.jsonl is read as path: a.jsonl")


def test_a_key_that_is_gone_is_left_out_and_said(old):
    settings, _, notes = old(f"schema: 1\nfancy: 3\n{MINIMAL}")
    assert "fancy" not in settings.values
    assert notes == ["fancy: 3 is left out; fancy is gone since schema 2: it did nothing"]


def test_a_value_with_another_meaning_is_converted_only_where_the_schema_is_said(old):
    assert old(f"schema: 2\nwarmup_ratio: 5\n{MINIMAL}")[0].values["warmup_ratio"] == 0.05
    for text in ("schema: 3\nwarmup_ratio: 0.05\n", "warmup_ratio: 0.05\n"):
        settings, _, notes = old(text + MINIMAL)
        assert (settings.values["warmup_ratio"], notes) == (0.05, [])


def test_only_what_changed_after_the_schema_it_was_written_in(old):
    settings, _, _ = old(f"schema: 2\nlr: 1\nfancy: 2\n{MINIMAL}")
    assert {"lr", "fancy"} <= settings.values.keys(), "schema 2 has no such keys: they are typing errors"


def test_a_yaml_by_hand_may_use_old_names(old):
    assert old(f"lr: 1e-3\n{MINIMAL}")[0].values["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: 1\nlearning_rate: 2\n", "learning_rate is set too; keep learning_rate"),
        ("schedule: triangle\n", "its value triangle has no counterpart; set lr_scheduler_type yourself"),
        ("schema: 99\n", f"is of a newer posttrain, this one reads up to {SCHEMA}; upgrade posttrain"),
        ("schema: new\n", f"got new, expected a whole number up to {SCHEMA}"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_line(old, text, said):
    _, problems, _ = old(MINIMAL + text)
    ((line, number),) = problems.found.items()
    assert said in line
    assert number == 3
    assert "old.yaml:3" in line


def test_in_every_part_of_a_pipeline(old, pipeline_text):
    text = pipeline_text.replace("learning_rate: 1e-3", "lr: 1e-3").replace(
        "with: { ", "with: { schedule: half-cosine, "
    )
    settings, problems, notes = old(
        "schema: 0\nlr: 2e-3\n" + text.replace("baseline:", "level: 5\n  baseline:"), [PipelineKeys, TrainKeys]
    )
    assert problems.found == {}
    assert settings.values["learning_rate"] == 2e-3
    assert settings.values["stages"][0]["sft"]["learning_rate"] == 1e-3
    assert settings.values["gate"]["alpha"] == 0.05
    assert settings.values["gate"]["on_fail"]["with"] == {"num_train_epochs": 3, "lr_scheduler_type": "cosine"}
    assert len(notes) == 4
    assert "stages.1.sft.lr: 0.001 is read as" in "\n".join(notes)


# --- as it is loaded -----------------------------------------------------------------------------------------------


def test_a_resolved_configuration_says_its_schema_and_loads(write, pipeline_text):
    keys = load_pipeline(write(pipeline_text)).keys
    assert resolved_yaml(keys).startswith(f"schema: {SCHEMA}\n")
    again = write(resolved_yaml(keys), "again.yaml")
    assert load_pipeline(again).keys == keys


def test_before_schemas_were_written_there_was_none(write):
    keys = load_stage("sft", write(MINIMAL)).keys
    text = resolved_yaml(keys).partition("\n")[2]
    assert load_stage("sft", write(text, "again.yaml")).keys == keys


def test_a_newer_schema_is_refused_in_one_line(write):
    with pytest.raises(ConfigError, match=r"train\.yaml:1: schema: 99 is of a newer posttrain") as caught:
        load_stage("sft", write("schema: 99\n" + MINIMAL))
    assert len(str(caught.value).splitlines()) == 1


def test_the_loader_reads_old_names_and_notes_them(write, monkeypatch):
    monkeypatch.setattr(
        "posttrain.config.load.migrate", lambda s, groups, problems: migrate(s, groups, problems, TABLE)
    )
    loaded = load_stage("sft", write("schema: 0\nlr: 1e-3\n" + MINIMAL))
    assert loaded.keys.learning_rate == 1e-3
    assert loaded.provenance["learning_rate"] == "train.yaml:2"
    assert any("lr is now learning_rate since schema 1" in note for note in loaded.notes)


def test_the_unknown_key_that_was_one_once_is_explained():
    assert renamed("lr", [SFTKeys], TABLE) == "lr is now learning_rate since schema 1: it has TRL's name"
    assert renamed("fancy", [in_pipeline("sft")], TABLE).startswith("fancy is gone since schema 2")
    assert renamed("fancy", [in_pipeline("dpo")], TABLE) == ""


def test_the_rows_that_ship_are_in_order_and_lead_to_keys_that_exist():
    assert [row.since for row in MIGRATIONS] == sorted(row.since for row in MIGRATIONS)
    for row in (*MIGRATIONS, *TABLE):
        assert row.new is None or row.new in keys_of(row.group), row
        assert row.old == row.new or row.old not in keys_of(row.group), row
    assert all(1 <= row.since <= SCHEMA for row in MIGRATIONS)


# --- what moved since a run was started ----------------------------------------------------------------------------


def test_keys_that_differ_are_listed_by_name_and_value(write):
    before = load_stage("sft", write(MINIMAL + "learning_rate: 1e-3\nmin_lr_ratio: 0.1\n")).keys
    run = write(resolved_yaml(before), "config.yaml")
    assert drift(run, before) == []
    now = load_stage("sft", write(MINIMAL + "learning_rate: 2e-3\nmin_lr_ratio: 0.1\neval_steps: 3\n")).keys
    assert "learning_rate: 0.001 → 0.002" in drift(run, now)
    assert "eval_steps: 0 → 3" in drift(run, now)
    assert len(drift(run, now)) == 2


def test_keys_an_older_version_did_not_have_or_called_otherwise_are_listed_too(write):
    keys = load_stage("sft", write(MINIMAL + "learning_rate: 1e-3\n")).keys
    lines = resolved_yaml(keys).splitlines()
    kept = [line for line in lines if not line.startswith(("schema", "packing:", "revision", "learning_rate"))]
    run = write("\n".join(["schema: 0", "lr: 1e-3", "fancy: 1", "odd: 2", *kept]), "config.yaml")
    assert drift(run, keys, TABLE) == [
        "lr: 0.001 is read as learning_rate: 0.001; lr is now learning_rate since schema 1: it has TRL's name",
        "fancy: 1 is left out; fancy is gone since schema 2: it did nothing",
        "packing: not there then, now false",
        "odd: 2 then, not there now",
    ]


def test_the_stages_of_a_pipeline_are_named_by_place(write, pipeline_text):
    run = write(resolved_yaml(load_pipeline(write(pipeline_text)).keys), "config.yaml")
    now = load_pipeline(write(pipeline_text), ["dpo.beta=0.2", "gate.primary.1.min_delta=0.1"]).keys
    assert drift(run, now) == ["stages.2.dpo.beta: 0.1 → 0.2", "gate.primary.1.min_delta: 0.05 → 0.1"]


def test_a_migration_is_a_plain_row():
    assert dataclasses.is_dataclass(Migration)
    assert (
        str(Migration(4, OnFailKeys, "times", "times", "why not", int)) == "times is read anew since schema 4: why not"
    )
