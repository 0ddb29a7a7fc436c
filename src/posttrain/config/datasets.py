"""The keys of a source of rows, and what rows can be. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import field_validator, model_validator

from posttrain.config.knob import Keys, knob
from posttrain.config.places import is_uri, looks_local

DatasetType = Literal[
    "auto",
    "chat",
    "sharegpt",
    "alpaca",
    "completion",
    "text",
    "preference",
    "alpaca_preference",
    "kto",
    "stepwise_supervised",
    "alpaca_kto",
    "prompt",
]

RowKind = Literal["examples", "pairs", "labels", "steps", "prompts"]
"""What a row of training data is: an answer to imitate, a better and a worse answer, an answer with a label, an answer in steps with a label
each, a prompt."""

ROWS_OF_TYPE: Mapping[str, tuple[RowKind, ...]] = {
    "chat": ("examples",),
    "sharegpt": ("examples",),
    "alpaca": ("examples",),
    "completion": ("examples",),
    "text": ("examples",),
    "preference": ("pairs", "labels"),
    "alpaca_preference": ("pairs", "labels"),
    "kto": ("labels",),
    "stepwise_supervised": ("steps",),
    "alpaca_kto": ("labels",),
    "prompt": ("prompts",),
}
"""Row format → the kinds of rows it can give."""


def share_or_number(size: float) -> float:
    """`val_size` as it is. Raises: ValueError."""
    if size > 1 and not float(size).is_integer():
        raise ValueError(f"val_size: {size} is neither a share below 1 nor a number of rows")
    return size


def read_once(sources: Sequence[DatasetKeys]) -> list[DatasetKeys]:
    """Sources of which every row is read once, as they are. Raises: ValueError."""
    for number, source in enumerate(sources, start=1):
        for name in ("weight", "val_size", "eval_name"):
            if getattr(source, name) is not None:
                raise ValueError(f"{name} of entry {number} does nothing where every row is read once; remove it")
    return list(sources)


# fmt: off
# One key a line: the table below is read down, not across.


class DatasetKeys(Keys):
    """One source of rows."""

    path: str = knob(..., "A JSONL, JSON, Parquet or CSV file, compressed (`.gz`, `.zst`) or not: relative to the YAML, or a URI that fsspec reads (`https://`, `s3://` …); or a hub dataset id.", example="./data.jsonl")
    type: DatasetType = knob("auto", "Row format; `auto` detects it from the first rows and says what it found.", also="formatting (LLaMA-Factory)")
    split: str = knob("train", "Split of a hub dataset.")
    name: str | None = knob(None, "Configuration of a hub dataset.", example="main")
    eval_name: str | None = knob(None, "Name of the validation set that these rows belong to, or that those held out of them do: its metrics are then `eval_NAME_loss` …; sources of one name are one set, those without are the set of `eval_loss`.", example="math")
    val_size: float | None = knob(None, "Rows of this source to hold out, where others than the stage's val_size: a share below 1, else so many.", ge=0, example=0.05)
    weight: float | None = knob(None, "Relative share in a weighted mixture; null takes every row once.", gt=0, example=0.5)
    limit: int | None = knob(None, "Use only so many rows, from the start of the file.", ge=1, example=1000)
    prompt_format: list[str] = knob([], "Write the prompt as plain text from other columns: `### Q: {question}`; of several, the first whose columns a row has and that are not empty. The row is then a `completion` (or `prompt`), without the chat template; with `type: alpaca` the text is the user's turn.", example=["### Question:\n{question}\n\n### Answer:\n"])
    completion_suffix: str = knob("", "Text that ends every answer (`completion`, `chosen`, `rejected`) of rows that are text; EOS follows.", example="<|im_end|>")
    default_system: str = knob("", "System message of conversations that have none, or an empty one.", example="You answer in one sentence.")
    data_files: list[str] = knob([], "Files of a hub dataset to read, where not all of its split.", example=["data/part-1.jsonl"])
    columns: dict[str, str] = knob({}, "Rename columns: our name → the file's name; `outer.inner` is what a column that holds objects has under that name.", also="field_messages (Axolotl)", example={"messages": "conversations"})

    @field_validator("eval_name")
    @classmethod
    def _is_part_of_a_metric(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise ValueError(f"{name!r} becomes part of a metric's name (eval_NAME_loss); expected letters, digits, - and _")
        return name

    @field_validator("val_size")
    @classmethod
    def _is_a_share_or_a_number(cls, size: float | None) -> float | None:
        return size if size is None else share_or_number(size)

    @model_validator(mode="after")
    def _only_the_hub_has_splits(self) -> DatasetKeys:
        if self.split != "train" and (is_uri(self.path) or looks_local(self.path)):
            raise ValueError(f"split: {self.split} of a file, which has no splits; take it out, and set limit for its first rows, or name a file with the rows that you want")
        return self
