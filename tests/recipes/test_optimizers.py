"""Steps of the optimizers in the table."""

import torch

from posttrain.config.stages import SFTKeys
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
