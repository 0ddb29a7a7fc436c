import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

import posttrain
from posttrain.cli import doctor as module
from posttrain.cli.app import main
from posttrain.cli.doctor import (
    attention,
    cache,
    four_bits,
    machine,
    packages,
    python,
    ray,
    sandbox,
    torch,
)
from posttrain.cli.doctor_run import check_run, durable
from posttrain.cli.doctor_surface import SURFACE, ForeignUse, missing, surface
from posttrain.cli.findings import Diagnosis
from posttrain.files import write_json
from posttrain.pipeline.pins import versions
from posttrain.pipeline.state import RunState
from posttrain.registry.manifest import environment_pins


def run(*argv):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    return caught.value.code


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_the_doctor_says_whether_the_sandbox_filters_system_calls(monkeypatch):
    from posttrain.grading import sandbox as ours

    monkeypatch.setattr(ours, "isolation", lambda: "namespaces")
    for program, status, words in ((b"x", "ok", "are refused"), (b"", "note", "no system-call filter")):
        monkeypatch.setattr(ours, "call_filter", lambda program=program: program)
        (finding,) = sandbox()
        assert finding.status == status and words in finding.text


def test_what_the_tests_run_on_is_sound():
    findings = [finding for check in (python, packages, machine, torch, sandbox, cache) for finding in check()]
    assert [finding for finding in findings if finding.status == "broken"] == []
    assert {
        "python",
        "packages",
        "cores",
        "memory",
        "disk",
        "crash-safe writes",
        "torch",
        "sandbox",
        "data cache",
    } <= set(by_name(findings))


def test_the_private_api_we_rely_on_is_there():
    assert {name: finding.status for name, finding in by_name(attention()).items()} == {
        "flash kernel": "ok",
        "packed forward": "ok",
    }


def test_a_flash_kernel_that_computes_something_else_is_noticed(monkeypatch):
    import torch as library

    real = library.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(library.nn.functional, "scaled_dot_product_attention", lambda *a, **k: real(*a, **k) + 1)
    assert by_name(attention())["flash kernel"].status == "broken"


@pytest.mark.slow
def test_the_4_bit_self_test_passes():
    assert by_name(four_bits())["4-bit weights"].status == "ok"


def test_a_broken_native_library_is_a_finding(monkeypatch):
    monkeypatch.setattr(module, "FOUR_BITS", "import os; os.abort()")
    finding = by_name(four_bits())["4-bit weights"]
    assert (finding.status, "ended with status -6" in finding.text) == ("broken", True)


@pytest.mark.parametrize(
    ("requirement", "status", "text"),
    [
        ("nothing-of-that-name>=1", "broken", "not installed (needs >=1)"),
        ("typer<0.1", "broken", "(needs <0.1)"),
        ('typer<0.1; extra == "serve"', "note", "(needs <0.1)"),
    ],
)
def test_packages_are_held_against_their_ranges(monkeypatch, requirement, status, text):
    monkeypatch.setattr(metadata, "requires", lambda name: ["pydantic>=2", requirement])
    finding = next(packages())
    assert finding.status == status
    assert text in finding.text


def test_what_differs_from_the_tested_versions_is_named(monkeypatch):
    monkeypatch.setattr(module, "_tested", lambda: {"pydantic": "0.1", "typer": metadata.version("typer")})
    text = by_name(packages())["versions"].text
    assert f"pydantic {metadata.version('pydantic')} (tested 0.1)" in text
    assert "typer" not in text


def test_the_exit_code_says_whether_something_is_broken(monkeypatch, capsys):
    def explodes():
        raise RuntimeError("half a library")
        yield

    def fine():
        yield Diagnosis("fine", "ok", "works")

    monkeypatch.setattr(module, "CHECKS", (fine,))
    assert run("doctor") == 0
    assert capsys.readouterr().out == "ok      fine  works\nnothing is broken\n"
    monkeypatch.setattr(module, "CHECKS", (explodes, fine))
    assert run("doctor") == 1
    output = capsys.readouterr().out
    assert "broken  explodes  RuntimeError: half a library" in output
    assert "ok      fine      works" in output
    assert output.splitlines()[-1] == "broken: explodes"


@pytest.fixture
def made(tmp_path, data_dir):
    """A run folder as a pipeline leaves it, with the pins of now."""
    (tmp_path / "config.yaml").write_text(
        f"name: sums\nbase_model: ./base\nstages: [{{ sft: {{ datasets: [{{ path: {data_dir / 'sft.jsonl'} }}] }} }}]\n"
    )
    (tmp_path / "base").mkdir()
    RunState("sums", versions("sft")).save(tmp_path)
    write_json(tmp_path / "environment.json", environment_pins())
    return tmp_path


