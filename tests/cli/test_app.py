import os
import re
import subprocess
import sys

import pytest
import typer

import posttrain
from posttrain.cli import app as app_module
from posttrain.cli.app import NO_PLACE, OTHER_WORDS, VERBS, available_verbs, load_verb, main
from posttrain.errors import DataError, TrainingError


def run(*argv):
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    return caught.value.code


def add_verb(monkeypatch, tmp_path, body):
    """A verb `trial` in a module of its own."""
    name = f"trial_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(VERBS, "trial", (name, "trial", "A verb on trial."))
    return name


def test_the_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"posttrain {posttrain.__version__}\n"


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_help_lists_the_verbs_that_are_there(capsys, argv):
    assert run(*argv) == 0
    output = capsys.readouterr().out
    listed = [verb for verb in VERBS if re.search(rf"^\W*{verb}\s+[A-Z]", output, re.MULTILINE)]
    assert listed == available_verbs()
    assert "explain" in listed


def test_every_available_verb_loads_and_has_help(capsys):
    for verb in available_verbs():
        assert load_verb(verb).name == verb
        assert run(verb, "--help") == 0
        assert f"posttrain {verb}" in capsys.readouterr().out


def test_a_verb_that_is_absent_leaves_the_others_alone(capsys, monkeypatch):
    monkeypatch.setitem(VERBS, "ghost", ("posttrain.cli.ghost_that_is_not_there", "ghost", "Not there."))
    assert "ghost" not in available_verbs()
    assert run("explain", "lora_r") == 0
    assert run("ghost") == 64
    assert "No such command 'ghost'" in capsys.readouterr().err


def test_a_typo_in_the_verb_names_the_nearest(capsys):
    assert run("explan") == 64
    assert "Did you mean 'explain'" in capsys.readouterr().err


def test_a_wrong_option_is_a_usage_error(capsys):
    assert run("explain", "--nonsense") == 64
    error = capsys.readouterr().err
    assert "--nonsense" in error
    assert "Traceback" not in error


def test_a_users_error_is_one_clean_message(capsys):
    assert run("explain", "lerning_rate") == 64
    captured = capsys.readouterr()
    assert captured.err == "error: lerning_rate: no such key; did you mean learning_rate?\n"
    assert captured.out == ""


def test_the_traceback_is_there_when_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_DEBUG", "1")
    assert run("explain", "lerning_rate") == 64
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [DataError("data.jsonl:3: broken"), TrainingError("loss is nan")])
def test_every_error_of_ours_exits_64(monkeypatch, tmp_path, capsys, error):
    add_verb(
        monkeypatch,
        tmp_path,
        f"from posttrain.errors import *\ndef trial():\n    raise {type(error).__name__}({str(error)!r})\n",
    )
    assert run("trial") == 64
    assert capsys.readouterr().err == f"error: {error}\n"


def test_several_lines_are_indented(monkeypatch, tmp_path, capsys):
    add_verb(
        monkeypatch, tmp_path, "from posttrain.errors import *\ndef trial():\n    raise ConfigError('a: 1\\nb: 2')\n"
    )
    assert run("trial") == 64
    assert capsys.readouterr().err == "error:\n  a: 1\n  b: 2\n"


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("raise typer.Exit(3)", 3),
        ("raise typer.Exit", 0),
        ("raise KeyboardInterrupt", 130),
        ("raise typer.Abort", 130),
        ("raise RuntimeError('a defect')", 70),
        ("return 5", 5),
        ("return {'result': 1}", 0),
        ("raise SystemExit(75)", 75),
    ],
)
def test_exit_codes(monkeypatch, tmp_path, statement, code):
    add_verb(monkeypatch, tmp_path, f"import typer\ndef trial():\n    {statement}\n")
    assert run("trial") == code


def test_a_defect_shows_its_traceback(monkeypatch, tmp_path, capsys):
    add_verb(monkeypatch, tmp_path, "def trial():\n    raise RuntimeError('a defect')\n")
    run("trial")
    assert "RuntimeError: a defect" in capsys.readouterr().err


