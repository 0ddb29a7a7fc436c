"""The tiny project that the pages' commands run in: the quickstart's base with a few of its rows, its runs and its registry."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from tests.docs.shown import ROOT, blocks_of

from posttrain.cli.app import _run

QUICKSTART = ROOT / "examples" / "quickstart"
SFT = "datasets: [{ path: data/sft.jsonl, type: chat }], learning_rate: 1e-4, max_steps: 2, per_device_train_batch_size: 8"
PIPELINE = f"""
base_model: ./base
evals: {{ heldout: {{ path: evals/heldout.jsonl, max_tokens: 12 }}, clean: {{ path: evals/clean.jsonl, max_tokens: 12 }} }}
stages:
  - sft: {{ {SFT} }}
"""
DPO = """
  - dpo: { datasets: [{ path: data/pairs.jsonl, type: preference }], max_steps: 2, per_device_train_batch_size: 8 }
"""
GRPO = """
  - grpo:
      datasets: [{ path: data/prompts.jsonl, type: prompt }]
      reward_funcs: [rewards.py:correct]
      num_generations: 4
      per_device_train_batch_size: 8
      max_steps: 2
      max_completion_length: 12
      keep_rollouts: true
"""
GATE = "guards: [{ suite: clean, margin: 0.9 }]"
"""What any two models of this size pass: commands are tried here, not what they say of a model."""
RUNS = {
    "word-problems": (0, f"{DPO}{GRPO}gate: {{ {GATE} }}\nregister: {{ name: word-problems }}\n"),
    "champion": (0, f"gate: {{ {GATE} }}\nregister: {{ name: words }}\n"),
    "second": (0, f"gate: {{ {GATE} }}\nregister: {{ name: words, registry: second }}\n"),
    "new": (0, f"gate: {{ {GATE} }}\nregister: {{ name: words, registry: new }}\n"),
    "waits": (4, f"gate: {{ {GATE}, approve: 1 }}\nregister: {{ name: words }}\n"),
    "first": (0, GRPO),
    "math": (0, f"adapter: lora\nlora_r: 4\ngate: {{ {GATE} }}\nregister: {{ name: math }}\n"),
    "law": (0, f"adapter: lora\nlora_r: 4\ngate: {{ {GATE} }}\nregister: {{ name: law }}\n"),
}
"""Run → its exit code, and what its YAML holds below the SFT stage. `second` and `new` are pulled: a version without an alias."""
BEFORE = [
    "posttrain registry push words@1 stores/second --registry second",
    "posttrain registry pull words@1 stores/second",
    "posttrain registry push words@1 stores/new --registry new",
    "posttrain registry pull words@1 stores/new",
    "posttrain gate runs/new/evals/01-sft runs/champion/evals/01-sft --spec gate.yaml --out runs/new/gate",
]
"""What was done before the pages begin."""

LINEAR = "models: [{ model: runs/MATH/stages/01-sft/KIND, parameters: { weight: 0.5 } }, { model: runs/LAW/stages/01-sft/KIND, parameters: { weight: 0.5 } }]\n"
FILES = {
    "pipeline.yaml": f"name: word-problems\nseed: 0{PIPELINE}{RUNS['word-problems'][1]}",
    "sft.yaml": f"{{ base_model: ./base, {SFT}, output_dir: runs/sft }}\n",
    "grpo.yaml": f"base_model: ./base\n{re.sub(r'^      |^  - grpo:$', '', GRPO, flags=re.M).strip()}\n",
    "gate.yaml": GATE + "\n",
    "merge.yaml": "merge_method: linear\n" + LINEAR.replace("KIND", "model").replace("MATH", "champion").replace("LAW", "new"),
    "adapters.yaml": "merge_method: linear\n" + LINEAR.replace("KIND", "adapter").replace("MATH", "math").replace("LAW", "law"),
    "axolotl.yaml": blocks_of("docs/switching.md", "axolotl")[0].replace("rows.jsonl", "data/sft.jsonl").replace("num_epochs: 3", "max_steps: 2"),
    "accelerate.yaml": "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: bf16\nnum_processes: 8\nnum_machines: 1\nfsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: true}\n",
    "run.sh": "trl sft --model_name_or_path base --dataset_name data/sft.jsonl --max_steps 2 --learning_rate 1e-4\n",
    "synth.yaml": "base_model: runs/first/stages/01-sft/model\ndatasets: [{ path: data/prompts.jsonl, type: prompt, limit: 8 }]\nreward_funcs: [rewards.py:any_text]\nnum_generations: 2\nmax_completion_length: 12\nkeep: all_correct\nkeep_truncated: true\n",
    "curate.yaml": "datasets: [{ path: data/sft.jsonl, type: chat }]\ndedup: near\ndecontaminate: [evals/heldout.jsonl]\nmax_chars: 8000\n",
}  # fmt: skip
"""What the pages have in their text, in this project's size."""
FILES["c.yaml"] = FILES["axolotl.yaml"].replace("./out", "./runs/c")
ANY_TEXT = "\n\ndef any_text(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n"


def _rows(name: str, folder: Path, heads: dict[str, int]) -> None:
    lines = (QUICKSTART / name).read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = [line for mark, number in heads.items() for line in [row for row in lines if mark in row][:number]]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("".join(chosen), encoding="utf-8")


def untrained(folder: Path) -> Path:
    """Base, rows, suites, and the files that the pages speak of."""
    shutil.copytree(QUICKSTART / "base", folder / "base")
    for path in QUICKSTART.glob("*.yaml"):
        shutil.copy(path, folder)
    (folder / "rewards.py").write_text((QUICKSTART / "rewards.py").read_text(encoding="utf-8") + ANY_TEXT)
    for name in ("sft", "pairs", "prompts"):
        _rows(f"data/{name}.jsonl", folder, {"": 48})
    for name in ("heldout", "clean"):
        _rows(f"evals/{name}.jsonl", folder, {'"dev"': 6, '"gate"': 32})
    for seed, (name, (_, rest)) in enumerate(RUNS.items()):
        (folder / f"{name}.yaml").write_text(f"name: {name}\nseed: {seed}{PIPELINE}{rest}")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def train(folder: Path) -> None:
    """`word-problems@1`, and `words` with a champion and two versions without an alias; `math` and `law` are adapters."""
    for name, (expected, _) in RUNS.items():
        assert _run(["run", f"{name}.yaml", "--quiet"]) == expected, name
    for line in BEFORE:
        assert _run(shlex.split(line)[1:]) == 0, line
