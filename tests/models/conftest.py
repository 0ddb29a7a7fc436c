import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.config.stages import SFTKeys
from posttrain.models.load import load_policy
from posttrain.types import TokenSeq


def keys_for(folder, **options):
    return SFTKeys(base_model=str(folder), datasets=[{"path": "unused.jsonl"}], **options)


@pytest.fixture
def keys_of(model_dir):
    """`keys_of("qwen3", adapter="lora")`: keys of a stage on that tiny model."""
    return lambda architecture, **options: keys_for(model_dir(architecture), **options)


@pytest.fixture
def policy_of(keys_of):
    return lambda architecture, **options: load_policy(keys_of(architecture, **options))


@pytest.fixture(scope="session")
def bf16_dir(model_dir, tmp_path_factory):
    """`bf16_dir("qwen3")` is the folder of that tiny model as models are published: weights in bf16."""
    made = {}

    def make(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp("bf16") / architecture
            shutil.copytree(model_dir(architecture), folder)
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
            made[architecture] = folder
        return made[architecture]

    return make


@pytest.fixture
def families():
    """A document, three branches of one prompt (one of them ending in it), a pair, and a document of two tokens."""
    generator = torch.Generator().manual_seed(3)

    def ids(length):
        return tuple(torch.randint(3, 288, (length,), generator=generator).tolist())

    def trained(tokens, start):
        return TokenSeq(tokens, tuple(t >= start for t in range(len(tokens))))

    prompt, other = ids(11), ids(4)
    return [
        [trained(ids(17), 5)],
        [trained(prompt + ids(9), 11), trained(prompt + ids(3), 11), trained(prompt, 8)],
        [trained(other + ids(14), 4), trained(other + ids(6), 4)],
        [trained(ids(2), 1)],
    ]


@pytest.fixture
def turns(families):
    """The same; and two conversations of turns that were answered several times, so that what they share is five levels deep.

    Between their sequences stand others; one is what another begins with, two are the same, and one document begins as a
    conversation does. Turns that others took (every second one) are not trained.
    """
    generator = torch.Generator().manual_seed(4)

    def turn():
        return tuple(
            torch.randint(3, 288, (3 + int(torch.randint(5, (), generator=generator)),), generator=generator).tolist()
        )

    def trained(parts):
        mask = [place % 2 == 1 for place, part in enumerate(parts) for _ in part]
        return TokenSeq(sum(parts, ()), tuple(mask))

    conversations = []
    for _ in range(2):
        rows = [(turn(),)]
        for answers in (2, 1, 2, 1, 1):
            rows = [(*row, turn()) for row in rows for _ in range(answers)]
        rows = [rows[0], rows[2], rows[1], rows[3], rows[1][:4], rows[3]]
        conversations.append([trained(row) for row in rows])
    return [conversations[0], *families, conversations[1], [trained((conversations[1][0].ids[:7], turn()))]]


@pytest.fixture
def oracle():
    return SingleRuns


class SingleRuns:
    """Log-probs and gradients by transformers alone: one sequence a run, eager attention, nothing packed."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)

    def logp(self, families, temperature=1.0):
        parts = []
        for sequence in (sequence for family in families for sequence in family):
            logits = self.model(torch.tensor([sequence.ids]), use_cache=False).logits[0, :-1].float() / temperature
            logp = logits.log_softmax(-1).gather(-1, torch.tensor(sequence.ids[1:])[:, None])[:, 0]
            parts.append(logp[torch.tensor(sequence.loss_mask[1:])])
        return torch.cat(parts)

    def gradients(self, families):
        self.model.zero_grad()
        weighted(self.logp(families)).backward()
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def weighted(logp_M):
    """A scalar that gives every log-prob its own weight."""
    return (logp_M * torch.linspace(0.5, 1.5, len(logp_M))).sum()
