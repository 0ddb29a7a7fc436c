"""The model card: written from the registry's records, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from posttrain.files import digest_start
from posttrain.names import REPOSITORY
from posttrain.registry.manifest import ADAPTER_TOTAL, MODEL, Manifest
from posttrain.registry.promotion import DECISION
from posttrain.registry.registry import Registry

_TEMPLATE = Path(__file__).with_name("card.md.j2")


def model_card(registry: Registry, name: str, version: int, *, hub: Literal["", "model", "adapter"] = "") -> str:
    """Markdown with Hugging Face front matter; for what is pushed to the `hub` that names only what may be there.

    Stage manifests may carry in `details`: base_model, license, datasets, command, wall_s, tokens and any number to show.
    """
    import jinja2

    entry = registry.show(name, version)
    chain = registry.chain(name, version)
    verdict = registry.verdict_record(name, version)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False)
    environment.filters |= {"number": _number, "short": digest_start, "cell": _cell}  # pyright: ignore[reportUnknownMemberType]
    return environment.from_string(_TEMPLATE.read_text()).render(
        front_matter=_front_matter(name, chain, verdict, hub),
        entry=entry,
        chain=[manifest.to_json() | {"digest": manifest.digest, "settings": _settings(manifest)} for manifest in chain],
        verdict=verdict,
        certificates=registry.records(name, version, "certificate"),
        decisions=_decisions(chain, registry.records(name, version, DECISION)),
        datasets=_datasets(chain),
        licence=_detail(chain, "license"),
        base=_detail(chain, "base_model") or chain[0].inputs[MODEL],
        command=_detail(chain, "command"),
        adapter=registry.evidence(name, version).get(ADAPTER_TOTAL, ("", ""))[1].removeprefix("sha256:"),
    )


def _detail(chain: list[Manifest], key: str) -> Any:
    """The last stage that says it wins."""
    return next((manifest.details[key] for manifest in reversed(chain) if manifest.details.get(key)), None)


def _decisions(chain: list[Manifest], records: list[Any]) -> list[Any]:
    """What people decided on this version: those in its lineage, and those it was promoted by."""
    stated = [decision.to_json() for manifest in chain for decision in manifest.decisions]
    return [*stated, *(record for record in records if record not in stated)]


def _datasets(chain: list[Manifest]) -> list[str]:
    return sorted({str(data) for manifest in chain for data in manifest.details.get("datasets", ())})


def _settings(manifest: Manifest) -> str:
    shown = {
        key: value for key, value in manifest.details.items() if isinstance(value, (int, float)) and key != "wall_s"
    }
    return ", ".join(f"{key} {_number(value)}" for key, value in sorted(shown.items()))


def _front_matter(name: str, chain: list[Manifest], verdict: Mapping[str, Any] | None, hub: str) -> str:
    import yaml

    base, datasets = str(_detail(chain, "base_model") or ""), _datasets(chain)
    if hub:
        base = "" if REPOSITORY.against(base) else base
        datasets = [path for path in datasets if not REPOSITORY.against(path) and not Path(path).suffix]
    fields: dict[str, Any] = {
        "base_model": base,
        "license": _detail(chain, "license"),
        "library_name": "peft" if hub == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "datasets": datasets,
        "tags": ["posttrain", *dict.fromkeys(manifest.stage for manifest in chain)],
        "model-index": [{"name": name, "results": _results(verdict)}] if verdict else None,
    }
    stated = {key: value for key, value in fields.items() if value}
    return yaml.safe_dump(stated, sort_keys=False).strip()  # pyright: ignore[reportUnknownMemberType]


def _results(verdict: Mapping[str, Any]) -> list[dict[str, Any]]:
    suites = {test["suite"]: test["candidate_mean"] for test in verdict["tests"] if test["role"] != "limit"}
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": suite, "type": suite},
            "metrics": [{"type": "mean_score", "value": mean}],
        }
        for suite, mean in suites.items()
    ]


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: Any) -> str:
    """Text that does not end a table's cell."""
    return str(text).replace("|", "\\|").replace("\n", " ")
