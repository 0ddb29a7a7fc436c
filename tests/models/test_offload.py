import weakref

import pytest
import torch
from tests.models.conftest import keys_for, weighted
from transformers import AutoModelForCausalLM

from posttrain.errors import ModelError
from posttrain.models import decode
from posttrain.models.batch import pack
from posttrain.models.compiled import compile_layers
from posttrain.models.export import save_policy
from posttrain.models.load import load_policy
from posttrain.models.proof import probe_logits
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Request, SamplingParams

LAYERS = 5
LORA = {"adapter": "lora", "lora_r": 4, "gradient_checkpointing": True}
QLORA = {**LORA, "adapter": "qlora", "load_in_4bit": True}


@pytest.fixture
def pair(model_dir):
    """`pair("llama", **keys)`: that tiny model of five layers, all on the device, and with offloaded layers."""

    def make(architecture="llama", **options):
        folder = model_dir(architecture, num_hidden_layers=LAYERS)
        made = [keys_for(folder, layer_offloading=on, **{**LORA, **options}) for on in (False, True)]
        return [load_policy(keys).without_dropout() for keys in made]

    return make


def layers_of(policy):
    return policy.base.get_decoder().layers


def layer_bytes(policy):
    return max(
        sum(p.numel() * p.element_size() for p in layer.parameters() if not p.requires_grad)
        for layer in layers_of(policy)
    )


def watch(policy):
    """The most that was there of the offloaded layers whenever a linear was called, forward, recomputed or decoding."""
    seen = []
    for layer in layers_of(policy):
        for module in layer.modules():
            module.register_forward_hook(lambda *_: seen.append(policy.offloaded.resident_bytes))
    return seen


def train(policy, families, steps=2):
    """Log-probs and gradients of each step, and the weights after it."""
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=1e-2)
    policy.model.train()
    found = []
    for _ in range(steps):
        scores = policy.score(pack(families), entropy=True)
        (weighted(scores.logp_M) + scores.entropy_M.sum()).backward()
        found += [scores.logp_M.detach(), scores.entropy_M.detach(), *(p.grad.clone() for _, p in policy.trainable())]
        optimizer.step()
        optimizer.zero_grad()
        found += [p.detach().clone() for _, p in policy.trainable()]
    return found


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("qwen3", {"bf16": True}),
        ("gemma2", {"use_dora": True}),
        ("qwen3_moe", {"gradient_checkpointing": "offload"}),
        ("gpt2", {}),
        ("llama", {"lora_modules_to_save": ["lm_head", "input_layernorm"]}),
        ("llama", QLORA),
        ("qwen3", {**QLORA, "bf16": True, "bnb_4bit_use_double_quant": False}),
    ],
)
def test_a_step_with_offloaded_layers_is_the_same_to_the_bit(architecture, options, pair, families):
    if options.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    whole, offloaded = pair(architecture, **options)
    for ours, theirs in zip(train(offloaded, families), train(whole, families), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, QLORA, {"bf16": True}])
def test_no_more_than_two_layers_are_there_at_a_time(options, pair, families):
    if options.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    whole, offloaded = pair(**options)
    assert offloaded.offloaded.host_bytes > 4 * layer_bytes(whole)
    seen = watch(offloaded)
    train(offloaded, families)
    with torch.no_grad():
        offloaded.reference_logp(pack(families))
    assert len(seen) > 100 and 0 < max(seen) <= 2 * layer_bytes(whole)


def test_the_reference_is_the_base_without_its_adapter(pair, families):
    whole, offloaded = pair()
    for policy in (whole, offloaded):
        train(policy, families, steps=1)
    batch = pack(families)
    assert torch.equal(offloaded.reference_logp(batch), whole.reference_logp(batch))
    assert not torch.equal(offloaded.reference_logp(batch), offloaded.score(batch).logp_M)


@pytest.mark.parametrize("options", [{}, {"bf16": True}])
def test_rollouts_are_the_same_tokens_and_log_probs(options, pair, families, monkeypatch):
    # A larger model: its weights are not copied to add the adapter.
    monkeypatch.setattr(decode, "_MOST_COPIED", 0)
    found = []
    for policy in pair(**options):
        train(policy, families, steps=1)
        engine = EmbeddedEngine(policy, stop_token_ids=(), batch_size=4)
        requests = [Request(tuple(range(3, 12 + n)), seed) for n in range(2) for seed in range(3)]
        seen = watch(policy) if policy.offloaded else []
        found.append(sorted(engine.generate(requests, SamplingParams(8)), key=lambda completion: completion.request))
    assert found[0] == found[1]
    assert max(seen) <= 2 * layer_bytes(policy)


