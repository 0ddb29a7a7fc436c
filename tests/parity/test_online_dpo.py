"""A step of online DPO beside TRL's OnlineDPOTrainer, on the same prompts, completions and rewards: its pair, loss and gradient."""

import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config.online_dpo import OnlineDPOKeys
from posttrain.models.load import freeze_reference, load_policy, load_tokenizer
from posttrain.objectives.reduce import Normalizer
from posttrain.recipes.credit import Made
from posttrain.recipes.dpo import pair_loss
from posttrain.recipes.reference import Reference
from posttrain.recipes.sampled_pairs import PairCredit, pair_objective, pair_rows
from posttrain.types import Sample

BETA, PENALTY = 0.3, 0.75
SEEN = [(3, 4, 6), (4, 3, 5), (5, 6, 2)]
"""Lengths of prompt, first and second completion; 6 is cut, and the others end. The penalty turns the first pair and the last."""
LONGEST = 6
PAID = [(0.2, 0.9), (0.5, 0.1), (1.0, 0.6)]


def completions(tokenizer):
    made = torch.Generator().manual_seed(5)

    def text(length):
        return torch.randint(10, len(tokenizer) - 1, (length,), generator=made).tolist()

    for prompt, first, second in SEEN:
        answers = [text(n) if n == LONGEST else [*text(n - 1), tokenizer.eos_token_id] for n in (first, second)]
        yield text(prompt), answers


@pytest.fixture
def trl_step(model_dir, tmp_path):
    """Loss and gradients of one `training_step`, with the completions given instead of sampled; the policy is not the reference."""
    from datasets import Dataset
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    base = model_dir()
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = list(completions(tokenizer))

    class Given(OnlineDPOTrainer):
        def _generate(self, model, prompts, images=None):
            pad = self.processing_class.pad_token_id

            def padded(lists, left):
                width = max(map(len, lists))
                fill = [[pad] * (width - len(one)) for one in lists]
                ids = [f + one if left else one + f for f, one in zip(fill, lists, strict=True)]
                mask = [
                    [0] * len(f) + [1] * len(one) if left else [1] * len(one) + [0] * len(f)
                    for f, one in zip(fill, lists, strict=True)
                ]
                return torch.tensor(ids), torch.tensor(mask)

            twice = [prompt for prompt, _ in rows] * 2
            answers = [answers[turn] for turn in (0, 1) for _, answers in rows]
            return *padded(twice, left=True), *padded(answers, left=False), None

    def paid(prompts, completions, **columns):
        return [rewards[turn] for turn in (0, 1) for rewards in PAID]

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    args = OnlineDPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, beta=[BETA],
        missing_eos_penalty=PENALTY, per_device_train_batch_size=len(rows), max_length=128, max_new_tokens=LONGEST,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "a"}] * len(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Given(model=model, reward_funcs=paid, args=args, train_dataset=data, processing_class=tokenizer)
    moved(dict(trainer.model.named_parameters()))
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, {"prompt": ["a"] * len(rows)})
    return float(loss), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}, rows


def moved(parameters):
    """The same small step away from the reference on both sides."""
    made = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name in sorted(parameters):
            noise = torch.randn(parameters[name].shape, generator=made)
            parameters[name].add_(0.01 * noise)


def test_pair_loss_and_gradient_are_trl_s(trl_step, model_dir):
    loss, gradients, rows = trl_step
    keys = OnlineDPOKeys.model_validate({
        "base_model": str(model_dir()), "datasets": [{"path": "p"}], "reward_funcs": ["r"], "beta": BETA, "device": "cpu", "bf16": False,
        "missing_eos_penalty": PENALTY,
    })  # fmt: skip
    policy = load_policy(keys, tokenizer=load_tokenizer(keys)).without_dropout()
    freeze_reference(policy)
    moved(dict(policy.model.named_parameters()))
    made = []
    for number, ((prompt, answers), rewards) in enumerate(zip(rows, PAID, strict=True)):
        samples = tuple(
            Sample(np.array(prompt + a, np.int32), np.arange(len(prompt + a)) >= len(prompt), np.zeros(len(a), np.float32))
            for a in answers
        )  # fmt: skip
        cut = [len(a) == LONGEST for a in answers]
        columns = [[r, -PENALTY if c else 0.0] for r, c in zip(rewards, cut, strict=True)]
        made.append(Made(number, samples, columns, [len(a) for a in answers], cut, [], [{}, {}], None, []))
    spec = pair_objective(keys)
    pairs = pair_rows(PairCredit(keys).credited(made, 0, BETA).groups)
    norm = Normalizer(tokens=1, sequences=len(pairs))
    terms = pair_loss(policy, Reference(policy, None), pairs, spec, norm)
    terms.loss.backward()
    assert float(terms.loss) == pytest.approx(loss, rel=1e-5)
    assert abs(loss - 0.6931) > 1e-3, "the policy is not the reference"
    ours = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert gradients.keys() == ours.keys()
    size = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - ours[name]).abs().max() <= 1e-4 * size, name
