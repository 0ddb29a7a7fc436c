"""Compiled layers by backends of a CPU: the graphs that a GPU's compiler is given, run as they are."""

import shutil

import pytest
import torch
from pydantic import ValidationError
from tests.models.conftest import keys_for, weighted

from posttrain.errors import ModelError
from posttrain.files import read_json_lines
from posttrain.models import compiled, load
from posttrain.models.batch import pack
from posttrain.models.compiled import (
    COMPILES,
    as_written,
    compile_layers,
    is_compiled,
    wants_compiling,
    why_not_compiled,
)
from posttrain.models.device import Placement
from posttrain.models.load import freeze_reference, load_policy
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Request, SamplingParams

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "qwen3_moe"]


class Graphs:
    """A backend that counts the graphs which it is given, and runs them as they are."""

    def __init__(self):
        self.made = self.run = 0

    def __call__(self, graph, inputs):
        self.made += 1

        def run(*args):
            self.run += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def _forget():
    yield
    torch._dynamo.reset()


def _learn(policy, families):
    policy.model.zero_grad()
    scores = policy.score(pack(families), entropy=True)
    (weighted(scores.logp_M) + scores.entropy_M.sum()).backward()
    return scores.logp_M.detach(), {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def _compare(policy, families, backend):
    expected, gradients = _learn(policy, families)
    compile_layers(policy, backend)
    logp, found = _learn(policy, families)
    if isinstance(backend, Graphs):
        assert backend.run > backend.made > 0
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-7, name


@pytest.mark.parametrize(
    "architecture", ["qwen3", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "qwen3")]
)
def test_compiled_layers_score_and_learn_what_they_do_as_written(architecture, policy_of, families):
    _compare(policy_of(architecture), families, Graphs())


@pytest.mark.parametrize(
    "options",
    [pytest.param({"adapter": "lora", "lora_r": 4}, marks=pytest.mark.slow, id="lora"),
     pytest.param({"gradient_checkpointing": True}, id="recomputed"),
     pytest.param({"gradient_checkpointing": "offload"}, marks=pytest.mark.slow, id="recomputed from offloaded inputs")],
)  # fmt: skip
def test_they_do_with_an_adapter_and_under_recomputation(options, policy_of, families):
    policy = policy_of("qwen3", **options)
    policy.model.train()
    with torch.no_grad():
        for name, parameter in policy.trainable():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    _compare(policy.without_dropout(), families, Graphs())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of a CPU needs g++")
@pytest.mark.parametrize("bf16", [False, True])
def test_kernels_that_are_compiled_for_a_cpu_compute_the_same(bf16, policy_of, families):
    if bf16:
        policy = policy_of("qwen3", bf16=True)
        expected, _ = _learn(policy, families)
        compile_layers(policy)
        found, _ = _learn(policy, families)
        torch.testing.assert_close(found, expected, atol=3e-2, rtol=1e-2)
    else:
        _compare(policy_of("qwen3"), families, "inductor")


def test_all_layers_and_lengths_share_their_graphs(policy_of, families):
    policy, backend = policy_of("qwen3"), Graphs()
    compile_layers(policy, backend)
    _learn(policy, families)
    made = backend.made
    for count in (1, 2, 3):
        _learn(policy, families[:count])
    assert backend.made == made <= 8


def test_decoding_goes_through_the_layers_as_they_are(policy_of):
    policy, backend = policy_of("qwen3"), Graphs()
    engine, request = EmbeddedEngine(policy, stop_token_ids=()), [Request((5, 6, 7), 1)]
    expected = list(engine.generate(request, SamplingParams(4)))
    compile_layers(policy, backend)
    assert list(engine.generate(request, SamplingParams(4))) == expected
    assert backend.made == 0 and is_compiled(policy)
    with as_written(policy):
        assert not is_compiled(policy)


