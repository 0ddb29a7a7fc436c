import pytest

from posttrain.config import apply_changes, load_pipeline
from posttrain.errors import ConfigError


def refusal(path):
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_two_stages_of_a_kind_need_a_place(write, pipeline_text):
    sft = next(line for line in pipeline_text.splitlines() if "- sft" in line)
    text = pipeline_text.replace("gate:\n", sft + "\ngate:\n")
    assert "2 stages are sft; name its place; there are 1 sft, 2 dpo, 3 grpo, 4 sft" in refusal(write(text))
    assert load_pipeline(write(text.replace("retry: sft", "retry: 4"))).keys.gate.on_fail.retry == 4


def test_register_without_a_gate_is_refused(write, pipeline_text):
    head, _, tail = pipeline_text.partition("gate:\n")
    register = tail[tail.index("register") :]
    message = refusal(write(head + register))
    assert "train.yaml:8: register: nothing takes an alias without a passing verdict" in message


def test_stop_when_gate_passes_needs_a_gate(write, pipeline_text):
    head = pipeline_text.partition("gate:\n")[0]
    assert "train.yaml:8: stop_when: gate_passes needs a gate" in refusal(write(head + "stop_when: gate_passes\n"))


def test_a_gate_may_stand_inside_a_stage(write, pipeline_text):
    head = pipeline_text.partition("gate:\n")[0].replace("num_train_epochs: 2 }", "num_train_epochs: 2, gate: %s }")
    gate = "{ baseline: 'stage:base', primary: [{suite: heldout}], on_fail: {retry: sft, with: {epochs: 5, datasets: [{path: data/pairs.jsonl}]}} }"
    loaded = load_pipeline(write(head % gate))
    stage = loaded.keys.stages[0].keys
    assert stage.gate.on_fail.with_["num_train_epochs"] == 5
    assert loaded.notes == ("epochs is torchtune's name; read as num_train_epochs",)
    changed = apply_changes(stage, stage.gate.on_fail.with_)
    assert changed.num_train_epochs == 5
    assert [source.path for source in changed.datasets] == [str(write("").parent / "data/pairs.jsonl")]
    assert changed.learning_rate == stage.learning_rate
    assert "no stage dpo before this gate; there are 1 sft" in refusal(
        write(head % gate.replace("retry: sft", "retry: dpo"))
    )


def test_register_is_content_with_a_gate_in_the_last_stage(write, pipeline_text):
    head = pipeline_text.partition("gate:\n")[0].replace(
        "max_steps: 200 }", "max_steps: 200, gate: {primary: [{suite: heldout}]} }"
    )
    assert load_pipeline(write(head + "register: {name: x}\n")).keys.register_.name == "x"


REWARD_MODEL = "  - reward_model: { datasets: [{path: data/pairs.jsonl, type: preference}] }\n"


def test_no_gate_judges_a_reward_model(write, pipeline_text):
    text = "judges a reward model, which answers no suite"
    assert f"gate: {text}" in refusal(write(pipeline_text.replace("gate:\n", REWARD_MODEL + "gate:\n", 1)))
    head = pipeline_text.partition("gate:\n")[0]
    gated = REWARD_MODEL.replace(
        "preference}] }", "preference}], gate: {baseline: 'stage:base', primary: [{suite: heldout}]} }"
    )
    assert text in refusal(write(head + gated))


def test_no_gate_compares_with_a_reward_model(write, pipeline_text):
    text = pipeline_text.replace("stages:\n", "stages:\n" + REWARD_MODEL, 1)
    text = text.replace("alias:champion  ", "stage:1  ", 1)
    assert "got stage:1, expected stage:base, stage:2" in refusal(write(text))
