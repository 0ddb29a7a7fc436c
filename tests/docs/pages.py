"""How the commands of each page are run, and which are not, with the reason. A command that a page gets later is run too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.docs.shown import in_text

HUB = "needs the Hugging Face hub"
GGUF = "tests/forms writes it; the tiny project's tokenizer cuts text as none that llama.cpp knows"
VLLM, SGLANG = "tests/serve/test_vllm.py starts vLLM", "needs a server of SGLang"
OWN_TEST = {
    "CHANGELOG.md": "says what changed; the pages show the commands",
    "docs/tutorial.md": "tests/docs/test_tutorial.py",
    "examples/scale/README.md": "tests/docs/test_scale_recipes.py",
    "examples/own-model/README.md": "tests/docs/test_own_model.py",
    "examples/reward-hacking/README.md": "tests/e2e/test_reward_hacking.py",
    "examples/process-reward/README.md": "tests/e2e/test_process_reward.py",
    "examples/reward-model/README.md": "tests/e2e/test_reward_model.py",
    "examples/tool-use/README.md": "tests/e2e/test_tool_use.py",
    "docs/learning-runs.md": "tests/e2e/test_quickstart.py",
}
"""Page → who runs its commands, or why nobody does."""

STANDS_FOR = {
    "CONFIG": "pipeline.yaml", "DIR": "clean", "REF": "words@3", "KEY": "lora_r", "RUN": "runs/first", "RUN_A": "runs/champion", "RUN_B": "runs/second", "MODEL": "runs/first/stages/01-sft/model",
    "BASE": "base", "URI": "sqlite:///mlflow.db", "http://mlflow:5000": "sqlite:///mlflow.db", "s3://bucket/models": "remote",
    "Qwen/Qwen3-8B": "base", "rows.jsonl": "data/sft.jsonl", "rewards.py:new": "rewards.py:correct", "RUN_OR_YAML": "runs/first", "FILE": "evals/heldout.jsonl", "word-problems@2": "words@3",
}  # fmt: skip
"""A word of a shown command that the reader puts his own for, or a server → what the tiny project has for it."""


@dataclass(frozen=True)
class Page:
    """What is said of one page's commands."""

    not_run: Mapping[str, str] = field(default_factory=dict)
    """Command → why it is not run here."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """A form with choices, or one that needs another run than its neighbours → one command of that form."""
    exits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Command → the exit codes that its page gives it, where they are not 0 alone."""
    stands_for: Mapping[str, str] = field(default_factory=dict)
    """As `STANDS_FOR`, for this page."""
    adds: Mapping[str, str] = field(default_factory=dict)
    """Beginning of a command → what is added to it, so that it is short, or does with 32 items."""
    before: Sequence[str] = ()
    """Commands that the page takes for done."""


ANY_STAGE = next(line for line in in_text("docs/configuration.md") if "sft|dpo|" in line)
SHORT = "--set max_steps=2 --set per_device_train_batch_size=8 --set max_completion_length=12"
AXOLOTL_LINES = ("posttrain import axolotl.yaml", "posttrain data axolotl.posttrain.yaml --examples 1", "posttrain plan axolotl.posttrain.yaml", "posttrain sft axolotl.posttrain.yaml", "posttrain eval base --suite heldout.jsonl --max-tokens 8 --out evals/base", "posttrain eval out/stages/01-sft/model --suite heldout.jsonl --max-tokens 8 --out evals/mine", "posttrain gate evals/mine evals/base --spec gate.yaml", "posttrain serve base --lora mine=out/stages/01-sft/adapter")  # fmt: skip
TINKER_LINES = ("posttrain eval tinker/session-…-train-0/sampler_weights/last/model --suite heldout.jsonl --out evals/last", "posttrain gate evals/last evals/base --spec gate.yaml", "posttrain serve tinker/session-…-train-0/sampler_weights/last/model", "posttrain serve BASE --lora last=tinker/session-…-train-0/sampler_weights/last/adapter_total")  # fmt: skip

