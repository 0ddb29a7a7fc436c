import json
import queue
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.errors import ModelError
from posttrain.models.adapters import load_adapter
from posttrain.models.batch import pack
from posttrain.models.export import merge_adapter, save_policy, write_folder_together
from posttrain.models.load import load_policy
from posttrain.models.provenance import check_base, model_digest, source_digest, was_tuned_by_us
from posttrain.types import TokenSeq

WITHOUT_US = """
import json, sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "posttrain":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.tensor([json.loads(sys.argv[1])])
for base, folder in json.loads(sys.argv[2]):
    model = AutoModelForCausalLM.from_pretrained(base or folder, dtype=torch.float32)
    if base:
        model = PeftModel.from_pretrained(model, folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    assert model.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]
    print(json.dumps(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()))
"""


def by_transformers(ids, folders) -> list[torch.Tensor]:
    """Log-probs of `ids` under each `(base or "", folder)`, from a process in which posttrain cannot be imported."""
    command = [
        sys.executable,
        "-c",
        WITHOUT_US,
        json.dumps(list(ids)),
        json.dumps([[str(b), str(f)] for b, f in folders]),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [torch.tensor(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]


def moved(policy, std=0.05):
    torch.manual_seed(5)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn_like(parameter) * std)
    return policy


def own_logp(policy, ids):
    with torch.no_grad():
        return policy.score(pack([[TokenSeq(tuple(ids), (True,) * len(ids))]])).logp_M


IDS = tuple(range(40, 62))


def test_what_is_saved_loads_without_us(model_dir, keys_of, tmp_path):
    """A whole model with tied embeddings (qwen3 here), one with untied (llama), an adapter, and its merge."""
    expected, folders = [], []
    for architecture in ("qwen3", "llama"):
        policy, folder = moved(load_policy(keys_of(architecture))), tmp_path / architecture / "model"
        report = save_policy(policy, folder, keys_of(architecture))
        assert (report.base, report.dtype) == ("", "float32")
        assert report.cast_difference < 1e-4 * report.max_logit
        config = json.loads((folder / "config.json").read_text())
        assert config["tie_word_embeddings"] == (architecture == "qwen3")
        assert "posttrain" not in json.dumps(config)
        assert was_tuned_by_us(str(folder))
        expected.append(own_logp(policy, IDS))
        folders.append(("", folder))
    keys = keys_of("qwen3", adapter="lora", lora_r=4, use_dora=True)
    policy = moved(load_policy(keys))
    before = own_logp(policy, IDS)
    assert save_policy(policy, tmp_path / "lora/model", keys).relative < 1e-4
    assert torch.equal(own_logp(policy, IDS), before), "saving changed the policy"
    expected += [before, before]
    folders += [(model_dir("qwen3"), tmp_path / "lora/adapter"), ("", tmp_path / "lora/model")]
    for found, logp in zip(by_transformers(IDS, folders), expected, strict=True):
        torch.testing.assert_close(found, logp, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"lora_modules_to_save": ["lm_head"]}, {"lora_target": r".*v_proj", "use_rslora": True}]
)
def test_merged_equals_unmerged(options, keys_of, tmp_path):
    keys = keys_of("llama", adapter="lora", lora_r=4, **options)
    policy = moved(load_policy(keys))
    save_policy(policy, tmp_path / "model", keys)
    again = load_policy(keys.model_copy(update={"base_model": str(tmp_path / "model"), "adapter": "none"}))
    torch.testing.assert_close(own_logp(again, IDS), own_logp(policy, IDS), atol=1e-4, rtol=1e-4)


