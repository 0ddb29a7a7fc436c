"""`posttrain init`: what it writes runs, for every goal; what cannot run is refused before anything is written."""

import io
from pathlib import Path

import pytest

from posttrain.cli.app import _run
from posttrain.cli.init import GOALS, OWN_REWARD, SAMPLES
from posttrain.config.load_pipeline import load_pipeline
from posttrain.report.records import read_run

OWN_MODEL = Path(__file__).parents[2] / "examples" / "own-model"
FEW = {
    "imitate": {},
    "prefer": {},
    "solve": {"num_generations": 2, "num_prompts_per_step": 2, "max_completion_length": 4},
    "distill": {"num_generations": 2, "num_prompts_per_step": 2, "max_completion_length": 4},
}
DATA = {"imitate": "sft", "prefer": "pairs", "solve": "prompts", "distill": "prompts"}


@pytest.fixture
def project(tmp_path, model_dir, monkeypatch):
    """`project("solve", "--data", …)`: the exit code, and the folder that it was to write."""
    monkeypatch.chdir(tmp_path)

    def write(goal, *words):
        model = str(model_dir("qwen3"))
        teacher = ["--reward", model] if goal == "distill" else []
        folder = tmp_path / f"my {goal}"
        return _run(["init", str(folder), "--model", model, "--goal", goal, *teacher, *words, "--yes"]), folder

    return write


def run_once(folder, goal):
    kind = GOALS[goal].kind
    sets = [f"--set={kind}.{key}={value}" for key, value in {"max_steps": 1, **FEW[goal]}.items()]
    code = _run(["run", str(folder / "pipeline.yaml"), "--quiet", *sets])
    return code, read_run(next((folder / "runs").iterdir()))


@pytest.mark.parametrize("goal", ["imitate", "prefer", pytest.param("solve", marks=pytest.mark.slow), pytest.param("distill", marks=pytest.mark.slow)])  # fmt: skip
def test_the_project_runs_as_it_was_written(project, goal, capsys):
    code, folder = project(goal)
    assert code == 0, capsys.readouterr().err
    assert {"pipeline.yaml", "README.md", "data"} <= {path.name for path in folder.iterdir()}
    code, run = run_once(folder, goal)
    assert code == 0, capsys.readouterr().err
    assert [stage.kind for stage in run.stages] == [GOALS[goal].kind]
    assert (run.folder / "stages" / f"01-{GOALS[goal].kind}" / "adapter" / "adapter_config.json").exists()
    assert f"runs/{run.folder.name}/stages/01-{GOALS[goal].kind}/model" in (folder / "README.md").read_text()


@pytest.mark.parametrize("goal", GOALS)
def test_each_goal_reads_the_user_s_rows_where_they_are(project, data_dir, goal, capsys):
    data = data_dir / f"{DATA[goal]}.jsonl"
    code, folder = project(goal, "--data", str(data))
    assert code == 0, capsys.readouterr().err
    (stage,) = load_pipeline(folder / "pipeline.yaml").keys.stages
    assert (stage.kind, [one.path for one in stage.keys.datasets]) == (GOALS[goal].kind, [str(data)])
    assert not (folder / "data").exists()


def test_rows_with_labels_are_trained_by_kto(project, data_dir):
    code, folder = project("prefer", "--data", str(data_dir / "kto.jsonl"))
    assert code == 0
    assert load_pipeline(folder / "pipeline.yaml").keys.stages[0].keys.loss_type == "kto"


def test_the_five_questions_are_asked_and_the_goal_is_guessed_from_the_rows(tmp_path, model_dir, data_dir, monkeypatch, capsys):  # fmt: skip
    answers = [str(model_dir("qwen3")), str(data_dir / "prompts.jsonl"), "", f"{data_dir / 'rewards.py'}:spread", "cpu"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{answer}\n" for answer in answers)))
    folder = tmp_path / "asked"
    assert _run(["init", str(folder)]) == 0
    asked = capsys.readouterr().err
    assert asked.index("Model") < asked.index("Data") < asked.index("Goal") < asked.index("Reward") < asked.index("Machine")  # fmt: skip
    assert "[solve]" in asked and "imitate" not in asked
    (stage,) = load_pipeline(folder / "pipeline.yaml").keys.stages
    assert (stage.kind, stage.keys.device, stage.keys.reward_funcs) == ("grpo", "cpu", [answers[3]])


def test_what_is_not_answered_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert _run(["init", str(tmp_path / "p")]) == 64
    assert "--model was left out" in capsys.readouterr().err
    assert _run(["init", str(tmp_path / "p"), "--yes", "--model", "m", "--goal", "distill"]) == 64
    assert "--reward was left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--goal", "win"], "--goal win: expected one of imitate, prefer, solve, distill"),
        (["--goal", "prefer", "--data", "sft.jsonl"], "its rows serve imitate"),
        (["--goal", "imitate", "--reward", "boxed"], "is told by its rows alone"),
        (["--goal", "imitate", "--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--goal", "solve", "--data", "bare.jsonl"], "a column `answer`, and there is prompt"),
        (["--goal", "solve", "--reward", "nothing.py:here"], "no file nothing.py"),
        (["--goal", "solve", "--reward", "own.py:corect"], "no function 'corect'; did you mean 'correct'?"),
        (["--goal", "solve", "--reward", "boxd"], "did you mean 'boxed'?"),
        (["--goal", "solve", "--reward", "model:nothing"], "model:nothing"),
        (["--goal", "imitate", "--model", "./none"], "./none does not exist"),
        (["--goal", "imitate", "--machine", "1xabacus"], "no card abacus"),
        (["--goal", "imitate", "--machine", "eight"], "expected COUNTxCARD"),
    ],
)
def test_what_could_not_run_is_refused_and_nothing_is_left_behind(project, data_dir, words, said, capsys, tmp_path):
    (tmp_path / "sft.jsonl").write_text((data_dir / "sft.jsonl").read_text())
    (tmp_path / "own.py").write_text("def correct(completions, **columns):\n    return [0.0 for _ in completions]\n")
    (tmp_path / "bare.jsonl").write_text('{"prompt": "What is 1 plus 1?"}\n')
    code, folder = project("imitate", *words)
    assert code == 64
    assert said in capsys.readouterr().err
    assert not list(folder.rglob("*"))


