"""How many of other tools' configurations import, and then plan, without an edit.

    python bench/import_coverage.py FOLDER_OR_JSONL [--refused]

FOLDER holds YAML files, and scripts of verl and OpenRLHF, whose data must be where they name it; a JSONL has a row {"tool": …, "config": …}
per file. `plan` reads a tiny model's config.json of the family that
`base_model` names, and LLaMA-Factory's names are looked up in a `dataset_info.json` with its demo data; both are made here.
Prints per tool: accepted, refused, failed to plan, crashed; and the share accepted of those whose method posttrain has.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from posttrain.config.importers.convert import import_file
from posttrain.errors import ConfigError, PosttrainError
from posttrain.files import read_json_lines

FAMILIES = (
    ("qwen3.5|qwen3.6", "qwen3_5_text"), ("qwen3-next", "qwen3_next"), ("qwen3.*a\\d+b", "qwen3_moe"), ("qwen3", "qwen3"), ("qwen", "qwen2"),
    ("gemma-4", "gemma4_text"), ("gemma-3n", "gemma3n_text"), ("gemma-3", "gemma3_text"), ("gemma-2", "gemma2"), ("gemma", "gemma"),
    ("llama-4", "llama4_text"), ("mixtral", "mixtral"), ("gpt-oss", "gpt_oss"), ("deepseek-v4", "deepseek_v4"), ("deepseek-v3", "deepseek_v3"), ("deepseek", "deepseek_v2"), ("falcon-h1", "falcon_h1"),
    ("falcon", "falcon"), ("phi-3|phi-4", "phi3"), ("phi", "phi"), ("mistral|ministral|magistral", "mistral"), ("mamba", "mamba"), ("mpt|replit", "mpt"), ("stablelm", "stablelm"), ("jamba", "jamba"),
    ("granite-4", "granitemoehybrid"), ("granite", "granite"), ("glm", "glm4_moe"), ("lfm2", "lfm2"), ("nemotron", "nemotron_h"), ("olmo", "olmo3"), ("smollm3", "smollm3"), ("minimax", "minimax_m2"),
    ("cohere|command|aya", "cohere"), ("pythia|neox", "gpt_neox"), ("apertus", "apertus"), ("seed-oss", "seed_oss"),
)  # fmt: skip
"""Part of a model's name → its family; what matches none is read as a Llama."""
_MOE = ("moe", "mixtral", "gpt_oss", "deepseek", "llama4", "minimax", "jamba")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 524_288}  # fmt: skip

DEMO = ("identity", "alpaca_en_demo", "alpaca_zh_demo", "glaive_toolcall_en_demo", "glaive_toolcall_zh_demo", "dpo_en_demo", "dpo_zh_demo", "kto_en_demo", "c4_demo", "wiki_demo", "mllm_demo", "mllm_video_demo", "mllm_audio_demo",
        "mllm_video_audio_demo", "med", "reason_tool_use_demo_50")  # fmt: skip
SCRIPTS = {"verl.trainer.": "verl", "openrlhf.cli.": "openrlhf"}
"""A word of a script → whose command it holds."""
METHODS = frozenset({
    "processor_type", "reward_model", "process_reward_model", "num_labels", "rl", "stage", "finetuning_type", "diffusion", "ebft", "kd_trainer", "qat", "fp8", "pretraining_dataset", "relora", "relora_steps",
    "reinit_weights", "use_llama_pro", "mixture_of_depths", "use_asft_loss", "use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon", "streaming", "lisa_n_layers",
    "kt_weight_path", "dsv4_fp4_grouped_mode",
})  # fmt: skip
"""A refusal of one of these keys says that the method itself is not here (multimodal, reward models, pre-training, …)."""
_REFUSAL = re.compile(r"^.+?: (?P<key>[\w.\- ]+): .+; .+$")


@dataclass(frozen=True)
class Verdict:
    tool: str
    name: str
    outcome: str
    lines: tuple[str, ...] = ()

    @property
    def lacks_method(self) -> bool:
        keys = {match["key"].split(".")[0].split(" ")[0] for line in self.lines if (match := _REFUSAL.match(line))}
        media = any("images, video" in line for line in self.lines)
        return self.outcome == "refused" and (bool(keys & METHODS) or media)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a folder of YAML files, or a JSONL of {tool, config}")
    parser.add_argument("--refused", action="store_true", help="print why each refused file was refused")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        verdicts = list(measure(args.source, Path(folder)))
    for verdict in verdicts:
        if verdict.outcome in ("plan failed", "crashed") or (args.refused and verdict.outcome == "refused"):
            print(f"{verdict.tool} {verdict.name} {verdict.outcome}", *verdict.lines, sep="\n  ")
    print(table(verdicts))


