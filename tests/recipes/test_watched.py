"""What the health rules read is what the recipes log: a rule whose metric nobody logs would never fire."""

import importlib.util
import json
from pathlib import Path

import pytest

from posttrain.errors import EngineError
from posttrain.health.history import History
from posttrain.health.rules import RULES, rules_for
from posttrain.types import StepReport

CONDITIONAL = {
    "eval_loss": "there are eval_datasets",
    "eval_score": "there is an eval_suite",
    "kl": "beta is above 0",
    "teacher/gap": "there are teachers",
    "importance_ratio/max": "a generation batch is used for more than one step",
    "skipped_step": "the step's update was thrown away",
    "reward_check/false_pass_rate": "the rewards look at an answer, and reward_check_steps is reached",
    "reward_check/canary_paid_rate": "as above",
    "reward_check/canary_reward": "as above",
    "sampling/staleness/mean": "groups are made ahead",
    "time/engine_idle": "as above",
    "time/trainer_idle": "as above",
    "judge/failed": "a judge is among the rewards",
    "judge/agreement": "it is asked at a server, and reward_check_steps is reached",
    "env/failed_ratio": "there is an env, or there are tools",
    "tools/failure_frequency": "tools were called",
    "router/balance": "the model is a mixture of experts",
    "router/mismatch": "the experts that the engine took are recorded",
    "critic/vf_explained_var": "the stage is ppo",
}
"""Metric → when it is logged; every other one is there in the plainest run."""


class Noting(dict):
    """A step's metrics that note what was asked for."""

    def __init__(self, values, asked):
        super().__init__(values)
        self._asked = asked

    def get(self, name, default=None):
        self._asked.add(name)
        return super().get(name, default)

    def __contains__(self, name):
        if super().__contains__(name):
            self._asked.add(name)
        return super().__contains__(name)


