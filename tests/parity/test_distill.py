"""GKD: TRL's loss on the same logits, and its trainer on given answers, from one student and one teacher."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from posttrain.config.distill import DistillKeys
from posttrain.objectives.distill import DistillSpec, Head, divergence

BETA_OF = {"forward_kl": 0.0, "jsd": 0.3, "reverse_kl": 1.0}
"""Our row → TRL's beta."""


@pytest.mark.parametrize("name", BETA_OF)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_divergence_and_its_gradient_are_trl_s(name, temperature):
    from trl.experimental.gkd import GKDTrainer

    made = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(9, 31, generator=made).requires_grad_() for _ in range(2))
    own = student.detach().clone().requires_grad_()
    spec = DistillSpec(name, jsd_beta=0.3, temperature=temperature)
    divergence(Head(own), Head(teacher.detach()), torch.arange(9), spec)[0].sum().backward()
    options = {"beta": BETA_OF[name], "temperature": temperature, "reduction": "sum"}
    GKDTrainer.generalized_jsd_loss(student[None], teacher.detach()[None], **options).backward()
    torch.testing.assert_close(own.grad, student.grad, rtol=1e-4, atol=1e-6)


@pytest.fixture
def model_dir(model_dir, tmp_path_factory):
    """The tiny model with a template that ends with the answer: TRL trains what a template writes after it, we do not."""
    folder = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(model_dir(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    tokenizer.save_pretrained(folder)
    return lambda: folder


@pytest.mark.slow
@pytest.mark.parametrize("name", BETA_OF)
def test_losses_and_updates(name, ours, theirs, rows, assert_parity, model_dir, tmp_path):
    """Answers of the data alone (`lmbda` 0), two micro-batches of different lengths a step."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    folder, made = tmp_path / "teacher", torch.Generator().manual_seed(3)
    AutoTokenizer.from_pretrained(model_dir()).save_pretrained(folder)
    (folder / "config.json").write_text((model_dir() / "config.json").read_text())
    weights = load_file(model_dir() / "model.safetensors")
    changed = {n: w + 0.05 * torch.randn(w.shape, generator=made) if w.ndim == 2 else w for n, w in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

    texts = [(row["prompt"], row["completion"]) for row in rows["sft"]]
    data = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]} for p, a in texts]
    shared = {"per_device_train_batch_size": 2, "learning_rate": 1e-3}
    mine = ours(
        "distill", DistillKeys, data, teachers=[{"model": str(folder)}], loss_type=name, jsd_beta=0.3, on_policy_share=0.0,
        num_prompts_per_step=4, **shared,
    )  # fmt: skip
    config = {
        "max_length": 256,
        "lr_scheduler_type": "linear",
        "lmbda": 0.0,
        "beta": BETA_OF[name],
        "gradient_accumulation_steps": 2,
    }
    assert_parity(mine, theirs(GKDTrainer, GKDConfig, data, extra={"teacher_model": str(folder)}, **config | shared))