def test_a_layer_that_was_not_fetched_is_an_error(pair):
    _, policy = pair()
    layers, ids = layers_of(policy), torch.ones(1, 64)
    policy.offloaded.fetch(0)
    assert layers[0].mlp.up_proj(ids).isfinite().all()
    for other in (1, 3):  # on its way, and not there
        with pytest.raises(AssertionError, match=f"layer {other} is called and was not fetched"):
            layers[other].mlp.up_proj(ids)
    policy.offloaded.fetch(3)
    assert layers[3].input_layernorm(ids).isfinite().all()
    with pytest.raises(AssertionError, match="layer 0 is called and was not fetched"):
        layers[0].input_layernorm(ids)


def test_a_backward_pass_that_does_not_recompute_is_an_error(pair, families):
    _, policy = pair()
    policy.model.eval()  # in which transformers recomputes nothing
    with pytest.raises(AssertionError, match="recomputes them"):
        policy.score(pack(families))


@pytest.mark.parametrize("options", [{}, QLORA])
def test_weights_for_an_engine_are_the_same(options, pair, families):
    if options.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    whole, offloaded = pair("qwen3", **options)
    for policy in (whole, offloaded):
        train(policy, families, steps=1)
    expected = dict(whole.weights("all"))
    found = dict(offloaded.weights("all"))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("options", [{}, QLORA, {"init_lora_weights": "pissa"}])
def test_an_export_is_the_same_file(options, pair, families, tmp_path):
    if options.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    folders = []
    for number, policy in enumerate(pair(**options)):
        train(policy, families, steps=1)
        folders.append(tmp_path / str(number) / "model")
        save_policy(policy, folders[-1], keys_for(policy.source, **{**LORA, **options}))
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        contents = [(folder.parent / name).read_bytes() for folder in folders]
        assert contents[0] == contents[1]


def test_a_base_in_half_precision_is_probed_in_float32_and_left_as_it_was(make_local_model, families):
    folder = make_local_model("llama", num_hidden_layers=LAYERS)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    found = []
    for on in (False, True):
        policy = load_policy(keys_for(folder, layer_offloading=on, bf16=True, **LORA))
        trained = train(policy, families, steps=1)
        found.append([*trained, probe_logits(policy.model), policy.reference_logp(pack(families))])
        assert {p.dtype for p in layers_of(policy)[0].parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_a_model_that_is_only_asked_is_offloaded_whole(model_dir, families):
    folder = model_dir("llama", num_hidden_layers=LAYERS)
    whole, offloaded = (
        load_policy(keys_for(folder, layer_offloading=on, **LORA), trainable=False) for on in (False, True)
    )
    with torch.no_grad():
        assert torch.equal(offloaded.score(pack(families)).logp_M, whole.score(pack(families)).logp_M)
    assert offloaded.offloaded.resident_bytes <= 2 * layer_bytes(whole)


class Two:
    """Says that two processes share the model."""

    num_shards = 2
    is_sharded = True


def test_processes_that_share_the_weights_are_refused_by_name(model_dir):
    with pytest.raises(ModelError, match=r"layer_offloading: true with 2 processes.*set it to false"):
        load_policy(keys_for(model_dir("llama"), layer_offloading=True, **LORA), sharding=Two())


def test_layers_that_are_fetched_are_not_compiled(model_dir):
    with pytest.raises(ValueError, match="torch_compile: true with layer_offloading: true"):
        keys_for(model_dir("llama"), layer_offloading=True, torch_compile=True, **LORA)
    policy = load_policy(keys_for(model_dir("llama"), layer_offloading=True, **LORA))
    with pytest.raises(
        ModelError, match=r"torch_compile: true: .* \(layer_offloading\), and hooks fetch them; set it to false"
    ):
        compile_layers(policy)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_inputs_of_layers_leave_the_device_until_the_backward_pass(adapter, policy_of, families):
    gradients, alive = {}, {}
    for how in (True, "offload"):
        policy = policy_of("qwen3", adapter=adapter, gradient_checkpointing=how)
        inputs = []
        layers_of(policy)[1].register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(weakref.ref(args[0]))
        )
        policy.model.train()
        scores = policy.score(pack(families))
        alive[how] = inputs[0]() is not None
        weighted(scores.logp_M).backward()
        gradients[how] = [p.grad for _, p in policy.trainable()]
    assert alive == {True: True, "offload": False}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients.values(), strict=True))
