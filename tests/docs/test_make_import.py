import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docs" / "make_import.py"


def load_script():
    spec = importlib.util.spec_from_file_location("make_import", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_importers_is_up_to_date():
    script = load_script()
    assert script.TARGET.read_text(encoding="utf-8") == script.render(), "run `python docs/make_import.py`"
