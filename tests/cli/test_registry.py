import sqlite3

import pytest
from typer.testing import CliRunner

from posttrain.cli.registry import app
from posttrain.errors import RegistryError
from posttrain.evidence import EvalReport, ItemRecord
from posttrain.files import digest_bytes, digest_tree
from posttrain.gate import GateSpec, Primary, decide, save_verdict
from posttrain.registry import Manifest, Registry

BASE = digest_bytes(b"base")


def report(model, good):
    items = tuple(ItemRecord(f"q{row}", f"p{row}", (float(row < good),)) for row in range(1000))
    return EvalReport("heldout", "gate", "sha256:suite", model, "exact", items)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.output

    return invoke


@pytest.fixture
def gated(tmp_path):
    """words@1 registered with its verdict against the base; words@2 with a verdict folder against words@1."""
    spec = GateSpec(primary=(Primary("heldout", 0.05),))
    book = Registry(tmp_path / "registry")
    baseline = BASE
    for weights, good in (("a", 600), ("b", 700)):
        folder = tmp_path / f"model-{weights}"
        folder.mkdir()
        (folder / "model.safetensors").write_text(weights * 100)
        digest = digest_tree(folder)
        manifest = Manifest("sft", {"model": BASE}, {"model": digest}, details={"learning_rate": 1e-3})
        reports = report(digest, good), report(baseline, good - 100)
        verdict = decide(spec, {"heldout": reports[0]}, {"heldout": reports[1]})
        if weights == "a":
            book.register("words", folder, manifest, verdict)
        else:
            book.register("words", folder, manifest)
            for name, side in zip(("candidate", "baseline"), reports, strict=True):
                side.save(tmp_path / "evals" / name)
            paths = [{"heldout": tmp_path / "evals" / name} for name in ("candidate", "baseline")]
            save_verdict(tmp_path / "gate", verdict, spec, *paths)
        baseline = digest
    book.close()
    return tmp_path


def test_promote_show_verify_and_roll_back(run, gated):
    assert "words@1" in run("promote", "words@1") and "[champion]" in run("list")
    assert "[champion]" in run("promote", "words@2", "--verdict", "gate", "--expected-epoch", "1")
    shown = run("show", "alias:champion")
    for expected in ("words@2", "path  registry/models/", "sft  sha256:", "model  " + BASE, "promote by"):
        assert expected in shown
    assert "gate  PASS" in run("show", "words@previous")
    assert run("verify", "words@champion").startswith("words@2: 3 files and 1 manifests are intact")
    assert "words@1" in run("rollback", "words", "--reason", "wrong answers")
    lines = run("list", "words").splitlines()
    assert "[champion]" in lines[0] and "hold: wrong answers" in lines[1]


def test_hold_and_release(run, gated):
    run("hold", "words@1", "--reason", "not yet")
    with pytest.raises(RegistryError, match="on hold: not yet"):
        run("promote", "words@1")
    run("release", "words@1")
    run("promote", "words@1")
    with pytest.raises(RegistryError, match="a hold needs a reason"):
        run("hold", "words@1", "--reason", " ")
    with pytest.raises(RegistryError, match="words@1 has no hold"):
        run("release", "words@1")
    acts = [line.split("  ")[2].split(",")[0] for line in run("log").splitlines()[2:5]]
    assert acts == ["tag words@1: key hold", "untag words@1: key hold", "promote words@1: alias champion"]
    assert run("log", "--kind", "untag").count("untag words@1") == 1


def test_refusals_reach_the_user(run, gated):
    with pytest.raises(RegistryError, match="registered without a verdict: name one with --verdict"):
        run("promote", "words@2")
    with pytest.raises(RegistryError, match="nothing holds champion yet"):
        run("promote", "words@2", "--verdict", "gate")
    with pytest.raises(RegistryError, match="got no registry here"):
        run("list", "--registry", "elsewhere")
    assert not (gated / "elsewhere").exists()


