"""Bit for bit: the engine's log-probs over the whole vocabulary are the trainer's."""

import math
from functools import partial

import pytest
import torch

from posttrain.config.stages import SFTKeys
from posttrain.distributed.whole import Whole
from posttrain.errors import EngineError, ModelError
from posttrain.models import exact
from posttrain.models.batch import pack
from posttrain.models.exact import TILE_ROWS, keeps_its_bits, logp_rows
from posttrain.models.load import load_policy
from posttrain.rollout import decoding
from posttrain.rollout.canary import check_arrival
from posttrain.rollout.embedded import EmbeddedEngine, score_sequences
from posttrain.rollout.exact import ExactRows
from posttrain.rollout.sampling import sample_scored, uniforms
from posttrain.types import Request, SamplingParams, TokenSeq, in_order

MAX_TOKENS = 12


def exact_policy(folder, sharding=None, **options):
    keys = SFTKeys(base_model=str(folder), datasets=[{"path": "unused.jsonl"}], **options)
    policy = load_policy(keys, exact=True, sharding=sharding)
    if policy.has_adapter:
        torch.manual_seed(5)
        with torch.no_grad():
            for _, parameter in policy.trainable():
                parameter.normal_(std=0.1)
    return policy


@pytest.fixture
def recorded(monkeypatch):
    """Every row that a token was drawn from, by the uniform number that chose it."""
    rows = {}

    def record(logp_RV, uniform_R, params):
        rows.update(zip(uniform_R.tolist(), logp_RV.clone(), strict=True))
        return sample_scored(logp_RV, uniform_R, params)

    monkeypatch.setattr(decoding, "sample_scored", record)
    return rows


