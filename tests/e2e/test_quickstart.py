"""The quickstart as it is shipped: cut short in the quick tests, whole and for three seeds in the long ones."""

import json
import re

import pytest
import yaml

from posttrain.cli.app import main
from posttrain.gate import exact
from posttrain.gate.pairing import pair
from posttrain.report.records import read_run

NON_INFERIOR = 0.05


@pytest.fixture
def quickstart(shipped):
    return shipped("quickstart")


def run(config, *options):
    with pytest.raises(SystemExit) as caught:
        main(["run", str(config), "--quiet", *options])
    return caught.value.code


def models_of(record):
    """Evals of the base and of the newest attempt at each stage."""
    return {"base": record.evals["base"]} | {stage.kind: record.evals[stage.name] for stage in record.stages}


def gain(models, candidate, baseline, suite):
    """Paired 95 % interval of the difference, by Tango's score from the stored items."""
    pairs = pair(models[candidate][suite, "gate"], models[baseline][suite, "gate"], "gate")
    assert pairs.binary
    assert len(pairs.differences) >= 1000
    good, bad = pairs.discordant
    return exact.interval(good, bad, len(pairs.differences))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_stage_gains_what_it_is_there_for(quickstart, seed):
    assert run(quickstart / "pipeline.yaml", "--set", f"seed={seed}") == 0
    record = read_run(quickstart / "runs" / "word-problems")
    assert record.problems == ()
    models = models_of(record)
    assert gain(models, "sft", "base", "heldout")[0] > 0
    assert gain(models, "dpo", "sft", "clean")[0] > 0
    assert gain(models, "dpo", "sft", "heldout")[0] > -NON_INFERIOR
    assert gain(models, "grpo", "dpo", "heldout")[0] > 0
    assert record.registered is not None
    assert record.registered["alias"] == "champion"


def cut_short(config):
    """The keys of a pipeline with two steps a stage, which learns nothing, and a gate that asks for little."""
    values = yaml.safe_load(config.read_text())
    for entry in values["stages"]:
        for keys in entry.values():
            keys |= {"max_steps": 2, "per_device_train_batch_size": 8}
            keys.pop("num_train_epochs", None)
            if "num_generations" in keys:
                keys |= {
                    "num_generations": 2,
                    "num_prompts_per_step": 4,
                    "max_completion_length": 16,
                }
    values["gate"] |= {"guards": [{"suite": "clean", "margin": 0.4}], "primary": []}
    return values


@pytest.fixture
def short(quickstart):
    """The quickstart with 40 items a suite and 200 rows, and both of its pipelines cut short."""
    for path in (quickstart / "evals").iterdir():
        rows = [line for line in path.read_text().splitlines() if json.loads(line)["split"] == "gate"]
        path.write_text("\n".join(rows[:40]) + "\n")
    for path in (quickstart / "data").iterdir():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:200]))
    for config, baseline in {"pipeline.yaml": "stage:base", "further.yaml": "alias:champion"}.items():
        values = cut_short(quickstart / config)
        values["gate"]["baseline"] = baseline
        (quickstart / config).write_text(yaml.safe_dump(values, sort_keys=False))
    return quickstart


def test_cut_short_it_still_goes_all_the_way(short, capsys):
    """Every part of it works."""
    assert run(short / "pipeline.yaml") == 0
    output = capsys.readouterr().out
    record = read_run(short / "runs" / "word-problems")
    assert (record.status, record.problems) == ("passed", ())
    assert [(stage.kind, stage.steps) for stage in record.stages] == [("sft", 2), ("dpo", 2), ("grpo", 2)]
    assert all(len(report.items) == 40 for reports in record.evals.values() for report in reports.values())
    assert [certificate["verdict"] for certificate in record.certificates.values()] == ["pass"]
    assert record.registered is not None
    assert record.registered["alias"] == "champion"
    report = short / "runs" / "word-problems" / "report.html"
    assert "01-sft" in report.read_text()
    for text in ("heldout/gate", "registry  word-problems v1 → champion", f"report  {report}"):
        assert text in output
    with pytest.raises(SystemExit):
        main(["registry", "verify", "word-problems@champion", "--registry", str(short / "registry")])
    assert re.fullmatch(r"word-problems@1: \d+ files and 3 manifests are intact\n", capsys.readouterr().out)
    follows_while_it_is_asked(short)


def follows_while_it_is_asked(short):
    """What the page says of serving: another run takes the alias, and answers go over to it, none lost."""
    serving = pytest.importorskip("tests.serve.conftest", reason="serving needs posttrain[serve] and the openai client")
    with serving.running(serving.ServedNames(["word-problems"], short / "registry")) as served:
        before = serving.names(served)["word-problems"]
        with serving.Asking(served.address, "word-problems", clients=1, max_tokens=1) as asking:
            assert run(short / "further.yaml") == 0
            after = read_run(short / "runs" / "further").registered["digest"]
            serving.until(lambda: serving.names(served)["word-problems"] == after)
            serving.until(lambda: asking.found[-1][1] == after)
    assert not asking.failed and before != after
    assert {digest for _, digest, _ in asking.found} == {before, after}
