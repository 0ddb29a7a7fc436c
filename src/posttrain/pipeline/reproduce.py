"""Repeat a registered version: its verdict from the stored items, its answers from the stored weights, its weights from
the pins. Each check says what matched, what did not, or what is missing to say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from posttrain.config.draft import StageKeys
from posttrain.config.load_pipeline import load_pipeline
from posttrain.config.pipeline import ConfiguredStage, PipelineKeys, SuiteKeys
from posttrain.config.resolved import apply_changes, to_data
from posttrain.config.rollout import RolloutKeys
from posttrain.config.settings import PROJECT_KEY
from posttrain.config.stages import ModelKeys
from posttrain.distributed.ranks import SingleProcess
from posttrain.errors import PosttrainError
from posttrain.evals.run import PLAYED_WITH
from posttrain.evals.suite import load_suite
from posttrain.evidence import EvalReport, RegistryEntry, Verdict
from posttrain.files import digest_json, read_json
from posttrain.gate.decide import decide
from posttrain.gate.folder import load_verdict, recompute, verdict_from_json
from posttrain.gate.spec import GateSpec, Guard
from posttrain.models.device import place
from posttrain.models.provenance import source_digest
from posttrain.pipeline.pins import (
    MADE_BY_STAGES,
    is_version,
    pinned_environment,
    stage_inputs,
    training_keys,
    with_models_made,
)
from posttrain.pipeline.run import Watch, run_pipeline
from posttrain.pipeline.state import RunState, StageEntry
from posttrain.pipeline.stored_data import DATA, stored_base, stored_changes, stored_config
from posttrain.pipeline.taken_over import adapter_total_of
from posttrain.recipes.measure.evaluate import evaluate
from posttrain.registry.manifest import ADAPTER_TOTAL, MODEL, Manifest
from posttrain.registry.registry import Registry

Agreement = Literal["same", "differs", "missing", "note"]
EXIT_CODE = {"same": 0, "note": 0, "differs": 1, "missing": 2}
MARGIN = 0.05
"""Within which two models' scores count as equivalent."""
_PLAYED = "played with env or tools, which are not registered"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One thing compared: it is the `same`, it `differs`, or what it takes is `missing`; a `note` decides nothing."""

    what: str
    found: Agreement
    detail: str

    def __str__(self) -> str:
        return f"{self.found:8} {self.what}: {self.detail}"


@dataclass(frozen=True)
class Version:
    """A registered version, the scratch folder it is repeated in, and the project that it was made from."""

    book: Registry
    entry: RegistryEntry
    scratch: Path
    say: Callable[[str], None]
    project: Path | None = None

    def export(self, role: str, name: str | None = None) -> Path | None:
        """The evidence of a role in the scratch folder."""
        return self.book.export(self.entry.name, self.entry.version, role, self.scratch / (name or role))

    def config(self) -> Path | None:
        """The configuration it was registered with."""
        return self.export("config", "config.yaml")

    def root(self, config: Mapping[str, Any]) -> Path:
        """Where the relative paths of that configuration start: as named, else where this registry lies as it says, else where
        the project was, if its runs lay outside of it."""
        if self.project is not None:
            return self.project
        said, place = Path(config["register"]["registry"]), self.book.folder.resolve()
        inside = not said.is_absolute() and ".." not in said.parts and place.parts[-len(said.parts) :] == said.parts
        if inside and said.parts:
            return place.parents[len(said.parts) - 1]
        was = Path(config.get(PROJECT_KEY) or ".")
        return was if was.is_absolute() and was.is_dir() else Path.cwd()

    @property
    def chain(self) -> list[Manifest]:
        return self.book.chain(self.entry.name, self.entry.version)

    @property
    def verdict(self) -> Mapping[str, Any] | None:
        return self.book.verdict_record(self.entry.name, self.entry.version)


def exit_code(checks: list[Comparison]) -> int:
    """0 all the same, 1 something differs, 2 nothing differs but something could not be compared."""
    codes = {EXIT_CODE[check.found] for check in checks}
    return 1 if 1 in codes else max(codes, default=2)


# --- level 0: the verdict ------------------------------------------------------------------------------------------


def repeat_verdict(version: Version) -> Iterator[Comparison]:
    """Decide again from the stored items, and check every stored byte."""
    done = version.book.verify(version.entry.name, version.entry.version)
    yield Comparison("stored bytes", "same", f"{done.num_files} files and {done.num_manifests} manifests are intact")
    stored = version.verdict
    gates, evals = version.export("gates"), version.export("evals")
    if stored is None or gates is None or evals is None:
        absent = ", ".join(n for n, v in (("verdict", stored), ("gates", gates), ("evals", evals)) if v is None)
        yield Comparison("verdict", "missing", f"no {absent} was registered with this version")
        return
    digest = verdict_from_json(stored).digest
    for path in sorted(gates.glob("*/verdict.json")):
        if load_verdict(path.parent).digest == digest:
            again = recompute(path.parent)
            yield Comparison("verdict", "same", f"{again.verdict.value} again, {digest} from the stored items")
            return
    yield Comparison("verdict", "missing", f"{digest} is not among the gates that were registered with this version")


# --- level 1: the answers ------------------------------------------------------------------------------------------


def repeat_answers(version: Version) -> Iterator[Comparison]:
    """Score the stored weights again, item by item."""
    path = version.config()
    if path is None:
        yield Comparison("answers", "missing", "no config was registered with this version")
        return
    config = _read(path)
    how, same = _loading(config, version.root(config)), _environment_checks(version)
    yield from same
    for suite, stored in _judged_reports(version).items():
        yield _answers(version, suite, stored, how, "; ".join(check.detail for check in same))


def _judged_reports(version: Version) -> dict[str, EvalReport]:
    """The candidate's reports that the verdict was made on."""
    evals, verdict = version.export("evals"), version.verdict
    if evals is None or verdict is None:
        return {}
    wanted = {suite: digests[0] for suite, digests in verdict["report_digests"].items()}
    reports = (EvalReport.load(path.parent) for path in sorted(evals.glob("*/*/report.json")))
    return {report.suite: report for report in reports if report.digest == wanted.get(report.suite)}


