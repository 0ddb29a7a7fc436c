from types import SimpleNamespace

import pytest
import torch

from posttrain.config.stages import SFTKeys
from posttrain.errors import EngineError
from posttrain.models import decode, packed
from posttrain.models.batch import pack
from posttrain.models.load import load_policy
from posttrain.rollout.cached import Shortcuts
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Request, SamplingParams, TokenSeq, in_order


def test_the_prompt_of_a_group_is_prefilled_once(shared_policy):
    policy = shared_policy("qwen3")
    lengths = []
    embedding = policy.base.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, output: lengths.append(args[0].numel()))
    prompt = tuple(range(40, 60))
    engine = EmbeddedEngine(policy, stop_token_ids=(), batch_size=3)
    in_order(engine.generate([Request(prompt, seed) for seed in range(6)], SamplingParams(max_tokens=3)))
    hook.remove()
    # The prompt, then six completions of two further tokens each, three at a time.
    assert lengths == [len(prompt)] + [3] * 4


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_fast_decode_step_computes_what_the_modules_compute(shared_policy, monkeypatch, family):
    policy = shared_policy(family)
    requests = [Request(tuple(range(9, 9 + 3 * n)), n) for n in (1, 2, 2, 7)]
    params = SamplingParams(max_tokens=24)
    fast = in_order(EmbeddedEngine(policy, stop_token_ids=()).generate(requests, params))
    monkeypatch.delitem(decode.FAMILIES, family)
    slow = in_order(EmbeddedEngine(policy, stop_token_ids=()).generate(requests, params))
    assert [c.ids for c in fast] == [c.ids for c in slow]
    for one, other in zip(fast, slow, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-5)


def _count_packed(monkeypatch):
    """Rows of each product with laid-out weights; tiny ones are made such products too."""
    rows, ops = [], packed._ops
    product = lambda x, *args: (rows.append(len(x)), ops._linear_pointwise(x, *args))[1]  # noqa: E731
    layout = SimpleNamespace(_reorder_linear_weight=ops._reorder_linear_weight, _linear_pointwise=product)
    monkeypatch.setattr(packed, "_ops", layout)
    monkeypatch.setattr(packed, "_LEAST_WORK", 0)
    return rows


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("mistral", {}), ("qwen2", {}), ("qwen3", {}), ("qwen3", {"adapter": "lora", "lora_r": 4})],
)
def test_laid_out_weights_give_the_tokens_and_the_trainers_log_probs(model_dir, monkeypatch, family, options):
    policy, rows = _own_policy(model_dir, family, **options), _count_packed(monkeypatch)
    with torch.no_grad():
        for name, parameter in policy.trainable():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    prompts = [tuple(range(9, 9 + 3 * n)) for n in (1, 2, 2, 7)]
    requests, params = [Request(prompt, n) for n, prompt in enumerate(prompts)], SamplingParams(max_tokens=24)
    plain = in_order(EmbeddedEngine(policy, stop_token_ids=()).generate(requests, params))
    assert not rows
    engine = EmbeddedEngine(policy, stop_token_ids=(), shortcuts=Shortcuts(prepack=True))
    laid_out = in_order(engine.generate(requests, params))
    layers = policy.base.config.num_hidden_layers
    # Queries, keys and values are one product, gate and up another; the head sees a prompt's last token alone.
    assert rows == [30] * 4 * layers + [3] + ([4] * (4 * layers + 1)) * 23
    assert [c.ids for c in laid_out] == [c.ids for c in plain]
    scored = engine.score([((*p, *c.ids), len(p)) for p, c in zip(prompts, laid_out, strict=True)])
    for completion, logp in zip(laid_out, scored, strict=True):
        assert completion.logp == pytest.approx(logp, abs=1e-5)


def test_weights_are_laid_out_anew_when_they_have_changed(model_dir, monkeypatch):
    policy, rows = _own_policy(model_dir), _count_packed(monkeypatch)
    engine = EmbeddedEngine(policy, stop_token_ids=(), shortcuts=Shortcuts(prepack=True))
    requests = [Request((5, 6, 7), 1), Request((5, 6, 7), 2)]
    [before, _] = in_order(engine.generate(requests, SamplingParams(max_tokens=6)))
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.mul_(1.1)
    [after, _] = in_order(engine.generate(requests, SamplingParams(max_tokens=6)))
    assert rows and before.logp != after.logp
    assert after.logp == pytest.approx(engine.score([((5, 6, 7, *after.ids), 3)])[0], abs=1e-5)


