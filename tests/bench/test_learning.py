"""What comes after SFT: each way's YAML is what it says, curves are read as they were measured, and short runs go all the way."""

import json
from dataclasses import replace

import pytest

import learning
import taught
from learning import WAYS, Bench, told
from posttrain.evidence import EvalReport, ItemRecord
from stage_posttrain import QUICKSTART, keys_of
from taught import curve_of, until
from time_to_accuracy import Done, Options


def keys_of_way(name, *changes):
    way = WAYS[name]
    config = way.config and str(QUICKSTART / way.config)
    return keys_of({"kind": way.kind, "model": "m", "seed": 1, "max_steps": 0, "config": config, "set": changes})


def test_the_methods_of_rl_differ_in_the_method_alone():
    """As many answers a step, at the same rate and length, as many steps; a critic has one answer a prompt."""
    grpo, ppo, rlsd = keys_of_way("grpo", "grpo.beta=0"), keys_of_way("ppo"), keys_of_way("rlsd")
    for keys in (ppo, rlsd):
        for name in ("learning_rate", "lr_scheduler_type", "max_completion_length", "temperature", "beta", "epsilon"):
            assert getattr(keys, name) == getattr(grpo, name), name
        assert keys.rows_per_step(1) == grpo.rows_per_step(1)
    assert ppo.max_steps == grpo.max_steps
    off = keys_of_way("rlsd-off", "teacher_coef=0")
    assert off.model_copy(update={"teacher_coef": rlsd.teacher_coef}) == rlsd


def test_a_question_that_gives_its_answer_away_is_worded_as_the_teacher_s_prompt():
    row = {
        "messages": [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "Sure! \\boxed{3} Easy!"}]
    }
    [teacher] = keys_of_way("rlsd").teachers
    assert told(row)["messages"][0]["content"] == teacher.prompt.format(prompt="1+2?", answer="3")
    assert told(row)["messages"][1] == row["messages"][1]


