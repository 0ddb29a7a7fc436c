"""A run folder as the pipeline leaves it: three stages, two suites, a verdict, a certificate, findings."""

import json
import math
import random
from functools import partial
from pathlib import Path

import pytest

from posttrain.evidence import EvalReport, GateVerdict, ItemRecord, TestResult, Verdict

RIGHT = {"base": 0.12, "01-sft": 0.41, "02-dpo": 0.43, "03-grpo": 0.62}
FORMAT = {"base": 0.02, "01-sft": 0.97, "02-dpo": 0.99, "03-grpo": 0.98}
STAGES = (("sft", 101.4, 410_000, 120), ("dpo", 44.0, 96_000, 40), ("grpo", 180.6, 1_250_000, 60))
HOSTILE = "</pre><script>alert(1)</script>\x1b[2J"


def digest(text):
    return "sha256:" + (text.encode().hex() * 64)[:64]


def make_report(model, suite, shares, num_items):
    """Each item has a fixed difficulty, so that two models agree on most items."""
    draw = random.Random(suite)
    items = []
    for number in range(num_items):
        right = draw.random() < shares[model]
        draw.random()
        answer = f"<think>{number}</think>\\boxed{{{number if right else number + 1}}}"
        answer = HOSTILE if number == 5 else answer
        items.append(
            ItemRecord(
                f"q{number}",
                digest(f"{suite}{number}"),
                (float(right),),
                completions=(answer,),
                finishes=("stop",),
                num_tokens=(12,),
            )
        )
    return EvalReport(suite, "gate", digest(suite), digest(model), "boxed", tuple(items), {"temperature": 0.0}, 2.5)


def _test(role, suite, baseline, candidate, line, verdict):
    estimate = candidate - baseline
    low, high, bound = estimate - 0.05, estimate + 0.05, estimate - 0.042
    return TestResult(
        role,
        suite,
        "tango",
        400,
        0,
        baseline,
        candidate,
        estimate,
        low,
        high,
        bound,
        line,
        0.001,
        verdict,
        f"bound {bound:+.3f} against line {line:+.3f}",
        (20, 220),
    )


def make_verdict(verdict=Verdict.PASS):
    tests = (
        _test("guard", "format", FORMAT["base"], FORMAT["03-grpo"], -0.02, Verdict.PASS),
        _test("primary", "heldout", RIGHT["base"], RIGHT["03-grpo"], 0.05, verdict),
    )
    return GateVerdict(
        verdict,
        "every test passed" if verdict is Verdict.PASS else "heldout did not clear its line",
        digest("03-grpo"),
        digest("base"),
        digest("spec"),
        0.05,
        tests,
    )


def _metrics(kind, steps, full):
    for step in range(1, steps + 1):
        done = step / steps
        common = {
            "step": step,
            "time": 1.75e9 + step,
            "learning_rate": 1e-3 * (1 - done),
            "grad_norm": 1 + 0.2 * math.sin(step),
            "num_tokens": 1000 * step,
        }
        by_kind = {
            "sft": {"loss": 0.2 + 2 * math.exp(-4 * done), "mean_token_accuracy": 0.4 + 0.5 * done},
            "dpo": {
                "loss": 0.69 - 0.3 * done,
                "rewards/accuracies": 0.5 + 0.4 * done,
                "rewards/margins": done,
                "rewards/chosen": 0.4 * done,
                "rewards/rejected": -0.6 * done,
            },
            "grpo": {
                "reward": 0.4 + 0.3 * done,
                "reward_std": 0.4,
                "entropy": 1.2 - 0.5 * done,
                "kl": 0.01 * done,
                "completions/mean_length": 20 + step / 10,
                "frac_reward_zero_std": 0.3,
            },
        }
        named = common | by_kind[kind]
        yield named if full else {name: named[name] for name in ("step", "time", "loss") if name in named}


ACTION = {"kind": "action", "step": 56, "time": 1.0, "rule": "kl_drift", "message": "kl_drift: beta 0.1"}
CERTIFICATE = {
    "verdict": "pass",
    "config": {"num_cases": 50, "num_samples": 200, "thresholds": {"recall": 0.98, "auc": 0.99}},
    "mutations": [
        {"name": "whitespace", "kind": "E", "num": 24, "violations": 0, "example": ""},
        {"name": "empty", "kind": "Z", "num": 12, "violations": 0, "example": ""},
        {"name": "two slots", "kind": "Z", "num": 30, "violations": 1, "example": "1 for '<b>'"},
    ],
    "measures": {
        "recall": 0.995, "auc": 0.9991, "separation": "inf", "policy: empty": 0.0, "policy: modal answer": 0.06,
        "determinism differences": 0.0, "latency_p50_s": 0.0004, "latency_p99_s": 0.0027, "latency_max_s": 0.003,
        "kill_wall_s": 1.7, "forecast: mean_reward": 0.375, "forecast: frac_reward_zero_std": 0.28,
    },
    "failures": [], "warnings": ["one warning"],
}  # fmt: skip


