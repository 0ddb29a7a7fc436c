import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def harness():
    """The module `harness`."""
    spec = importlib.util.spec_from_file_location("recovery_harness", Path(__file__).with_name("harness.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
