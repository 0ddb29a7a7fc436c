"""Both sides train the same tokens with the same settings; the table; and the whole bench at three steps a stage."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import stage_trl
import time_to_accuracy
from posttrain.data.load import load_preference, load_prompts, load_sft
from posttrain.evidence import EvalReport, ItemRecord
from stage_posttrain import QUICKSTART, keys_of
from time_to_accuracy import SIDES, STAGES, Done, Options, render


def job(kind, **more):
    return {"kind": kind, "model": str(QUICKSTART / "base"), "seed": 3, "max_steps": 0} | more


@pytest.fixture
def first_rows(tmp_path, monkeypatch):
    """A stage's keys on the first 20 rows of its data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(kind):
        keys = keys_of(job(kind))
        source = Path(keys.datasets[0].path)
        short = tmp_path / source.name
        short.write_text("".join(source.read_text().splitlines(keepends=True)[:20]))
        return keys.model_copy(update={"datasets": [keys.datasets[0].model_copy(update={"path": str(short)})]})

    return make


def trained(tokenizer, row, answer):
    """Ids and mask of TRL's prompt and completion."""
    prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row[answer]))
    return whole, [False] * len(prompt) + [True] * (len(whole) - len(prompt))


def without_tail(sequence):
    """Our ids and mask up to the last trained token: the template's newline behind it is no target."""
    end = max(place for place, is_trained in enumerate(sequence.loss_mask) if is_trained) + 1
    return list(sequence.ids[:end]), list(sequence.loss_mask[:end])


def test_both_sides_train_the_same_sft_tokens_in_the_same_order(first_rows):
    keys, tokenizer = first_rows("sft"), AutoTokenizer.from_pretrained(QUICKSTART / "base")
    data = load_sft(keys, tokenizer)
    ours = [without_tail(data.rows[index]) for index in data.order(keys.seed, 0)]
    assert [trained(tokenizer, row, "completion") for row in stage_trl.rows_of(keys, tokenizer)] == ours


def test_both_sides_train_the_same_pairs(first_rows):
    keys, tokenizer = first_rows("dpo"), AutoTokenizer.from_pretrained(QUICKSTART / "base")
    data = load_preference(keys, tokenizer)
    ours = [
        (without_tail(row.chosen), without_tail(row.rejected))
        for row in map(data.rows.__getitem__, data.order(keys.seed, 0))
    ]
    rows = stage_trl.rows_of(keys, tokenizer)
    assert [tuple(trained(tokenizer, row, side) for side in ("chosen", "rejected")) for row in rows] == ours


def test_both_sides_sample_from_the_same_prompts(first_rows):
    keys, tokenizer = first_rows("grpo"), AutoTokenizer.from_pretrained(QUICKSTART / "base")
    data = load_prompts(keys, tokenizer)
    rows = stage_trl.rows_of(keys, tokenizer)
    theirs = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows]
    assert [tuple(ids) for ids in theirs] == [data.rows[index][1] for index in data.order(keys.seed, 0)]
    assert rows[0].keys() == {"prompt", "answer"}


@pytest.mark.slow
def test_trl_is_given_the_pipelines_hyperparameters(tmp_path):
    configs = {kind: stage_trl.config_of(kind, keys_of(job(kind)), tmp_path)[1] for kind in STAGES}
    assert {kind: (c.learning_rate, c.lr_scheduler_type.value, c.max_steps) for kind, c in configs.items()} == {
        "sft": (1e-3, "cosine", -1), "dpo": (5e-5, "cosine", 40), "grpo": (7e-5, "constant", 120),
    }  # fmt: skip
    assert (configs["dpo"].loss_type, configs["dpo"].loss_weights) == (["sigmoid", "sft"], [1.0, 1.0])
    grpo = configs["grpo"]
    assert (grpo.generation_batch_size, grpo.num_generations, grpo.beta, grpo.max_completion_length) == (
        64,
        8,
        0.05,
        64,
    )
    assert not any(config.bf16 or config.gradient_checkpointing for config in configs.values())


def test_a_shorter_run_changes_the_steps_only():
    whole, short = keys_of(job("dpo")), keys_of(job("dpo", max_steps=3))
    assert whole.model_copy(update={"max_steps": 3}) == short


def report(suite, scores):
    items = tuple(ItemRecord(str(place), "", (float(score),), None, ("",)) for place, score in enumerate(scores))
    return EvalReport(suite, "gate", "s", "m", "boxed", items, {}, 0.0)