def ragged_groups(count):
    """Requests in groups of up to four with one prompt; prompts of 1 to 83 tokens."""
    generator = torch.Generator().manual_seed(count)
    lengths = [(1, 83, 17, 33, 2, 70)[group % 6] for group in range(-(-count // 4))]
    prompts = [tuple(torch.randint(3, 288, (length,), generator=generator).tolist()) for length in lengths]
    return [Request(prompts[number // 4], 1000 * count + number) for number in range(count)]


def unequal_rows(policy, requests, recorded, *, temperature=0.7, batch_size=64, family_size=4):
    """How many of the engine's rows differ from the trainer's, and how many there are."""
    engine = EmbeddedEngine(policy, stop_token_ids=tuple(range(20, 60)), batch_size=batch_size)
    completions = in_order(engine.generate(requests, SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature)))
    prompts = [len(request.prompt_ids) for request in requests]
    sequences = [
        TokenSeq((*r.prompt_ids, *c.ids), (False,) * p + (True,) * len(c.ids))
        for r, c, p in zip(requests, completions, prompts, strict=True)
    ]
    batch = pack([sequences[n : n + family_size] for n in range(0, len(sequences), family_size)])
    with policy.placement.autocast():
        trainer = torch.cat([rows for _, rows in logp_rows(policy.model.eval(), batch, temperature)])[batch.source_M]
    drawn = [
        recorded[u]
        for r, c in zip(requests, completions, strict=True)
        for u in uniforms(r.seed, MAX_TOKENS)[: len(c.ids)]
    ]
    policy.model.train()
    scored = policy.score(batch, temperature=temperature).logp_M
    assert scored.tolist() == [logp for completion in completions for logp in completion.logp]
    assert scored.requires_grad == any(p.requires_grad for p in policy.model.parameters())
    assert len({len(c.ids) for c in completions}) > 1 or len(completions) == 1
    return sum(
        not torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(drawn, trainer, strict=True)
    ), len(drawn)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_the_row_a_token_is_drawn_from_is_the_trainers_row(count, adapter, threads, model_dir, recorded):
    policy = exact_policy(model_dir("qwen3"), adapter=adapter)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        unequal, rows = unequal_rows(policy, ragged_groups(count), recorded)
    finally:
        torch.set_num_threads(before)
    assert rows >= count
    assert unequal == 0


@pytest.mark.parametrize("architecture", sorted(TILE_ROWS))
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_exact_for_every_architecture_it_is_promised_for(architecture, adapter, model_dir, recorded):
    policy = exact_policy(model_dir(architecture), adapter=adapter)
    unequal, rows = unequal_rows(policy, ragged_groups(7), recorded, batch_size=3, family_size=2)
    assert rows >= 7
    assert unequal == 0


@pytest.mark.parametrize(
    "options",
    [{"bf16": True}, {"bf16": True, "adapter": "lora"}, {"adapter": "qlora"}, {"adapter": "lora", "use_dora": True}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_exact_in_bf16_in_4_bits_and_with_dora(options, model_dir, recorded):
    policy = exact_policy(model_dir("qwen3"), **options)
    unequal, rows = unequal_rows(policy, ragged_groups(20), recorded)
    assert rows >= 20
    assert unequal == 0


def test_exact_where_heads_are_no_whole_number_of_cache_lines(make_local_model, recorded):
    odd = {
        "hidden_size": 60,
        "intermediate_size": 132,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 22,
    }
    unequal, rows = unequal_rows(exact_policy(make_local_model("llama", **odd)), ragged_groups(20), recorded)
    assert rows >= 20
    assert unequal == 0


def test_a_deeper_tree_changes_no_bit(model_dir):
    policy = exact_policy(model_dir("qwen3"))
    draw = torch.Generator().manual_seed(1)
    rows = [tuple(torch.randint(3, 288, (20,), generator=draw).tolist())]
    for answers in (2, 3, 2):
        rows = [
            (*row, n, *torch.randint(3, 288, (25,), generator=draw).tolist()) for row in rows for n in range(answers)
        ]
    group = [TokenSeq(row, (False,) * 20 + (True,) * (len(row) - 20)) for row in rows]
    group = group[::2] + group[1::2]
    with torch.no_grad():
        deep, two_levels, alone = (
            policy.score(pack(families, least_shared), entropy=True)
            for families, least_shared in (([group], 1), ([group], math.inf), ([[row] for row in group], math.inf))
        )
    for scores in (two_levels, alone):
        assert torch.equal(deep.logp_M, scores.logp_M) and torch.equal(deep.entropy_M, scores.entropy_M)


def test_values_are_the_models_and_gradients_are_the_ordinary_ones(model_dir):
    exact = exact_policy(model_dir("gemma2"))
    requests = ragged_groups(7)
    sequences = [
        TokenSeq((*r.prompt_ids, n, 9, n + 3), (False,) * len(r.prompt_ids) + (True,) * 3)
        for n, r in enumerate(requests)
    ]
    batch, weight = pack([sequences[:4], sequences[4:]]), None
    found = {}
    for mode in (True, False):
        exact.exact = mode
        exact.model.zero_grad()
        scores = exact.score(batch, temperature=0.7, entropy=True)
        weight = torch.linspace(0.5, 1.5, len(scores.logp_M)) if weight is None else weight
        (scores.logp_M @ weight + 0.1 * scores.entropy_M.sum()).backward()
        grads = [p.grad.clone() for p in exact.model.parameters()]
        found[mode] = [scores.logp_M.detach(), scores.entropy_M.detach(), scores.top1_M, *grads]
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_the_ordinary_mode_is_not_exact(model_dir):
    """Else the tests here would show nothing."""
    policy = exact_policy(model_dir("qwen3"))
    policy.exact = False
    requests = ragged_groups(64)
    engine = EmbeddedEngine(policy, stop_token_ids=())
    completions = in_order(engine.generate(requests, SamplingParams(max_tokens=MAX_TOKENS)))
    scored = engine.score(
        [((*r.prompt_ids, *c.ids), len(r.prompt_ids)) for r, c in zip(requests, completions, strict=True)]
    )
    assert sum(a != b for c, s in zip(completions, scored, strict=True) for a, b in zip(c.logp, s, strict=True)) > 100


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"top_k": 5, "temperature": 1.3}, {"top_p": 0.8}, {"min_p": 0.01}]
)
def test_cuts_and_greedy_choice_report_the_same_log_probs(params, model_dir):
    policy = exact_policy(model_dir("llama"))
    engine = EmbeddedEngine(policy, stop_token_ids=(), batch_size=3)
    requests = ragged_groups(7)
    completions = in_order(engine.generate(requests, SamplingParams(max_tokens=6, **params)))
    sequences = [((*r.prompt_ids, *c.ids), len(r.prompt_ids)) for r, c in zip(requests, completions, strict=True)]
    assert [list(c.logp) for c in completions] == engine.score(sequences, params.get("temperature") or 1.0)


def test_the_canary_of_an_exact_engine_allows_no_gap(model_dir):
    policy = exact_policy(model_dir("qwen3"), adapter="lora")
    engine = EmbeddedEngine(policy, stop_token_ids=())
    engine.update(policy, 1)
    assert check_arrival(engine, partial(score_sequences, policy)) == 0.0
    other = [parameter for _, parameter in policy.trainable()][-1]

    def trainer(sequences):
        with torch.no_grad():
            other.mul_(1 + 1e-5)
        return score_sequences(policy, sequences)

    with pytest.raises(EngineError, match=r"tolerance 0e\+00.* set rollout.exact: false"):
        check_arrival(engine, trainer)


def test_places_of_ended_rows_and_prompts_are_used_again(model_dir):
    policy = exact_policy(model_dir("qwen3"))
    rows = ExactRows(policy, 1.0)
    for start in range(3, 43):
        ((prompt, logp_V),) = rows.prefill([(start, 5, 6, 7)])
        rows.add_row(prompt)
        rows.add_row(prompt)
        assert rows.step([8, 9]).shape == (2, len(logp_V))
        rows.drop_row(0)
        rows.drop_row(0)
    assert rows.places < 20


@pytest.mark.parametrize("architecture", ["mamba", "gpt_oss"])
def test_other_architectures_are_refused_by_name(architecture, model_dir):
    with pytest.raises(
        ModelError, match=rf"rollout.exact: true: {architecture} is not among .*qwen3.*; set rollout.exact: false"
    ):
        exact_policy(model_dir(architecture))


@pytest.fixture
def as_a_card(monkeypatch):
    """A CPU stands for the card."""
    monkeypatch.setattr(exact, "_TESTED_ON", "none")
    monkeypatch.setattr(exact, "_TRIED_ON", "cpu")


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "qwen3_moe"])
def test_a_card_is_asked_whether_it_keeps_bits(architecture, model_dir, as_a_card):
    assert keeps_its_bits(exact_policy(model_dir(architecture)).model)


def test_a_card_that_rounds_by_a_rows_place_is_refused(model_dir, as_a_card, monkeypatch):
    real = torch.nn.Linear.forward

    def by_place(self, x):
        out = real(self, x)
        return torch.where(torch.arange(out.shape[-2])[:, None] == 3, out * (1 + 2**-20), out)

    monkeypatch.setattr(torch.nn.Linear, "forward", by_place)
    with pytest.raises(ModelError, match=r"rollout.exact: true: on this cpu device .*; set rollout.exact: false"):
        exact_policy(model_dir("qwen3"))


def test_frequencies_that_depend_on_length_are_refused(make_local_model):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ModelError, match="rotary embedding of this llama changes with the length"):
        exact_policy(make_local_model("llama", rope_parameters=rope))


@pytest.mark.parametrize(
    ("changes", "options", "width"),
    [
        ({"intermediate_size": 130}, {}, r"down_proj has 130"),
        ({}, {"adapter": "lora", "lora_r": 6}, r"lora_B.default has 6"),
    ],
)
def test_inputs_whose_place_in_memory_moves_the_rounding_are_refused(changes, options, width, make_local_model):
    with pytest.raises(ModelError, match=rf"{width} inputs, no multiple of 4"):
        exact_policy(make_local_model("llama", **changes), **options)


class TwoShards(Whole):
    num_shards, is_sharded = 2, True


def test_a_policy_that_is_to_be_sharded_is_refused(model_dir):
    with pytest.raises(ModelError, match=r"rollout\.exact: true with 2 processes"):
        exact_policy(model_dir("qwen3"), sharding=TwoShards())


@pytest.fixture
def exact_run(train, runner):
    """The logged steps of a short GRPO run."""
    return lambda **options: runner.rows(train("grpo", max_steps=4, **options))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_in_a_run_sampler_and_trainer_differ_by_nothing(adapter, exact_run):
    correction = {"importance_sampling_correction": "token_truncate"}
    exact = exact_run(adapter=adapter, rollout={"exact": True}, **correction)
    assert [step["sync/canary_gap"] for step in exact] == [0.0] * 4
    assert [step["sampling/sampling_logp_difference/mean"] for step in exact] == [0.0] * 4
    assert [step["sampling/importance_sampling_ratio/mean"] for step in exact] == [1.0] * 4
    ordinary = exact_run(adapter=adapter, **correction)
    assert max(step["sync/canary_gap"] for step in ordinary) > 0.0


def test_the_ratio_of_weights_that_did_not_move_is_exactly_1(exact_run):
    """Its first pass is 1 by definition; this is the second, which divides what the trainer finds by what was sampled."""
    steps = exact_run(rollout={"exact": True}, num_iterations=2, learning_rate=1e-30)
    ratios = [step["importance_ratio/max"] for step in steps if "importance_ratio/max" in step]
    assert ratios
    assert set(ratios) == {1.0}
