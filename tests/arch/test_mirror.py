"""The tests mirror the package: every package has a folder of tests with something in it."""

from pathlib import Path

import posttrain

SOURCE = Path(posttrain.__file__).parent
TESTS = Path(__file__).parents[1]


def test_every_package_has_tests():
    packages = [path.parent.name for path in SOURCE.glob("*/__init__.py")]
    assert len(packages) > 15
    missing = [name for name in packages if not list((TESTS / name).glob("test_*.py"))]
    assert missing == []


def test_no_package_is_empty():
    empty = [
        path.name
        for path in SOURCE.iterdir()
        if path.is_dir() and path.name != "__pycache__" and not list(path.glob("*.py"))
    ]
    assert empty == []
