"""Symlinks in the data, the base, the runs and the registry: followed, and what they lead to is what is pinned."""

import shutil

import pytest

from posttrain.cli import doctor
from posttrain.cli.app import main
from posttrain.files import file_digests

SFT = {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 8}
NOT_WORSE = {"guards": [{"suite": "yes", "margin": 0.4}]}


@pytest.fixture
def linked(project, model_dir, tmp_path):
    """A project of which everything lies elsewhere; the base as the hub's cache lays it out, each file a link to a blob."""
    made = project([{"sft": SFT}], gate=NOT_WORSE, register={"name": "yes"})
    disk = tmp_path / "disk"
    disk.mkdir()
    for name in ("sft.jsonl", "yes.jsonl"):
        shutil.move(made.folder / name, disk / name)
    for name in ("runs", "registry"):
        (disk / name).mkdir()
    for path in disk.iterdir():
        (made.folder / path.name).symlink_to(path)
    (made.folder / "base").mkdir()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(model_dir("qwen3").iterdir())):
        shutil.copy(path, blobs / str(number))
        (made.folder / "base" / path.name).symlink_to(blobs / str(number))
    made.values["base_model"] = "./base"
    return made


def call(*words):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return caught.value.code


def test_a_project_made_of_links_trains_the_same_and_is_found_whole(linked, tmp_path):
    plain = linked.copy_to(tmp_path / "plain")
    assert plain.command() == 0
    assert not any(path.is_symlink() for path in plain.folder.rglob("*"))
    assert linked.command() == 0
    digests = [[entry.output_digest for entry in made.state.stages] for made in (linked, plain)]
    assert digests[0] == digests[1]
    assert linked.state.pins["base_model"] == plain.state.pins["base_model"]
    registry = ["--registry", linked.folder / "registry"]
    assert call("registry", "verify", "yes@1", *registry) == 0
    assert call("reproduce", "yes@1", "--level", "2", *registry) == 0
    assert (linked.folder / "runs").is_symlink() and (linked.folder / "registry").is_symlink()


def test_a_model_moved_to_another_disk_with_a_link_left_behind_is_taken_over(linked, tmp_path, capsys, monkeypatch):
    assert linked.command() == 0
    model = linked.out / "stages/01-sft/model"
    shutil.move(model, tmp_path / "moved")
    model.symlink_to(tmp_path / "moved")
    before = file_digests(tmp_path / "moved")
    assert linked.command() == 0
    assert "done before with the same inputs" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(doctor, "CHECKS", ())
    assert call("doctor", linked.out) == 0
    (tmp_path / "moved/config.json").write_text("{}")
    capsys.readouterr()
    assert linked.command() == 64
    assert "stages/01-sft/model/config.json has been changed" in capsys.readouterr().err
    assert before.keys() == file_digests(tmp_path / "moved").keys()


@pytest.mark.parametrize("name", ["sft.jsonl", "yes.jsonl", "base/config.json", "base"])
def test_a_link_that_leads_nowhere_is_named(linked, tmp_path, capsys, name):
    link = linked.folder / name
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    else:
        link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    assert linked.command() == 64
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert name.split("/")[0] in error
