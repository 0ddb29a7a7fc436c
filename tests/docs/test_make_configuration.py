import importlib.util
from pathlib import Path

from posttrain.config.explain import all_keys

SCRIPT = Path(__file__).parents[2] / "docs" / "make_configuration.py"


def load_script():
    spec = importlib.util.spec_from_file_location("make_configuration", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date():
    script = load_script()
    assert script.TARGET.read_text(encoding="utf-8") == script.render(), "run `python docs/make_configuration.py`"


def test_every_key_stands_on_the_page():
    page = load_script().render()
    missing = [name for names in all_keys().values() for name in names if f"| `{name}` |" not in page]
    assert missing == []
