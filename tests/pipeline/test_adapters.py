"""Adapters along a pipeline: one adapter for the given base after every stage, also with retries, resumes and the registry."""

import json

import pytest
import torch

from posttrain.cli.app import main
from posttrain.errors import ConfigError
from posttrain.files import digest_tree, read_json
from posttrain.models.continued import ADAPTER
from posttrain.models.total import ADAPTER_TOTAL
from posttrain.registry.card import model_card

LORA = {"adapter": "lora", "lora_r": 4, "lora_target": ["q_proj", "v_proj"]}
QUICK = {"learning_rate": 1e-2, "max_steps": 8, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
NOT_WORSE = {"baseline": "stage:base", "guards": [{"suite": "yes", "margin": 0.4}]}


def sft(**keys):
    return {"sft": {"datasets": [{"path": "sft.jsonl"}], **QUICK, **keys}}


def dpo(**keys):
    return {"dpo": {"datasets": [{"path": "pairs.jsonl"}], "max_steps": 2, "learning_rate": 1e-3,
                    "per_device_train_batch_size": 4, "save_steps": 1, **keys}}  # fmt: skip


def by_peft(base, folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from posttrain.models.proof import probe_logits

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return probe_logits(model if folder is None else PeftModel.from_pretrained(model, folder))


def folders(project):
    return [project.out / entry.folder for entry in project.state.stages]


def test_sft_dpo_dpo_leave_one_adapter_for_the_given_base_registered_and_promoted(project):
    made = project(
        [sft(), dpo(), dpo(adapter_start="continue", learning_rate=2e-3)], **LORA, gate=NOT_WORSE,
        register={"name": "yes", "alias": "champion"},
    )  # fmt: skip
    made.run()
    base, stages = made.values["base_model"], folders(made)
    for folder, rank in zip(stages, (4, 8, 8), strict=True):
        total = read_json(folder / "result.json")[ADAPTER_TOTAL]
        assert (total["refused"], total["rank"]) == ("", rank)
        assert total["digest"] == digest_tree(folder / ADAPTER_TOTAL)
        torch.testing.assert_close(
            by_peft(base, folder / ADAPTER_TOTAL), by_peft(folder / "model", None), atol=1e-3, rtol=1e-3
        )
    # The third stage trains the second one's adapter on, over the model that the first one made.
    assert json.loads((stages[2] / ADAPTER / "posttrain.json").read_text())["base_digest"] == digest_tree(
        stages[0] / "model"
    )
    metrics = [json.loads(line) for line in (stages[2] / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    from posttrain.cli.doctor_run import check_run

    (found,) = [finding for finding in check_run(made.out) if finding.name == "run adapter"]
    assert (found.status, "rank 8 for the given base" in found.text) == ("ok", True)
    merged = made.folder / "merged"
    with pytest.raises(SystemExit) as caught:  # the base that the pipeline was given, named by no one
        main(["merge", str(stages[1] / ADAPTER_TOTAL), "--out", str(merged)])
    assert caught.value.code == 0
    torch.testing.assert_close(by_peft(merged, None), by_peft(base, stages[1] / ADAPTER_TOTAL), atol=1e-3, rtol=1e-3)
    book = made.registry()
    try:
        chain = book.chain("yes", 1)
        assert [m.outputs[ADAPTER_TOTAL] for m in chain] == [digest_tree(f / ADAPTER_TOTAL) for f in stages]
        offered = book.adapter("yes", 1)
        assert f"adapters/{offered.name}` of the registry" in model_card(book, "yes", 1)
        assert digest_tree(offered) == digest_tree(stages[2] / ADAPTER_TOTAL)
        assert book.show("yes", 1).aliases == ("champion",)
        (offered / "adapter_config.json").unlink()
        with pytest.raises(Exception, match=r"adapter_config\.json"):
            book.verify("yes", 1)
    finally:
        book.close()


def test_a_retry_goes_into_the_sum_and_a_second_start_makes_nothing_again(project):
    gate = {"baseline": "stage:base", "primary": [{"suite": "yes", "min_delta": 0.35}],
            "on_fail": {"retry": "sft", "times": 1, "with": {"learning_rate": 1e-2}}}  # fmt: skip
    made = project(
        [sft(learning_rate=1e-6, lora_target="all-linear", lora_r=16, max_steps=16), dpo()], adapter="lora", gate=gate
    )
    made.run()
    entries = {(entry.index, entry.attempt): made.out / entry.folder for entry in made.state.stages}
    assert (1, 2) in entries
    last = entries[max(key for key in entries if key[0] == 2)]
    torch.testing.assert_close(
        by_peft(made.values["base_model"], last / ADAPTER_TOTAL), by_peft(last / "model", None), atol=1e-3, rtol=1e-3
    )
    before = digest_tree(made.out / "stages")
    made.run()
    assert digest_tree(made.out / "stages") == before


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"adapter": "none"}, {"adapter": "lora"}, r"stages\.2\.adapter_start: continue: stage 1 trains all weights"),
        ({"adapter": "qlora"}, {"adapter": "lora"}, r"stages\.2\.adapter_start: continue: stage 1 has adapter: qlora"),
    ],
)
def test_continue_without_a_fitting_adapter_before_is_refused_before_anything_runs(first, second, message, project):
    made = project([sft(**first), dpo(**second, adapter_start="continue")])
    with pytest.raises(ConfigError, match=message):
        made.run()
    assert not made.out.exists()