def test_experts_merge(keys_of, tmp_path):
    keys = keys_of("qwen3_moe", adapter="lora", lora_r=4, lora_target=["q_proj", "gate_up_proj", "down_proj"])
    policy = moved(load_policy(keys))
    save_policy(policy, tmp_path / "model", keys)
    again = load_policy(keys.model_copy(update={"base_model": str(tmp_path / "model"), "adapter": "none"}))
    torch.testing.assert_close(own_logp(again, IDS), own_logp(policy, IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_qlora_merges_onto_the_base_it_names(onto, keys_of, tmp_path):
    keys = keys_of("llama", adapter="qlora", load_in_4bit=True, lora_r=4, merge_onto=onto)
    policy = moved(load_policy(keys))
    report = save_policy(policy, tmp_path / "model", keys)
    assert report.base == onto
    assert json.loads((tmp_path / "model/posttrain.json").read_text())["merged_onto"] == onto
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        found = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    difference = (found - own_logp(policy, IDS)).abs().max()
    if onto == "dequantized":
        assert difference < 2e-3
    else:
        assert 2e-3 < difference < 2.0


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_dora_of_a_bf16_file_is_proven_and_merged(adapter, bf16_dir, keys_of, tmp_path):
    """DoRA takes the norm of the base's weights: in the precision of the proof, not in that of the file."""
    keys = keys_of("llama", adapter=adapter, load_in_4bit=adapter == "qlora", lora_r=4, use_dora=True, bf16=True)
    keys = keys.model_copy(update={"base_model": str(bf16_dir("llama"))})
    assert save_policy(moved(load_policy(keys)), tmp_path / "model", keys).relative < 1e-4


def test_merging_again_without_the_trained_policy_gives_the_same_weights(keys_of, tmp_path):
    keys = keys_of("llama", adapter="qlora", load_in_4bit=True, lora_r=4)
    save_policy(moved(load_policy(keys)), tmp_path / "model", keys)
    merged = merge_adapter(keys.base_model, tmp_path / "adapter", keys)
    saved = load_file(tmp_path / "model/model.safetensors")
    for name, tensor in merged.model.state_dict(keep_vars=True).items():
        torch.testing.assert_close(merged.sharding.whole(tensor).float(), saved[name].float(), atol=1e-6, rtol=1e-5)


def test_an_adapter_for_another_base_is_refused(keys_of, model_dir, tmp_path):
    keys = keys_of("llama", adapter="lora", lora_r=4)
    save_policy(load_policy(keys), tmp_path / "model", keys)
    other = tmp_path / "other"
    shutil.copytree(model_dir("llama"), other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    check_base(tmp_path / "adapter", model_dir("llama"))
    with pytest.raises(ModelError, match=r"was trained on a base with digest .* give the base it was trained on"):
        merge_adapter(str(other), tmp_path / "adapter", keys)


def test_an_adapter_with_missing_weights_is_refused(keys_of, tmp_path):
    keys = keys_of("llama", adapter="lora", lora_r=4, lora_target=["q_proj", "v_proj"])
    save_policy(load_policy(keys), tmp_path / "model", keys)
    path = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "v_proj" in name))
    save_file(weights, path)
    base = load_policy(keys.model_copy(update={"adapter": "none"})).base
    with pytest.raises(ModelError, match=r"1 weights missing \(.*v_proj"):
        load_adapter(base, tmp_path / "adapter")


def test_a_merge_that_is_not_the_trained_model_is_refused(keys_of, tmp_path, monkeypatch):
    from peft import LoraModel

    keys = keys_of("llama", adapter="lora", lora_r=4)
    policy = moved(load_policy(keys))
    original = LoraModel.merge_and_unload

    def broken(self, **options):
        merged = original(self, **options)
        with torch.no_grad():
            merged.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", broken)
    with pytest.raises(ModelError, match=r"changes the logits by .* more than rounding .*the adapter is kept"):
        save_policy(policy, tmp_path / "model", keys)
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    assert not (tmp_path / "model").exists()


def test_digest_of_a_model_follows_its_bytes(model_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model_dir("llama"), copy)
    assert model_digest(copy) == source_digest(str(model_dir("llama")))
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "model.safetensors").write_bytes(raw)
    assert model_digest(copy) != model_digest(model_dir("llama"))
    assert source_digest("Qwen/Qwen3-8B") == "hub:Qwen/Qwen3-8B"
    assert not was_tuned_by_us(str(copy))


class RankThread:
    """One of two ranks that are threads; rank 0 waits for nobody where it works alone."""

    meeting = threading.Barrier(2, timeout=30)

    def __init__(self, rank, results):
        self.rank, self.is_main, self._results = rank, rank == 0, results

    def main_only(self, work):
        if not self.is_main:
            return self._results.get(timeout=30)
        done = work()
        self._results.put(done)
        return done

    def barrier(self):
        self.meeting.wait()


def test_a_folder_stays_where_it_is_until_the_slowest_rank_has_read_it(tmp_path):
    """Copies of a model share no collective, so nothing but a barrier holds rank 0 back."""
    results, seen = queue.Queue(), []

    def write(folder):
        (folder / "a").write_text("x")

    def read(folder):
        time.sleep(0.5)
        seen.extend(path.name for path in folder.iterdir())

    both = [
        threading.Thread(target=write_folder_together, args=(tmp_path / "model", fill, RankThread(rank, results)))
        for rank, fill in enumerate((write, read))
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert seen == ["a"] and (tmp_path / "model" / "a").read_text() == "x"
