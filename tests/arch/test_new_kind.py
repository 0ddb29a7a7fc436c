"""A kind of stage is two rows, its keys and its loop: one that is added at run time trains, is shown, judged and registered."""

import json

import yaml

from posttrain.cli.app import VERBS, load_verb
from posttrain.config.kinds import STAGE_KINDS, StageKind
from posttrain.config.load_pipeline import load_pipeline
from posttrain.config.stages import SFTKeys
from posttrain.data.load import load_sft
from posttrain.distributed.ranks import SingleProcess
from posttrain.health.rules import rules_for
from posttrain.models.load import load_policy
from posttrain.objectives.reduce import Normalizer
from posttrain.pipeline.run import Watch, run_pipeline
from posttrain.recipes import sft
from posttrain.recipes.kinds import LOOPS
from posttrain.recipes.metrics import StepMetrics
from posttrain.recipes.optim import make_optimizer, update
from posttrain.registry.registry import Registry
from posttrain.report.build import build_report
from posttrain.report.records import read_run
from posttrain.tracking.live import LiveView


def train(keys, stage):
    policy = load_policy(keys)
    rows, optimizer = load_sft(keys, policy.tokenizer).rows[:8], make_optimizer(policy, keys)
    state = stage.resume(policy, optimizer, keys.max_steps)
    for step in range(state.step, keys.max_steps):
        stage.begin_step(step)
        metrics, norm = StepMetrics(), Normalizer.of(sft.loss_counts(rows))
        terms = sft.loss(policy, rows, norm)
        terms.loss.backward()
        metrics.add(terms.metrics)
        values = metrics.reduced(stage.ranks)
        values |= update(policy, optimizer, stage, keys.learning_rate, values, step + 1)
        state.step = step + 1
        stage.finish_step(state, values, state.step == keys.max_steps, None)
    return stage.done(state)


def project(folder, model):
    """A pipeline of one such stage with a gate; a tiny model learns to say yes."""

    def asked(n):
        return [{"role": "user", "content": f"What is {n // 10} plus {n % 10}?"}]

    rows = [{"messages": [*asked(n), {"role": "assistant", "content": "Yes."}]} for n in range(1, 25)]
    items = [
        {"id": f"q{n}", "messages": asked(n), "target": "Yes.", "scorer": "exact", "split": "gate"}
        for n in range(100, 140)
    ]
    for name, lines in (("sft.jsonl", rows), ("yes.jsonl", items)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = {
        "name": "twin",
        "base_model": str(model),
        "sequence_len": 64,
        "evals": {"yes": {"path": "yes.jsonl", "max_tokens": 6}},
        "stages": [{"sft_twin": {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-2, "max_steps": 8}}],
        "gate": {"baseline": "stage:base", "guards": [{"suite": "yes", "margin": 0.4}]},
        "register": {"name": "twin", "registry": "registry"},
        "output_dir": "run",
    }
    (folder / "twin.yaml").write_text(yaml.safe_dump(keys))
    return folder / "twin.yaml"


def test_a_kind_of_two_rows_trains_is_reported_gated_and_registered(tmp_path, model_dir, monkeypatch):
    monkeypatch.setitem(STAGE_KINDS, "sft_twin", StageKind("sft_twin", SFTKeys, "A second SFT.", ("examples",)))
    monkeypatch.setitem(LOOPS, "sft_twin", train)
    loaded = load_pipeline(project(tmp_path, model_dir("qwen3")))
    watch = Watch(sinks=lambda kind, total: [LiveView(kind, total)], say=lambda text: None)
    outcome = run_pipeline(loaded.keys, SingleProcess(), watch=watch, project=loaded.project)
    assert outcome.status == "passed", outcome.reason
    run = read_run(outcome.folder)
    assert [(stage.name, stage.kind, stage.status) for stage in run.stages] == [("01-sft_twin", "sft_twin", "done")]
    assert [row["step"] for row in run.stages[0].metrics] == list(range(1, 9))
    assert "Token accuracy" in build_report(outcome.folder).read_text()
    registry = Registry(tmp_path / "registry")
    entry = registry.resolve("twin@champion")
    registry.close()
    assert entry.version == 1


def test_a_new_kind_is_a_verb_and_has_its_health_rules(tmp_path, monkeypatch):
    monkeypatch.setitem(STAGE_KINDS, "sft_twin", StageKind("sft_twin", SFTKeys, "A second SFT.", ("examples",)))
    assert load_verb("sft_twin").name == "sft_twin"
    assert [rule.name for rule in rules_for("sft_twin")] == [rule.name for rule in rules_for("sft")]


def test_every_kind_of_ours_is_listed_as_a_verb_with_its_line_of_help():
    assert {row.name: row.help for row in STAGE_KINDS.values()} == {name: VERBS[name][2] for name in STAGE_KINDS}
