"""Every part of a plan against what torch allocates: one pass of the work that the part stands for."""

import gc
import json
from functools import partial

import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.preference import WITHOUT_REFERENCE
from posttrain.config.rl import GRPOKeys
from posttrain.config.stages import SFTKeys
from posttrain.distributed.ranks import SingleProcess
from posttrain.models import decode
from posttrain.models.batch import pack
from posttrain.models.export import save_policy
from posttrain.models.load import freeze_reference, load_policy
from posttrain.objectives.preference import PREFERENCE_LOSSES
from posttrain.planner import ModelShape, Workload, estimate_memory, memory, shape
from posttrain.recipes.optim import make_optimizer
from posttrain.recipes.run.stage import Stage
from posttrain.rollout import decoding
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Request, SamplingParams, TokenSeq, in_order

MODELS = {
    "qwen3": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 4096},
    "llama": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 8192},
    "gemma2": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 8192},
}
COMMON = {"max_position_embeddings": 2048, "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 2048}
PROMPT, COMPLETION = 96, 160
TOLERANCE = 0.15


def allocated(work):
    """(peak, left, result) of a call: bytes allocated on the CPU beyond those there were."""
    gc.collect()  # a model of before that is let go of within would be taken off
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    events, waiting = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return peak, held, result


def planned_and_measured(folder, run_folder, completion=COMPLETION, **options):
    """Name → (planned bytes, measured bytes)."""
    keys = GRPOKeys(
        base_model=str(folder), datasets=[{"path": "unused.jsonl"}], reward_funcs=["exact_match"], num_generations=4,
        per_device_train_batch_size=4, rollout_batch_size=16, sequence_len=PROMPT + completion,
        max_completion_length=completion, beta=0.1, save_steps=1, **options,
    )  # fmt: skip
    sizes = ModelShape.from_config(json.loads((folder / "config.json").read_text()))
    workload = Workload.from_keys(
        keys.model_dump(), **STAGE_KINDS["grpo"].demands(keys), device_has_bf16=False, on_cpu=True
    )
    plan = estimate_memory(sizes, workload).parts

    def planned(*names):
        return sum(plan.get(name, 0) for name in names)

    policy = load_policy(keys)
    found = {"weights": (planned("weights", "adapter"), sum(p.nbytes for p in policy.model.parameters()))}
    if keys.adapter == "none":
        found["reference"] = (planned("reference"), allocated(partial(freeze_reference, policy))[1])
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return tuple(torch.randint(3, 200, (length,), generator=generator).tolist())

    prompt = ids(PROMPT)
    batch = pack([[TokenSeq(prompt + ids(completion), (False,) * PROMPT + (True,) * completion) for _ in range(4)]])
    policy.model.train()
    # The second micro-batch is the one that finds gradients.
    policy.score(batch, entropy=True).logp_M.sum().backward()
    gradients = sum(p.grad.nbytes for _, p in policy.trainable())
    _, forward, scores = allocated(lambda: policy.score(batch, entropy=True).logp_M)
    backward, _, _ = allocated(lambda: scores.sum().backward())
    training = planned("autocast", "gradients", "activations", "logits")
    found["gradients"] = (planned("gradients"), gradients)
    found["training"] = (training, forward + backward + gradients)
    if not keys.gradient_checkpointing:
        tile = 4 * completion * 4 * sizes.vocab
        found["activations"] = (planned("autocast", "activations") + tile, forward)
    optimizer = make_optimizer(policy, keys)
    found["optimizer"] = (planned("optimizer"), allocated(optimizer.step)[1])
    optimizer.zero_grad()
    stage = Stage("grpo", run_folder, keys, SingleProcess())
    state = stage.resume(policy, optimizer, 1)
    found["checkpoint"] = (planned("checkpoint"), allocated(lambda: stage.checkpoints.save(state, wait=False))[0])
    stage.close()
    engine = EmbeddedEngine(policy, stop_token_ids=(), batch_size=16)
    requests = [Request(prompt, seed) for prompt in [ids(PROMPT) for _ in range(4)] for seed in range(4)]
    rollout = allocated(lambda: in_order(engine.generate(requests, SamplingParams(completion))))[0]
    found["rollout"] = (planned("autocast", "decode_weights", "kv_cache", "prefill"), rollout)
    found["export"] = (planned("export"), allocated(lambda: save_policy(policy, run_folder / "model", keys))[0])
    return found


def check(found):
    wrong = {
        name: f"planned {planned / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB"
        for name, (planned, measured) in found.items()
        if abs(planned - measured) > TOLERANCE * measured
    }
    assert not wrong, wrong


VARIANTS = {
    "full": {},
    "checkpointed": {"gradient_checkpointing": True},
    "long prompts": {"completion": 8},
    "bf16": {"bf16": True},
    "lora": {"adapter": "lora", "lora_r": 16},
    "lora checkpointed": {"adapter": "lora", "lora_r": 16, "gradient_checkpointing": True},
    "qlora": {"adapter": "qlora", "load_in_4bit": True, "lora_r": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_part_of_a_plan_is_what_is_allocated(model, variant, make_local_model, tmp_path):
    check(planned_and_measured(make_local_model(model, **MODELS[model], **COMMON), tmp_path, **VARIANTS[variant]))


def test_the_planner_knows_up_to_which_size_decoding_copies_weights_and_encodes_at_once():
    assert memory.MOST_COPIED == decode._MOST_COPIED
    assert memory.ENCODED_AT_ONCE == decoding._ENCODED_AT_ONCE
    assert set(shape.DECODED_BY_WEIGHTS) == set(decode.FAMILIES)


def test_the_planner_knows_which_losses_need_no_reference():
    assert {name for name, row in PREFERENCE_LOSSES.items() if not row.needs_reference} == WITHOUT_REFERENCE


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_the_parts_of_a_small_plan_are_what_is_allocated(variant, make_local_model, tmp_path):
    small = {**MODELS["llama"], "num_hidden_layers": 2, "vocab_size": 2048}
    check(planned_and_measured(make_local_model("llama", **small, **COMMON), tmp_path, **VARIANTS[variant]))


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_offloaded_layers_are_held_and_copied_as_planned(adapter, make_local_model):
    """On the GPU's plan: two layers beside what stays, and what a micro-batch and a pass without gradients copy."""
    if adapter == "qlora":
        pytest.importorskip("bitsandbytes")
    folder = make_local_model("qwen3", **MODELS["qwen3"], **COMMON)
    sizes = ModelShape.from_config(json.loads((folder / "config.json").read_text()))
    keys = SFTKeys(
        base_model=str(folder), datasets=[{"path": "unused.jsonl"}], adapter=adapter, lora_r=4,
        gradient_checkpointing=True, layer_offloading=True,
    )  # fmt: skip
    plan = estimate_memory(sizes, Workload.from_keys(keys.model_dump(), device_has_bf16=False, on_cpu=False))
    policy = load_policy(keys)
    offloaded = policy.offloaded
    batch = pack([[TokenSeq(tuple(range(3, 35)), (False,) + (True,) * 31)]])

    def copied(work):
        work()  # what the pass before left there
        before = offloaded.copied_bytes
        work()
        return offloaded.copied_bytes - before

    def train():
        policy.score(batch).logp_M.sum().backward()

    policy.model.train()
    assert copied(train) == pytest.approx(plan.copied_to_train_bytes, rel=0.02)
    assert copied(lambda: policy.reference_logp(batch)) == pytest.approx(plan.copied_bytes, rel=0.02)
    held = sum(p.nbytes for p in policy.model.parameters() if not p.requires_grad) - offloaded.host_bytes
    two = 2 * offloaded.host_bytes // sizes.num_layers
    assert plan.part("weights") == pytest.approx(held + two, rel=0.05)
    assert offloaded.host_bytes * 0.99 <= plan.host["layers"] <= 2 * offloaded.host_bytes


def test_offloaded_layers_take_no_more_room_than_two_of_them(make_local_model):
    """What torch allocates for a step, beside the same step with all layers there."""
    folder = make_local_model("qwen3", **MODELS["qwen3"], **COMMON)
    batch = pack([[TokenSeq(tuple(range(3, 35)), (False,) + (True,) * 31)]])
    peaks = {}
    keys = SFTKeys(
        base_model=str(folder),
        datasets=[{"path": "unused.jsonl"}],
        adapter="lora",
        lora_r=4,
        gradient_checkpointing=True,
    )
    for on in (False, True):
        policy = load_policy(keys.model_copy(update={"layer_offloading": on}))
        policy.model.train()
        policy.score(batch).logp_M.sum().backward()
        # Two are there already. What was allocated before the profile is let go of unseen within it, or with the size that an
        # earlier profile of this process saw at that place.
        for layer in list(policy.offloaded._present) if on else ():
            policy.offloaded._release(layer)
        peaks[on] = allocated(lambda policy=policy: policy.score(batch).logp_M.sum().backward())[0]
    two = 2 * policy.offloaded.host_bytes // 6
    assert two * 0.9 < peaks[True] - peaks[False] < two * 1.1
