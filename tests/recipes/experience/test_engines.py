"""From the keys of a stage to the engine that it samples with."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest

from posttrain.config.pipeline import SuiteKeys
from posttrain.config.rl import GRPOKeys
from posttrain.config.rollout import RolloutKeys
from posttrain.distributed.whole import Whole
from posttrain.errors import ConfigError, EngineError, EngineGoneError
from posttrain.evals.suite import load_suite
from posttrain.evidence import EvalReport
from posttrain.gate.pairing import PairingError, pair
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.recipes.experience.engines import (
    EngineSource,
    _Ask,
    _cards_of,
    _own_server,
    _sleeps,
    _vllm_options,
    make_engine,
    named_engine,
)
from posttrain.recipes.measure.certify import certified_before, certify
from posttrain.recipes.measure.evaluate import evaluate
from posttrain.rollout.vllm import server
from posttrain.rollout.vllm.connect import ServerOptions

NEEDS_VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make setup-vllm")


@pytest.fixture
def in_process():
    """vLLM looks at a model's class in a process of its own, which imports everything once more."""
    import vllm.model_executor.models.registry as registry

    registry._run_in_subprocess = lambda look: look()


@pytest.fixture
def keys(model_dir):
    def make(**options):
        values = {"base_model": str(model_dir("qwen3")), "datasets": [{"path": "x.jsonl"}], "reward_funcs": ["r.py:f"]}
        return GRPOKeys.model_validate(values | options)

    return make


def options_of(keys, rows=5):
    return _vllm_options(_Ask(EngineSource(keys), keys.rollout, rows), load_tokenizer(keys))


@pytest.mark.parametrize(
    ("key", "value", "argument", "expected"),
    [
        ("dtype", "bfloat16", "dtype", "bfloat16"),
        ("max_model_len", 64, "max_model_len", 64),
        ("memory_gib", 0.5, "kv_cache_memory_bytes", 1 << 29),
        ("tensor_parallel_size", 2, "tensor_parallel_size", 2),
    ],
)
def test_each_key_reaches_vllm(key, value, argument, expected, keys):
    before = options_of(keys()).engine_args()
    after = options_of(keys(rollout={"engine": "vllm", key: value})).engine_args()
    assert before[argument] != after[argument] == expected
    assert {name for name in before if before[name] != after[name]} == {argument}


def test_eager_is_what_a_cpu_always_is(keys):
    assert options_of(keys()).engine_args()["enforce_eager"]
    assert options_of(keys(rollout={"engine": "vllm", "enforce_eager": True})).enforce_eager


def test_eager_without_effect_is_said_where_somebody_asked_for_it(keys, caplog):
    source = EngineSource(keys(device="cpu"))
    make_engine(source)
    make_engine(source, keys=RolloutKeys())
    assert not caplog.records
    make_engine(source, keys=RolloutKeys(enforce_eager=True))
    [record] = caplog.records
    assert record.message.startswith("enforce_eager: no effect, because engines compile nothing")


def test_it_starts_as_the_trainer_computes_and_stops_where_we_do(keys):
    made = options_of(keys())
    assert (made.dtype, made.max_num_seqs) == ("float32", 5)
    assert made.engine_args()["max_model_len"] == -1
    assert made.stop_token_ids == (2,)


SHOWS = "import json, os, sys; print(json.dumps([os.environ.get('CUDA_VISIBLE_DEVICES'), sys.argv[1:]])); raise ValueError('enough')"


