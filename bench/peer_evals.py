"""1,000 items of the quickstart, as a suite of ours and as a task of lm-eval: sampled answers, or four numbers to choose from."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.files import read_json_lines
from stage_posttrain import QUICKSTART

_ANSWERS = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: [], max_gen_toks: MOST, do_sample: false}
filter_list:
  - {name: boxed, filter: [{function: regex, regex_pattern: 'boxed[{](-?[0-9]+)[}]'}, {function: take_first}]}
metric_list: [{metric: exact_match}]
"""
_CHOICES = """
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
_HEAD = "task: NAME\ndataset_path: json\ndataset_kwargs: {data_files: {test: FILE}}\ntest_split: test\nnum_fewshot: 0\n"


def write(kind: str, folder: Path, most_tokens: int) -> dict[str, str]:
    """Paths of `suite` and `task`."""
    items = [item for _, item in read_json_lines(QUICKSTART / "evals" / "heldout.jsonl") if item["split"] == "gate"]
    made = [(_answer if kind == "answers" else _choice)(item, random.Random(item["id"])) for item in items]
    suite, documents, task = (folder / f"peers-{kind}{end}" for end in (".suite.jsonl", ".docs.jsonl", ".yaml"))
    suite.write_text("".join(json.dumps(row) + "\n" for row, _ in made))
    documents.write_text("".join(json.dumps(row) + "\n" for _, row in made))
    text = _HEAD + (_ANSWERS if kind == "answers" else _CHOICES).lstrip()
    task.write_text(
        text.replace("NAME", f"peers_{kind}")
        .replace("FILE", json.dumps(str(documents)))
        .replace("MOST", str(most_tokens))
    )
    return {"suite": str(suite), "task": str(task)}


def _question(item: Mapping[str, Any]) -> str:
    [message] = item["messages"]
    return message["content"]


def _answer(item: Mapping[str, Any], rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    return dict(item), {"question": _question(item), "target": item["target"]}


def _choice(item: Mapping[str, Any], rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    right = int(item["target"])
    choices = [f" {number}" for number in rng.sample([right, right + 1, right + 10, right + rng.randrange(11, 90)], 4)]
    label = choices.index(f" {right}")
    question = _question(item)
    asked = {"id": item["id"], "prompt": f"{question} Answer:", "choices": choices, "target": label, "scorer": "acc"}
    return asked, {"question": question, "choices": choices, "label": label}
