"""What a key means: everything `posttrain explain` and the configuration page say comes from the schema."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from posttrain.config.curate import ColumnRangeKeys, CurateKeys, QualityKeys
from posttrain.config.datasets import DatasetKeys
from posttrain.config.foreign import NO_COUNTERPART, foreign_names
from posttrain.config.instruct import InstructKeys
from posttrain.config.judge import CriterionKeys, JudgeKeys
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.knob import Keys
from posttrain.config.pipeline import (
    GateKeys,
    GuardKeys,
    NotifyKeys,
    OnFailKeys,
    PipelineKeys,
    PrimaryKeys,
    RegisterKeys,
    SuiteKeys,
)
from posttrain.config.rollout import RolloutKeys
from posttrain.config.schema import CLOSE_KEYS, ForeignName, KeyInfo, did_you_mean, keys_of, nearest
from posttrain.config.sharding import ShardingKeys
from posttrain.config.synth import DifficultyKeys, SynthKeys
from posttrain.config.teachers import TeacherKeys
from posttrain.errors import ConfigError

GROUPS: Mapping[str, type[Keys]] = {
    "pipeline": PipelineKeys,
    "datasets": DatasetKeys,
    "rollout": RolloutKeys,
    "teachers": TeacherKeys,
    "judge": JudgeKeys,
    "judge.rubric": CriterionKeys,
    "sharding": ShardingKeys,
    "data curate": CurateKeys,
    "data curate.ranges": ColumnRangeKeys,
    "data curate.quality": QualityKeys,
    "data instruct": InstructKeys,
    "data synth": SynthKeys,
    "data synth.difficulty": DifficultyKeys,
    "evals": SuiteKeys,
    "gate": GateKeys,
    "gate.guards": GuardKeys,
    "gate.primary": PrimaryKeys,
    "gate.on_fail": OnFailKeys,
    "register": RegisterKeys,
    "notify": NotifyKeys,
}
"""Where keys stand besides the stages: the pipeline, and the groups inside it."""


def groups() -> dict[str, type[Keys]]:
    """Where keys stand: the stages of every kind, and the rest."""
    return {**{row.name: row.keys for row in STAGE_KINDS.values()}, **GROUPS}


_FAR = 0.4
"""How alike a name must be to be the nearest where none is close."""


@dataclass(frozen=True, slots=True)
class KeyUse:
    """A key in the places where it means one thing; `defaults` by place."""

    places: tuple[str, ...]
    meaning: str
    type: str
    defaults: Mapping[str, str]
    example: str
    also: tuple[ForeignName, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """A key: one `Use` per meaning (`path` is one thing in `datasets`, another in `evals`)."""

    key: str
    uses: tuple[KeyUse, ...]
    asked: str

    @property
    def meaning(self) -> str:
        return self.uses[0].meaning

    @property
    def type(self) -> str:
        return self.uses[0].type

    @property
    def defaults(self) -> dict[str, str]:
        return {place: default for use in self.uses for place, default in use.defaults.items()}

    @property
    def also(self) -> tuple[ForeignName, ...]:
        return tuple(dict.fromkeys(name for use in self.uses for name in use.also))

    @property
    def stages(self) -> tuple[str, ...]:
        """The stage kinds that take the key."""
        return tuple(stage for stage in STAGE_KINDS if stage in self.defaults)


def explain(key: str) -> Explanation:
    """Explain a key by its name, its place and name (`gate.alpha`), or another tool's name. Raises: ConfigError."""
    place, _, name = key.rpartition(".")
    name = _own_name(name)
    found = [(group, keys_of(model)[name]) for group, model in groups().items() if name in keys_of(model)]
    if place:
        found = [(group, info) for group, info in found if group == place or group.rpartition(".")[2] == place]
    if not found:
        raise ConfigError(_unknown(key))
    return Explanation(name, tuple(_uses(found)), key)


def all_keys() -> dict[str, tuple[str, ...]]:
    """The names of the keys by place."""
    return {place: tuple(keys_of(model)) for place, model in groups().items()}


def _own_name(name: str) -> str:
    if any(name in keys_of(model) for model in groups().values()):
        return name
    return next((foreign_names(m)[name].name for m in groups().values() if name in foreign_names(m)), name)


def _uses(found: list[tuple[str, KeyInfo]]) -> list[KeyUse]:
    together: dict[tuple[str, str], list[tuple[str, KeyInfo]]] = {}
    for place, info in found:
        together.setdefault((info.meaning, info.type), []).append((place, info))
    return [
        KeyUse(
            places=tuple(place for place, _ in members),
            meaning=meaning,
            type=type_,
            defaults={place: info.default for place, info in members},
            example=f"{members[0][1].name}: {members[0][1].example}" if members[0][1].example else "",
            also=tuple(dict.fromkeys(other for _, info in members for other in info.also)),
        )
        for (meaning, type_), members in together.items()
    ]


def _unknown(key: str) -> str:
    if key in NO_COUNTERPART:
        tools, advice = NO_COUNTERPART[key]
        return f"{key}: a key of {tools.replace(', ', ' and ')} without a counterpart here; {advice}"
    names = {name for model in groups().values() for name in (*keys_of(model), *foreign_names(model))}
    name = key.rpartition(".")[2]
    close = did_you_mean(name, sorted(names), cutoff=CLOSE_KEYS)
    return f"{key}: no such key{close or _about(name, names) + '; `posttrain explain` without a key lists them all'}"


def _about(word: str, names: Iterable[str]) -> str:
    """The keys that speak of `word`, for want of one that is called nearly so."""
    told = {
        info.name: f"{info.name} {info.meaning}".lower()
        for model in groups().values()
        for info in keys_of(model).values()
    }
    about = [name for name, text in told.items() if word.lower() in text]
    if about:
        return f"; keys about it: {', '.join(about[:6])}{' …' * (len(about) > 6)}"
    far = nearest(word, sorted(names), _FAR)
    return f"; the nearest is {far[0]}" if far else ""
