"""A merge by layer: to the bit what PEFT merges of the whole model in float32, never more of it at once than a layer, the trained base untouched."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from posttrain.models.adapters import load_adapter
from posttrain.models.export import merge_adapter, save_policy
from posttrain.models.load import load_policy
from posttrain.models.merged import MergedByLayer
from posttrain.models.proof import probe_logits
from posttrain.models.read import read_as_filed


@pytest.fixture
def saved(bf16_dir, keys_of, tmp_path):
    """Keys and folder of an adapter with weights, trained on a bf16 file."""

    def save(architecture, **options):
        keys = keys_of(architecture, adapter="lora", lora_r=4, save_dtype="float32", **options)
        keys = keys.model_copy(update={"base_model": str(bf16_dir(architecture))})
        policy = load_policy(keys)
        torch.manual_seed(5)
        with torch.no_grad():
            for _, parameter in policy.trainable():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        policy.model.save_pretrained(str(tmp_path), save_embedding_layers=False)  # pyright: ignore
        return keys, tmp_path

    return save


def whole(keys, adapter) -> PreTrainedModel:
    base = AutoModelForCausalLM.from_pretrained(keys.base_model, dtype=torch.float32)
    return load_adapter(base, adapter).merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]


EXPERTS = {"lora_target": ["q_proj", "gate_up_proj", "down_proj"]}


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {"use_rslora": True}), ("qwen3_moe", EXPERTS), ("gpt2", {"use_dora": True})],
)
def test_each_tensor_is_what_peft_merges_in_float32(architecture, options, saved):
    keys, adapter = saved(architecture, **options)
    merged, expected = merge_adapter(keys.base_model, adapter, keys), whole(keys, adapter)
    tensors = merged.model.state_dict(keep_vars=True)
    assert tensors.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(merged.sharding.whole(tensors[name]).float(), tensor), name
    assert torch.equal(merged.logits, probe_logits(expected))


def test_of_a_merge_there_is_one_layer_at_a_time(saved):
    keys, adapter = saved("llama")
    merged = merge_adapter(keys.base_model, adapter, keys)
    own = list(merged.model.parameters())
    places = [parameter.data_ptr() for parameter in own]
    lifted: list[int] = []

    def count(*_):
        lifted.append(sum(parameter.dtype == torch.float32 for parameter in own))

    linears = [module for module in merged.model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [linear.register_forward_pre_hook(count) for linear in linears]
    assert isinstance(merged.sharding, MergedByLayer)
    with merged.sharding.running() as model:
        probe_logits(model)
    for hook in hooks:
        hook.remove()
    assert max(lifted) == len(list(merged.model.model.layers[0].parameters()))
    assert [parameter.data_ptr() for parameter in own] == places, "the base is as it was read"
    assert all(parameter.dtype == torch.bfloat16 for parameter in own)


def test_a_file_is_read_in_its_own_dtype_only_where_that_says_the_same(bf16_dir, keys_of):
    def read(architecture):
        return read_as_filed(keys_of(architecture).model_copy(update={"base_model": str(bf16_dir(architecture))}))

    model = read("llama")
    assert model is not None
    assert model.dtype == torch.bfloat16
    assert read("gemma3_text") is None, "its scale of embeddings would be rounded to bf16"


class ReadsOf(TorchDispatchMode):
    """Notes each operation on one of these tensors."""

    def __init__(self, tensors):
        super().__init__()
        self._places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.untyped_storage().data_ptr() in self._places for tensor in given):
            self.found.append(func)
        return func(*args, **(kwargs or {}))


def test_to_save_an_adapter_no_weight_of_the_frozen_base_is_touched(keys_of, tmp_path):
    keys = keys_of("llama", adapter="lora", lora_r=4)
    policy = load_policy(keys)
    logits = probe_logits(policy.model)
    with ReadsOf([p for p in policy.model.parameters() if not p.requires_grad]) as reads:
        save_policy(policy, tmp_path / "model", keys, trained=logits)
    assert reads.found == []
