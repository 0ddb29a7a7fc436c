"""GRPO's family on recorded completions: TRL's GRPOTrainer and our recipe are handed the same tokens to train on.

Each generation batch is trained on twice, so the importance ratio leaves 1 and the clip ranges matter.
"""

import random

import pytest
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from posttrain.config.rl import GRPOKeys
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Completion

PROMPTS, GROUP, LONGEST = 2, 4, 24
REWARD = '''
def vowels(completions, **columns):
    """Share of vowels: every group has a spread."""
    return [sum(text.count(c) for c in "aeiou") / max(1, len(text)) for text in completions]
'''
LOSSES = [
    ("grpo", "token", {}),
    ("grpo", "sequence", {"epsilon": 0.01, "epsilon_high": 0.02}),
    ("dr_grpo", "token", {}),
    ("bnpo", "token", {}),
    ("dapo", "token", {"epsilon_high": 0.28}),
    ("dapo", "sequence", {"epsilon": 0.01}),
    ("cispo", "token", {"epsilon_high": 5.0}),
    ("sapo", "token", {}),
    ("sapo", "sequence", {}),
    ("luspo", "sequence", {"epsilon": 0.01}),
]


RLOO = {"loss_type": "rloo", "kl_in_reward": True}
"""What `trl rloo` is imported as."""


class Replay(EmbeddedEngine):
    """An engine that has its completions already; it scores them under its present weights, as sampling would."""

    recorded: dict[tuple[int, ...], list[tuple[int, ...]]]

    def generate(self, requests, params):
        if any(request.prompt_ids not in self.recorded for request in requests):
            return super().generate(requests, params)
        left = {prompt: list(completions) for prompt, completions in self.recorded.items()}
        ids = [left[request.prompt_ids].pop(0) for request in requests]
        scored = self.score([(r.prompt_ids + c, len(r.prompt_ids)) for r, c in zip(requests, ids, strict=True)])
        return [Completion(c, tuple(logp), "stop", self.policy_version) for c, logp in zip(ids, scored, strict=True)]


@pytest.fixture
def recorded(rows, model_dir):
    """Prompt text → its ids and the ids of its completions."""
    from transformers import AutoTokenizer

    rng, tokenizer = random.Random(3), AutoTokenizer.from_pretrained(model_dir())
    result = {}
    for row in rows["grpo"][: 6 * PROMPTS]:
        completions = [
            (*(rng.randrange(3, len(tokenizer)) for _ in range(rng.randint(1, LONGEST - 1))), tokenizer.eos_token_id)
            for _ in range(GROUP)
        ]
        result[row["prompt"]] = (tuple(tokenizer(row["prompt"])["input_ids"]), completions)
    return result


@pytest.fixture
def both(ours, theirs, rows, recorded, tmp_path, monkeypatch):
    """Train both sides on the recorded completions: (keys that both know) → (our run, TRL's run)."""
    (tmp_path / "rewards.py").write_text(REWARD)
    namespace = {}
    exec(REWARD, namespace)
    data = rows["grpo"][: 6 * PROMPTS]

    def engine(source, *rest, **options):
        made = Replay(source.policy, stop_token_ids=())
        made.recorded = dict(recorded.values())
        return made

    def replay(prompts, trainer):
        ids = {text: iter(completions) for text, (_, completions) in recorded.items()}
        completions = [list(next(ids[prompt])) for prompt in prompts]
        return {"prompt_ids": [list(recorded[p][0]) for p in prompts], "completion_ids": completions, "logprobs": None}

    def recall(trainer, prompt_ids, *media):
        ids = {prompt: iter(completions) for prompt, completions in recorded.values()}
        return [list(next(ids[tuple(prompt)])) for prompt in prompt_ids]

    def train(lora_r=0, trainer=GRPOTrainer, **options):
        monkeypatch.setattr("posttrain.recipes.rl.make_engine", engine)
        shared = {"learning_rate": 3e-3, "num_iterations": 2, "num_generations": GROUP, "lr_scheduler_type": "linear"}
        shared |= {"per_device_train_batch_size": PROMPTS * GROUP, "max_completion_length": LONGEST} | options
        adapter = {"adapter": "lora", "lora_r": lora_r} if lora_r else {}
        steps = 12
        mine = ours(
            "grpo", GRPOKeys, data, reward_funcs=[str(tmp_path / "rewards.py") + ":vowels"], max_steps=steps,
            num_prompts_per_step=PROMPTS, **shared, **adapter, **({} if trainer is GRPOTrainer else RLOO),
        )  # fmt: skip
        accumulate = PROMPTS * GROUP // shared["per_device_train_batch_size"]
        extra = {"reward_funcs": namespace["vowels"]}
        if trainer is GRPOTrainer:
            extra |= {"rollout_func": replay}
        else:
            monkeypatch.setattr(RLOOTrainer, "_generate_single_turn", recall)
        trl = theirs(
            trainer, GRPOConfig if trainer is GRPOTrainer else RLOOConfig, data, lora_r=lora_r, extra=extra, shuffle_dataset=False, max_steps=steps,
            gradient_accumulation_steps=accumulate, **shared,
        )  # fmt: skip
        return mine, trl

    return train


QUICK = (("dapo", "token"), ("grpo", "sequence"), ("cispo", "token"))


@pytest.mark.parametrize(
    ("loss_type", "level", "options"),
    [pytest.param(*row, marks=() if row[:2] in QUICK else pytest.mark.slow) for row in LOSSES],
)
def test_every_shared_loss(both, assert_parity, loss_type, level, options):
    assert_parity(*both(loss_type=loss_type, importance_sampling_level=level, **options))


@pytest.mark.slow
@pytest.mark.parametrize("lora_r", [0, 8], ids=["frozen copy", "adapter off"])
def test_kl_to_the_reference(both, assert_parity, lora_r):
    assert_parity(*both(lora_r=lora_r, loss_type="dapo", beta=0.2))


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_groups_as_micro_batches(both, assert_parity, loss_type):
    assert_parity(*both(loss_type=loss_type, per_device_train_batch_size=GROUP))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 0.2}, {"epsilon": 0.01, "beta": 0.05}, {"beta": 0.05, "per_device_train_batch_size": GROUP}],
    ids=["clipped", "KL in the reward", "often clipped", "groups as micro-batches"],
)
def test_rloo(both, assert_parity, options):
    # A loss that sums terms of both signs to nearly nothing: Adam would make of its last bits whole steps.
    mine, trl = both(trainer=RLOOTrainer, **{"beta": 0.0, "optim": "sgd", "learning_rate": 0.05} | options)
    assert_parity(mine, trl, moved=0.01 if "epsilon" not in options else 5e-4)  # a clipped loss moves less


@pytest.mark.slow
def test_bnpo_counts_the_tokens_of_the_step(both):
    """On purpose: the token mean is over the step. TRL takes it per micro-batch, a mean of means of unequal weight."""
    mine, trl = both(loss_type="bnpo", num_iterations=1, per_device_train_batch_size=GROUP)
    assert mine.losses != pytest.approx(trl.losses, rel=1e-3)
    whole, _ = both(loss_type="bnpo", num_iterations=1)
    assert mine.losses == pytest.approx(whole.losses, rel=1e-4)