@pytest.mark.parametrize(
    ("placement", "seen", "trainers", "each"),
    [
        ("split", "0123", 2, ["2", "3"]),
        ("colocated", "0123", 2, ["0", "1"]),
        ("auto", "0123", 1, ["0", "0"]),
        ("split", "", 2, [None, None]),
    ],
)
def test_each_server_of_a_stage_is_started_on_the_cards_that_the_placement_says(
    placement, seen, trainers, each, keys, tmp_path, monkeypatch
):
    (tmp_path / "program_shows.py").write_text(SHOWS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(server, "_MODULE", "program_shows")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = keys(rollout={"engine": "vllm_server", "replicas": 2, "placement": placement})
    ask = _Ask(EngineSource(given), given.rollout, 4, tmp_path, trainers)
    options, how = options_of(given), ServerOptions(5.0, 30.0, "file", 1, "wait")
    for number in range(2):
        mine = replace(options, cards=_cards_of(ask, number, seen))
        with pytest.raises(EngineGoneError, match="ValueError: enough"):
            _own_server(ask, number, mine, how, str, None)()
    shown = [json.loads((tmp_path / f"vllm_server-{n}.log").read_text().splitlines()[0]) for n in range(2)]
    assert [cards for cards, _ in shown] == each
    assert len({arguments[arguments.index("--uds") + 1] for _, arguments in shown}) == 2


def test_a_stage_whose_servers_have_no_card_is_refused_with_what_to_set(keys):
    given = keys(rollout={"engine": "vllm_server", "replicas": 4, "placement": "split"})
    ask = _Ask(EngineSource(given), given.rollout, 4, trainers=2)
    with pytest.raises(
        ConfigError, match=r"needs 6 cards, and 4 are seen here; set rollout.replicas: 2, or placement: colocated"
    ):
        _cards_of(ask, 0, "0123")


def test_only_a_server_that_takes_turns_on_the_trainers_cards_sleeps(keys):
    own = {"engine": "vllm_server"}
    for device, rollout, sleeps in (
        ("cuda", own, True), ("cuda", own | {"placement": "split"}, False), ("cuda", own | {"max_staleness": 1}, False),
        ("cpu", own, False), ("cuda", {"engine": "vllm"}, False), ("cuda", own | {"url": "http://127.0.0.1:1"}, False),
    ):  # fmt: skip
        assert _sleeps(keys(rollout=rollout).rollout, device) == sleeps, (device, rollout)


def test_tokens_that_the_given_model_lacks_are_refused(keys):
    with pytest.raises(ConfigError, match=r"no rows for added_tokens; train them in an SFT stage first"):
        make_engine(EngineSource(keys(added_tokens=["<tool>"])), keys=RolloutKeys(engine="vllm"))


def test_several_processes_do_not_each_hold_a_vllm(keys):
    class Two(Whole):
        num_shards, is_sharded = 2, True

    policy = replace(load_policy(keys()), sharding=Two())
    with pytest.raises(
        ConfigError, match=r"the one process that trains, and there are 2 of them; set rollout\.engine: vllm_server"
    ):
        make_engine(EngineSource(keys(), policy), keys=RolloutKeys(engine="vllm"))


def test_an_eval_names_its_engine_unless_it_is_ours():
    assert named_engine(RolloutKeys()) == ""


@NEEDS_VLLM
@pytest.mark.xdist_group("vllm")
@pytest.mark.parametrize("engine", ["vllm", pytest.param("vllm_server", marks=pytest.mark.slow)])
def test_a_report_of_another_engine_is_measured_anew_and_never_compared(engine, keys, tmp_path, in_process):
    rows = [
        {"id": str(n), "prompt": f"{n} and", "target": "e", "scorer": "contains", "split": "gate"} for n in range(3)
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suites = [(load_suite("s", tmp_path / "s.jsonl"), SuiteKeys(path=str(tmp_path / "s.jsonl"), max_tokens=4))]
    ours = evaluate(keys(), suites, "gate", tmp_path / "evals")["s"]
    vllm = RolloutKeys(engine=engine, memory_gib=0.1)
    theirs = evaluate(keys(), suites, "gate", tmp_path / "evals", rollout=vllm)["s"]
    assert (ours.engine, theirs.engine) == ("", named_engine(vllm))
    assert [item.completions for item in ours.items] == [item.completions for item in theirs.items]
    assert EvalReport.load(tmp_path / "evals" / "s-gate") == theirs
    with pytest.raises(PairingError, match=rf"engine differs: candidate {engine} 0\..*, baseline embedded"):
        pair(replace(theirs, model_digest="another"), ours, "gate")


@NEEDS_VLLM
@pytest.mark.xdist_group("vllm")
def test_a_stage_samples_with_vllm_and_trains_on_it(train, in_process):
    rollout = {"engine": "vllm", "memory_gib": 0.1, "transfer": "file"}
    folder = train("grpo", rollout=rollout, max_steps=3, eval_steps=2, top_p=0.9)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row["sync/moved_bytes"] > 0
        assert row["sync/canary_gap"] < 1e-4
    # With a cut, what a token was drawn from is not what the trainer computes.
    assert rows[0]["sampling/sampling_logp_difference/mean"] > 1e-3
    assert rows[0]["sampling/importance_sampling_ratio/mean"] < 1


@NEEDS_VLLM
@pytest.mark.xdist_group("vllm")
def test_a_stage_whose_engine_died_goes_on_when_it_is_started_again(train, in_process, monkeypatch):
    from vllm.v1.engine.llm_engine import LLMEngine

    options = {"rollout": {"engine": "vllm", "memory_gib": 0.1}, "save_steps": 1, "name": "one"}
    step, asked = LLMEngine.step, []

    def dying(self):
        asked.append(self)
        if len(asked) > 30:
            raise RuntimeError("the worker is gone")
        return step(self)

    monkeypatch.setattr(LLMEngine, "step", dying)
    with pytest.raises(EngineError, match="vLLM could not generate: RuntimeError: the worker is gone"):
        train("grpo", **options)
    monkeypatch.undo()
    folder = train("grpo", **options)
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    issued = [number for e in events if e["kind"] == "rollouts" for number in e["prompts"]["issued"]]
    assert rows == [1, 2, 3, 4]
    assert len(issued) == len(set(issued)) == 8


@NEEDS_VLLM
@pytest.mark.xdist_group("vllm")
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_the_certificate_is_made_with_the_engine_of_the_stage(
    engine, runner, model_dir, data_dir, tmp_path, in_process
):
    rollout = {"engine": engine, "memory_gib": 0.1}
    keys = runner.keys_of("grpo", model_dir("qwen3"), data_dir, rollout=rollout)
    certificate = certify(keys, tmp_path / "certificate.json")
    assert certified_before(keys, tmp_path / "certificate.json") in (certificate, None)
    assert (tmp_path / "vllm_server.log").exists() == (engine == "vllm_server")
