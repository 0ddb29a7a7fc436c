"""The engine of a GPU through the CPU's kernels. A step is traced to operators on fixed tensors and replayed, as a CUDA graph is."""

from collections import Counter

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from posttrain.config.rollout import RolloutKeys
from posttrain.config.stages import SFTKeys
from posttrain.errors import EngineError
from posttrain.models.batch import pack
from posttrain.models.load import load_policy
from posttrain.recipes.experience.engines import EngineSource, make_engine
from posttrain.rollout import decoding, pages
from posttrain.rollout.decoding import Decoding, DecodingRow, Ends
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.graphs import bucket_of
from posttrain.rollout.paged import PagedRows, paged_rows
from posttrain.types import Request, SamplingParams, TokenSeq, in_order

REQUESTS = [
    Request(tuple(9 + t % 50 for t in range(3 * n)), 5 * n + i) for n in (1, 2, 30, 100) for i in range(n % 3 + 1)
]


class Recorder:
    """Counts what it recorded. A trace that asked a tensor for a number could not be made."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, work):
        self.recorded += 1
        return make_fx(work)()


def _engine(policy, **options):
    engine = EmbeddedEngine(policy, **{"stop_token_ids": (), **options})
    recorder = Recorder()
    engine._paged = PagedRows(policy, recorder)
    return engine, recorder


@pytest.fixture
def small_pages(monkeypatch):
    for module in ("pages", "paged"):
        monkeypatch.setattr(f"posttrain.rollout.{module}.PAGE", 16)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_recorded_steps_on_pages_sample_what_the_cache_of_a_cpu_does(shared_policy, small_pages, family):
    policy, params = shared_policy(family), SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95)
    expected = in_order(EmbeddedEngine(policy, stop_token_ids=(2,), batch_size=5).generate(REQUESTS, params))
    engine, recorder = _engine(policy, stop_token_ids=(2,), batch_size=5)
    found = in_order(engine.generate(REQUESTS, params))
    assert [c.ids for c in found] == [c.ids for c in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-5)
    assert recorder.recorded >= 1
    assert pages.PAGE == 16


def _own_policy(model_dir, **options):
    return load_policy(SFTKeys(base_model=str(model_dir("qwen3")), datasets=[{"path": "unused.jsonl"}], **options))


@pytest.mark.parametrize("options", [{}, {"adapter": "lora", "lora_r": 4}, {"bf16": True}])
def test_graphs_are_recorded_once_a_bucket_and_read_weights_that_were_updated_in_place(model_dir, options):
    policy, params = _own_policy(model_dir, **options), SamplingParams(max_tokens=6)
    engine, recorder = _engine(policy)
    before = in_order(engine.generate(REQUESTS[:3], params))
    once = recorder.recorded
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=0.05, fused=True)
    for version in (1, 2):
        policy.score(pack([[TokenSeq((5, 6, 7), (False, True, True))]])).logp_M.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.update(policy, version)
        after = in_order(engine.generate(REQUESTS[:3], params))
        fresh = in_order(_engine(policy)[0].generate(REQUESTS[:3], params))
        assert [c.logp for c in after] == [c.logp for c in fresh]
    assert recorder.recorded == once
    assert [c.logp for c in before] != [c.logp for c in after]


def test_weights_that_moved_or_an_adapter_that_was_switched_off_are_recorded_anew(model_dir):
    policy, params = _own_policy(model_dir, adapter="lora", lora_r=4), SamplingParams(max_tokens=4)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.normal_(std=0.1)
    engine, recorder = _engine(policy)
    [on] = engine.generate(REQUESTS[:1], params)
    with policy.reference():
        [off] = engine.generate(REQUESTS[:1], params)
    assert off.logp != on.logp
    [again] = engine.generate(REQUESTS[:1], params)
    for _, parameter in policy.trainable():
        parameter.data = parameter.data.clone()
    [moved] = engine.generate(REQUESTS[:1], params)
    assert on.logp == again.logp == moved.logp
    assert recorder.recorded == 4


def test_rows_that_nobody_takes_leave_the_cache(shared_policy):
    policy, params = shared_policy("qwen3"), SamplingParams(max_tokens=9)
    whole = in_order(EmbeddedEngine(policy, stop_token_ids=()).generate(REQUESTS, params))
    engine, _ = _engine(policy, stop_token_ids=(whole[0].ids[3],), batch_size=3)
    taken = engine.generate(REQUESTS, SamplingParams(max_tokens=9))
    next(taken)
    assert engine._paged.is_busy
    inside = in_order(engine.generate(REQUESTS[:2], SamplingParams(max_tokens=5)))  # on a cache of its own
    taken.close()
    assert not engine._paged.is_busy
    outside = in_order(engine.generate(REQUESTS[:2], SamplingParams(max_tokens=5)))
    assert [c.ids for c in inside] == [c.ids for c in outside]


def _breaks_off(error):
    """A recorder that fails as `torch.cuda.graph` does: the end of the capture raises too, over the error that says why."""

    def record(work):
        try:
            raise error
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    return record


def test_a_capture_that_fails_is_one_paragraph_that_says_why_and_names_the_key(shared_policy):
    engine = EmbeddedEngine(shared_policy("qwen3"), stop_token_ids=())
    why = "CUDA error: operation not permitted when stream is capturing\nFor debugging consider CUDA_LAUNCH_BLOCKING=1"
    engine._paged = PagedRows(shared_policy("qwen3"), _breaks_off(RuntimeError(why)))
    for _ in range(2):
        with pytest.raises(EngineError) as raised:
            list(engine.generate(REQUESTS[:3], SamplingParams(max_tokens=4)))
        assert str(raised.value) == (
            "a decoding step of 4 rows could not be captured as a CUDA graph (RuntimeError: CUDA error: operation not permitted when "
            "stream is capturing); set enforce_eager: true in rollout (in eval_rollout where an eval failed) to decode without graphs"
        )
        assert not engine._paged.is_busy


def test_a_capture_for_which_memory_is_short_is_left_to_the_stage_to_explain(shared_policy):
    engine = EmbeddedEngine(shared_policy("qwen3"), stop_token_ids=())
    engine._paged = PagedRows(shared_policy("qwen3"), _breaks_off(torch.OutOfMemoryError("Tried to allocate 2 GiB")))
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2 GiB"):
        list(engine.generate(REQUESTS[:1], SamplingParams(max_tokens=4)))


@pytest.mark.parametrize(
    ("keys", "takes_graphs"),
    [(RolloutKeys(), True), (RolloutKeys(enforce_eager=True), False), (None, False)],
    ids=["default", "enforce_eager", "no keys"],
)
def test_enforce_eager_takes_the_loop_of_a_cpu_as_does_whoever_has_no_key_to_set(
    shared_policy, small_pages, monkeypatch, keys, takes_graphs
):
    policy, recorder, params = shared_policy("qwen3"), Recorder(), SamplingParams(max_tokens=6)
    expected = in_order(EmbeddedEngine(policy, stop_token_ids=()).generate(REQUESTS, params))
    monkeypatch.setattr("posttrain.rollout.embedded.paged_rows", lambda policy: PagedRows(policy, recorder))
    engine = make_engine(EngineSource(SFTKeys(base_model="m", datasets=[{"path": "x.jsonl"}]), policy), keys=keys)
    found = in_order(engine.generate(REQUESTS, params))
    assert bool(recorder.recorded) == takes_graphs
    assert [c.ids for c in found] == [c.ids[: len(f.ids)] for c, f in zip(expected, found, strict=True)]


def test_a_cpu_keeps_its_own_cache(shared_policy):
    assert paged_rows(shared_policy("qwen3")) is None


def test_buckets_are_powers_of_two():
    assert [bucket_of(rows) for rows in (1, 2, 3, 4, 5, 33, 64)] == [1, 2, 4, 4, 8, 64, 64]


class HostWaits(TorchFunctionMode):
    """Counts what makes a host wait for its GPU: numbers read out of a tensor, shapes that follow from values, copies that block."""

    READS = frozenset(("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select", "unique"))  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found, self.of_the_host = Counter(), []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, options = getattr(func, "__name__", ""), kwargs or {}
        masks = [part for part in args[1:2] if isinstance(part, torch.Tensor) and part.dtype == torch.bool]
        moved = name == "to" and any(args[0] is tensor for tensor in self.of_the_host)
        counted = name == "repeat_interleave" and isinstance(args[1], torch.Tensor)
        blocks = counted or (moved and not options.get("non_blocking")) or (name == "tensor" and options.get("device"))
        if name in self.READS or blocks or (name == "__getitem__" and masks):
            self.found[name] += 1
        made = func(*args, **options)
        if name == "tensor" and not options.get("device"):
            self.of_the_host.append(made)
        return made


def _decoding(policy, paged, temperatures=(1.0, 0.7)):
    ends = Ends(64, frozenset(), None)
    rows = [
        DecodingRow(n, request, SamplingParams(64, temperatures[n % 2], top_p=0.9), ends)
        for n, request in enumerate(REQUESTS)
    ]
    return Decoding(policy, rows, paged=PagedRows(policy, Recorder()) if paged else None)


@pytest.mark.parametrize("paged", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_the_host_waits_once_a_step(shared_policy, family, paged):
    running = _decoding(shared_policy(family), paged)
    with torch.no_grad():
        for _ in range(3):  # rows are admitted, pages taken, the step recorded
            running.advance(64)
        for _ in range(4):
            with HostWaits() as waits:
                running.advance(64)
            assert waits.found == {"tolist": 1}


@pytest.mark.parametrize(
    ("name", "blocking"),
    [
        ("tensor", lambda values, device: torch.tensor(values, device=device)),
        ("to", lambda values, device: torch.tensor(values).to(device)),
    ],
)
def test_a_copy_that_blocks_is_seen(shared_policy, monkeypatch, name, blocking):
    monkeypatch.setattr(decoding, "uploaded", blocking)
    running = _decoding(shared_policy("qwen3"), True)
    with torch.no_grad():
        for _ in range(3):
            running.advance(64)
        with HostWaits() as waits:
            running.advance(64)
    assert waits.found == {"tolist": 1, name: 3}