SPECIAL: dict[str, Page] = {
    "README.md": Page(not_run={"posttrain init my-project": "asks at a terminal; with its answers as options it is run"}, exits={"posttrain doctor": (0, 1)}),
    "SKILL.md": Page(
        stands_for={"CONFIG": "axolotl.yaml", "runs/NAME": "runs/first", "runs/A": "runs/champion", "runs/B": "runs/second", "A": "runs/new/evals/01-sft", "B": "runs/champion/evals/01-sft", "RUN": "runs/waits"},
        instead={
            "posttrain registry promote word-problems@2": "posttrain registry promote words@3 --verdict runs/new/gate",
            'posttrain registry rollback word-problems --reason "why"': "posttrain registry rollback words --reason why",
        },
        not_run={"posttrain export MODEL --to gguf --out DIR": GGUF},
        exits={"posttrain diff runs/A runs/B": (1,), "posttrain doctor --json": (0, 1), "posttrain rewards check pipeline.yaml": (0, 1)},
    ),
    "docs/agents.md": Page(),
    "docs/architecture.md": Page(exits={"posttrain doctor RUN": (0, 1)}),
    "docs/configuration.md": Page(instead={ANY_STAGE: "posttrain sft sft.yaml"}),
    "docs/data-from-samples.md": Page(
        instead={"posttrain data synth CONFIG": "posttrain data synth synth.yaml", "posttrain data synth CONFIG --remake 7": "posttrain data synth synth.yaml --remake 1", "posttrain data curate CONFIG": "posttrain data curate curate.yaml"},
        not_run={"posttrain data instruct CONFIG": "tests/synthesis/test_instruct.py asks a teacher"},
    ),
    "docs/evals.md": Page(
        stands_for={"16": "4", "model:./rm": "model:rm-run/stages/01-reward_model/model", "judge:rubric.yaml": "rewards.py:correct"},
        before=("posttrain reward_model reward_model.yaml --set max_steps=2 --set val_size=0 --set output_dir=rm-run",),
        adds={"posttrain eval": "--max-tokens 8"},
    ),
    "docs/export.md": Page(
        adds={"posttrain export": "--margin 0.9"},
        not_run={"posttrain export words@champion --to gguf --out words-gguf": GGUF, "posttrain export runs/NAME/stages/03-grpo/model --to gguf --type f16 --suite suite.jsonl --out words-f16": GGUF, "posttrain export words@3 --to gptq --calibration data/sft.jsonl --out words-gptq": "tests/forms calls llm-compressor in its own environment"},
    ),
    "docs/failure-modes.md": Page(exits={"posttrain diff RUN_A RUN_B": (1,), "posttrain rewards check CONFIG": (0, 1)}),
    "docs/forecast.md": Page(exits=dict.fromkeys(("posttrain forecast runs/first", "posttrain forecast runs/first --steps 2000", "posttrain forecast runs/first --metric rewards/correct/mean --worth 0.02 --json"), (2,))),
    "docs/environments.md": Page(not_run={"posttrain data env 'verifiers:.venv-verifiers/bin/python my-environment' data/prompts.jsonl --limit 1000": "tests/environments/test_verifiers_client.py runs it where verifiers is"}),
    "docs/gate.md": Page(not_run={'posttrain gate decide RUN --accept|--reject --by NAME --reason "…"': "a form; one of it is run"}, instead={
        'posttrain gate decide runs/new --accept --by Ada --reason "safe to try"': "posttrain gate decide runs/waits --accept --by Ada --reason 'safe to try'",
    }),
    "docs/gpu.md": Page(stands_for={"CONFIG": "runs/first/stages/01-sft/model"}, adds={"posttrain eval": "--suite evals/heldout.jsonl", "posttrain plan": "--set adapter=lora --set gradient_checkpointing=offload"}),
    "docs/import.md": Page(instead={"posttrain import FILE [-o OUT]": "posttrain import axolotl.yaml -o other.yaml", "posttrain sft FILE": "posttrain sft axolotl.yaml"}),
    "docs/merging.md": Page(
        stands_for={"runs/NAME/stages/01-sft/adapter": "runs/math/stages/01-sft/adapter", "suite.jsonl": "evals/clean.jsonl"},
        not_run={"posttrain registry promote words@1 --verdict verdict": "a judgement of another version"},
    ),
    "docs/planning.md": Page(),
    "docs/registry.md": Page(
        not_run={"posttrain registry push words@champion --push-to-hub lab/words": HUB, "posttrain registry push words@3 --push-to-hub lab/words": HUB},
        instead={"posttrain reproduce REF --level 0|1|2 [--registry DIR] [--project DIR] [--out DIR]": "posttrain reproduce words@3 --level 1", "posttrain registry log [NAME]": "posttrain registry log words", "posttrain runs prune [FOLDER]": "posttrain runs prune runs"},
        exits={"posttrain registry compare words@3 words@2 --margin 0.02": (2,)},  # 32 items are too few to tell
    ),
    "docs/reliability.md": Page(exits={"posttrain doctor RUN_OR_YAML": (0, 1)}),
    "docs/rewards.md": Page(exits={"posttrain rewards check CONFIG": (0, 1)}),
    "docs/rollout-engines.md": Page(not_run={"posttrain run pipeline.yaml --set grpo.rollout.engine=vllm": "tests/rollout/vllm trains with vLLM"}),
    "docs/scale.md": Page(not_run={"posttrain run pipeline.yaml --ray auto --workers 16 --worker gpus=1": "tests/distributed/test_on_ray.py has a cluster"}),
    "docs/serving.md": Page(
        stands_for={"math=runs/a/stages/01-sft/adapter_total": "math=runs/math/stages/01-sft/adapter_total", "law=runs/b/stages/01-sft/adapter_total": "law=runs/law/stages/01-sft/adapter_total", "word-problems@3": "word-problems@1"},
        not_run={
            "posttrain serve word-problems --registry registry --engine vllm": VLLM,
            "posttrain serve BASE --engine vllm --lora math=runs/a/stages/01-sft/adapter_total --max-lora-rank 64": VLLM,
            "posttrain serve word-problems --registry registry --engine sglang --url http://127.0.0.1:30000": SGLANG,
            "posttrain serve math law --registry registry --base BASE --engine sglang --url http://127.0.0.1:30000": SGLANG,
            "posttrain serve math law --registry registry --base BASE --engine vllm --url http://127.0.0.1:8001": VLLM,
        },
    ),
    "docs/switching.md": Page(
        not_run=dict.fromkeys(AXOLOTL_LINES, "tests/docs/test_switching.py") | {"posttrain export MODEL --to gguf --out DIR": GGUF},
        stands_for={"ADAPTER": "out/stages/01-sft/adapter"},
    ),
    "docs/tinker.md": Page(not_run=dict.fromkeys(TINKER_LINES, "tests/serve/tinker/test_page.py trains as the page's script; its numbers are in the path")),
    "docs/tracking.md": Page(stands_for={"runs/NAME": "runs/first"}),
    "docs/ui.md": Page(stands_for={"runs/NAME/stages/01-sft/model": "runs/first/stages/01-sft/model", "NAME@champion": "words@champion"}),
    "examples/quickstart/README.md": Page(
        instead={"posttrain registry rollback word-problems --reason 'a test'": "posttrain registry rollback words --reason 'a test'"},
        before=("posttrain registry promote words@3 --alias champion --verdict runs/new/gate",),
        not_run={"posttrain run further.yaml": "its guard wants 504 questions, and the tiny project has 32"},
        adds={"posttrain distill": SHORT, "posttrain ppo": SHORT, "posttrain sft": "--set max_steps=2", "posttrain reward_model": "--set max_steps=2 --set val_size=8", "posttrain data synth": "--set max_completion_length=48"},
    ),
}  # fmt: skip
"""Pages of which something is to be said beside `OWN_TEST`; of the others every command runs as it stands."""