def measure(source: Path, folder: Path) -> Iterator[Verdict]:
    make_demo_data(folder / "data")
    for number, (tool, name, config) in enumerate(configs(source)):
        path = config if isinstance(config, Path) else folder / f"{number}.yaml"
        if not isinstance(config, Path):
            path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        out = folder / f"{number}.ours.yaml"
        yield judge(path, out, tool, name, folder)


def configs(source: Path) -> Iterator[tuple[str | None, str, dict[str, Any] | Path]]:
    """A tool, a name and a configuration: keys, or a script."""
    if source.is_file():
        for number, row in read_json_lines(source):
            yield row["tool"], f"row {number}", row["config"]
        return
    for path in sorted((*source.rglob("*.yaml"), *source.rglob("*.yml"))):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and {"base_model", "model_name_or_path"} & set(config):
            yield None, str(path.relative_to(source)), config
    for path in sorted(source.rglob("*.sh")):
        text = path.read_text(encoding="utf-8")
        if tool := next((tool for mark, tool in SCRIPTS.items() if mark in text), None):
            yield tool, str(path.relative_to(source)), path


def judge(path: Path, out: Path, tool: str | None, name: str, folder: Path) -> Verdict:
    named = tool or "unnamed"
    try:
        imported = import_file(path, out, tool)
    except ConfigError as error:
        return Verdict(named, name, "refused", tuple(str(error).splitlines()))
    except Exception:  # noqa: BLE001 - what is counted here
        return Verdict(named, name, "crashed", tuple(traceback.format_exc().splitlines()[-3:]))
    model = tiny_model(str(imported.keys["base_model"]), folder)
    result = CliRunner().invoke(_plan(), [str(out), "--set", f"base_model={model}"])
    if isinstance(result.exception, PosttrainError):
        return Verdict(named, name, "plan failed", tuple(str(result.exception).splitlines()))
    # 1 says that it does not fit on this machine, which is an answer.
    if result.exit_code not in (0, 1) or not isinstance(result.exception, SystemExit | None):
        return Verdict(named, name, "crashed", (repr(result.exception),))
    assert f"\n{imported.kind}  trains" in result.output, result.output
    return Verdict(named, name, "accepted")


def _plan() -> Any:
    import typer

    from posttrain.cli.plan import plan

    app = typer.Typer()
    app.command()(plan)
    return app


def tiny_model(name: str, folder: Path) -> Path:
    """A folder with the config.json of a tiny model of the family that `name` is of."""
    family = next((kind for part, kind in FAMILIES if re.search(part, name.lower())), "llama")
    place = folder / "models" / family
    place.mkdir(parents=True, exist_ok=True)
    experts = (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        if any(part in family for part in _MOE)
        else {}
    )
    (place / "config.json").write_text(json.dumps({"model_type": family, **SIZES, **experts}))
    return place


def make_demo_data(folder: Path) -> None:
    """LLaMA-Factory's `dataset_info.json` with the names of its demo data, and the files."""
    folder.mkdir(parents=True)
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    }
    info: dict[str, Any] = {}
    for name in DEMO:
        entry: dict[str, Any] = {"file_name": f"{name}.json"}
        if "toolcall" in name:
            entry |= {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}}
        elif name.startswith("dpo"):
            entry |= {
                "formatting": "sharegpt",
                "ranking": True,
                "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
            }
        elif name.startswith("kto"):
            entry |= {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}, "tags": tags}
        elif name.startswith("mllm"):
            entry |= {"formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}, "tags": tags}
        elif name in ("c4_demo", "wiki_demo"):
            entry |= {"columns": {"prompt": "text"}}
        info[name] = entry
        (folder / entry["file_name"]).write_text("[]")
    (folder / "dataset_info.json").write_text(json.dumps(info))


def table(verdicts: list[Verdict]) -> str:
    columns = ("accepted", "refused", "plan failed", "crashed")
    lines = [
        f"{'tool':14} {'files':>6} {'accepted':>9} {'refused':>8} {'plan failed':>12} {'crashed':>8} {'method here':>12} {'of these':>9}"
    ]
    for tool in [*sorted({verdict.tool for verdict in verdicts}), "all"]:
        mine = [verdict for verdict in verdicts if tool in ("all", verdict.tool)]
        counts = Counter(verdict.outcome for verdict in mine)
        ours = sum(not verdict.lacks_method for verdict in mine)
        share = f"{counts['accepted'] / ours:.0%}" if ours else "-"
        cells = " ".join(f"{counts[name]:>{width}}" for name, width in zip(columns, (9, 8, 12, 8), strict=True))
        lines.append(f"{tool:14} {len(mine):>6} {cells} {ours:>12} {share:>9}")
    whole = [line for verdict in verdicts if verdict.outcome == "refused" for line in verdict.lines]
    named = sum(bool(_REFUSAL.match(line)) for line in whole)
    return "\n".join([*lines, f"refusals that name key, reason and what to do: {named} of {len(whole)}"])


if __name__ == "__main__":
    main()