def _cases():
    path = Path(__file__).parents[1] / "health/test_rules.py"
    spec = importlib.util.spec_from_file_location("rule_cases", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CASES


def reads(rule):
    """The metrics a rule looks at, found by letting it fire: then each of its conditions was asked about."""
    _, fault, _ = _cases()[rule.name]
    for last in range(1, len(fault) + 1):
        asked = set()
        reports = [StepReport(r.step, Noting(r.metrics, asked)) for r in fault[:last]]
        evaluated = tuple(
            r for r in reports if any(dict.__contains__(r.metrics, n) for n in ("eval_loss", "eval_score"))
        )
        if rule.check(History(tuple(reports[:8]), tuple(reports[-64:]), evaluated), **rule.thresholds) is not None:
            return asked
    raise AssertionError(f"{rule.name} does not fire on its own case")


READS = {rule.name: reads(rule) for rule in RULES}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "dev.jsonl"
    rows = [{"id": str(n), "prompt": f"What is {n} plus 1?", "target": str(n + 1), "split": "dev"} for n in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name for line in lines for name in line}


def wanted(kind):
    found = set().union(*(READS[rule.name] for rule in rules_for(kind)))
    # Of rules for every stage, what only RL has.
    found = found if kind == "grpo" else found - {"frac_reward_zero_std"}
    # Features know no best: how like an answer a completion can be is not known before.
    return found - {"frac_reward_all_right", "frac_reward_all_wrong"} if kind == "ebft" else found


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward_model", "grpo", "distill", "ebft"])
def test_the_plainest_run_logs_what_is_not_conditional(kind, train):
    assert wanted(kind) - logged(train(kind, max_steps=2)) <= set(CONDITIONAL)


ENV = Path(__file__).parents[1] / "environments" / "own_env.py"
RUNS = {
    "sft": lambda judge: [{}],
    "dpo": lambda judge: [{}],
    "grpo": lambda judge: [
        {
            "beta": 0.1,
            "num_iterations": 2,
            "rollout": {"max_staleness": 1, "routed_experts": "compare"},
            "teachers": [{"model": "start"}],
        },
        {"env": f"{ENV}:Echo", "max_completion_length": 60, "reward_funcs": ["spread", judge], "reward_check_steps": 1},
    ],
}
"""Kind → the options of runs that together meet every condition."""


@pytest.mark.parametrize(("kind", "file"), [("sft", "dev-sft"), ("dpo", "dev-pairs"), ("grpo", "dev-prompts")])
def test_with_all_conditions_met_every_rule_can_fire(kind, file, train, judging, data_dir, suite, tmp_path):
    dev = {"eval_datasets": [{"path": str(data_dir / f"{file}.jsonl")}]}
    common = {"architecture": "qwen3_moe", "max_steps": 2}
    with judging(lambda question, body: "Verdict: 5") as (url, _):
        (tmp_path / "judge.yaml").write_text(json.dumps({"model": "m", "url": url}))
        runs = RUNS[kind](f"judge:{tmp_path / 'judge.yaml'}")
        found = set().union(
            *(logged(train(kind, **common, **dev, **({"eval_suite": str(suite)} | options))) for options in runs)
        )
    missing = {name for name in wanted(kind) - found if not name.startswith("reward_check/")}
    # Nothing is skipped here, a model that was taught nothing calls no tool, and grpo has no critic.
    assert missing == {
        "skipped_step",
        *(["tools/failure_frequency", "critic/vf_explained_var"] if kind == "grpo" else []),
    }


def test_the_dev_score_is_that_of_the_evals_and_chooses_the_best(train, runner, suite, data_dir):
    """Greedy answers to `limit` items of the dev split, by the suite's own scorer."""
    from posttrain.config.pipeline import SuiteKeys
    from posttrain.config.stages import ModelKeys
    from posttrain.evals.suite import load_suite
    from posttrain.recipes.measure.evaluate import evaluate

    dev = [json.loads(line) for line in (data_dir / "dev-prompts.jsonl").read_text().splitlines()]
    rows = [
        {"id": str(n), "messages": row["prompt"], "target": "!", "scorer": "contains", "split": "dev"}
        for n, row in enumerate(dev)
    ]
    path = suite.with_name("answers.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "eval_suite": str(path),
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "max_steps": 3,
        "save_steps": 1,
    }
    folder = train("grpo", learning_rate=2e-2, **options)
    scores = [row["eval_score"] for row in runner.rows(folder)]
    best = json.loads((folder / "checkpoints/best.json").read_text())
    assert best == {"step": 1 + scores.index(max(scores)), "score": max(scores)}
    keys = SuiteKeys(path=str(path), max_tokens=6)
    report = evaluate(
        ModelKeys(base_model=str(folder / "model")), [(load_suite("s", path), keys)], "dev", folder / "evals"
    )["s"]
    assert report.mean == max(scores)


def test_a_suite_is_cut_to_its_limit_and_needs_a_dev_split(train, runner, suite):
    from posttrain.errors import EvalError

    shares = [
        runner.rows(train("sft", max_steps=1, eval_suite=str(suite), eval_suite_limit=limit))[-1]["eval_score"]
        for limit in (1, 5)
    ]
    assert all((limit * share) % 1 == 0 for limit, share in zip((1, 5), shares, strict=True))
    suite.with_name("gate.jsonl").write_text(json.dumps({"id": "a", "prompt": "x", "target": "y"}) + "\n")
    with pytest.raises(EvalError, match="no items with split 'dev'"):
        train("sft", eval_suite=str(suite.with_name("gate.jsonl")))


def test_sampler_and_trainer_are_compared_where_they_have_the_same_weights(train, runner):
    rows = runner.rows(train("grpo", num_iterations=2, learning_rate=1e-2))
    gaps = [row.get("sampling/sampling_logp_difference/mean") for row in rows]
    assert gaps[1] is gaps[3] is None
    assert 0 <= gaps[0] < 1e-4 and 0 <= gaps[2] < 1e-4
    peaks = [row.get("importance_ratio/max") for row in rows]
    assert peaks[0] is peaks[2] is None
    assert peaks[1] > rows[1]["importance_ratio/mean"]


@pytest.fixture
def stale_engine(monkeypatch):
    """The engine keeps sampling from the weights of the start."""
    import copy

    from posttrain.recipes import rl
    from posttrain.rollout.embedded import EmbeddedEngine

    original = rl.make_engine

    def stale(source, *rest, **options):
        engine = original(source, *rest, **options)
        frozen = copy.copy(source.policy)
        frozen.model = copy.deepcopy(source.policy.model)
        return EmbeddedEngine(frozen, stop_token_ids=tuple(engine._stop_token_ids), batch_size=8)

    monkeypatch.setattr(rl, "make_engine", stale)


def test_a_run_whose_weights_do_not_arrive_at_the_engine_stops(train, stale_engine):
    with pytest.raises(EngineError, match=r"after the sync to policy version [12] .* it decodes with other weights"):
        train("grpo", learning_rate=1e-2, max_steps=6)


def test_weights_that_drift_below_what_the_canary_sees_show_as_a_mismatch(train, stale_engine, monkeypatch):
    from posttrain.recipes.experience import source

    monkeypatch.setattr(
        source,
        "sync_engine",
        lambda engine, policy, version: {"sync/moved_bytes": float(engine.update(policy, version).num_bytes)},
    )
    folder = train("grpo", learning_rate=1e-2, max_steps=6)
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert "sampler_mismatch" in {event.get("rule") for event in found}
