"""Writes docs/configuration.md from the schema: `python docs/make_configuration.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from posttrain.config.explain import GROUPS
from posttrain.config.foreign import CONVERTED_VALUES
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.knob import Keys
from posttrain.config.schema import KeyInfo, keys_of, show_value
from posttrain.config.stages import ModelKeys, TrainKeys

TARGET = Path(__file__).with_name("configuration.md")

HEAD = """\
# Configuration

This page is written by `docs/make_configuration.py` from the schema in `src/posttrain/config/`; change it there.
`posttrain explain KEY` says the same about one key.

## A single stage

`posttrain sft|dpo|reward_model|process_reward_model|grpo|ppo|online_dpo|distill|ebft CONFIG` takes a flat YAML. `base_model` and `datasets` are required (`reward_funcs` too for
`grpo`, `ppo` and `online_dpo`, `teachers` for `distill`); every other key has a default, and the run saves all of them.

```yaml
base_model: Qwen/Qwen3-8B
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_target: [q_proj, k_proj, v_proj, o_proj]
sequence_len: 4096
gradient_checkpointing: true
bf16: true
datasets: [{ path: ./sft_data.jsonl, type: chat }]
```

## A pipeline

`posttrain run CONFIG` takes a list of such stages and what surrounds them. A model or training key at the top is handed
down to every stage; a stage's own key wins. A gate may stand at the top (after the last stage) or inside a stage (after
that stage).

```yaml
name: word-problems
base_model: ./base
evals: { heldout: evals/heldout.jsonl, format: evals/format.jsonl }
stages:
  - sft:  { datasets: [{ path: data/sft.jsonl, type: chat }], learning_rate: 1e-3, num_train_epochs: 2 }
  - dpo:  { datasets: [{ path: data/pairs.jsonl, type: preference }], beta: 0.1, learning_rate: 5e-6 }
  - grpo: { datasets: [{ path: data/prompts.jsonl, type: prompt }], reward_funcs: [rewards.py:correct], num_generations: 8, max_steps: 200 }
gate:
  baseline: alias:champion
  guards:  [{ suite: format, margin: 0.02 }]
  primary: [{ suite: heldout, min_delta: 0.05 }]
  on_fail: { retry: sft, times: 1, with: { num_train_epochs: 3 } }
register: { name: word-problems, alias: champion }
```

## How a YAML is read

- An unknown key is an error that names file, line and the nearest valid key. All errors are listed at once.
- `1e-4` is a number. A key whose value is empty or `null` is unset: the default applies.
- Numbers, `true` and `false` follow YAML 1.2: `off`, `no` and `2024-01-01` are text where text is expected.
- A key that stands twice in one mapping is an error. Anchors, aliases and `<<` work.
- Paths are relative to the folder of the YAML. `Qwen/Qwen3-8B` is a hub id unless that folder stands beside the YAML;
  `./x`, `/x`, `~/x` and names such as `x.jsonl` are local, and must exist before anything starts.
- A key that is set and changes nothing, such as `lora_r` with `adapter: none`, is noted.

## `--set`

`--set KEY=VALUE` overrides one key; it may be given several times. The value is a YAML scalar, `[…]`, `{…}` or a quoted
string; an empty value unsets the key. Places in lists count from 1.

| In | `--set` | sets it for |
|---|---|---|
| a single stage | `learning_rate=1e-6`, `datasets.1.limit=100` | the stage |
| a pipeline | `learning_rate=1e-6` | every stage, above the stages' own keys |
| a pipeline | `grpo.learning_rate=1e-6` | every grpo stage |
| a pipeline | `stages.2.learning_rate=1e-6` | the second stage |
| a pipeline | `gate.alpha=0.1`, `evals.heldout.num_samples=4`, `name=second` | the pipeline |

