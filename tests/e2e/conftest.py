import shutil
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def shipped(tmp_path):
    """Names of examples → a copy of the first, beside copies of the others that it uses, without what runs left in them."""

    def copied(*names):
        for name in names:
            ignored = shutil.ignore_patterns("runs", "registry", "__pycache__")
            shutil.copytree(EXAMPLES / name, tmp_path / name, ignore=ignored)
        return tmp_path / names[0]

    return copied
