"""A folder with everything that the YAML of these tests refers to."""

from pathlib import Path

import pytest

FLAT = """\
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
"""

PIPELINE = """\
name: word-problems
base_model: ./base
evals: { heldout: evals/heldout.jsonl, format: evals/format.jsonl }
stages:
  - sft:  { datasets: [{ path: data/sft.jsonl, type: chat }], learning_rate: 1e-3, num_train_epochs: 2 }
  - dpo:  { datasets: [{ path: data/pairs.jsonl, type: preference }], beta: 0.1, learning_rate: 5e-6 }
  - grpo: { datasets: [{ path: data/prompts.jsonl, type: prompt }], reward_funcs: [rewards.py:correct], num_generations: 8, max_steps: 200 }
gate:
  baseline: alias:champion      # stage:base when there is no champion yet
  guards:  [{ suite: format, margin: 0.02 }]
  primary: [{ suite: heldout, min_delta: 0.05 }]
  on_fail: { retry: sft, times: 1, with: { num_train_epochs: 3 } }
register: { name: word-problems, alias: champion }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project: data, suites, a base model's folder, a rewards file, and the two YAMLs of the documentation."""
    for name in ("base", "data", "evals"):
        (tmp_path / name).mkdir()
    files = ["sft_data.jsonl", "rewards.py", "chat.jinja"]
    files += [f"data/{name}.jsonl" for name in ("sft", "pairs", "prompts")]
    files += [f"evals/{name}.jsonl" for name in ("heldout", "format")]
    for name in files:
        (tmp_path / name).touch()
    (tmp_path / "train.yaml").write_text(FLAT)
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path


@pytest.fixture
def write(folder: Path):
    """Write a YAML into the project."""

    def write_yaml(text: str, name: str = "train.yaml") -> Path:
        path = folder / name
        path.write_text(text)
        return path

    return write_yaml


@pytest.fixture
def pipeline_text() -> str:
    return PIPELINE