def test_for_one_row_no_weights_are_laid_out(shared_policy, monkeypatch):
    policy, rows = shared_policy("qwen3"), _count_packed(monkeypatch)
    plain, prepack = (
        EmbeddedEngine(policy, stop_token_ids=(), shortcuts=Shortcuts(prepack=on)) for on in (False, True)
    )
    requests, params = [Request((5, 6, 7), 1), Request((8, 9), 2)], SamplingParams(max_tokens=6)
    assert in_order(prepack.generate(requests[:1], params)) == in_order(plain.generate(requests[:1], params))
    assert not rows
    in_order(prepack.generate(requests, params))
    assert rows


def test_where_no_weights_are_laid_out_the_key_says_why(shared_policy, model_dir, caplog):
    EmbeddedEngine(shared_policy("qwen3"), stop_token_ids=(), shortcuts=Shortcuts(prepack=True))
    assert not caplog.text
    for family, why in (("gemma2", "decodes by its own modules"), ("mamba", "decodes row by row")):
        caplog.clear()
        EmbeddedEngine(shared_policy(family), stop_token_ids=(), shortcuts=Shortcuts(prepack=True))
        assert "rollout.prepack: no effect, because" in caplog.text and why in caplog.text


def test_more_completions_than_places_start_one_by_one_as_places_fall_free(shared_policy):
    engine = EmbeddedEngine(shared_policy("qwen3"), stop_token_ids=(), batch_size=2)
    prompts = [(5, 6, 7), (8,), (5, 6, 7), tuple(range(30, 42))]
    requests = [Request(prompts[i % 4], i) for i in range(9)]
    wide = EmbeddedEngine(shared_policy("qwen3"), stop_token_ids=(), batch_size=64)
    params = SamplingParams(max_tokens=70)
    assert [c.ids for c in in_order(engine.generate(requests, params))] == [
        c.ids for c in in_order(wide.generate(requests, params))
    ]


def test_generating_leaves_the_mode_of_the_model_and_no_gradient(shared_policy):
    policy = shared_policy("qwen3")
    engine = EmbeddedEngine(policy, stop_token_ids=())
    for mode in (True, False):
        policy.model.train(mode)
        in_order(engine.generate([Request((5,), 0)], SamplingParams(max_tokens=2)))
        assert policy.model.training is mode
    assert all(p.grad is None for p in policy.model.parameters())


def _own_policy(model_dir, family="qwen3", **options):
    return load_policy(SFTKeys(base_model=str(model_dir(family)), datasets=[{"path": "unused.jsonl"}], **options))


def test_dropout_is_off_while_sampling(model_dir):
    policy = _own_policy(model_dir, adapter="lora", lora_dropout=0.5, lora_r=4)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.normal_(std=0.1)
    policy.model.train()
    engine = EmbeddedEngine(policy, stop_token_ids=())
    requests = [Request((5, 6, 7), seed) for seed in range(3)]
    first, second = (in_order(engine.generate(requests, SamplingParams(max_tokens=6))) for _ in range(2))
    assert first == second
    policy.model.eval()
    for completion, scored in zip(first, engine.score([((5, 6, 7, *c.ids), 3) for c in first]), strict=True):
        assert completion.logp == pytest.approx(scored, abs=2e-4)


@pytest.mark.parametrize(("options", "passes"), [({}, 1), ({"use_rslora": True}, 1), ({"use_dora": True}, 12)])
def test_an_adapter_is_added_to_its_weights_once_where_that_is_the_same(model_dir, options, passes):
    """Through the adapter itself goes the prefill; DoRA, which is no sum of weights, sends every token through it."""
    policy = _own_policy(model_dir, adapter="lora", lora_r=4, **options)
    with torch.no_grad():
        for name, parameter in policy.trainable():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    calls = []
    policy.base.get_decoder().layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    engine = EmbeddedEngine(policy, stop_token_ids=())
    [completion] = in_order(engine.generate([Request((5, 6, 7), 1)], SamplingParams(max_tokens=12)))
    assert len(calls) == passes
    assert completion.logp == pytest.approx(engine.score([((5, 6, 7, *completion.ids), 3)])[0], abs=1e-5)


def test_a_large_model_is_not_copied_to_add_its_adapter(model_dir, monkeypatch):
    monkeypatch.setattr(decode, "_MOST_COPIED", 1000)
    policy = _own_policy(model_dir, adapter="lora", lora_r=4)
    calls = []
    policy.base.get_decoder().layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    in_order(EmbeddedEngine(policy, stop_token_ids=()).generate([Request((5, 6, 7), 1)], SamplingParams(max_tokens=12)))
    assert len(calls) == 12


