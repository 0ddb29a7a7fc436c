"""Weights go from run folders whose model is registered, and from no other; killed on the way, nothing is lost."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest

from posttrain.checkpoint.lock import run_lock
from posttrain.cli.app import main
from posttrain.config.stages import SFTKeys
from posttrain.distributed.ranks import SingleProcess
from posttrain.files import digest_tree, reading
from posttrain.pipeline import prune
from posttrain.pipeline.prune import prune_runs
from posttrain.recipes.run.stage import Stage
from posttrain.registry import Registry
from posttrain.report.build import build_report


def call(*words):
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return caught.value.code


@pytest.fixture
def done(promoted, tmp_path):
    """`promoted`, in a folder of its own."""
    shutil.copytree(promoted.folder, tmp_path / "project")
    return replace(promoted, folder=tmp_path / "project")


def pruned(run, **options):
    return list(prune_runs(run.folder / "runs", **options))


def weights(run):
    return sorted(path.name for path in run.out.glob("stages/*/*") if path.name in ("model", "checkpoints"))


def why_kept(run, **options):
    before = digest_tree(run.out, ignore=[".lock"])
    (one,) = [one for one in pruned(run, **options) if one.run == str(run.out)]
    assert digest_tree(run.out, ignore=[".lock"]) == before
    assert not one.folders
    return one.kept


def test_weights_go_and_what_was_recorded_stays(done, capsys):
    records = {
        path: path.read_bytes()
        for path in done.out.rglob("*")
        if path.is_file() and path.suffix in (".jsonl", ".json", ".yaml")
    }
    kept = {path: data for path, data in records.items() if not {"model", "checkpoints"} & set(path.parts)}
    (would,) = pruned(done, dry_run=True)
    assert weights(done) == ["checkpoints", "checkpoints", "model", "model"], "a dry run deletes nothing"
    assert would.folders == (
        "stages/01-sft/checkpoints", "stages/01-sft/model", "stages/02-dpo/checkpoints", "stages/02-dpo/model"
    )  # fmt: skip
    assert call("runs", "prune", str(done.folder / "runs")) == 0
    assert "deleted; its model is yes@1" in capsys.readouterr().out
    assert weights(done) == []
    assert {path: path.read_bytes() for path in kept} == kept
    build_report(done.out)
    registry = ["--registry", str(done.folder / "registry")]
    assert call("reproduce", "yes@1", *registry) == 0
    assert call("registry", "verify", "yes@1", *registry) == 0
    capsys.readouterr()
    assert call("runs", "prune", str(done.out), "--json") == 0, "again, on the run itself: nothing is left to go"
    (again,) = json.loads(capsys.readouterr().out)
    assert (again["folders"], again["num_bytes"], again["version"]) == ([], 0, "yes@1")


def test_a_pruned_run_is_not_gone_on_with_and_says_where_its_model_is(done, capsys):
    pruned(done)
    assert done.command() == 64
    assert "its model is yes@1 of the registry; `--on-change new-run` trains anew" in capsys.readouterr().err
    assert call("doctor", str(done.out)) in (0, 1)
    assert "pruned: the registry holds its model" in capsys.readouterr().out


def test_a_run_is_kept_whose_outcome_the_registry_does_not_hold(done, make_project, tmp_path):
    state = (done.out / "pipeline.json").read_text()
    book = done.registry()
    (done.folder / "registry").rename(tmp_path / "aside")
    assert "its registry is not at" in why_kept(done)
    (tmp_path / "aside").rename(done.folder / "registry")
    other = tmp_path / "empty"
    assert "name its folder with --registry" in why_kept(done, registry=other)
    assert not other.exists()
    path = max((done.folder / "registry/objects").glob("??/*"), key=lambda path: path.stat().st_size)
    path.chmod(0o644)
    with path.open("r+b") as handle:
        handle.write(b"damage")
    assert "content has changed" in why_kept(done)
    book.close()
    assert (done.out / "pipeline.json").read_text() == state


def test_a_run_that_is_unfinished_or_was_refused_its_alias_is_kept(done):
    state = done.state
    replace(state, registered=None).save(done.out)
    assert why_kept(done) == "its outcome is not registered (the run is passed)"
    replace(state, registered={**state.registered, "alias": None}).save(done.out)
    assert "refused its alias, which starting this run again may still give it" in why_kept(done)
    replace(state, status="stopped").save(done.out)
    assert "the run is stopped" in why_kept(done)
    state.save(done.out)
    with run_lock(done.out):
        assert "is in use by process" in next(iter(pruned(done))).kept


def test_a_run_that_another_run_or_a_version_starts_from_is_kept(done):
    other = done.folder / "runs/other"
    other.mkdir()
    shutil.copy(done.out / "pipeline.json", other)
    config = (done.out / "config.yaml").read_text()
    first = done.out / "stages/01-sft/model"
    base = next(line for line in config.splitlines() if line.startswith("base_model:"))
    (other / "config.yaml").write_text(config.replace(base, "base_model: ./runs/yes/stages/01-sft/model"))
    assert why_kept(done) == f"the run {other.resolve()} takes something from it"
    shutil.rmtree(other)
    book = done.registry()
    manifest = replace(book.chain("yes", 1)[0], inputs={**book.chain("yes", 1)[0].inputs, "model": digest_tree(first)})
    book.register("child", book.show("yes", 1).path, replace(manifest, outputs={"model": book.show("yes", 1).digest}))
    assert why_kept(done) == "child@1 was trained from a model in it, which the registry does not hold"
    book.close()


def test_a_dry_run_keeps_no_run_from_being_started_or_read(done, monkeypatch):
    verify, looked = Registry.verify, []

    def meanwhile(book, *version):
        with run_lock(done.out):
            looked.append(version)
        return verify(book, *version)

    monkeypatch.setattr(Registry, "verify", meanwhile)
    for found in prune_runs(done.folder / "runs", dry_run=True):
        assert found.folders and not found.kept
        with reading(done.out / "stages/01-sft/model"):
            pass
    assert looked


def test_a_run_whose_model_is_read_is_kept_and_who_reads_it_is_said(done):
    with reading(done.out / "stages/01-sft/model"):
        assert why_kept(done) == (
            f"{done.out}/stages/01-sft/model is read by process {os.getpid()}; stop that first, or wait for its end"
        )
    keys = SFTKeys(base_model=str(done.out / "stages/02-dpo/model"), datasets=[{"path": "rows.jsonl"}])
    stage = Stage("sft", done.folder / "alone", keys, SingleProcess())
    assert f"02-dpo/model is read by process {os.getpid()}" in why_kept(done), "a stage that trains on it elsewhere"
    stage.close()
    (one,) = pruned(done)
    assert not one.kept


@pytest.mark.parametrize("step", range(1, 9))
def test_killed_at_any_deletion_nothing_is_lost_and_the_next_time_ends_it(done, step):
    child = os.fork()
    if child == 0:
        seen = iter(range(1, 100))

        def dies(work):
            def wrapped(*words, **named):
                if next(seen) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return work(*words, **named)

            return wrapped

        prune.shutil.rmtree = dies(prune.shutil.rmtree)
        prune.Path.replace = dies(prune.Path.replace)
        pruned(done)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == -signal.SIGKILL
    book = done.registry()
    assert book.verify("yes", 1).num_files > 0
    book.close()
    (one,) = pruned(done)
    assert not one.kept
    assert list(done.out.glob("stages/*/.*.gone")) == []
    assert weights(done) == []


def test_a_folder_without_a_run_is_said(tmp_path, capsys):
    assert call("runs", "prune", str(tmp_path)) == 64
    assert "got no run here" in capsys.readouterr().err
