"""`adapter_total/`: after any number of stages, one adapter for the given base that plain PEFT loads; or a reason by name."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from posttrain.config.resolved import resolved_yaml
from posttrain.config.stages import SFTKeys
from posttrain.files import digest_tree
from posttrain.models.export import save_policy
from posttrain.models.load import load_policy
from posttrain.models.proof import probe_logits
from posttrain.models.provenance import source_digest
from posttrain.models.total import MergedBefore, write_total


def moved(policy, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return policy


class Stages:
    """Stages one after the other, each from the merged model of the one before. `totals` are what each said."""

    def __init__(self, folder, base):
        self.folder, self.base, self.totals, self.before, self.source = folder, base, [], None, base

    def run(self, **options):
        keys = SFTKeys(
            base_model=str(self.source), datasets=[{"path": "x.jsonl"}], **{"adapter": "lora", "lora_r": 4, **options}
        )
        number = len(self.totals) + 1
        folder = self.folder / f"{number:02d}-sft"
        policy = moved(load_policy(keys), number)
        self.trained = probe_logits(policy.model)
        save_policy(policy, folder / "model", keys)
        (folder / "config.yaml").write_text(resolved_yaml(keys))
        total = write_total(policy, folder, keys, self.trained, self.before) if policy.has_adapter else None
        self.totals.append(total)
        given = self.before.given if self.before else policy.under
        if keys.adapter_start == "fresh":
            self.fresh_before = self.before
        self.before = MergedBefore(folder, given, total.refused if total else "")
        self.last, self.source = folder, folder / "model"
        return total

    def go_on(self, **options):
        """A stage with `adapter_start: continue`: what was merged before it was merged before the one it continues."""
        self.before = self.fresh_before
        return self.run(adapter_start="continue", **options)

    def by_peft(self):
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        return probe_logits(PeftModel.from_pretrained(base, self.last / "adapter_total"))


@pytest.fixture
def stages(model_dir, tmp_path):
    return lambda architecture: Stages(tmp_path, model_dir(architecture))


CHAINS = {
    "three alike": ("llama", [{}, {}, {}]),
    "other ranks, targets and scales": (
        "llama",
        [
            {"lora_target": ["q_proj", "v_proj"], "lora_alpha": 8},
            {"lora_r": 2, "lora_target": ["v_proj", "down_proj"], "use_rslora": True},
            {"rank_pattern": {"o_proj": 3}, "alpha_pattern": {"layers.1.self_attn.o_proj": 7}},
        ],
    ),
    "inits that move the base": ("llama", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]),
    "whole modules": ("llama", [{"lora_modules_to_save": ["lm_head"]}, {}, {"lora_modules_to_save": ["lm_head"]}]),
    "tied whole modules": ("qwen3", [{"lora_modules_to_save": ["embed_tokens"]}, {}]),
    "experts": ("qwen3_moe", [{"lora_target": ["q_proj", "gate_up_proj", "down_proj"], "rank_pattern": {"down_proj": 2}}] * 2),
    "experts as PEFT finds them": ("qwen3_moe", [{}, {}]),
    "experts once": ("qwen3_moe", [{"lora_target": ["q_proj"]}, {"lora_target": ["gate_up_proj"]}, {"lora_target": ["q_proj"]}]),
}  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS)
def test_one_adapter_for_the_given_base_is_the_trained_policy_after_every_stage(chain, stages, model_dir):
    architecture, options = CHAINS[chain]
    run = stages(architecture)
    for keys in options:
        total = run.run(**keys)
        assert total.refused == ""
        assert total.max_logit_difference < 1e-4 * total.max_logit
        torch.testing.assert_close(run.by_peft(), run.trained, atol=1e-3, rtol=1e-3)
    assert total.digest == digest_tree(run.last / "adapter_total")
    record = json.loads((run.last / "adapter_total/posttrain.json").read_text())
    assert record["base_digest"] == total.base_digest == source_digest(str(model_dir(architecture)))
    config = json.loads((run.last / "adapter_total/adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == total.rank
    assert str(model_dir(architecture)) not in json.dumps(config), "its digest does not depend on where the base lay"


def test_a_continued_adapter_counts_once(stages):
    run = stages("llama")
    assert run.run().rank == 4
    assert run.go_on().rank == 4
    assert run.run(lora_r=2).rank == 6
    assert run.go_on().rank == 6
    torch.testing.assert_close(run.by_peft(), run.trained, atol=1e-3, rtol=1e-3)


def test_a_qlora_pipeline_that_continues_its_adapter_has_one_for_the_given_base_in_4_bits(stages):
    run = stages("llama")
    first = run.run(adapter="qlora", load_in_4bit=True)
    assert first.refused == ""
    again = run.go_on(adapter="qlora", load_in_4bit=True)
    assert again.refused == ""
    assert again.max_logit_difference < 1e-4 * again.max_logit


def test_merges_that_were_rounded_to_half_precision_are_named_with_how_far_off_they_are(bf16_dir, tmp_path):
    run = Stages(tmp_path, bf16_dir("llama"))
    assert run.run().max_logit_difference < 1e-4 * 20
    total = run.run()
    assert total.refused == ""
    assert total.rounded == ("01-sft",)
    difference = float((run.by_peft() - run.trained).abs().max())
    assert difference > 1e-3
    assert total.max_logit_difference == pytest.approx(difference, rel=1e-3)
    assert "the merges of 01-sft were rounded to half precision; save_dtype: float32" in str(total)
    exact = Stages(tmp_path / "exact", bf16_dir("llama"))
    for _ in range(2):
        total = exact.run(save_dtype="float32")
    assert (total.rounded, total.max_logit_difference < 1e-3) == ((), True)


REFUSED = {
    "DoRA": ([{}, {"use_dora": True}], "DoRA also rescales"),
    "a full fine-tune before": ([{"adapter": "none"}, {}], "01-sft left none: it trained all weights"),
    "a stage after one that was refused": ([{"use_dora": True}, {}], "01-sft left none: DoRA also rescales"),
    "added tokens": ([{"added_tokens": ["<tool>"]}], "added_tokens gave the embedding rows"),
    "a QLoRA merge in between": ([{"adapter": "qlora", "load_in_4bit": True}] * 2, "was quantised or dequantised in between"),
    "whole and by low rank": (
        [{"lora_target": ["lm_head", "q_proj"]}, {"lora_modules_to_save": ["lm_head"]}],
        "lora_modules_to_save: lm_head is trained whole in one stage and by low rank in another",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_add_up_is_refused_by_name_and_leaves_no_folder(case, stages):
    options, reason = REFUSED[case]
    run = stages("llama")
    for keys in options:
        run.run(**keys)
    assert reason in run.totals[-1].refused
    assert str(run.totals[-1]).startswith("adapter_total: none: ")
    assert not (run.last / "adapter_total").exists()


def test_other_experts_than_before_are_refused_by_name(stages):
    run = stages("qwen3_moe")
    run.run(lora_target=["gate_up_proj"])
    assert "other experts than before (down_proj; before gate_up_proj)" in run.run(lora_target=["down_proj"]).refused


def test_a_sum_that_is_not_the_trained_policy_is_never_kept(stages, monkeypatch):
    run = stages("llama")
    run.run()
    real = "posttrain.models.total.side_by_side"
    from posttrain.models.low_rank import side_by_side

    monkeypatch.setattr(real, lambda parts, *rest: side_by_side(parts[:1], *rest))
    total = run.run()
    assert "from the trained ones, more than rounding" in total.refused
    assert not (run.last / "adapter_total").exists()
