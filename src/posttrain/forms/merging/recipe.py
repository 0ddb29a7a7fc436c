"""mergekit's YAML, read key by key: what is not known, or not acted on here, is refused with its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from posttrain.config.yaml_lines import Document, KeyPath, read_yaml
from posttrain.errors import ConfigError
from posttrain.forms.merging.methods import MERGE_METHODS, MergeMethod

RECIPE_KEYS = ("models", "slices", "merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "parameters")  # fmt: skip
_NOT_HERE = {
    "modules": "models of several parts (vision towers) are not merged here; expected `models` or `slices`",
    "residual_weight": "mergekit reads it and does nothing with it; take it out",
    "tokens": "single tokens are not placed here; expected `tokenizer_source: union`, `base` or a model",
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class MergeSource:
    """One model of an output slice: the layers [first, last) of it; `layers` is None for all."""

    model: str
    layers: tuple[int, int] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers of the result that come from the same sources."""

    sources: tuple[MergeSource, ...]
    base: str | None
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class MergeRecipe:
    """A whole file. `text` is kept with the result, as it was written."""

    method: str
    slices: tuple[Slice, ...]
    base: str | None
    parameters: Mapping[str, Any]
    dtype: str | None
    out_dtype: str | None
    tokenizer_source: str | None
    pad_to_multiple_of: int
    chat_template: str | None
    text: str

    @property
    def row(self) -> MergeMethod:
        return MERGE_METHODS[self.method]

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that is named, in the order of the file, the base first."""
        named = [source.model for part in self.slices for source in part.sources]
        bases = [base for base in (self.base, *(part.base for part in self.slices)) if base]
        return tuple(dict.fromkeys([*bases, *named]))


def read_recipe(path: Path) -> MergeRecipe:
    """Raises: ConfigError with file and line."""
    return _RecipeReader(path, read_yaml(path)).read()


@dataclass(slots=True)
class _RecipeReader:
    path: Path
    document: Document
    method: MergeMethod = field(init=False)

    def read(self) -> MergeRecipe:
        data = self.document.data
        self._known(data, RECIPE_KEYS, ())
        name = self._text(data, "merge_method", ()) or ""
        if name not in MERGE_METHODS:
            self._refuse(("merge_method",), f"merge_method: got {name!r}; expected one of {', '.join(MERGE_METHODS)}")
        self.method = MERGE_METHODS[name]
        if ("models" in data) == ("slices" in data):
            self._refuse((), "expected `models` or `slices`, exactly one of them")
        base = self._text(data, "base_model", ())
        for key in ("dtype", "out_dtype"):
            if data.get(key) not in (None, *DTYPES):
                self._refuse((key,), f"{key}: got {data[key]!r}; expected one of {', '.join(DTYPES)}")
        if "{" not in (self._text(data, "chat_template", ()) or "{"):
            self._refuse(("chat_template",), "chat_template: expected the text of a Jinja template")
        tokenizer = self._tokenizer()
        slices = self._models(base) if "models" in data else self._slices(base)
        for place, part in enumerate(slices):
            self._fits(part, ("slices", place) if "slices" in data else ("models",))
        return MergeRecipe(
            name, slices, base, self._parameters(data, (), (*self.method.shared, *self.method.of_model)), data.get("dtype"), data.get("out_dtype"),
            *tokenizer, self._text(data, "chat_template", ()), self.path.read_text(encoding="utf-8-sig"),
        )  # fmt: skip

    def _tokenizer(self) -> tuple[str | None, int]:
        data = self.document.data
        if "tokenizer" not in data:
            return self._text(data, "tokenizer_source", ()), 1
        if "tokenizer_source" in data:
            self._refuse(("tokenizer",), "tokenizer: stands beside tokenizer_source; keep one of them")
        said = data["tokenizer"]
        self._known(said, ("source", "pad_to_multiple_of"), ("tokenizer",))
        return self._text(said, "source", ("tokenizer",)) or "union", int(said.get("pad_to_multiple_of", 1))

    def _models(self, base: str | None) -> tuple[Slice, ...]:
        sources = [
            self._source(entry, ("models", place), ("model", "parameters"))
            for place, entry in enumerate(self._list(self.document.data["models"], ("models",)))
        ]
        if base is not None and base not in {source.model for source in sources}:
            sources.append(MergeSource(base))
        return (Slice(tuple(sources), base),)

    def _slices(self, base: str | None) -> tuple[Slice, ...]:
        found: list[Slice] = []
        for place, entry in enumerate(self._list(self.document.data["slices"], ("slices",))):
            here: KeyPath = ("slices", place)
            self._known(entry, ("sources", "base_model", "parameters"), here)
            places = (*here, "sources")
            sources = tuple(
                self._source(source, (*places, number), ("model", "layer_range", "parameters"))
                for number, source in enumerate(self._list(entry.get("sources"), places))
            )
            lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
            if len(lengths) != 1 or any(source.layers is None for source in sources):
                self._refuse(
                    places, "the sources of a slice must each have a layer_range, of equally many layers (at least one)"
                )
            found.append(
                Slice(
                    sources,
                    self._text(entry, "base_model", here) or base,
                    self._parameters(entry, here, (*self.method.shared, *self.method.of_model)),
                )
            )
        return tuple(found)

    def _source(self, entry: Any, here: KeyPath, keys: Sequence[str]) -> MergeSource:
        self._known(entry, keys, here)
        model = self._text(entry, "model", here)
        if not model:
            self._refuse(here, "expected `model: FOLDER`")
        layers = entry.get("layer_range")
        if layers is not None:
            at = (*here, "layer_range")
            if not (isinstance(layers, list) and len(layers) == 2 and all(type(number) is int for number in layers)):
                self._refuse(at, f"layer_range: got {layers!r}; expected [first, last], the last not included")
            if not 0 <= layers[0] < layers[1]:
                self._refuse(at, f"layer_range: got {layers}; expected 0 <= first < last")
        return MergeSource(
            model, tuple(layers) if layers else None, self._parameters(entry, here, tuple(self.method.of_model))
        )

    def _parameters(self, entry: Mapping[str, Any], here: KeyPath, allowed: Sequence[str]) -> Mapping[str, Any]:
        given = entry.get("parameters", {})
        self._known(given, allowed, (*here, "parameters"))
        for name, value in given.items():
            self._setting(value, (*here, "parameters", name))
        return given

    def _setting(self, value: Any, here: KeyPath) -> None:
        """A number, a list of numbers along the layers, or a list of values by filter."""
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            for place, part in enumerate(value):
                self._known(part, ("filter", "value"), (*here, place))
                if "value" not in part:
                    self._refuse((*here, place), "expected `value:` beside the filter")
                self._setting(part["value"], (*here, place, "value"))
            return
        if isinstance(value, dict):
            self._known(value, ("filter", "value"), here)
            return self._setting(value.get("value"), (*here, "value"))
        wrong = [part for part in (value if isinstance(value, list) else [value]) if not isinstance(part, (int, float))]
        if wrong or value == []:
            self._refuse(here, f"got {value!r}; expected a number, a list of them, or a list of `filter:` and `value:`")

    def _fits(self, part: Slice, here: KeyPath) -> None:
        """Whether the method can take these models."""
        names = [source.model for source in part.sources]
        if len(set(names)) < len(names):
            self._refuse(here, "names a model twice in one slice; expected each once")
        has_base = part.base is not None and part.base in names
        if part.base is not None and not has_base and (self.method.needs_base or not self.method.of_base):
            self._refuse(here, f"base_model {part.base} is none of the sources of this slice; add it to them")
        if self.method.needs_base and not has_base:
            self._refuse(here, f"{self.document.data['merge_method']} needs base_model")
        others = len(names) - has_base
        for count, (least, most), what in (
            (len(names), self.method.models, "models"),
            (others, self.method.others, "models beside the base"),
        ):
            if not least <= count <= most:
                wanted = str(least) if least == most else f"at least {least}"
                self._refuse(here, f"{self.document.data['merge_method']} takes {wanted} {what}; got {count}")

    def _list(self, value: Any, here: KeyPath) -> list[Any]:
        if not isinstance(value, list) or not value:
            self._refuse(here, f"got {value!r}; expected a list")
        return value

    def _text(self, entry: Mapping[str, Any], key: str, here: KeyPath) -> str | None:
        value = entry.get(key)
        if isinstance(value, dict) and set(value) == {"model"}:
            value = value["model"]
        if value is not None and not isinstance(value, str):
            self._refuse((*here, key), f"{key}: got {value!r}; expected text")
        return value

    def _known(self, entry: Any, keys: Iterable[str], here: KeyPath) -> None:
        if not isinstance(entry, dict):
            self._refuse(here, f"got {entry!r}; expected keys: {', '.join(keys)}")
        for key in entry:
            if key in keys:
                continue
            if key in _NOT_HERE:
                self._refuse((*here, key), f"{key}: {_NOT_HERE[key]}")
            near = difflib.get_close_matches(str(key), list(keys), 1)
            meant = f"; did you mean {near[0]}?" if near else f"; expected {', '.join(keys) or 'none'}"
            self._refuse((*here, key), f"{key}: unknown key{meant}")

    def _refuse(self, here: KeyPath, reason: str) -> NoReturn:
        line = next(
            (self.document.lines[here[:n]] for n in range(len(here), 0, -1) if here[:n] in self.document.lines), 1
        )
        raise ConfigError(f"{self.path}:{line}: {reason}")


def setting_at(value: Any, tensor: str, t: float) -> Any:
    """The value for one tensor: the first filter that stands in its name, a list as a line along the layers at `t`.

    None where no filter applies.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    if all(isinstance(part, dict) for part in value):
        found = (part for part in value if part.get("filter") in (None, "*") or part["filter"] in tensor)
        first = next(found, None)
        return None if first is None else setting_at(first["value"], tensor, t)
    if any(isinstance(part, bool) for part in value):
        return value[int(t * (len(value) - 1))]
    place = t * (len(value) - 1)
    low = int(place)
    high = min(len(value) - 1, low + 1)
    return (1 - place + low) * value[low] + (place - low) * value[high]


def settings_of(
    defaults: Mapping[str, Any], said: Sequence[Mapping[str, Any]], tensor: str, t: float, of: str
) -> dict[str, Any]:
    """Every parameter of `defaults`, from the first of `said` that has it. Raises: ConfigError for one without a value."""
    found: dict[str, Any] = {}
    for name, default in defaults.items():
        values = (setting_at(scope[name], tensor, t) for scope in said if name in scope)
        value = next((value for value in values if value is not None), default)
        if value is ...:
            raise ConfigError(f"parameters.{name}: {of} has none for {tensor}; expected `{name}:` beside it or for all")
        found[name] = value
    return found