def test_sampling_follows_the_weights_as_they_change(model_dir):
    policy = _own_policy(model_dir)
    engine = EmbeddedEngine(policy, stop_token_ids=())
    [before] = in_order(engine.generate([Request((5, 6, 7), 1)], SamplingParams(max_tokens=6)))
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.mul_(1.1)
    engine.update(engine._policy, 1)
    [after] = in_order(engine.generate([Request((5, 6, 7), 1)], SamplingParams(max_tokens=6)))
    assert before.logp != after.logp
    assert after.logp == pytest.approx(engine.score([((5, 6, 7, *after.ids), 3)])[0], abs=2e-4)


def test_an_update_fills_a_copy_and_says_how_much_it_moved(model_dir):
    policy = _own_policy(model_dir, adapter="lora", lora_r=4)
    engine = EmbeddedEngine(_own_policy(model_dir, adapter="lora", lora_r=4), stop_token_ids=(), shares_weights=False)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(0.05)
    assert engine.update(policy, 3).num_bytes == sum(p.numel() * p.element_size() for _, p in policy.trainable())
    [completion] = engine.generate([Request((5, 6, 7), 1)], SamplingParams(max_tokens=6))
    shared = EmbeddedEngine(policy, stop_token_ids=())
    assert shared.update(policy, 3).num_bytes == 0
    [same] = shared.generate([Request((5, 6, 7), 1)], SamplingParams(max_tokens=6))
    assert (same.ids, same.policy_version) == (completion.ids, 3)
    assert same.logp == pytest.approx(completion.logp, abs=1e-5)


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("shares_weights", [True, False])
def test_neither_a_step_nor_an_update_moves_a_parameter(model_dir, shares_weights, adapter):
    """What keeps addresses, as a CUDA graph does, then reads the new weights."""
    trained = _own_policy(model_dir, adapter=adapter)
    sampled = trained if shares_weights else _own_policy(model_dir, adapter=adapter)
    engine = EmbeddedEngine(sampled, stop_token_ids=(), shares_weights=shares_weights)
    optimizer = torch.optim.AdamW([p for _, p in trained.trainable()], lr=0.01, fused=True)

    def addresses():
        return {name: parameter.data_ptr() for name, parameter in sampled.model.named_parameters()}

    before = addresses()
    for version in (1, 2):
        list(engine.generate([Request((5, 6, 7), 1)], SamplingParams(max_tokens=3)))
        trained.score(pack([[TokenSeq((5, 6, 7), (False, True, True))]])).logp_M.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.update(trained, version)
    assert addresses() == before
    for (name, mine), (_, theirs) in zip(trained.trainable(), sampled.trainable(), strict=True):
        assert torch.equal(mine, theirs), name


def test_an_update_of_another_policy_is_refused(model_dir):
    engine = EmbeddedEngine(_own_policy(model_dir), stop_token_ids=(), shares_weights=False)
    with pytest.raises(EngineError, match=r"the weights hold .* which the engine's copy does not"):
        engine.update(_own_policy(model_dir, adapter="lora", lora_r=4), 1)


def test_completions_come_in_the_order_in_which_they_end(model_dir):
    engine = EmbeddedEngine(_own_policy(model_dir), stop_token_ids=(), batch_size=2)
    stops = [Request((5, 6), 1), Request((7, 8), 2), Request((9, 3), 3)]
    whole = in_order(engine.generate(stops, SamplingParams(max_tokens=9)))
    early = next(i for i in range(1, 9) if whole[1].ids[i] not in (*whole[0].ids[: i + 1], *whole[1].ids[:i]))
    params = SamplingParams(max_tokens=9, stop_token_ids=(whole[1].ids[early],))
    ended = [completion.request for completion in engine.generate(stops, params)]
    assert ended[0] == 1 and sorted(ended) == [0, 1, 2]
    # Whoever takes the first one may compute with gradients before the next is made.
    taken = engine.generate(stops, params)
    next(taken)
    assert torch.is_grad_enabled()


def test_bf16_decoding_agrees_with_bf16_scoring(model_dir):
    engine = EmbeddedEngine(_own_policy(model_dir, bf16=True), stop_token_ids=())
    engine.update(engine._policy, 1)
    [completion] = in_order(engine.generate([Request((5, 6, 7), 1)], SamplingParams(max_tokens=12)))
    assert completion.logp == pytest.approx(engine.score([((5, 6, 7, *completion.ids), 3)])[0], abs=0.2)


def test_a_quantised_policy_with_an_adapter_samples_what_it_scores(model_dir):
    engine = EmbeddedEngine(_own_policy(model_dir, adapter="qlora", load_in_4bit=True, lora_r=4), stop_token_ids=())
    [completion] = in_order(engine.generate([Request((5, 6, 7), 1)], SamplingParams(max_tokens=12)))
    assert completion.logp == pytest.approx(engine.score([((5, 6, 7, *completion.ids), 3)])[0], abs=2e-3)