def _write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _source(kind):
    left_out = {"longer than sequence_len": {"count": 17, "first": ["a.jsonl:1"]}} if kind == "sft" else {}
    return {
        "path": f"data/{kind}.jsonl", "format": "chat (column `messages`)", "rows_read": 2017, "rows_kept": 2000,
        "skipped": left_out, "tokens": 123456, "loss_tokens": 65432,
    }  # fmt: skip


def write_stage(run, number, kind, wall_s, tokens, steps, full):
    name = f"{number:02d}-{kind}"
    folder = run / "stages" / name
    folder.mkdir(parents=True)
    parent = "base" if number == 1 else f"{number - 1:02d}-{STAGES[number - 2][0]}"
    _write_lines(folder / "metrics.jsonl", _metrics(kind, steps, full))
    finding = {
        "kind": "finding",
        "step": 50,
        "time": 1.0,
        "rule": "truncation_spiral",
        "severity": "soft",
        "evidence": {"completions/clipped_ratio": 0.31},
        "action": "evaluate",
        "message": "31 % of the answers hit the length limit",
    }
    _write_lines(folder / "events.jsonl", [finding, finding | {"step": 55}, ACTION] if kind == "grpo" else [])
    _write_lines(
        folder / "samples.jsonl",
        [{"step": step, "prompt": "12+30=", "completion": "\\boxed{42}", "reward": 1.0} for step in (10, 20, 30, 40)],
    )
    (folder / "result.json").write_text(
        json.dumps(
            {
                "kind": kind,
                "steps": steps,
                "tokens": tokens,
                "wall_s": wall_s,
                "model_digest": digest(name),
                "parent_digest": digest(parent),
                "metrics": {"loss": 0.2},
            }
        )
    )
    segments = [["user: 12+30=\nassistant: ", False], ["\\boxed{42}<eos>", True]]
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "datasets": [{"sources": [_source(kind)]}],
                "examples": [{"origin": "sft.jsonl:1", "segments": segments}] if kind == "sft" else [],
            }
        )
    )
    return {
        "index": number,
        "kind": kind,
        "attempt": 1,
        "folder": f"stages/{name}",
        "status": "done",
        "wall_s": wall_s,
        "tokens": tokens,
        "steps": steps,
        "input_digest": digest(parent),
        "output_digest": digest(name),
        "changed": {},
    }


def write_run(run: Path, *, verdict=Verdict.PASS, num_items=400, full=True):
    """The whole folder; what a test does not want it removes. Not `full`: one metric per stage, for fewer charts."""
    stages = [write_stage(run, number, *stage, full) for number, stage in enumerate(STAGES, 1)]
    for model in RIGHT:
        make_report(model, "heldout", RIGHT, num_items).save(run / "evals" / model / "heldout-gate")
        make_report(model, "format", FORMAT, num_items).save(run / "evals" / model / "format-gate")
    gate = run / "gates" / "03"
    gate.mkdir(parents=True)
    (gate / "spec.json").write_text(json.dumps({"alpha": 0.05}))
    (gate / "verdict.json").write_text(json.dumps(make_verdict(verdict).to_json()))
    suite = run / "heldout.jsonl"
    _write_lines(suite, [{"id": f"q{n}", "prompt": f"Question number {n}?", "target": str(n)} for n in range(400)])
    (run / "config.yaml").write_text(f"name: word-problems\nevals:\n  heldout: {suite}\nstages: []\n")
    (run / "stages" / "03-grpo" / "certificate.json").write_text(json.dumps(CERTIFICATE))
    (gate / "evidence.json").write_text(json.dumps({"look": 2}))
    finding = {
        "rule": "near_duplicate", "meaning": "almost the same row again", "count": 31, "share": 0.031, "action": "warn",
        "limit": 0.0, "refuses": False, "first": ["sft.jsonl:7: 91% like sft.jsonl:3"],
    }  # fmt: skip
    lint = {"num_rows": 1000, "refused": False, "findings": [finding]}
    (run / "stages" / "01-sft" / "lint.json").write_text(json.dumps(lint))
    passed = verdict is Verdict.PASS
    pipeline = {
        "name": "word-problems", "status": "passed", "stages": stages,
        "gates": [{"after": "final", "folder": "gates/03", "verdict": verdict.value}],
        "registered": {"name": "word-problems", "version": 1, "alias": "champion", "digest": digest("03-grpo")} if passed else None,
        "pins": {"base": digest("base"), "data": {"sft": digest("sft-data")}, "environment": {"torch": "2.13.0"}},
    }  # fmt: skip
    (run / "pipeline.json").write_text(json.dumps(pipeline))
    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "word-problems")


@pytest.fixture
def own_run(tmp_path):
    """A run folder that the test may damage."""
    return write_run(tmp_path / "word-problems", num_items=40, full=False)


@pytest.fixture
def run_writer():
    return partial(write_run, num_items=40, full=False)