@pytest.mark.parametrize("file", ["rewards.py:other", OWN_REWARD])
def test_a_reward_that_is_there_is_looked_into_before_anything_is_written(project, tmp_path, file, capsys):
    (tmp_path / "rewards.py").write_text("def other(completions, **columns):\n    return [0.0 for _ in completions]\n")
    code, folder = project("solve", "--reward", file)
    assert code == (0 if file == "rewards.py:other" else 64)
    if code:
        assert "no function 'correct' (it defines other)" in capsys.readouterr().err and not folder.exists()


def test_a_base_without_a_chat_template_learns_conversations_by_one_that_is_written(tmp_path, make_local_model, monkeypatch, data_dir, capsys):  # fmt: skip
    raw = make_local_model("qwen3")
    (raw / "chat_template.jinja").unlink()
    words = ["--model", str(raw), "--goal", "imitate", "--machine", "cpu", "--yes"]
    assert _run(["init", str(tmp_path / "p"), *words]) == 0
    code, run = run_once(tmp_path / "p", "imitate")
    assert code == 0, capsys.readouterr().err
    assert (run.folder / "stages/01-sft/model/chat_template.jinja").exists()
    (tmp_path / "texts.jsonl").write_text('{"text": "It rains."}\n')
    assert _run(["init", str(tmp_path / "texts"), "--data", str(tmp_path / "texts.jsonl"), *words]) == 0
    assert not (tmp_path / "texts" / "chat.jinja").exists(), "texts need none"


@pytest.mark.parametrize("text", ["{", "\xff", "[]"])
def test_a_tokenizer_that_cannot_be_read_is_said_in_one_line(tmp_path, make_local_model, text, capsys):
    raw = make_local_model("qwen3")
    (raw / "chat_template.jinja").unlink()
    (raw / "tokenizer_config.json").write_bytes(text.encode("latin-1"))
    assert _run(["init", str(tmp_path / "p"), "--model", str(raw), "--goal", "solve", "--yes"]) == 64
    assert capsys.readouterr().err.count("\n") == 1


def test_a_link_in_the_folder_is_not_written_through(project, tmp_path, capsys):
    (tmp_path / "my imitate").mkdir()
    (tmp_path / "my imitate" / "pipeline.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    code, _ = project("imitate")
    assert code == 64 and "pipeline.yaml is there already" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere.yaml").exists()


def test_what_to_type_next_can_be_pasted(project, capsys, tmp_path):
    project("imitate")
    assert f"posttrain run '{tmp_path}/my imitate/pipeline.yaml'" in capsys.readouterr().out


def test_a_base_that_never_learnt_to_answer_is_refused_for_other_goals(tmp_path, make_local_model, monkeypatch, capsys):
    raw = make_local_model("qwen3")
    (raw / "chat_template.jinja").unlink()
    assert _run(["init", str(tmp_path / "p"), "--model", str(raw), "--goal", "solve", "--yes"]) == 64
    assert "begin with --goal imitate" in capsys.readouterr().err


def test_nothing_is_written_over(project, capsys):
    project("imitate")
    code, folder = project("imitate")
    assert code == 64
    assert "data/train.jsonl is there already" in capsys.readouterr().err
    assert (folder / "pipeline.yaml").exists()


def test_the_machine_decides_how_much_is_trained(tmp_path, capsys):
    """8 B fit a large card as they are, a small one in 4 bits, and a laptop's processor not at all."""
    model = tmp_path / "big"
    model.mkdir()
    (model / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, '
        '"num_key_value_heads": 8, "vocab_size": 128256}'
    )
    (model / "chat_template.jinja").write_text("x")
    chosen = {}
    for machine in ("8xh100", "1xrtx4090"):
        folder = tmp_path / machine
        assert _run(["init", str(folder), "--model", str(model), "--goal", "imitate", "--machine", machine, "--yes"]) == 0, capsys.readouterr().err  # fmt: skip
        chosen[machine] = load_pipeline(folder / "pipeline.yaml").keys.stages[0].keys.adapter
    assert chosen == {"8xh100": "lora", "1xrtx4090": "qlora"}
    assert "torchrun: torchrun --nproc-per-node 8" in capsys.readouterr().out


def test_what_people_copy_by_hand_is_what_init_writes():
    for ours, example in (("imitate.jsonl", "data/sft.jsonl"), ("solve.jsonl", "data/prompts.jsonl"), ("rewards.py", "rewards.py")):  # fmt: skip
        assert (SAMPLES / ours).read_text() == (OWN_MODEL / example).read_text()
