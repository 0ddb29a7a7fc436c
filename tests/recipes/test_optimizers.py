"""Steps of the optimizers in the table."""

import pytest
import torch

from posttrain.config.stages import SFTKeys
from posttrain.errors import ConfigError
from posttrain.models.load import load_policy
from posttrain.recipes.optim import make_optimizer, take_step


def test_muons_spectral_norm_steps_are_as_large_as_rows_over_columns_and_decay_as_the_rest(model_dir):
    options = {"optim": "muon", "muon_adjust_lr": "spectral_norm", "learning_rate": 1e-2, "weight_decay": 0.5}
    keys = SFTKeys.model_validate({"base_model": str(model_dir("llama")), "datasets": [{"path": "x.jsonl"}], **options})
    policy = load_policy(keys)
    optimizer = make_optimizer(policy, keys)
    inner = {name: p for name, p in policy.trainable() if p.ndim == 2 and ".layers." in name}
    assert len({p.shape for p in inner.values()}) > 2
    torch.manual_seed(0)
    for _, parameter in policy.trainable():
        parameter.grad = torch.randn_like(parameter)
    before = {name: p.detach().clone() for name, p in inner.items()}
    gradients = {name: torch.as_tensor(p.grad).clone() for name, p in inner.items()}
    take_step(optimizer, 1e-2)
    for name, p in inner.items():
        left, _, right = torch.linalg.svd(gradients[name], full_matrices=False)
        rows, columns = p.shape
        step = (before[name] * (1 - 1e-2 * 0.5) - p.detach()) / (1e-2 * (rows / columns) ** 0.5)
        assert (step - left @ right).norm() < 0.35 * (left @ right).norm(), name


@pytest.mark.parametrize("adapter", [{}, {"adapter": "lora", "lora_modules_to_save": ["embed_tokens", "lm_head"]}])
def test_embedding_and_head_have_a_learning_rate_of_their_own(adapter, model_dir):
    options = {"embedding_lr_scale": 0.25, "weight_decay": 0.5, **adapter}
    keys = SFTKeys.model_validate({"base_model": str(model_dir("llama")), "datasets": [{"path": "x.jsonl"}], **options})
    policy = load_policy(keys)
    groups = [group for group in make_optimizer(policy, keys).param_groups if group.get("lr_ratio") == 0.25]
    found = {id(p) for group in groups for p in group["params"]}
    assert found == {id(p) for name, p in policy.trainable() if "embed_tokens" in name or "lm_head" in name}
    assert len(found) == 2 and all(group["weight_decay"] == 0 for group in groups)
    if adapter:
        with pytest.raises(ConfigError, match="embedding_lr_scale: neither embedding nor head is trained here"):
            bare = keys.model_copy(update={"lora_modules_to_save": []})
            make_optimizer(load_policy(bare), bare)
