"""requirements.lock holds what pyproject.toml asks for in the versions of constraints.txt, each with hashes."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PLATFORMS = [
    {"sys_platform": system, "platform_machine": machine, "python_full_version": f"{python}.5", "python_version": python}
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
    for python in ("3.11", "3.12", "3.13")
]  # fmt: skip


def pinned(text, platform):
    """Name → version of what a platform installs."""
    asked = [Requirement(line) for line in re.findall(r"^([a-z][^\\\n]*)", text, re.M)]
    return {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for one in asked
        if one.marker is None or one.marker.evaluate(platform)
    }


def wanted():
    """What pyproject.toml asks for: the core and the extras that `make lock` names, one inside the other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"^LOCKED := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    found = [Requirement(one) for one in project["dependencies"]]
    for extra in extras:
        found += [
            Requirement(one) for one in project["optional-dependencies"][extra] if not one.startswith("posttrain[")
        ]
    return found


def missing(text, platform):
    """What is asked for and not locked as asked."""
    locked = pinned(text, platform)
    return [str(one) for one in wanted() if not one.specifier.contains(locked.get(canonicalize_name(one.name), "0"))]


LOCK = (ROOT / "requirements.lock").read_text()


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda one: f"{one['sys_platform']}-{one['platform_machine']}-{one['python_version']}")  # fmt: skip
def test_every_platform_gets_what_is_asked_for_in_the_versions_that_are_tested(platform):
    locked = pinned(LOCK, platform)
    assert missing(LOCK, platform) == [] and len(locked) > 100
    tested = pinned((ROOT / "constraints.txt").read_text(), platform)
    assert {
        name: (locked[name], version) for name, version in tested.items() if locked.get(name, version) != version
    } == {}


def test_each_version_has_its_hashes():
    entries = re.split(r"\n(?=[a-z])", LOCK.strip())
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_a_lock_that_is_behind_is_seen():
    behind = re.sub(r"^pydantic==\S+", "pydantic==1.10.0", LOCK, flags=re.M)
    assert missing(behind, PLATFORMS[0]) == ["pydantic>=2.12"]