Where several reach the same key, the one that names the fewest stages wins.
"""

MEANINGS = {
    "pipeline": "Keys of a pipeline; the model and training keys may stand here too.",
    "datasets": "An entry of `datasets` or `eval_datasets`.",
    "rollout": "The engine that samples, in a `grpo`, `ppo`, `online_dpo`, `distill` or `ebft` stage; docs/rollout-engines.md compares them.",
    "teachers": "An entry of `teachers`, in a `grpo` or `distill` stage; docs/algorithms.md says what is learned from them.",
    "judge": "A judge's file, `judge:FILE.yaml` in `reward_funcs` or as a `scorer` ([how it is asked](rewards.md#reward-models-and-judges)).",
    "judge.rubric": "An entry of `rubric`; a text alone is its `criterion`.",
    "sharding": "How several processes hold the model between them (FSDP2), in any stage; docs/scale.md.",
    "data curate": "The file of `posttrain data curate` ([curation](data-from-samples.md#curation)).",
    "data curate.ranges": "An entry of `ranges` in it.",
    "data curate.quality": "An entry of `quality` in it.",
    "data instruct": "The file of `posttrain data instruct` ([instructions](data-from-samples.md#instructions-from-a-teacher)).",
    "data synth": "The file of `posttrain data synth` ([rows from samples](data-from-samples.md)).",
    "data synth.difficulty": "`difficulty` in it.",
    "evals": "An entry of `evals`; `NAME: path` is short for `NAME: {path: path}`.",
    "gate": "A gate, at the top of a pipeline, inside a stage, or in a file for `posttrain gate --spec`.",
    "gate.guards": "An entry of `guards`.",
    "gate.primary": "An entry of `primary`.",
    "gate.on_fail": "What `on_fail` takes instead of `stop`.",
    "register": "Where a model that passed is registered; needs a gate.",
    "notify": "A hook that is told what becomes of the run ([notices](reliability.md)): either `url_env` or `command`.",
}
"""What the groups besides the stages are."""


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    parts += _section(
        "Model keys (every stage)", "Which weights, and what of them is trained.", keys_of(ModelKeys).values()
    )
    training = [info for name, info in keys_of(TrainKeys).items() if name not in keys_of(ModelKeys)]
    parts += _section("Training keys (every stage)", "Defaults are those of `sft`.", training)
    for kind, row in STAGE_KINDS.items():
        parts += _section(
            f"`{kind}`",
            _first_line(row.keys) + " Keys that every stage has stand here where they differ.",
            _own(row.keys),
        )
    for place, meaning in MEANINGS.items():
        parts += _section(f"`{place}`", meaning, keys_of(GROUPS[place]).values())
    return "\n".join([*parts, *_other_tools()]) + "\n"


def _own(model: type[Keys]) -> list[KeyInfo]:
    common = keys_of(TrainKeys)
    return [info for name, info in keys_of(model).items() if common.get(name) != info]


def _section(title: str, meaning: str, keys: Iterable[KeyInfo]) -> list[str]:
    rows = [_row(info) for info in keys]
    return [
        f"\n## {title}\n",
        f"{meaning}\n",
        "| Key | Default | Type | Meaning | Also called |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _row(info: KeyInfo) -> str:
    default = info.default if info.required else f"`{info.default}`"
    also = ", ".join(str(name) for name in info.also)
    cells = (f"`{info.name}`", default, info.type, info.meaning, also)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _first_line(model: type[Keys]) -> str:
    return (model.__doc__ or "").splitlines()[0]


def _other_tools() -> list[str]:
    values = [
        f"| `{key}` | {', '.join(f'`{show_value(theirs)}` → `{show_value(ours)}`' for theirs, ours in readings.items())} |"
        for key, readings in CONVERTED_VALUES.items()
    ]
    return [
        "\n## Other tools' names\n",
        "The names under *Also called* are read as ours, with a note. These values are read as ours too:\n",
        *("| Key | Read as |", "|---|---|", *values),
        "\nWhat becomes of every other key of Axolotl, LLaMA-Factory and TRL stands in [coming from another tool](import.md).",
    ]


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