def done(folder, scores, metrics=()):
    items = tuple(ItemRecord(str(place), "", (float(score),), None, ("",)) for place, score in enumerate(scores))
    report = EvalReport("heldout", "gate", "s", "m", "boxed", items, {}, 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return Done({"call_s": 2.0, "finished": "now"}, folder / "model", {"heldout": report, "clean": report})


def test_a_target_is_reached_where_two_measurements_in_a_row_are_there(tmp_path):
    """10 tokens a step, measured every other step; 0.8 at step 4 falls again, from step 8 on it holds: 80 tokens."""
    scores = {2: 0.5, 4: 0.8, 6: 0.7, 8: 0.8, 10: 0.9}
    rows = [
        {"step": step, "loss_tokens": 10} | ({"eval_score": scores[step]} if step in scores else {})
        for step in range(1, 11)
    ]
    curve = curve_of(done(tmp_path, [], rows))
    assert curve == [(10 * step, score) for step, score in scores.items()]
    assert until(curve, 0.8) == 80
    assert until(curve, 0.95) is None


def test_the_table_has_each_way_with_what_it_gained(tmp_path, monkeypatch):
    before, after = done(tmp_path / "a", [1, 0, 0, 0]), done(tmp_path / "b", [1, 1, 1, 0])
    monkeypatch.setattr(Bench, "start", lambda self, name="sft": before)
    monkeypatch.setattr(Bench, "done", lambda self, name, seed: after)
    line = learning.render(Bench(Options((1,), 1, 0, "gate", tmp_path), 0), ["synth"], [1, 2]).splitlines()[-1]
    cells = [cell.strip().split(" (")[0] for cell in line.split("|")[1:-1]]
    assert cells == [
        WAYS["synth"].title,
        "1, 2",
        "25.0 %",
        "75.0 %",
        "75.0 75.0",
        "+50.0",
        "25.0 %",
        "75.0 %",
        "2 s",
        "–",
    ]


def test_tokens_are_counted_until_shares_of_the_teacher_s_accuracy(tmp_path):
    """The teacher has 0.5 of four questions: 0.45 is 90 % of it, reached after 100 tokens; 0.475 never is for two readings."""
    steps = [{"step": step, "loss_tokens": 50, "eval_score": score} for step, score in enumerate((0.2, 0.46, 0.47), 1)]
    of_teacher, student = done(tmp_path / "t", [1, 1, 0, 0]), done(tmp_path / "s", [], steps)
    text = taught.tokens_to_teacher("after SFT", of_teacher, "gate", [("OPD", 1, student)])
    assert "50.0 % on 4 gate questions" in text
    assert text.splitlines()[-1] == "| OPD | 1 | 100 | 100 | not in 150 | 47.0 % |"


def test_answers_are_counted_as_the_stage_samples_them(tmp_path):
    """Two steps of 128 answers, 3 and 4 tokens long."""
    lengths = [{"step": step, "completions/mean_length": length} for step, length in ((1, 3), (2, 4))]
    found = done(tmp_path, [], lengths)
    assert learning.answer_tokens(replace(found, record={"metrics": {"rows_per_step": 128}})) == [384, 512]
    assert keys_of_way("ebft").rows_per_step(1) == 128


def test_a_share_of_another_way_s_tokens_is_a_geometric_mean_over_seeds(tmp_path):
    """OPD takes a half and an eighth of SFT's tokens to 90 % of 0.5: a quarter; and with seed 2 it never gets to 95 %."""

    def student(name, tokens, last):
        scores = (0.1, 0.46, last, last)
        rows = [{"step": step, "loss_tokens": tokens / 2, "eval_score": score} for step, score in enumerate(scores, 1)]
        return done(tmp_path / name, [], rows)

    curves = [
        ("SFT", 1, student("a", 200, 0.5)), ("SFT", 2, student("b", 800, 0.5)),
        ("OPD", 1, student("c", 100, 0.5)), ("OPD", 2, student("d", 100, 0.46)),
    ]  # fmt: skip
    text = taught.against("SFT", done(tmp_path / "t", [1, 1, 0, 0]), "gate", curves)
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    assert cells[0] == "OPD" and cells[3] == "there with both in 1 of 2 seeds"
    assert cells[2].split(" (")[0] == "0.25"


def test_who_is_read_is_read_after_as_many_answers_as_the_others(tmp_path, monkeypatch):
    """Two readings in a row are likelier there by chance where there are more of them."""
    settings = {str(setting): setting for found in taught.SEARCHED.values() for setting in found}
    assert {name: one.prompts * one.answers * one.every for name, one in settings.items()} == dict.fromkeys(settings, 128)  # fmt: skip
    (tmp_path / "teacher").mkdir()
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.setattr(Bench, "done", lambda self, name, seed: Done({}, tmp_path / "teacher", {}))
    monkeypatch.setattr(Bench, "rows", lambda self, *_: tmp_path / "rows.jsonl")
    for of_teacher, settings in taught.TAUGHT.items():
        bench = Bench(Options((1,), 1, 0, "gate", tmp_path), 0, of_teacher)
        assert list(settings) == [name for name, way in WAYS.items() if way.taught]
        for name in settings:
            keys = keys_of_way(name, *WAYS[name].changes(bench, 1))
            assert keys.rows_per_step(1) * keys.eval_steps == 128, (of_teacher, name)


def test_a_search_reads_dev_questions_and_the_rows_read_gate(tmp_path):
    asked = {split: taught.curve_suite(tmp_path, split).read_text() for split in taught.CURVE_ITEMS}
    questions = {split: {json.loads(line)["id"] for line in text.splitlines()} for split, text in asked.items()}
    assert {split: len(ids) for split, ids in questions.items()} == taught.CURVE_ITEMS
    assert not questions["dev"] & questions["gate"]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Two steps of every stage, the base in the place of the model after SFT."""
    base = Done({"finished": "base"}, QUICKSTART / "base", {})
    monkeypatch.setattr(Bench, "start", lambda self, name="sft": base)
    return Bench(Options((1,), 1, 2, "dev", tmp_path), 2)


def test_ppo_goes_from_its_yaml_to_an_accuracy(bench):
    """Its warm-up is longer than the run: the base answers as before."""
    found = bench.done("ppo", 1)
    assert len(learning.answer_tokens(found)) == 2
    assert found["metrics"]["rows_per_step"] == keys_of_way("ppo").rows_per_step(1) == 64
    assert found.reports["heldout"].mean == 0


@pytest.mark.slow
def test_every_way_goes_from_its_yaml_to_an_accuracy(bench, monkeypatch):
    """The base has no right answer to keep, so every answer is."""
    rows = Bench.rows
    monkeypatch.setattr(Bench, "rows", lambda self, name, seed, model, changes=(): rows(self, name, seed, model, ["correct_from=-1", "max_completion_length=8", "keep_truncated=true"]))  # fmt: skip
    for name in WAYS:
        assert 0 <= bench.done(name, 1).reports["heldout"].mean <= 1, name


@pytest.mark.slow
def test_the_large_base_is_the_small_one_s_but_for_its_width(bench):
    """A step of each phase: it loads, and its tokenizer is the student's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = bench.large_base()
    assert AutoModelForCausalLM.from_pretrained(made).num_parameters() == 4_756_096
    of_teacher, of_student = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (made, QUICKSTART / "base"))
    assert of_teacher == of_student


@pytest.mark.slow
def test_a_search_reads_each_setting_on_what_it_trained(bench, monkeypatch):
    """Two steps of each kind: the tokens of its line are those that it was trained on."""
    searched = {name: settings[:1] for name, settings in taught.SEARCHED.items()}
    monkeypatch.setattr(learning, "SEARCHED", searched)
    rows = Bench.rows
    monkeypatch.setattr(Bench, "rows", lambda self, name, seed, model, changes=(): rows(self, name, seed, model, [*changes, "max_completion_length=8", "keep_truncated=true"]))  # fmt: skip
    lines = learning.search(bench, list(searched)).splitlines()[-2:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {settings[0]}" for settings in searched.values()]
    student = bench.done("search-imitate-0", taught.SEARCH_SEED)
    [(trained, _)] = curve_of(student)
    assert trained == sum(learning.answer_tokens(student)) > 0