def done(seconds, scores):
    record = {"call_s": seconds, "process_s": 2 * seconds, "others_cpus": 0.0, "losses": [1.0]}
    return Done(record, Path(), {name: report(name, scores) for name in ("heldout", "clean")})


def test_the_table_pairs_by_item_and_divides_by_ours():
    seconds = {"ours": 10.0, "trl": 30.0}
    scores = {"ours": [1, 1, 1, 0], "trl": [1, 1, 0, 0]}
    runs = {
        (s, side, stage): done(seconds[side] * s, scores[side]) for s in (1, 2) for side in SIDES for stage in STAGES
    }
    text = render(runs, Options((1, 2), 1, 0, "gate", Path()))
    [whole] = [line for line in text.splitlines() if "all three" in line]
    cells = [cell.strip() for cell in whole.split("|")[1:-1]]
    assert cells[1:5] == ["45 s", "135 s", "**3.00×** (3.00–3.00)", "**3.00×** (3.00–3.00)"]
    assert [cell.split(" (")[0] for cell in cells[5:]] == ["75.0 %", "50.0 %", "+25.0"]
    assert text.count("3.00× | 3.00× |") == 2


def test_another_first_loss_stops_the_bench():
    with pytest.raises(SystemExit, match="on the same batch"):
        time_to_accuracy.check_first_loss(done(1.0, [1]), Done({"losses": [1.01]}, Path(), {}))


def test_a_finished_stage_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(time_to_accuracy, "evaluated", lambda *_: {})
    started = []

    def timed(script, asked, folder, options):
        started.append(script)
        return {"call_s": 1.0, "process_s": 2.0, "others_cpus": 0.0, "losses": [1.0], "finished": "now"}

    monkeypatch.setattr(time_to_accuracy, "timed", timed)
    options = Options((1,), 1, 3, "dev", tmp_path)
    done = [
        time_to_accuracy.run_stage(1, "ours", "sft", (parent, "model"), options)
        for parent in ("base", "base", "another", "base", "another")
    ]
    assert started == [SIDES["ours"]] * 2
    folders = [one.model.parent for one in done]
    assert folders == [folders[0], folders[0], folders[2], folders[0], folders[2]] and folders[0] != folders[2]


def test_a_cut_run_makes_place_for_the_next_and_hides_no_finished_one(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "log.txt").touch()
    (tmp_path / "sft.2").mkdir()
    (tmp_path / "sft.2" / "done.json").write_text('{"job": {"seed": 1}}')
    assert time_to_accuracy.kept_run(tmp_path / "sft", {"seed": 2}) == (tmp_path / "sft", None)
    assert time_to_accuracy.kept_run(tmp_path / "sft", {"seed": 1}) == (tmp_path / "sft.2", {"job": {"seed": 1}})


def test_a_checkout_that_was_moved_runs_no_finished_stage_again(tmp_path, monkeypatch):
    """Paths stand in the job itself and within the keys that are changed."""
    monkeypatch.setattr(time_to_accuracy, "evaluated", lambda *_: {})
    started = []
    for name in ("here", "thére"):
        root = tmp_path / name
        if started:
            (tmp_path / "here").rename(root)
        monkeypatch.setattr(time_to_accuracy, "ROOT", root)
        monkeypatch.setattr(time_to_accuracy, "timed", lambda *_, root=root: started.append(root) or {"call_s": 1.0, "process_s": 2.0, "others_cpus": 0.0})  # fmt: skip
        job = {"kind": "sft", "model": str(root / "base"), "folder": str(root / "out" / "sft"), "set": [f"datasets=[{{path: {root}/rows.jsonl, type: chat}}]"]}  # fmt: skip
        time_to_accuracy.run_job("sft", "stage_posttrain.py", job, Options((1,), 1, 3, "dev", root / "out"))
    assert started == [tmp_path / "here"]


@pytest.mark.slow
def test_three_steps_a_stage_go_all_the_way(tmp_path, monkeypatch):
    """Two processes per stage; from the base both sides follow the same losses."""
    monkeypatch.setattr(time_to_accuracy, "STAGES", ("sft",))
    runs = time_to_accuracy.run_all(Options((1,), 1, 3, "dev", tmp_path))
    ours, trl = (runs[1, side, "sft"]["losses"] for side in SIDES)
    assert ours == pytest.approx(trl, rel=1e-4) and len(ours) == 3
    assert json.loads((tmp_path / "seed-1" / "ours-1-sft" / "done.json").read_text())["job"]["kind"] == "sft"
    assert (tmp_path / "seed-1" / "trl-1-sft" / "model" / "model.safetensors").exists()
