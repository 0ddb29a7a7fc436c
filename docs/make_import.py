"""Writes docs/import.md from the importers' tables: `python docs/make_import.py`."""

from __future__ import annotations

from pathlib import Path

from posttrain.config.importers.fates import KeyFate, Tool
from posttrain.config.importers.read import TOOLS

TARGET = Path(__file__).with_name("import.md")

HEAD = """\
# Coming from another tool

`posttrain import FILE [-o OUT]` reads a configuration of Axolotl, LLaMA-Factory, TRL, torchtune, OpenRLHF or verl and writes a YAML of ours with a
comment per key. FILE is a YAML, or a script that holds the tool's command (`trl sft --model_name_or_path …`, `accelerate launch dpo.py --…`,
`llamafactory-cli train x.yaml`, `tune run RECIPE --config x.yaml optimizer.lr=1e-4`, `deepspeed --module openrlhf.cli.train_sft --…`, `python -m verl.trainer.main_ppo key=value …`); variables that the script sets are put in, and `$((1024 * 2))` as its number. `posttrain sft FILE` takes
such a YAML in place, prints the notes and runs.

```
posttrain import axolotl.yaml -o train.yaml
posttrain plan train.yaml
posttrain sft train.yaml
```

- The tool is told by its keys (`--tool` names it), the stage by `rl`, `stage`, `loss_type`, `reward_funcs` or the script (`--stage` names it).
- A key that asks for nothing (null, false, 0) is no obstacle. What the tool does where its file is silent, and we would not, is written
  out, with a comment.
- A key that changes what is learned and cannot be had here is refused, and so is a key that no table knows. Every refusal
  is listed with what to do; nothing is written then, and the exit code is 64.
- LLaMA-Factory's data names are looked up in `dataset_info.json`, in `dataset_dir` beside the file, above it, or where the command
  is started. A chat template by name is ours that renders the same text (`axolotl_chatml`, `llamafactory_llama3` …: a test holds its rendering of
  200 conversations against what the tool rendered), else the tokenizer's own where the model is known to carry that format; others are refused. LLaMA-Factory's write no tools here, so rows with
  tools are left to the tokenizer's own.
- verl's `custom_reward_function` is called as verl calls it ([rewards](rewards.md)); a reward that verl picks by a row's `data_source` is refused. Its
  steps are generation batches, ours optimizer steps: `save_freq`, `test_freq` and `total_training_steps` are multiplied.
- OpenRLHF's `train_ppo_ray` is `ppo` with `gae`, and `grpo` with `group_norm`, `dr_grpo` and `rloo`. It cuts rewards at ±10 unasked, which is refused where something
  could be cut, until `--reward_clip_range -1e9 1e9` says that nothing is. `--remote_rm_url FILE.py` is taken where its `reward_func` is called as ours are, `(prompts, completions, **columns)`,
  with the column of `label_key` as `labels`. Its `(queries, prompts, labels)`, servers, REINFORCE++ and a KL in the reward of groups are refused. Its steps are generation batches too.

Each table below says what becomes of a key. *Together* means that it is read with others; `a.*` stands for all keys inside `a`.
"""


def render() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(line for tool in TOOLS.values() for line in _section(tool))]) + "\n"


def _section(tool: Tool) -> list[str]:
    rows = [f"| `{key}` | {_fate(row)} | {_what(row)} |" for key, row in sorted(tool.rows.items())]
    return [f"\n## {tool.name}\n", "| Key | Fate | What |", "|---|---|---|", *rows]


def _fate(row: KeyFate) -> str:
    return "mapped, together" if row.joint else row.fate


def _what(row: KeyFate) -> str:
    ours = f"`{row.to}`" if row.to else ""
    todo = row.todo if row.fate == "refused" else ""
    return "; ".join(part for part in (ours, row.why, todo) if part).replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
