"""The wheel, built from the sdist and installed into an environment that has nothing else of ours."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import posttrain

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("package")


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def pip(*words):
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as an index builds it: a sdist of the checkout, and the wheel of what is in the sdist alone."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools>=77, which torch brings")
    place = tmp_path_factory.mktemp("package")
    checkout = shutil.copytree(
        ROOT, place / "checkout", ignore=lambda _, names: {".venv", ".git", "runs", "build", "dist", "__pycache__", *(n for n in names if n.endswith(".egg-info"))}
    )  # fmt: skip
    build = "import setuptools.build_meta as build; print(build.build_sdist('../sdist'))"
    sdist = place / "sdist" / run(sys.executable, "-c", build, cwd=checkout).split()[-1]
    shutil.unpack_archive(sdist, place / "unpacked", filter="data")
    (source,) = (place / "unpacked").iterdir()
    assert (source / "constraints.txt").exists()
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", place / "wheels", source)
    (built,) = (place / "wheels").iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An empty virtual environment with the wheel; it sees the dependencies by their folder, and nothing that is editable there."""
    place = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", place)
    pip("--python", place / "bin/python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return place


@pytest.fixture
def ours(environment, tmp_path):
    """Runs a program of the environment elsewhere than in the checkout, with nothing of it on the path."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return lambda program, *words: run(environment / "bin" / program, *words, cwd=tmp_path, env=clean)


def test_the_wheel_holds_every_file_of_the_package(wheel):
    source = ROOT / "src"
    wanted = {
        str(path.relative_to(source))
        for path in (source / "posttrain").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("posttrain/")}
    assert held == wanted
    assert {"posttrain/report/page.css", "posttrain/config/templates/llama3.jinja", "posttrain/py.typed"} <= held


def test_its_metadata_is_that_of_the_project(wheel, environment):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (packages,) = environment.glob("lib/python*/site-packages")
    (found,) = importlib.metadata.distributions(name="posttrain", path=[str(packages)])
    assert found.version == posttrain.__version__ == project["version"]
    assert set(found.metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    needed = {re.match(r"[\w-]+", line)[0] for line in found.requires if "extra ==" not in line}
    assert needed == {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    assert "License-File: LICENSE" in str(found.metadata)


def test_the_command_and_the_module_answer_alike(ours, environment):
    assert (
        ours("posttrain", "--version")
        == ours("python", "-m", "posttrain", "--version")
        == f"posttrain {posttrain.__version__}\n"
    )
    listed = ours("posttrain", "--help")
    assert "reward_model" in listed and "registry" in listed
    assert ours("python", "-m", "posttrain", "--help") == listed
    assert str(environment) in ours("python", "-c", "import posttrain; print(posttrain.__file__)")
    assert "Rank of the adapter" in ours("posttrain", "explain", "lora_r")


def test_a_user_error_ends_the_module_with_the_command_s_code(environment, tmp_path):
    for words in (["posttrain"], ["python", "-m", "posttrain"]):
        done = subprocess.run([environment / "bin" / words[0], *words[1:], "sft", "none.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 64 and "none.yaml" in done.stderr


def test_doctor_names_no_file_that_only_a_checkout_has(ours):
    ask = "from posttrain.cli.doctor import _mend; from packaging.requirements import Requirement as R; print(_mend(R('torch>=2')))"
    assert ours("python", "-c", ask) == "pip install 'torch>=2'\n"


def test_the_dockerfile_names_files_and_extras_that_there_are():
    text = (ROOT / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert "constraints.txt" in copied and "src" in copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    extras = {extra for words in re.findall(r"EXTRAS=([\w,-]+)", text) for extra in words.split(",")}
    assert extras <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    shown = re.search(r"--build-arg EXTRAS=(\S+)", text)[1]
    assert "gpu" in shown.split(",")
