"""`posttrain --help` and the configuration load none of the heavy packages."""

import os
import subprocess
import sys

HEAVY = ("torch", "transformers", "datasets", "numpy", "peft", "accelerate", "scipy", "pandas", "matplotlib", "mlflow")

SCRIPT = """
import sys
{statement}
print("LOADED", [name for name in {heavy!r} if name in sys.modules])
"""

HELP = """
from posttrain.cli.app import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0, end.code
"""


def loaded_after(statement, *heavy):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    code = SCRIPT.format(statement=statement, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("LOADED ")[2].strip(), done.stdout


def test_help_loads_nothing_heavy():
    loaded, output = loaded_after(HELP, *HEAVY, "pydantic", "yaml", "jinja2")
    assert "explain" in output
    assert loaded == "[]"


def test_configuration_loads_no_torch():
    assert loaded_after("import posttrain.config, posttrain.cli.explain", *HEAVY)[0] == "[]"


def test_the_probe_sees_what_is_loaded():
    assert loaded_after("import json", "json", "torch")[0] == "['json']"
