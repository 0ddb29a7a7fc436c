"""`--json` of verbs that list something: one JSON value on stdout, with what the lines say."""

import json

import pytest

from posttrain.cli.app import main


def printed(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        main([*words, "--json"])
    return caught.value.code, json.loads(capsys.readouterr().out)


@pytest.fixture
def config(tmp_path, model_dir, data_dir):
    path = tmp_path / "sft.yaml"
    path.write_text(
        f"base_model: {model_dir('qwen3')}\ndatasets: [{{path: {data_dir / 'sft.jsonl'}}}]\nmax_steps: 1\nsequence_len: 64\n"
    )
    return str(path)


def test_explain_prints_json(capsys):
    code, key = printed(capsys, "explain", "learning_rate")
    assert (code, key["key"]) == (0, "learning_rate") and key["uses"][0]["defaults"]
    _, places = printed(capsys, "explain")
    assert "name" in places["pipeline"]


def test_doctor_prints_json(capsys):
    _, findings = printed(capsys, "doctor")
    assert {"name", "status", "text"} == set(findings[0])


def test_plan_prints_json_in_bytes(capsys, config):
    code, plan = printed(capsys, "plan", config)
    (stage,) = plan["stages"]
    assert (code, stage["stage"], stage["fits"]) == (0, "sft", True)
    assert 0 < stage["floor_bytes"] <= stage["total_bytes"]


def test_data_prints_json(capsys, config):
    code, (stage,) = printed(capsys, "data", config)
    assert (code, stage["stage"]) == (0, "sft")
    assert stage["sources"][0]["rows_kept"] and "findings" in stage["lint"]