def test_a_run_of_this_machine_can_go_on(made):
    assert {name: finding.status for name, finding in by_name(check_run(made)).items()} == dict.fromkeys(
        ("run config", "crash-safe writes", "run code", "run versions"), "ok"
    )


def test_what_moved_since_the_run_is_named(made):
    RunState("sums", versions("sft") | {"posttrain": "0.0.9", "numbers.sft": "0"}).save(made)
    pins = environment_pins()
    packages_then = pins["packages"] | {"torch": "1.0", "left-alone": "3"}
    write_json(made / "environment.json", pins | {"python": "3.9.0", "compiler": "cc 1", "packages": packages_then})
    found = by_name(check_run(made))
    assert {name: finding.status for name, finding in found.items()} == {
        "run config": "ok",
        "crash-safe writes": "ok",
        "run code": "note",
        "run versions": "note",
    }
    text = found["run versions"].text
    assert f"python 3.9.0 → {pins['python']}" in text
    assert f"compiler cc 1 → {pins['compiler']}" in text
    assert re.search(r"torch 1\.0 → \d", text)
    assert "1 other packages" in text


def test_a_configuration_this_version_does_not_read_is_broken(made, monkeypatch, capsys):
    config = made / "config.yaml"
    config.write_text(config.read_text() + "seeed: 3\n")
    monkeypatch.setattr(module, "CHECKS", ())
    assert run("doctor", made) == 1
    output = capsys.readouterr().out
    assert "broken  run config" in output
    assert "did you mean seed" in output


def test_a_folder_without_a_run_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "CHECKS", ())
    assert run("doctor", tmp_path) == 1
    assert "config.yaml is not there" in capsys.readouterr().out
    assert run("doctor", tmp_path / "nowhere") == 1
    assert "no such folder or file; expected the folder of a run, or a YAML" in capsys.readouterr().out


def test_a_yaml_is_held_against_the_keys_of_this_version(made, monkeypatch, capsys):
    monkeypatch.setattr(module, "CHECKS", ())
    assert run("doctor", made / "config.yaml") == 0
    assert "a valid pipeline for this version" in capsys.readouterr().out
    (made / "config.yaml").write_text("schema: 99\n" + (made / "config.yaml").read_text())
    assert run("doctor", made / "config.yaml") == 1
    assert "is of a newer posttrain" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_broken_and_what_to_do_is_said(tmp_path):
    assert durable(tmp_path / "not" / "there" / "yet").status == "ok"
    assert list(tmp_path.iterdir()) == []
    finding = durable(Path("/proc/self"))
    assert finding.status == "broken"
    assert finding.text.endswith("move output_dir to a folder that can be written")


# --- the functions of other packages -------------------------------------------------------------------------------


def test_the_functions_we_call_are_there_and_take_our_arguments():
    light = [use for use in SURFACE if use.package not in ("bitsandbytes", "mlflow-skinny")]
    (finding,) = surface(light)
    assert finding.status == "ok"
    assert finding.text.startswith(f"{len(light)} of {len(light)} functions")


@pytest.mark.slow
def test_those_of_the_optional_packages_too():
    assert [finding.status for finding in surface()] == ["ok"]


def test_what_a_new_version_lost_is_named_with_who_needs_it():
    table = (
        ForeignUse("typer", "typer:Typer", "cli/app.py", ("name",)),
        ForeignUse("typer", "typer:Typer", "cli/app.py", ("name", "sideways")),
        ForeignUse("typer", "typer:Gone", "cli/app.py"),
        ForeignUse("typer", "typer.gone:thing", "cli/app.py"),
        ForeignUse("not-installed", "nothing:here", "nobody"),
    )
    *wrong, summary = surface(table)
    assert [finding.status for finding in wrong] == ["broken"] * 3
    assert "typer:Typer does not take sideways" in wrong[0].text
    assert "which cli/app.py needs; pip install --constraint constraints.txt typer" in wrong[0].text
    assert "typer:Gone is not there" in wrong[1].text
    assert "typer.gone:thing is not there" in wrong[2].text
    assert summary.text == "1 of 4 functions of 1 packages are as expected"


def test_every_row_names_a_part_of_ours():
    package = Path(posttrain.__file__).parent
    for use in SURFACE:
        assert (package / use.user).is_file(), use
        name = use.where.rpartition(":")[2].rpartition(".")[2]
        assert name in (package / use.user).read_text(), use
    assert missing(ForeignUse("typer", "typer:Typer.command", "cli/app.py")) == ""


def test_the_doctor_says_who_may_reach_the_ports_of_ray():
    (found,) = ray()
    assert "for trusted networks only" in found.text if find_spec("ray") else "posttrain[ray]" in found.text
