"""One merge from a recipe to a folder: each tensor read, merged and written in its turn, then the config and the tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import ConfigError, ModelError
from posttrain.files import read_json, write_folder
from posttrain.forms.merging.adapters import Factored, base_of, bits_of, write_factored
from posttrain.forms.merging.methods import MergeInput
from posttrain.forms.merging.plan import PlannedTensor, layers_of, planned
from posttrain.forms.merging.recipe import MergeRecipe
from posttrain.forms.merging.shards import SHARD_BYTES, ShardWriter
from posttrain.forms.merging.sparse import Draw
from posttrain.forms.merging.vocabulary import IS_OF_TOKENS, Vocabulary, tokenizer_at, vocabulary
from posttrain.forms.merging.weights import AdaptedModel, StoredModel
from posttrain.models.export import save_tokenizer
from posttrain.models.low_rank import CONFIG
from posttrain.models.provenance import PROVENANCE, check_base, source_digest

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_OF_THE_LAYERS = "num_hidden_layers"


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """`adapter_rank`: write the result as one adapter of this rank for the recipe's base. `seed` draws DARE's and DELLA's masks."""

    seed: int = 0
    shard_bytes: int = SHARD_BYTES
    adapter_rank: int | None = None


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was written. `parents` are the digests of the models by their names in the recipe."""

    method: str
    num_tensors: int
    base_digest: str
    parents: Mapping[str, str]
    factored: Factored | None = None


def merge_models(
    recipe: MergeRecipe, out: Path, resolve: Callable[[str], Path], options: MergeOptions | None = None
) -> MergeReport:
    """Write the merged model to `out`, all or nothing. `resolve` finds the folder of a model of the recipe.

    Raises: ConfigError, ModelError.
    """
    return _Merge(recipe, resolve, options or MergeOptions()).write(out)


class _Merge:
    def __init__(self, recipe: MergeRecipe, resolve: Callable[[str], Path], options: MergeOptions) -> None:
        self.recipe, self.options = recipe, options
        self.folders = {model: resolve(model) for model in recipe.models}
        self.models = {model: self._opened(folder, resolve) for model, folder in self.folders.items()}
        self.stored = {model: _stored(found) for model, found in self.models.items()}
        self.configs = {model: read_json(found.folder / "config.json") for model, found in self.stored.items()}
        self._check_alike()
        self.first = recipe.models[0]
        self.names = self._names()
        self.vocabulary = self._vocabulary()
        # All of it before the first tensor is read: hours may lie between that and the last.
        self.plan = list(planned(recipe, self.names))
        self._check_shapes()

    def _opened(self, folder: Path, resolve: Callable[[str], Path]) -> StoredModel | AdaptedModel:
        if not (folder / CONFIG).is_file():
            return StoredModel(folder)
        if bits_of(folder):
            raise ModelError(
                f"{folder} was trained on a base in 4 bits, which is not the base that its updates would be added to: "
                "say which one with posttrain merge ADAPTER --onto dequantized (or original) --out DIR, and name that folder"
            )
        named = self.recipe.base
        is_model = named is not None and not (resolve(named) / CONFIG).is_file()
        base = resolve(named if named is not None and is_model else base_of(folder))
        check_base(folder, base)
        return AdaptedModel(folder, StoredModel(base))

    def _check_alike(self) -> None:
        kinds = {model: config["model_type"] for model, config in self.configs.items()}
        if len(set(kinds.values())) > 1:
            said = ", ".join(f"{model}: {kind}" for model, kind in kinds.items())
            raise ConfigError(f"models of different architectures cannot be merged ({said})")

    def _check_shapes(self) -> None:
        for plan in self.plan:
            of_tokens = self.vocabulary is not None and IS_OF_TOKENS.search(plan.name)
            shapes = {part.model: self._shape(part.model, part.name)[1 if of_tokens else 0 :] for part in plan.parts}
            if len(set(shapes.values())) > 1:
                raise ModelError(f"{plan.name}: shapes differ: {shapes}; expected models of one size")

    def _names(self) -> dict[str, list[str]]:
        """Each model's tensors; where only some have a head of their own, a tied one's is its embedding."""
        names = {model: list(found.names) for model, found in self.models.items()}
        untied = any(_HEAD in found for found in names.values())
        return {
            model: [*found, *([_HEAD] if untied and _HEAD not in found and _EMBEDDING in found else [])]
            for model, found in names.items()
        }

    def _vocabulary(self) -> Vocabulary | None:
        rows = {model: int(_text_config(config)["vocab_size"]) for model, config in self.configs.items()}
        folders = {model: self._with_tokenizer(model) for model in self.folders}
        wanted = self.recipe.tokenizer_source
        return vocabulary(wanted, self.recipe.pad_to_multiple_of, folders, rows, self.first)

    def _with_tokenizer(self, model: str) -> Path:
        own = self.folders[model]
        return own if (own / "tokenizer_config.json").is_file() else self.stored[model].folder

    def write(self, out: Path) -> MergeReport:
        reports: list[MergeReport] = []
        fill = self._fill_adapter if self.options.adapter_rank else self._fill
        write_folder(out, lambda folder: reports.append(fill(folder)))
        return reports[0]

    def _fill(self, folder: Path) -> MergeReport:
        writer, dtypes, count = ShardWriter(folder, self.options.shard_bytes), set[torch.dtype](), 0
        for name, tensor in self.tensors():
            writer.add(name, tensor)
            dtypes |= {tensor.dtype} if tensor.is_floating_point() else set()
            count += 1
        writer.close()
        config = self._config(dtypes)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        generation = self.stored[self.first].folder / "generation_config.json"
        if generation.is_file():
            shutil.copy(generation, folder)
        self._save_tokenizer(folder)
        return self._record(folder, MergeReport(self.recipe.method, count, *self._digests()))

    def _fill_adapter(self, folder: Path) -> MergeReport:
        """What the result is beyond the base, as one adapter. Raises: ConfigError where no adapter can be the result."""
        rank = self.options.adapter_rank
        adapters = [found for found in self.models.values() if isinstance(found, AdaptedModel)]
        in_slices = any(source.layers for part in self.recipe.slices for source in part.sources)
        if (
            in_slices
            or not adapters
            or len({found.folder.resolve() for found in self.stored.values()}) > 1
            or self.vocabulary
        ):
            raise ConfigError("--adapter-rank: expected adapters of one base and nothing else in the recipe")
        assert rank is not None
        base = self.stored[self.first]
        touched = {name for found in adapters for name in found.adapted}

        def updates() -> Iterator[tuple[str, torch.Tensor]]:
            # In float64, where base + ΔW − base is ΔW to all the digits that float32 has.
            for plan in self.plan:
                before, merged = base.tensor(plan.parts[0].name, torch.float64), self.merged(plan, torch.float64)
                if plan.name in touched:
                    yield plan.name, merged - before
                elif not torch.allclose(merged, before, rtol=1e-6, atol=0):
                    raise ConfigError(
                        f"--adapter-rank: this merge also changes {plan.name}, which no adapter adapts (weights that do not "
                        "sum to 1?); leave --adapter-rank out to write the whole model"
                    )

        factored = write_factored(folder, updates(), rank, [found.config for found in adapters])
        self._save_tokenizer(folder)
        report = MergeReport(self.recipe.method, len(touched), *self._digests(), factored)
        return self._record(folder, report, {"base_digest": source_digest(str(base.folder)), "load_in_4bit": False})

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the result, in the dtype that it is written in. Raises: ModelError for one that is not finite."""
        for plan in self.plan:
            tensor = self.merged(plan)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ModelError(
                    f"{plan.name}: the merged tensor is not finite; look at the weights of {plan.parts[0].model}"
                )
            yield plan.name, tensor

    def merged(self, plan: PlannedTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, computed in float32 from what the files (or `dtype`) hold, and cast once at the end."""
        said = dtype or (getattr(torch, self.recipe.dtype) if self.recipe.dtype else None)
        found = {part.model: self._tensor(part.model, part.name, said) for part in plan.parts}
        if not all(tensor.is_floating_point() for tensor in found.values()):
            return _agreed(plan.name, list(found.values()))
        kept = self.recipe.out_dtype
        written = dtype or (getattr(torch, kept) if kept else _promoted(found.values()))
        if self.vocabulary is not None and IS_OF_TOKENS.search(plan.name):
            found = self.vocabulary.aligned({model: tensor.float() for model, tensor in found.items()})
        exact = torch.float64 if written == torch.float64 else torch.float32
        inputs = [MergeInput(found[part.model].to(exact), part.settings, part.is_base) for part in plan.parts]
        return self.recipe.row.merge(inputs, plan.shared, draw_for(self.options.seed, plan.name)).to(written)

    def _tensor(self, model: str, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        return self.models[model].tensor(self._stored_name(model, name), dtype)

    def _shape(self, model: str, name: str) -> tuple[int, ...]:
        return self.models[model].shape(self._stored_name(model, name))

    def _stored_name(self, model: str, name: str) -> str:
        return _EMBEDDING if name == _HEAD and name not in self.models[model].names else name

    def _config(self, dtypes: set[torch.dtype]) -> dict[str, Any]:
        config = json.loads(json.dumps(self.configs[self.first]))
        text = _text_config(config)
        layers, before = layers_of(self.recipe, self.names), text[_OF_THE_LAYERS]
        per_layer = [key for key, value in text.items() if isinstance(value, list) and len(value) == before]
        for key in per_layer:
            text[key] = [_text_config(self.configs[model])[key][number] for model, number in layers]
        text[_OF_THE_LAYERS] = len(layers)
        tied = not any(_HEAD in names for names in self.names.values())
        if "tie_word_embeddings" in config:
            config["tie_word_embeddings"] = tied
        if self.vocabulary is not None:
            text["vocab_size"] = self.vocabulary.size
        if len(dtypes) == 1:
            for part in (config, text):
                for key in {"dtype", "torch_dtype"} & set(part):
                    part[key] = str(next(iter(dtypes))).removeprefix("torch.")
        return config

    def _save_tokenizer(self, folder: Path) -> None:
        made = self.vocabulary.tokenizer if self.vocabulary else tokenizer_at(self._with_tokenizer(self.first))
        if template := self.recipe.chat_template:
            made.chat_template = template
        save_tokenizer(made, folder)

    def _digests(self) -> tuple[str, dict[str, str]]:
        digests = {model: source_digest(str(folder)) for model, folder in self.folders.items()}
        return source_digest(str(self.stored[self.first].folder)), digests

    def _record(self, folder: Path, report: MergeReport, more: Mapping[str, Any] | None = None) -> MergeReport:
        """What it was made from, by digest: it names no path, so the same merge is the same anywhere."""
        record = {
            "base_digest": report.base_digest, "merge_method": report.method, "parents": list(report.parents.values()),
            "seed": self.options.seed,
        }  # fmt: skip
        (folder / PROVENANCE).write_text(json.dumps(record | dict(more or {}), indent=2))
        return report


def draw_for(seed: int, name: str) -> Draw:
    """Ones and zeros by a generator of the seed and the tensor's name: the same mask in any order, on any shard."""
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
    )

    def draw(probabilities: torch.Tensor) -> torch.Tensor:
        return torch.bernoulli(probabilities, generator=generator)

    return draw


def _stored(found: StoredModel | AdaptedModel) -> StoredModel:
    return found.base if isinstance(found, AdaptedModel) else found


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("text_config", config)


def _promoted(tensors: Any) -> torch.dtype:
    found, *others = [tensor.dtype for tensor in tensors]
    for dtype in others:
        found = torch.promote_types(found, dtype)
    return found


def _agreed(name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A tensor of whole numbers has no mean. Raises: ModelError where the models' differ."""
    if any(not torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
        raise ModelError(f"{name} is not of floating point and differs between the models; it cannot be merged")
    return tensors[0]
