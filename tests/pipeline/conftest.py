"""Small whole projects: a tiny model learns to say yes; data, suites, rewards and a YAML in one folder."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from posttrain.cli.app import main
from posttrain.config.load_pipeline import load_pipeline
from posttrain.distributed.ranks import SingleProcess
from posttrain.pipeline.run import Outcome, Watch, run_pipeline
from posttrain.pipeline.state import RunState
from posttrain.registry.registry import Registry

REWARDS = '''
def spread(prompts, completions, answer, **columns):
    """A number that differs between almost any two completions."""
    return [sum(map(ord, c[0]["content"])) % 17 / 17.0 for c in completions]


def is_in(prompts, completions, answer, **columns):
    """Pays for the right answer anywhere in the text, and so for a list of all answers."""
    return [float(a in c[0]["content"]) for c, a in zip(completions, answer)]
'''


def question(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {number // 10} plus {number % 10}?"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_files(folder: Path, num_items: int = 40) -> None:
    """Data on sums of one digit, a suite on larger ones: nothing of the suite is in the data."""
    train = range(1, 25)
    write_rows(folder / "sft.jsonl", [{"messages": question(n) + said("Yes.")} for n in train])
    write_rows(
        folder / "pairs.jsonl",
        [{"prompt": question(n), "chosen": said("Yes."), "rejected": said(f"No {n}")} for n in train],
    )
    write_rows(folder / "prompts.jsonl", [{"prompt": question(n), "answer": str(n // 10 + n % 10)} for n in train])
    items = [
        {"id": f"q{n}", "messages": question(100 + n), "target": "Yes.", "scorer": "exact", "split": split}
        for split, numbers in (("dev", range(35)), ("gate", range(100, 100 + num_items)))
        for n in numbers
    ]
    write_rows(folder / "yes.jsonl", items)
    (folder / "rewards.py").write_text(REWARDS)


SFT = {
    "datasets": [{"path": "sft.jsonl", "type": "chat"}],
    "learning_rate": 1e-2, "max_steps": 8, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant",
}  # fmt: skip
DPO = {
    "datasets": [{"path": "pairs.jsonl", "type": "preference"}],
    "learning_rate": 1e-4, "max_steps": 3, "per_device_train_batch_size": 4, "save_steps": 1,
}  # fmt: skip
GRPO = {
    "datasets": [{"path": "prompts.jsonl", "type": "prompt"}],
    "reward_funcs": ["rewards.py:spread"], "reward_check": "off", "learning_rate": 1e-4, "max_steps": 3,
    "num_generations": 4, "num_prompts_per_step": 2, "max_completion_length": 6, "temperature": 2.0,
    "per_device_train_batch_size": 8, "save_steps": 1,
}  # fmt: skip
GATE = {"baseline": "alias:champion", "primary": [{"suite": "yes", "min_delta": 0.35}]}


@dataclass
class Project:
    """A folder with a pipeline; `values` are its YAML."""

    folder: Path
    values: dict
    said: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        path = self.folder / "pipeline.yaml"
        path.write_text(yaml.safe_dump(self.values, sort_keys=False))
        return path

    @property
    def out(self) -> Path:
        return self.folder / "runs" / self.values["name"]

    @property
    def state(self) -> RunState:
        state = RunState.load(self.out)
        assert state is not None
        return state

    def registry(self) -> Registry:
        return Registry(self.folder / "registry")

    def run(self, *sets: str, on_change="refuse") -> Outcome:
        """Run in this process. What it said is in `said`."""
        self.said.clear()
        loaded, watch = load_pipeline(self.path, sets), Watch(say=self.said.append)
        return run_pipeline(loaded.keys, SingleProcess(), on_change=on_change, watch=watch, project=loaded.project)

    def command(self, *options: str) -> int:
        """Exit code of `posttrain run`, called in this process."""
        with pytest.raises(SystemExit) as caught:
            main(["run", str(self.path), "--quiet", *options])
        return caught.value.code

    def spawn(self, *options: str) -> subprocess.Popen:
        """`posttrain run` as a process of its own, on one thread as the tests are."""
        command = [sys.executable, "-m", "posttrain.cli.app", "run", str(self.path), "--quiet", *options]
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
        return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def events(self, action: str) -> list:
        book = self.registry()
        try:
            return [event for event in book.rows.events() if event.action == action]
        finally:
            book.close()

    def copy_to(self, folder: Path) -> "Project":
        """The same project elsewhere, without its runs."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("runs", "registry"))
        return Project(folder, json.loads(json.dumps(self.values)))


def stages(*rows: tuple[str, dict]) -> list[dict]:
    return [{kind: dict(keys)} for kind, keys in rows]


@pytest.fixture(scope="session")
def make_project(model_dir):
    """`make_project(folder, stages, **keys)` writes a project on the tiny Qwen3 model."""

    def make(folder: Path, stages_: list[dict], **keys) -> Project:
        folder.mkdir(parents=True, exist_ok=True)
        make_files(folder)
        values = {
            "name": "yes", "base_model": str(model_dir("qwen3")), "sequence_len": 64, "seed": 1,
            "evals": {"yes": {"path": "yes.jsonl", "max_tokens": 6}}, "stages": stages_, **keys,
        }  # fmt: skip
        return Project(folder, values)

    return make


@pytest.fixture
def project(make_project, tmp_path):
    """`project(stages, **keys)` in a folder of its own."""
    return lambda stages_, **keys: make_project(tmp_path / "project", stages_, **keys)


REGISTER = {"name": "yes", "alias": "champion"}


@pytest.fixture(scope="session")
def finished(make_project, tmp_path_factory) -> Project:
    """A whole run, sft → dpo → grpo → gate → register, in this process. Not to be changed."""
    rows = stages(("sft", SFT), ("dpo", DPO), ("grpo", GRPO))
    made = make_project(tmp_path_factory.mktemp("finished"), rows, gate=GATE, register=REGISTER)
    made.run()
    return made


@pytest.fixture(scope="session")
def promoted(make_project, tmp_path_factory) -> Project:
    """A short run, sft → dpo → gate → register, whose model became champion. Not to be changed."""
    rows = stages(("sft", SFT), ("dpo", DPO))
    made = make_project(tmp_path_factory.mktemp("promoted"), rows, gate=GATE, register=REGISTER)
    made.run()
    return made
