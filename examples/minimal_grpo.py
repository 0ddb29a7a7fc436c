"""GRPO on one page, of posttrain's public parts: sample, score, compare within the group, make the likely better likelier.

    python examples/minimal_grpo.py [STEPS]

trains the quickstart's tiny base to answer in digits. `src/posttrain/recipes/grpo.py` is this loop with what a real run
needs around it: references, resume, health rules, ranks, validation, rewards in processes of their own.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from posttrain.config.stages import ModelKeys
from posttrain.models.batch import pack
from posttrain.models.load import load_policy
from posttrain.objectives.advantages import AdvantageSpec, as_rewards, compute_advantages
from posttrain.objectives.policy import PolicyInputs, policy_loss
from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.spec import PolicySpec
from posttrain.recipes.experience.engines import EngineSource, make_engine, sync_engine
from posttrain.rollout.sampling import request_seed
from posttrain.types import Request, Sample, SamplingParams, in_order

BASE = Path(__file__).parent / "quickstart/base"
PROMPTS = ["Tom has 67 nuts and loses 16.", "A box has 30 cards.", "Eva gets 51 more.", "Zoe had 87 and gave away 41."]
GROUP, MAX_TOKENS, LEARNING_RATE = 8, 12, 1e-3
SPEC = PolicySpec(loss_type="dapo")


def reward(text: str) -> float:
    """The share of digits."""
    return sum(character.isdigit() for character in text) / max(1, len(text))


def rollout(engine, prompts, step):
    """GROUP completions of each prompt: [prompt][sample]. The seed decides a completion, whatever it is batched with."""
    requests = [
        Request(ids, request_seed(0, step, prompt, sample))
        for prompt, ids in enumerate(prompts)
        for sample in range(GROUP)
    ]
    completions = in_order(engine.generate(requests, SamplingParams(max_tokens=MAX_TOKENS)))
    return [completions[start : start + GROUP] for start in range(0, len(completions), GROUP)]


def samples_of(prompts, groups, advantages):
    """Each completion with what the loss reads of its tokens: what sampled them, and how much better than its group it was."""
    each = iter(advantages)
    for ids, group in zip(prompts, groups, strict=True):
        yield tuple(
            Sample(
                ids=np.array((*ids, *completion.ids), np.int32),
                loss_mask=np.arange(len(ids) + len(completion.ids)) >= len(ids),
                behavior_logp=np.array(completion.logp, np.float32),
                advantage=np.full(len(completion.ids), next(each), np.float32),
            )
            for completion in group
        )


def main(steps: int = 30) -> list[float]:
    policy = load_policy(ModelKeys(base_model=str(BASE), device="cpu", bf16=False)).without_dropout()
    policy.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=LEARNING_RATE)
    engine = make_engine(EngineSource(ModelKeys(base_model=str(BASE)), policy))
    prompts = [tuple(policy.tokenizer(text)["input_ids"]) for text in PROMPTS]
    history = []

    for step in range(steps):
        # Rollout: the engine takes the present weights, and a canary proves that it has them.
        sync_engine(engine, policy, version=step)
        groups = rollout(engine, prompts, step)

        # Reward, and advantage: how much better than the other answers to the same prompt.
        texts = [policy.tokenizer.decode(completion.ids) for group in groups for completion in group]
        rewards_B1 = as_rewards([[reward(text)] for text in texts])
        group_B = torch.arange(len(texts)) // GROUP
        advantage_B = compute_advantages(rewards_B1, group_B, AdvantageSpec()).advantage_B

        # Loss: all completions in one batch without padding, each group attending to one copy of its prompt.
        samples = list(samples_of(prompts, groups, advantage_B.tolist()))
        batch = pack(samples)
        flat = [sample for group in samples for sample in group]
        inputs = PolicyInputs(
            policy_logp_M=policy.score(batch).logp_M,
            advantage_M=torch.from_numpy(np.concatenate([sample.advantage for sample in flat])),
            seq_M=batch.seq_M,
            num_sequences=batch.num_sequences,
        )
        norm = Normalizer(tokens=sum(sample.num_loss_tokens for sample in flat), sequences=len(flat))
        loss = policy_loss(inputs, SPEC, norm).loss

        # Step.
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(rewards_B1.mean()))
        print(f"step {step + 1:3d}  reward {history[-1]:.3f}  {texts[0]!r}")
    return history


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