def _answers(version: Version, name: str, stored: EvalReport, how: Mapping[str, Any], elsewhere: str) -> Comparison:
    if PLAYED_WITH in stored.decoding:
        return Comparison(f"answers on {name}", "missing", f"{name} was {_PLAYED}")
    again = _measured(version, name, stored, how, version.entry.path, "again")
    if again is None:
        return Comparison(
            f"answers on {name}", "missing", f"the suite was not registered with this version (suite.{name})"
        )
    if again.suite_digest != stored.suite_digest:
        text = f"recorded {stored.suite_digest}, now {again.suite_digest}: the scorer's code or the decoding changed"
        return Comparison(f"answers on {name}", "missing", f"pin suite: {text}")
    pairs = list(zip(stored.items, again.items, strict=True))
    texts = sum(left.completions == right.completions for left, right in pairs)
    scores = sum(left.scores == right.scores for left, right in pairs)
    counts = f"{texts} of {len(pairs)} answers and {scores} of {len(pairs)} scores are equal"
    if again.digest == stored.digest:
        return Comparison(f"answers on {name}", "same", counts)
    why = elsewhere or "environment and code are those that were recorded, so this should not be"
    return Comparison(f"answers on {name}", "differs", f"{counts}; mean {stored.mean:.4f} → {again.mean:.4f} ({why})")


def _measured(
    version: Version, name: str, like: EvalReport, how: Mapping[str, Any], model: Path, where: str
) -> EvalReport | None:
    """The suite as it was registered, decoded as then; None if it was not registered."""
    kind, _ = version.book.evidence(version.entry.name, version.entry.version).get(f"suite.{name}", ("", ""))
    file = version.export(f"suite.{name}", f"suites/{name}" if kind == "tree" else f"suites/{name}.jsonl")
    if file is None:
        return None
    if kind == "tree":  # the suite beside the files of its own scorer
        (file,) = (path for path in file.rglob("*") if path.is_file() and path.suffix != ".py")
    keys = SuiteKeys(path=str(file), **like.decoding)
    loading = ModelKeys(base_model=str(model), **how)
    engine = RolloutKeys.model_validate({"engine": like.engine.partition(" ")[0]}) if like.engine else None
    suites = [(load_suite(name, file), keys)]
    return evaluate(loading, suites, like.split, version.scratch / where, rollout=engine)[name]


def _read(config: Path) -> Mapping[str, Any]:
    return yaml.safe_load(config.read_text(encoding="utf-8"))


