"""The form over the schema, and the YAML that it writes."""

import pytest

from posttrain.cli.agent_folder import ServedFolder
from posttrain.cli.pages.yaml_form import FORM_KINDS, draft_yaml, key_fields
from posttrain.config.explain import explain, groups
from posttrain.config.load import load_stage
from posttrain.config.schema import keys_of


@pytest.mark.parametrize("kind", FORM_KINDS)
def test_every_key_of_the_schema_has_a_field_with_what_explain_says(kind):
    usual, rest = key_fields(kind, {})
    names = [one.info.name for one in (*usual, *rest)]
    assert sorted(names) == sorted(keys_of(groups()[kind])) and len(names) == len(set(names))
    for one in (*usual, *rest)[:10]:
        assert one.info.meaning in {use.meaning for use in explain(one.info.name).uses}
    assert {one.info.name for one in usual} >= {name for name, info in keys_of(groups()[kind]).items() if info.required}


def test_what_is_filled_in_is_a_yaml_that_loads_to_those_values(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"messages": []}\n')
    given = {
        "base_model": "Qwen/Qwen3-0.6B",
        "datasets": "- path: data.jsonl\n  type: chat",
        "learning_rate": "1e-4",
        "seed": "",
        "adapter": "lora",
    }
    draft = draft_yaml("sft", given, ServedFolder(tmp_path), "sft.yaml")
    assert draft.problem == "" and "# Peak learning rate." in draft.text and "seed" not in draft.text
    (tmp_path / "sft.yaml").write_text(draft.text)
    keys = load_stage("sft", tmp_path / "sft.yaml").keys
    assert (keys.learning_rate, keys.adapter, keys.datasets[0].type) == (1e-4, "lora", "chat")


def test_what_is_wrong_is_said_with_its_line_in_the_yaml_that_is_shown(tmp_path):
    draft = draft_yaml(
        "sft", {"base_model": "x", "learning_rate": "-1", "lora_r": "{"}, ServedFolder(tmp_path), "sft.yaml"
    )
    assert "lora_r" in draft.problem
    draft = draft_yaml("sft", {"base_model": "x", "learning_rate": "-1"}, ServedFolder(tmp_path), "sft.yaml")
    line = 1 + draft.text.splitlines().index("learning_rate: -1")
    assert f"sft.yaml:{line}" in draft.problem and "datasets" in draft.problem and "/tmp" not in draft.problem


def test_a_file_is_written_with_allow_acts_and_never_over_another(make_client, folder, page_of):
    (folder / "data.jsonl").write_text('{"messages": []}\n')
    fields = {
        "kind": "sft",
        "target": "new.yaml",
        "key.base_model": "Qwen/Qwen3-0.6B",
        "key.datasets": "[{path: data.jsonl}]",
    }
    reading, acting = make_client(), make_client(allow_acts=True)
    answer = reading.post("/configure", data={"form_token": reading.site.form_token, **fields, "do": "check"})
    assert "The command would take it" in page_of(answer.text).text and "Write the file" not in answer.text
    answer = reading.post("/configure", data={"form_token": reading.site.form_token, **fields, "do": "write"})
    assert answer.status_code == 403 and not (folder / "new.yaml").exists()
    write = {"form_token": acting.site.form_token, **fields, "do": "write"}
    assert "Written: new.yaml" in page_of(acting.post("/configure", data=write).text).text
    assert "base_model: Qwen/Qwen3-0.6B" in (folder / "new.yaml").read_text()
    answer = acting.post("/configure", data=write)
    assert answer.status_code == 400 and "there already" in page_of(answer.text).text


@pytest.mark.parametrize(
    "target",
    ["../new.yaml", "/tmp/new.yaml", "a" * 300 + ".yaml", "new.py", "nowhere/new.yaml", "runs/first/pipeline.json"],
)
def test_a_form_writes_a_yaml_inside_the_folder_only(make_client, target):
    client = make_client(allow_acts=True)
    fields = {"form_token": client.site.form_token, "kind": "sft", "target": target, "do": "write"}
    assert client.post("/configure", data=fields).status_code == 400


def test_what_is_no_yaml_is_said_under_the_name_of_its_key(tmp_path):
    draft = draft_yaml("sft", {"datasets": "x\n  y: : :"}, ServedFolder(tmp_path), "new.yaml")
    assert draft.problem.startswith("datasets:3:6: broken YAML")