def test_a_changed_item_behind_a_verdict_stops_the_promotion(run, gated):
    run("promote", "words@1")
    items = gated / "evals" / "candidate" / "items.jsonl"
    items.write_text(items.read_text().replace("[0.0]", "[1.0]", 1))
    with pytest.raises(ValueError, match="does not match"):
        run("promote", "words@2", "--verdict", "gate")


def test_the_card_is_printed(run, gated):
    assert "# words, version 1" in run("show", "words@1", "--card")


def test_a_mirror_that_is_down_is_reported_and_costs_nothing(run, gated):
    said = run("mirror", "http://127.0.0.1:9", code=75)
    assert said.startswith("0 events sent; 2 wait: ConnectionRefusedError")


def test_show_names_the_adapter_for_the_given_base(run, gated, tmp_path):
    adapter = tmp_path / "adapter_total"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    made = {"model": digest_tree(tmp_path / "model-a"), "adapter_total": digest_tree(adapter)}
    book = Registry(tmp_path / "registry")
    book.register(
        "low", tmp_path / "model-a", Manifest("sft", {"model": BASE}, made), evidence={"adapter_total": adapter}
    )
    book.close()
    (line,) = [line for line in run("show", "low@1").splitlines() if "adapter_total" in line]
    assert f"adapters/{made['adapter_total'].removeprefix('sha256:')}" in line
    assert BASE in line
    assert "adapter_total" not in run("show", "words@1")


def test_the_log_says_who_did_what_and_the_alarm_rings_on_the_command_line(run, gated, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_ACTOR", "ada@lab")
    run("promote", "words@1")
    lines = run("log", "--by", "ada@lab", "--kind", "promote").splitlines()
    assert len(lines) == 2 and "ada@lab  promote words@1: alias champion" in lines[0]
    assert lines[1].startswith("1 of 3 entries; the last seal is sha256:")
    run("log", "--head", lines[1].split()[-1])
    with pytest.raises(RegistryError, match="expected a date such as 2026-01-31"):
        run("log", "--since", "yesterday")
    with pytest.raises(RegistryError, match="got kind 'promotion', expected one of add, decide, look, promote"):
        run("log", "--kind", "promotion")
    assert run("log", "--kind", "remove").startswith("0 of 3 entries")
    db = sqlite3.connect("registry/registry.sqlite")
    db.execute("UPDATE aliases SET version = 2")
    db.commit()
    db.close()
    with pytest.raises(RegistryError, match="the log is not as it was written"):
        run("log")


def test_remove_and_gc_say_what_goes_and_what_stays(run, gated):
    assert "words@2 would be removed" in run("remove", "words@2", "--reason", "old", "--dry-run")
    assert "words@2 is removed\nits files stay until" in run("remove", "words@2", "--reason", "old")
    assert run("list").count("words@") == 1
    for words, there in ((("gc", "--dry-run"), 2), (("gc",), 1)):
        said = run(*words)
        assert "3 objects (0.0 MiB)" in said and "kept: versions name them" in said
        assert len(list((gated / "registry" / "models").iterdir())) == there
    run("verify", "words@1")


def test_a_version_is_pushed_and_pulled_with_its_verdict(run, gated):
    run("promote", "words@1")
    said = run("push", "words@1", "store", "--alias", "champion")
    assert "words@1 is at store: 4 objects copied, 0 were there" in said
    assert "words@1 of store is words@1: 0 objects copied, 4 were here" in run("pull", "words@1", "store")
    said = run("pull", "words@champion", "store", "--registry", "elsewhere")
    assert "words@champion of store is words@1: 4 objects copied, 0 were here" in said
    assert "gate  PASS" in run("show", "words@1", "--registry", "elsewhere")
    assert "[champion]" in run("promote", "words@1", "--registry", "elsewhere")


def test_what_a_remote_lacks_and_an_alias_that_is_not_held_are_said(run, gated):
    with pytest.raises(RegistryError, match="does not hold champion here"):
        run("push", "words@1", "store", "--alias", "champion")
    with pytest.raises(RegistryError, match="store has no words@7; push it there first"):
        run("pull", "words@7", "store")