def _loading(config: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """How the run loaded its models, from its resolved config."""
    (first,) = config["stages"][0].values()
    how = {
        name: first[name]
        for name in ("trust_remote_code", "chat_template_kwargs", "bf16", "device", "layer_offloading")
        if name in first
    }
    template = root / (first["chat_template"] or "no template")
    return how | ({"chat_template": str(template)} if template.is_file() else {})


def _environment_checks(version: Version) -> list[Comparison]:
    """What of the environment is not as it was: bitwise repetition is not promised then."""
    path = version.export("environment", "environment.json")
    if path is None:
        return [Comparison("environment", "note", "was not registered with this version, so it cannot be compared")]
    before, now = _flat(read_json(path)), _flat(pinned_environment())
    moved = [
        f"{k}: {before.get(k, 'absent')} → {now.get(k, 'absent')}"
        for k in sorted(before | now)
        if before.get(k) != now.get(k)
    ]
    more = f" and {len(moved) - 8} more" if len(moved) > 8 else ""
    return [Comparison("environment", "note", "differs: " + ", ".join(moved[:8]) + more)] if moved else []


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


# --- level 2: the weights ------------------------------------------------------------------------------------------


def repeat_training(version: Version, margin: float = MARGIN) -> Iterator[Comparison]:
    """Train again from the pins, in the scratch folder: the same bytes, or else equivalent scores."""
    config, chain = version.config(), version.chain
    if config is None:
        yield Comparison("pins", "missing", "no config was registered with this version")
        return
    root = version.root(_read(config))
    data = version.export(DATA) if version.project is None else None
    if data is not None:
        config, chain = stored_config(config, data, root, stored_base(version.book, chain)), stored_changes(chain, data)
        root = data
    try:
        keys = load_pipeline(config, project=root).keys
        moved = list(_moved_pins(keys, chain))
    except (PosttrainError, OSError) as error:
        lines = "; ".join(str(error).splitlines())
        hint = f"looked in {root}; --project DIR names another place"
        yield Comparison("pins", "missing", f"what the run was made from is not where it was: {lines}; {hint}")
        return
    yield from moved
    if any(check.found == "missing" for check in moved):
        return
    notes = [*moved, *_environment_checks(version)]
    yield from notes[len(moved) :]
    placement = place(keys.stages[0].keys)
    if placement.device.type != "cpu" or placement.autocast_dtype is not None:
        notes.append(Comparison("arithmetic", "note", f"{placement.device.type}, bf16 or not on a CPU: not bitwise"))
        yield notes[-1]
    yield from _retrained(version, keys, chain, notes, margin)


def _moved_pins(keys: PipelineKeys, chain: list[Manifest]) -> Iterator[Comparison]:
    """Inputs that are not those of the manifests. Other versions may still train the same; other data may not."""
    moved: dict[str, Comparison] = {}
    for index, (stage, manifest) in enumerate(zip(keys.stages, chain, strict=False), start=1):
        parent = source_digest(keys.base_model) if index == 1 else manifest.inputs[MODEL]
        trained = _as_trained(stage, manifest)
        before = [
            StageEntry(place, one.kind, 1, "", "", "") for place, one in enumerate(keys.stages[: index - 1], start=1)
        ]
        made = with_models_made(trained, Path("/"), before)
        now = stage_inputs(stage.kind, trained, parent) | {"keys": digest_json(training_keys(made))}
        named, folders = to_data(trained), to_data(made)
        unknown = {pin for pin, key in MADE_BY_STAGES.items() if named.get(key) != folders.get(key)}
        for name in [name for name in now if name not in unknown]:
            value = now[name]
            recorded = manifest.inputs.get(name, "absent")
            what = (
                name if is_version(name) else "base_model" if name == MODEL else f"stages.{index}.{stage.kind}.{name}"
            )
            found: Agreement = "note" if is_version(name) else "missing"
            if recorded != value:
                moved[what] = Comparison(f"pin {what}", found, f"recorded {recorded}, now {value}")
    yield from moved.values()


def _as_trained(stage: ConfiguredStage, manifest: Manifest) -> StageKeys:
    """The keys of a stage with what a loop-back changed."""
    return apply_changes(stage.keys, manifest.details.get("changed", {}))


def _retrained(
    version: Version, keys: PipelineKeys, chain: list[Manifest], notes: list[Comparison], margin: float
) -> Iterator[Comparison]:
    folder = version.scratch / "run"
    run_pipeline(_only_training(keys, chain, folder), SingleProcess(), watch=Watch(say=version.say))
    state = RunState.load(folder)
    assert state is not None, "the run that just ended left its state"
    made = [state.stage(index) for index in range(1, len(chain) + 1)]
    equal = True
    for manifest, entry in zip(chain, made, strict=True):
        assert entry is not None, "every stage ran"
        for name in MADE_BY_STAGES:
            recorded, now = manifest.inputs.get(name), entry.inputs.get(name)
            if recorded != now:
                pin = f"pin stages.{entry.index}.{entry.kind}.{name}"
                yield Comparison(pin, "note" if notes or not equal else "missing", f"recorded {recorded}, now {now}")
        same = entry.output_digest == manifest.outputs[MODEL]
        equal = equal and same
        text = entry.output_digest if same else f"recorded {manifest.outputs[MODEL]}, now {entry.output_digest}"
        expected = bool(notes)
        yield Comparison(f"weights of {manifest.stage}", "same" if same else "note" if expected else "differs", text)
        if recorded := manifest.outputs.get(ADAPTER_TOTAL):
            now = adapter_total_of(entry.files)
            text = now if now == recorded else f"recorded {recorded}, now {now or 'absent'}"
            found: Agreement = "same" if now == recorded else "note" if expected else "differs"
            yield Comparison(f"{ADAPTER_TOTAL} of {manifest.stage}", found, text)
    last = made[-1]
    assert last is not None, "a version has at least one stage"
    if not equal:
        yield from _equivalent(version, folder / last.folder / "model", keys, margin)


def _only_training(keys: PipelineKeys, chain: list[Manifest], folder: Path) -> PipelineKeys:
    """The stages of the chain with what loop-backs changed, nothing measured, judged, mirrored, told or registered."""
    quiet = {"gate": None, "report_to": [], "mlflow": None, "prometheus_port": None}
    stages = [
        ConfiguredStage(
            kind=stage.kind,
            keys=_as_trained(stage, manifest).model_copy(update=quiet),
        )
        for stage, manifest in zip(keys.stages, chain, strict=False)
    ]
    update = {
        "output_dir": str(folder),
        "stages": stages,
        "gate": None,
        "register_": None,
        "evals": {},
        "stop_when": "end",
        "notify": {},
    }
    return keys.model_copy(update=update)


def _equivalent(version: Version, model: Path, keys: PipelineKeys, margin: float) -> Iterator[Comparison]:
    """Two one-sided tests: neither model is worse than the other by `margin` or more."""
    first = keys.stages[0].keys
    how = {
        name: getattr(first, name)
        for name in ("trust_remote_code", "bf16", "device", "layer_offloading", "chat_template", "chat_template_kwargs")
    }
    for name, stored in _judged_reports(version).items():
        if PLAYED_WITH in stored.decoding:
            yield Comparison(f"scores on {name}", "missing", f"{name} was {_PLAYED}")
            continue
        again = _measured(version, name, stored, how, model, "retrained")
        if again is None or again.suite_digest != stored.suite_digest:
            yield Comparison(
                f"scores on {name}", "missing", "the suite is not as it was registered, so nothing compares"
            )
            continue
        spec = GateSpec(guards=(Guard(name, margin),), split=stored.split)
        sides = [decide(spec, {name: a}, {name: b}) for a, b in ((again, stored), (stored, again))]
        text = f"mean {stored.mean:.4f} → {again.mean:.4f}, margin {margin:g}: "
        worst = next((side for side in sides if side.verdict is not Verdict.PASS), None)
        if worst is None:
            yield Comparison(f"scores on {name}", "same", f"{text}equivalent at alpha {spec.alpha:g}")
        else:
            found: Agreement = "differs" if worst.verdict is Verdict.FAIL else "missing"
            yield Comparison(f"scores on {name}", found, f"{text}{worst.verdict.value}, {worst.reason}")


LEVELS: dict[int, Callable[[Version], Iterator[Comparison]]] = {
    0: repeat_verdict,
    1: repeat_answers,
    2: repeat_training,
}
"""What each level of `posttrain reproduce` repeats."""
