"""One word, one thing: who greps for the name of a class or function finds the one place that says what it is."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import posttrain

SOURCE = Path(posttrain.__file__).parent
VERB = "one verb: the command, the Python door and what does the work"
TOOL = "a part of the row that each tool has in TOOLS"
RECIPE = "each recipe has its own; LOOPS names them"
SHARED = {
    "distill": VERB,
    "dpo": VERB,
    "ebft": VERB,
    "evaluate": VERB,
    "explain": VERB,
    "grpo": VERB,
    "online_dpo": VERB,
    "ppo": VERB,
    "run": f"{VERB}; {RECIPE}",
    "run_pipeline": VERB,
    "process_reward_model": VERB,
    "reward_model": VERB,
    "sft": VERB,
    "defaults": TOOL,
    "finish": TOOL,
    "read_datasets": TOOL,
    "stage": TOOL,
    "loss": RECIPE,
    "validation_loss": RECIPE,
    "lower_bound": "of each test statistic, called with its module",
    "main": "where a process begins",
    "mean": "NaN of nothing; siblings do not import each other",
    "merge": "PEFT's word for an adapter, and flash attention's for two sets of keys",
}
"""Public functions that share a name, with the reason."""


def _is_type(name: str) -> bool:
    return name[:1].isupper() and not name.isupper()


def types(module: ast.Module) -> Iterator[str]:
    """Names of classes, aliases and type variables, without the underscore that makes them private."""
    for node in module.body:
        match node:
            case ast.ClassDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]):
                if _is_type(name.lstrip("_")):
                    yield name.lstrip("_")
            case ast.AnnAssign(target=ast.Name(id=name), annotation=ast.Name(id="TypeAlias")):
                yield name.lstrip("_")
            case _:
                pass


def functions(module: ast.Module) -> Iterator[str]:
    """Names of public functions of the module."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name


def in_several_places(names: dict[str, set[str]]) -> dict[str, list[str]]:
    """Names with the files that define them, where these are several."""
    places = defaultdict(list)
    for place, defined in names.items():
        for name in defined:
            places[name].append(place)
    return {name: sorted(where) for name, where in sorted(places.items()) if len(where) > 1}


def _modules() -> dict[str, ast.Module]:
    paths = sorted(SOURCE.rglob("*.py"))
    return {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text()) for path in paths}


def test_a_type_is_defined_in_one_place():
    shared = in_several_places({place: set(types(module)) for place, module in _modules().items()})
    assert shared == {}


def test_a_public_function_is_defined_in_one_place():
    shared = in_several_places({place: set(functions(module)) for place, module in _modules().items()})
    assert {name: where for name, where in shared.items() if name not in SHARED} == {}
    assert SHARED.keys() <= shared.keys(), "a name that is no longer shared needs no reason"


def test_the_rule_sees_what_it_forbids():
    one = "class _Run: ...\nRow = tuple[str, int]\nLIMIT = 3\ndef decide(): ...\ndef _own(): ..."
    other = "class Run: ...\nclass Row: ...\ndef decide(): ...\ndef _own(): ..."
    trees = {"a.py": ast.parse(one), "b.py": ast.parse(other)}
    assert list(in_several_places({place: set(types(tree)) for place, tree in trees.items()})) == ["Row", "Run"]
    assert list(in_several_places({place: set(functions(tree)) for place, tree in trees.items()})) == ["decide"]