def test_the_frozen_reference_of_a_compiled_policy_is_compiled_too(policy_of, families, monkeypatch):
    policy = policy_of("qwen3")
    compile_layers(policy, Graphs())
    monkeypatch.setattr(load, "compile_layers", lambda frozen: compile_layers(frozen, Graphs()))
    freeze_reference(policy)
    assert is_compiled(policy.frozen)
    batch = pack(families)
    with torch.no_grad():
        assert torch.equal(policy.reference_logp(batch), policy.score(batch).logp_M)


def test_auto_follows_the_table_of_cards(keys_of, monkeypatch):
    keys, cuda = keys_of("qwen3", torch_compile="auto"), torch.device("cuda", 0)
    assert not wants_compiling(keys, Placement(torch.device("cpu"), torch.bfloat16))
    for capability in ((7, 5), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert wants_compiling(keys, Placement(cuda, torch.bfloat16)) == (capability in COMPILES)
        assert not wants_compiling(keys, Placement(cuda, None))
        assert wants_compiling(keys_of("qwen3", torch_compile=True), Placement(cuda, None))


def test_what_cannot_be_compiled_is_refused_by_name(model_dir, data_dir, runner, policy_of, caplog):
    with pytest.raises(ValidationError, match="torch_compile: true with load_in_4bit: true"):
        keys_for(model_dir("qwen3"), adapter="qlora", torch_compile=True)
    with pytest.raises(ValidationError, match="torch_compile: true with layer_offloading: true"):
        offloaded = {"layer_offloading": True, "gradient_checkpointing": True}
        keys_for(model_dir("qwen3"), adapter="lora", torch_compile=True, **offloaded)
    with pytest.raises(ValidationError, match=r"torch_compile: true with rollout\.exact: true"):
        runner.keys_of("grpo", model_dir("qwen3"), data_dir, torch_compile=True, rollout={"exact": True})
    with pytest.raises(ModelError, match=r"computes exactly \(rollout.exact\).*; set it to false"):
        load_policy(keys_for(model_dir("qwen3"), torch_compile=True), exact=True)
    policy = policy_of("qwen3")
    policy.ragged = False
    with pytest.raises(ModelError, match="does not fit the ragged layout"):
        compile_layers(policy)
    compiled.compile_where_it_fits(policy)
    assert "its layers run as they are" in caplog.text and not is_compiled(policy)


def test_a_compiler_that_fails_is_one_line_that_names_the_key(policy_of, families):
    def broken(graph, inputs):
        raise OSError("no compiler found\nset CXX")

    policy = policy_of("qwen3")
    compile_layers(policy, broken)
    with pytest.raises(RuntimeError) as raised:
        _learn(policy, families)
    why = why_not_compiled(raised.value)
    assert why.startswith("its layers could not be compiled (BackendCompilerFailed: ")
    assert "no compiler found" in why and why.endswith("set torch_compile: false") and "\n" not in why
    assert not why_not_compiled(RuntimeError("another"))


@pytest.mark.parametrize(
    "kind", ["sft", pytest.param("dpo", marks=pytest.mark.slow), pytest.param("grpo", marks=pytest.mark.slow)]
)
def test_a_stage_with_compiled_layers_learns_and_exports_what_it_does_without(kind, train, monkeypatch):
    backend = Graphs()
    monkeypatch.setattr(load, "compile_layers", lambda policy: compile_layers(policy, backend))
    plain, found = train(kind), train(kind, torch_compile=True)
    assert backend.run > backend.made > 0
    losses = [
        [row["loss"] for _, row in read_json_lines(folder / "metrics.jsonl") if "loss" in row]
        for folder in (plain, found)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert (found / "model" / "config.json").is_file()


def test_a_stage_whose_compiler_fails_ends_with_one_line(train, monkeypatch):
    def broken(graph, inputs):
        raise OSError("no compiler found")

    monkeypatch.setattr(load, "compile_layers", lambda policy: compile_layers(policy, broken))
    with pytest.raises(
        ModelError, match=r"^sft: its layers could not be compiled .*no compiler found.*; set torch_compile: false$"
    ):
        train("sft", torch_compile=True)