@pytest.mark.parametrize("number", NO_PLACE)
def test_a_place_that_cannot_be_used_is_one_line_with_what_to_do(monkeypatch, tmp_path, capsys, number):
    body = f"import os\ndef trial():\n    raise OSError({number}, os.strerror({number}), '/some/place')\n"
    add_verb(monkeypatch, tmp_path, body)
    assert run("trial") == 64
    assert capsys.readouterr().err == f"error: /some/place: {os.strerror(number)}; {NO_PLACE[number]}\n"


def test_another_failure_of_the_system_is_a_defect(monkeypatch, tmp_path, capsys):
    add_verb(monkeypatch, tmp_path, "def trial():\n    open('/no/such/file')\n")
    assert run("trial") == 70
    assert "Traceback" in capsys.readouterr().err


def test_a_verb_may_be_an_app_of_its_own(monkeypatch, tmp_path, capsys):
    body = "import typer\ntrial = typer.Typer()\n@trial.command()\ndef show(name: str):\n    print('shown', name)\n@trial.command('list')\ndef list_():\n    print('listed')\n"
    add_verb(monkeypatch, tmp_path, body)
    assert run("trial", "show", "x") == 0
    assert "shown x" in capsys.readouterr().out
    assert run("trial", "--help") == 0
    assert "list" in capsys.readouterr().out


def test_a_verb_is_imported_only_when_it_is_called(monkeypatch, tmp_path, capsys):
    name = add_verb(monkeypatch, tmp_path, "def trial():\n    pass\n")
    run("--help")
    assert "A verb on trial." in capsys.readouterr().out
    assert name not in sys.modules
    run("trial")
    assert name in sys.modules


def test_the_installed_command_runs():
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    command = [sys.executable, "-m", "posttrain.cli.app", "explain", "nothing_like_it"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 64
    assert done.stderr.startswith("error: nothing_like_it: no such key")
    assert isinstance(app_module.app, typer.Typer)


@pytest.mark.parametrize("word", OTHER_WORDS)
def test_a_verb_by_another_name_is_answered_with_ours(capsys, word):
    assert word not in VERBS
    assert run(word, "--nonsense") == 64
    answer = capsys.readouterr().err
    assert f"No such command '{word}'; " in answer
    words = re.findall(r"[\w./-]+", answer.partition("; ")[2].replace("posttrain --version.", "--version"))
    assert set(words) & {*VERBS, "--version", "--help", "posttrain", "base", "examples/own-model", "model/"}


def complete(words):
    """What the shell is told for the last word, and which heavy packages that loaded."""
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(sys.path),
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split(" ")) - 1),
        _POSTTRAIN_COMPLETE="complete_bash",
    )
    code = (
        "import sys; from posttrain.cli.app import main\n"
        "try:\n    main([])\nfinally:\n    print('LOADED', [n for n in ('torch', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    *offered, loaded = done.stdout.splitlines()
    return offered, loaded


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("posttrain re", ["reward_model", "rewards", "reproduce", "registry", "report"]),
        ("posttrain sft --on", ["--on-change"]),
        ("posttrain registry l", ["looks", "list", "log"]),
        ("posttrain sft x.yaml --on-change re", ["refuse", "rerun"]),
    ],
)
def test_the_shell_completes_verbs_and_their_options_without_torch(words, expected):
    assert complete(words) == (expected, "LOADED []")


def test_completion_can_be_shown_for_a_shell(capsys, monkeypatch):
    # Else typer asks which shell started the tests, and make's own is none that completes.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert run("--show-completion", "bash") == 0
    assert "_POSTTRAIN_COMPLETE=complete_bash" in capsys.readouterr().out


def test_no_verb_shows_the_bars_of_the_libraries():
    code = (
        "from posttrain.cli.app import main\n"
        "try:\n    main(['--version'])\n"
        "finally:\n    import transformers.utils.logging as t; print('BARS', t.is_progress_bar_enabled())"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_PROGRESS_BARS")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines()[-1] == "BARS False", done.stderr
