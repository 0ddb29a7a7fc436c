"""Every rotary embedding and mask that depends on length, at its boundary: packed equals run alone, and sampled equals scored."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.config.stages import SFTKeys
from posttrain.models import attention, selfcheck
from posttrain.models.batch import pack
from posttrain.models.lengths import forget_lengths
from posttrain.models.load import load_policy
from posttrain.models.selfcheck import ragged_is_exact
from posttrain.rollout.embedded import EmbeddedEngine, score_sequences
from posttrain.types import Request, SamplingParams, TokenSeq, in_order

BOUNDARY = 64
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": BOUNDARY, "factor": 4.0, "rope_theta": 10000.0}
LONGROPE |= {"short_factor": [1.0 + 0.05 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)]}
ORIGINAL = {"original_max_position_embeddings": BOUNDARY, "rope_theta": 10000.0}


def rope(**parameters):
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


ROPES = {
    "default": ("llama", rope(rope_type="default")),
    "linear": ("llama", rope(rope_type="linear", factor=4.0)),
    "dynamic": ("llama", rope(rope_type="dynamic", factor=4.0) | {"max_position_embeddings": BOUNDARY}),
    "yarn": ("llama", rope(rope_type="yarn", factor=4.0, **ORIGINAL)),
    "llama3": ("llama", rope(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL)),
    "proportional": ("llama", rope(rope_type="proportional", factor=4.0, partial_rotary_factor=0.5)),
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": BOUNDARY, "head_dim": 16}),
}
CHUNKED = {
    "attention_chunk_size": BOUNDARY, "attn_temperature_tuning": False, "num_local_experts": 2, "intermediate_size_mlp": 128,
    "num_hidden_layers": 4, "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
}  # fmt: skip
LAYERED = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
}
MASKS = {
    "chunks": ("llama4_text", CHUNKED),
    "window": ("mistral", {"sliding_window": BOUNDARY}),
    "dynamic by layer": ("gemma3_text", {"sliding_window": 6, "max_position_embeddings": BOUNDARY, "rope_parameters": LAYERED, "layer_types": ["sliding_attention", "full_attention"]}),
}  # fmt: skip
ALL = ROPES | MASKS


@pytest.fixture(scope="module")
def policy_of(make_local_model_once):
    made = {}

    def make(name):
        if name not in made:
            folder = make_local_model_once(name, *ALL[name])
            made[name] = load_policy(SFTKeys(base_model=str(folder), datasets=[{"path": "x.jsonl"}]))
        return made[name]

    return make


@pytest.fixture(scope="module")
def make_local_model_once(tmp_path_factory, make_model_in):
    return lambda name, architecture, changes: make_model_in(tmp_path_factory.mktemp("rope"), architecture, **changes)


def ids(length, seed=0):
    return tuple(
        torch.randint(3, 280, (length,), generator=torch.Generator().manual_seed(100 * length + seed)).tolist()
    )


def trained(tokens, start=1):
    return TokenSeq(tokens, tuple(t >= start for t in range(len(tokens))))


class SingleRuns:
    """transformers alone: a fresh look at each sequence, eager attention, the last token predicted and not encoded."""

    def __init__(self, policy):
        self.model = AutoModelForCausalLM.from_pretrained(
            policy.source, attn_implementation="eager", dtype=torch.float32
        )

    def logp(self, sequence):
        forget_lengths(self.model)
        inputs = torch.tensor([sequence.ids[:-1]])
        logp = self.model(inputs, use_cache=False).logits[0].float().log_softmax(-1)
        logp = logp.gather(-1, torch.tensor(sequence.ids[1:])[:, None])[:, 0]
        return logp[torch.tensor(sequence.loss_mask[1:])]


def test_every_rope_type_of_transformers_is_here():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert {*ROPE_INIT_FUNCTIONS, "default"} == set(ROPES)


@pytest.mark.parametrize("name", ALL)
def test_packed_sequences_on_both_sides_of_the_boundary_are_as_if_run_alone(name, policy_of):
    """Sequences of inputs at boundary − 1, 0 and + 1, much shorter and longer ones, and a family across it, of three levels."""
    policy = policy_of(name)
    assert policy.ragged
    prompt = ids(BOUNDARY - 10)
    family = [trained(prompt + ids(n, seed=1), BOUNDARY - 10) for n in (3, 10, 11, 12, 60)]
    family[1:1] = [trained(prompt + ids(7) + ids(n, seed=4), BOUNDARY - 10) for n in (3, 4, 5, 50)]
    families = [[trained(ids(n + 1))] for n in (20, BOUNDARY - 1, BOUNDARY, BOUNDARY + 1, 100, 30)] + [family]
    single = SingleRuns(policy)
    expected = torch.cat([single.logp(sequence) for family in families for sequence in family])
    batch = pack(families, least_shared=5)
    assert max(segment.depth for tree in batch.layout.trees for segment in tree.segments()) == 2
    scores = policy.score(batch, entropy=True)
    assert (scores.logp_M - expected).abs().max() < 2e-4
    weight = torch.linspace(0.5, 1.5, len(expected))
    policy.model.zero_grad()
    (scores.logp_M * weight).sum().backward()
    (expected * weight).sum().backward()
    want = {n: p.grad for n, p in single.model.named_parameters() if p.grad is not None}
    for n, p in policy.model.named_parameters():
        if n in want:
            assert (p.grad - want[n]).abs().max() <= 1e-3 * (want[n].abs().max() + 1e-3), n


@pytest.mark.parametrize("name", ALL)
def test_completions_that_reach_or_cross_the_boundary_have_the_trainers_log_probs(name, policy_of):
    """Prompts that leave room for 12 tokens before, at and behind the boundary; alone and in company."""
    policy = policy_of(name)
    engine = EmbeddedEngine(policy, stop_token_ids=(), batch_size=3)
    params = SamplingParams(max_tokens=12, temperature=0.9)
    # The last inputs are prompt + 11.
    lengths = (BOUNDARY - 12, BOUNDARY - 11, BOUNDARY - 10, 20, BOUNDARY - 1, BOUNDARY, BOUNDARY + 1, 90)
    requests = [Request(ids(n, seed=2), n) for n in lengths]
    together = in_order(engine.generate(requests, params))
    single = SingleRuns(policy)
    for request, completion in zip(requests, together, strict=True):
        assert len(completion.ids) == 12
        sequence = request.prompt_ids + completion.ids
        [scored] = score_sequences(policy, [(sequence, len(request.prompt_ids))], 0.9)
        assert completion.logp == pytest.approx(scored, abs=3e-4)
        [alone] = in_order(engine.generate([request], params))
        assert alone.ids == completion.ids
        assert alone.logp == pytest.approx(completion.logp, abs=1e-4)
        # The last token is sampled from the encoding of all before it.
        inputs = torch.tensor([sequence[:-1]])
        forget_lengths(single.model)
        with torch.no_grad():
            logp = (single.model(inputs, use_cache=False).logits[0, -1] / 0.9).log_softmax(-1)
        assert completion.logp[-1] == pytest.approx(float(logp[sequence[-1]]), abs=3e-4)


def test_lengths_far_beyond_the_probe_are_asked_of_a_scaled_down_copy(make_local_model):
    """Temperature tuning counts packed places from 8,192 on: only a copy with that scaled down can show it."""
    folder = make_local_model("llama4_text", **CHUNKED | {"attn_temperature_tuning": True, "floor_scale": 8192})
    policy = load_policy(SFTKeys(base_model=str(folder), datasets=[{"path": "x.jsonl"}]))
    assert not policy.ragged


def test_the_self_check_leaves_the_random_numbers_alone(policy_of):
    policy = policy_of("longrope")
    before = torch.get_rng_state()
    assert ragged_is_exact(policy.base)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("window", {"sliding_window": 4096}), ("chunks", {"attention_chunk_size": 8192})],
)
def test_a_mask_that_is_forgotten_is_found_however_long_it_is(name, changes, make_local_model, monkeypatch):
    architecture, options = ALL[name]
    model = AutoModelForCausalLM.from_pretrained(make_local_model(architecture, **options | changes))
    assert ragged_is_exact(model)
    monkeypatch.setattr(attention, "window_of", lambda module, sliding_window: None)
    assert not ragged_is_exact(model)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_frequencies_that_are_chosen_by_the_longest_neighbour_are_found(name, policy_of, monkeypatch):
    monkeypatch.setattr(selfcheck, "by_encoding", lambda model, batch: [(batch, None)])
    assert not ragged_is_exact(policy_of(name).base)
