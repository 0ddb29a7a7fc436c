"""The bench beside other tools: its table, its environments, its questions. No peer is installed or run here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.docs.shown import ROOT

import peer_envs
import peer_evals
import peer_table
import peers
import turns
import workload
from gpu_report import LeftOut
from posttrain.evals.suite import load_suite
from posttrain.files import read_json_lines

FACTS = {"packages": "torch 0", "machine": "a machine"}


def turn(tokens, cpu_seconds, seconds, peak_mb=100.0):
    return {"tokens": tokens, "cpu_seconds": cpu_seconds, "seconds": seconds, "steps": 1, "peak_mb": peak_mb, "others_cpus": seconds / 100}  # fmt: skip


def result(ours, theirs, equal="losses to 1e-06"):
    return {"ours": ours, "theirs": theirs, "equal": equal, "unit": "tok", "pairs": len(ours)}


def cells(text, name):
    [line] = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_a_ratio_is_our_rate_by_theirs_pair_by_pair_and_what_is_left_out_has_its_reason():
    first, second, third = peers.ROWS[:3]
    # Of the processor 10/5, 20/5 and 30/5 tokens a second by 1: 2, 4 and 6; by the clock half of that.
    ours = [turn(n, 5.0, 10.0, 50.0) for n in (10, 20, 30)]
    theirs = [turn(7, 7.0, 7.0, 200.0)] * 3
    results = {first.name: result(ours, theirs), second.name: {"left_out": "no such package", "pairs": 3}}
    text = peer_table.render([first, second, third], results, FACTS)
    assert cells(text, first.title) == [
        first.title, first.peer, "**4.00×** (2.00–6.00)", "2.00× (1.00–3.00)", "4 tok", "1 tok", "0.25×", "losses to 1e-06", "0.10",
    ]  # fmt: skip
    assert text.splitlines()[0] == "torch 0; a machine; median of 3 pairs."
    assert text.splitlines()[-3] == f"Left out: {second.title}, beside {second.peer}: no such package"
    assert text.splitlines()[-1] == f"Not measured: {third.name}."
    assert text.count("\n| ") == 2


def test_a_row_that_cannot_be_run_is_left_out_and_the_next_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr("sys.argv", ["peers.py", "--threads", "1", "--pairs", "1"])

    def missing(options):
        raise LeftOut("cannot be installed here: ERROR: none\nmore")

    def fine(options):
        return peer_table.Found([turn(1, 1.0, 1.0)], [turn(1, 2.0, 2.0)], "all")

    rows = [peers.PeerRow("a", "work", "tool", missing), peers.PeerRow("b", "other work", "tool", fine)]
    monkeypatch.setattr(peers, "ROWS", rows)
    peers.main()
    shown = capsys.readouterr().out
    assert cells(shown, "other work")[2] == "**2.00×** (2.00–2.00)"
    assert "Left out: work, beside tool: cannot be installed here: ERROR: none\n" in shown
    # What was measured stays for the table of a later call with the same settings, and for no other.
    monkeypatch.setattr(peers, "ROWS", rows[1:])
    monkeypatch.setattr("sys.argv", ["peers.py", "--threads", "1", "--pairs", "1", "--row", "b"])
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert peers.kept_rows(kept["facts"]).keys() == {"a", "b"}
    assert peers.kept_rows(kept["facts"] | {"machine": "another"}) == {}


def test_every_peer_has_its_pins_and_the_torch_of_all():
    ours = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)  # fmt: skip
    for name in peer_envs.PEERS:
        pins = peer_envs.pins_of(name).read_text()
        assert f"\ntorch=={ours['torch']}\n" in pins and peer_envs.version_of(name)
        assert (peer_envs.HERE / f"side_{name}.py").exists()


def test_an_environment_that_cannot_be_made_says_why_and_is_tried_again(monkeypatch, tmp_path):
    monkeypatch.setattr(peer_envs, "FOLDER", tmp_path)
    monkeypatch.setattr(peer_envs.sys, "executable", shutil.which("false"))
    with pytest.raises(LeftOut, match="cannot be installed here: status 1"):
        peer_envs.python_of("axolotl")
    assert not (tmp_path / "axolotl" / "pins.txt").exists()


@pytest.mark.parametrize("kind", ["answers", "choices"])
def test_suite_and_task_ask_the_same_questions(kind, tmp_path):
    files = peer_evals.write(kind, tmp_path, 48)
    task = yaml.safe_load(Path(files["task"]).read_text())
    documents = [row for _, row in read_json_lines(tmp_path / f"peers-{kind}.docs.jsonl")]
    items = load_suite("asked", tmp_path / f"peers-{kind}.suite.jsonl").on("gate")
    assert len(items) == len(documents) == 1000
    for item, document in zip(items, documents, strict=True):
        if kind == "answers":
            assert (item.prompt[0]["content"], item.target) == (document["question"], document["target"])
        else:
            assert item.prompt == document["question"] + " Answer:"
            assert list(item.choices) == document["choices"] and item.target == document["choices"][document["label"]]
            assert len(set(item.choices)) == 4
    assert task["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / f"peers-{kind}.docs.jsonl")
    assert task["output_type"] == {"answers": "generate_until", "choices": "multiple_choice"}[kind]


def test_a_peer_is_handed_the_rows_in_our_order_with_their_ends(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}:", "completion": f" {n}"}) + "\n" for n in range(9)))
    rows = [row for _, row in read_json_lines(peers.with_ends(path))]
    order = workload.training_order(9, peers.SEED)
    assert order != sorted(order)
    assert rows == [{"prompt": f"{n}:", "completion": f" {n}{workload.END}"} for n in order]


def test_processors_seconds_are_of_the_whole_tree():
    """A grandchild that still runs counts too."""
    work = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint('done', flush=True)\ninput()"
    start = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {work!r}])"
    before = turns.own_seconds()
    child = subprocess.Popen([sys.executable, "-c", start], stdin=-1, stdout=-1, text=True)
    assert child.stdout.readline() == "done\n"
    while_alive = turns.own_seconds() - before
    child.communicate("\n")
    assert while_alive >= 0.29 and turns.own_seconds() - before >= while_alive - 0.05
