"""A model's sizes, read from its config.json; no weights are touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.errors import ModelError
from posttrain.planner.families import FAMILIES, LLAMA, NAMES, Family
from posttrain.planner.state_space import StateSpace, state_space_of

DECODED_BY_WEIGHTS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose decode step adds a LoRA adapter to a copy of the matrices."""
_NOT_COUNTED = ("rwkv", "jamba", "bamba", "zamba", "zamba2", "recurrent_gemma")


@dataclass(frozen=True, slots=True)
class Latent:
    """Sizes of multi-head latent attention. Source: DeepSeek-V2, arXiv 2405.04434 §2.1; `query` 0 is not compressed."""

    query: int
    key_value: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder-only transformer.

    `num_experts` is 0 for a dense model. Of an MoE, `dense_layers` have one MLP of `dense_intermediate` instead, and
    `shared_intermediate` is the width of what every token passes beside its experts. `stored_bytes` is a saved weight's size;
    `windowed_layers` see no more than `window` tokens back; `max_positions` 0 is unlimited; `other_params` are biases, head norms and learned positions.
    With a `mixer` a layer is that alone: no heads, no MLP, nothing kept of a token.
    """

    num_layers: int
    hidden: int
    intermediate: int
    vocab: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    stored_bytes: int = 2
    max_positions: int = 0
    norms_per_layer: int = 2
    attention_softcap: bool = False
    logit_softcap: bool = False
    decodes_by_weights: bool = False
    family: Family = LLAMA
    dense_layers: int = 0
    dense_intermediate: int = 0
    shared_intermediate: int = 0
    latent: Latent | None = None
    window: int = 0
    windowed_layers: int = 0
    other_params: int = 0
    mixer: StateSpace | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Raises: ModelError naming the keys that are missing, or the kind of model that has no such sizes."""
        try:
            return cls._from_values(config)
        except ModelError:
            raise
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ModelError(
                f"config.json: got a size that is none ({error}); expected the config of a transformers causal LM"
            ) from None

    @classmethod
    def _from_values(cls, config: Mapping[str, Any]) -> ModelShape:
        text = config.get("text_config")
        values: Mapping[str, Any] = {**config, **text} if isinstance(text, Mapping) else config
        _refuse_other_kinds(values)
        if (mixer := state_space_of(values)) is not None:
            return cls._of_mixers(values, mixer)
        model_type = str(values.get("model_type", ""))
        family = FAMILIES.get(model_type, LLAMA)
        hidden, heads, layers = _size(values, "hidden"), _size(values, "heads") or 1, _size(values, "layers")
        wide, experts = _size(values, "intermediate") or 4 * hidden, _size(values, "experts")
        head_dim = int(values.get("head_dim") or hidden // heads)
        kv_heads = _kv_heads(values, heads)
        positions = _size(values, "positions")
        return cls(
            num_layers=layers,
            hidden=hidden,
            intermediate=int(values.get("moe_intermediate_size") or wide) if experts else wide,
            vocab=_size(values, "vocab"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            tied=bool(values.get("tie_word_embeddings", family.tied)),
            num_experts=experts,
            experts_per_token=_size(values, "experts_per_token") or (1 if experts else 0),
            stored_bytes=_stored_bytes(values),
            max_positions=positions,
            norms_per_layer=family.norms_per_layer,
            decodes_by_weights=model_type in DECODED_BY_WEIGHTS,
            attention_softcap=bool(values.get("attn_logit_softcapping")),
            logit_softcap=bool(values.get("final_logit_softcapping")),
            family=family,
            dense_layers=_dense_layers(values, layers) if experts else 0,
            dense_intermediate=wide,
            shared_intermediate=_shared(values) if experts else 0,
            latent=_latent(values),
            window=int(values.get("sliding_window") or 0),
            windowed_layers=sum(kind == "sliding_attention" for kind in values.get("layer_types") or ()),
            other_params=_other_params(family, layers, hidden, (heads, kv_heads, head_dim), wide, positions),
        )

    @classmethod
    def _of_mixers(cls, values: Mapping[str, Any], mixer: StateSpace) -> ModelShape:
        hidden, layers = _size(values, "hidden"), _size(values, "layers")
        family = FAMILIES[str(values["model_type"])]
        return cls(
            num_layers=layers, hidden=hidden, intermediate=0, vocab=_size(values, "vocab"), num_heads=0, num_kv_heads=0, head_dim=0,
            tied=bool(values.get("tie_word_embeddings", family.tied)), stored_bytes=_stored_bytes(values), norms_per_layer=family.norms_per_layer,
            family=family, other_params=layers * mixer.other_params(hidden), mixer=mixer,
        )  # fmt: skip

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Linear modules: name → (inputs, outputs, how many in the whole model); one name may stand for several shapes in an MoE."""
        attention = {name: (*shape, self.num_layers) for name, shape in self._attention().items()}
        moe = self.num_layers - self.dense_layers if self.num_experts else 0
        plain = self.num_layers - moe
        found = dict(attention)
        for prefix, width, count in (
            ("", self.dense_intermediate or self.intermediate, plain),
            ("experts.", self.intermediate, moe * self.num_experts),
            ("shared_expert.", self.shared_intermediate, moe),
        ):
            if width and count:
                found |= {prefix + name: (*shape, count) for name, shape in self._mlp(width).items()}
        return found

    def _attention(self) -> dict[str, tuple[int, int]]:
        if self.mixer is not None:
            return self.mixer.linear(self.hidden)
        if self.latent is not None:
            latent, heads = self.latent, self.num_heads
            query = heads * (latent.nope + latent.rope)
            queries = (
                {"q_a_proj": (self.hidden, latent.query), "q_b_proj": (latent.query, query)}
                if latent.query
                else {"q_proj": (self.hidden, query)}
            )
            return {
                **queries,
                "kv_a_proj_with_mqa": (self.hidden, latent.key_value + latent.rope),
                "kv_b_proj": (latent.key_value, heads * (latent.nope + latent.value)),
                "o_proj": (heads * latent.value, self.hidden),
            }
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        names = self.family.attention
        if len(names) == 2:
            return {names[0]: (self.hidden, query + 2 * key), names[1]: (query, self.hidden)}
        return dict(
            zip(
                names, ((self.hidden, query), (self.hidden, key), (self.hidden, key), (query, self.hidden)), strict=True
            )
        )

    def _mlp(self, width: int) -> dict[str, tuple[int, int]]:
        *widening, narrowing = self.family.mlp
        wide = 2 * width if self.family.fused_gate else width
        # GPT-2 calls the attention's output and the MLP's by one name.
        narrow = f"mlp.{narrowing}" if narrowing in self.family.attention else narrowing
        return {**dict.fromkeys(widening, (self.hidden, wide)), narrow: (width, self.hidden)}

    @property
    def linear_params(self) -> int:
        """Weights of the layers' linear modules: what 4-bit quantisation applies to."""
        return sum(rows * columns * count for rows, columns, count in self.linear_shapes.values())

    @property
    def embedding_params(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def num_params(self) -> int:
        norms = (self.num_layers * self.norms_per_layer + 1) * self.hidden * self.family.per_norm
        router = (self.num_layers - self.dense_layers) * self.hidden * self.num_experts
        return self.linear_params + self.embedding_params + norms + router + self.other_params

    @property
    def active_params(self) -> int:
        """Parameters a token passes through: of the experts, only those it is routed to."""
        if not self.num_experts:
            return self.num_params
        return self.num_params - self.expert_params // self.num_experts * (self.num_experts - self.experts_per_token)

    @property
    def expert_params(self) -> int:
        """Weights of all experts, the shared ones left out."""
        shapes = self.linear_shapes
        return sum(
            rows * columns * count for name, (rows, columns, count) in shapes.items() if name.startswith("experts.")
        )

    @property
    def active_linear_params(self) -> int:
        """Of the layers' linear modules, those a token passes through."""
        return self.linear_params - (self.num_params - self.active_params)

    @property
    def widest_mlp(self) -> int:
        """Values of the MLP's inner side that one token makes: of all the experts that it is routed to."""
        return max(
            self.intermediate * max(1, self.experts_per_token) + self.shared_intermediate,
            self.dense_intermediate if self.dense_layers else 0,
        )

    def attended(self, sequence: float) -> float:
        """Tokens that a token of a sequence sees, over all layers: half of it on average, or as many as a window has."""
        inside = min(sequence / 2, float(self.window)) if self.window else sequence / 2
        return (self.num_layers - self.windowed_layers) * sequence / 2 + self.windowed_layers * inside

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Keys and values of one token in all layers; of latent attention what both are made from."""
        if self.latent is not None:
            return self.num_layers * (self.latent.key_value + self.latent.rope) * bytes_per_value
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value

    def cache_bytes(self, tokens: float, bytes_per_value: int = 2) -> float:
        """What a sequence of so many tokens leaves for the next one: keys and values of each, or a mixer's states, however many there were."""
        states = self.num_layers * self.mixer.state_values if self.mixer is not None else 0
        return tokens * self.kv_bytes_per_token(bytes_per_value) + states * bytes_per_value


def _size(values: Mapping[str, Any], name: str) -> int:
    """0 where the config has none of its keys."""
    return int(next((values[key] for key in NAMES[name] if values.get(key)), 0))


def _stored_bytes(values: Mapping[str, Any]) -> int:
    kind = str(values.get("dtype") or values.get("torch_dtype") or "")
    return 2 if kind.endswith(("float16", "bfloat16")) else 4


def _refuse_other_kinds(values: Mapping[str, Any]) -> None:
    kind = str(values.get("model_type", ""))
    if values.get("is_encoder_decoder") or kind in _NOT_COUNTED:
        raise ModelError(
            f"config.json has model_type {kind}; expected a decoder-only model whose layers are known: these cannot be counted"
        )
    missing = [NAMES[name][0] for name in ("hidden", "layers", "vocab") if not _size(values, name)]
    if missing:
        raise ModelError(f"config.json has no {', '.join(missing)}; expected the config of a transformers causal LM")


def _kv_heads(values: Mapping[str, Any], heads: int) -> int:
    """Falcon and StarCoder say `multi_query` where there is one; falcon's newer architecture has a number after all."""
    if values.get("multi_query") and not values.get("new_decoder_architecture"):
        return 1
    return _size(values, "kv_heads") or heads


def _dense_layers(values: Mapping[str, Any], layers: int) -> int:
    """Layers of an MoE that have one MLP: the first few, all but every nth, or those that are listed."""
    step = int(values.get("decoder_sparse_step") or 1)
    listed: set[int] = set(values.get("mlp_only_layers") or ())
    first = int(values.get("first_k_dense_replace") or 0)
    return sum(layer < first or layer in listed or (layer + 1) % step != 0 for layer in range(layers))


def _shared(values: Mapping[str, Any]) -> int:
    width = int(values.get("shared_expert_intermediate_size") or 0)
    return width or int(values.get("n_shared_experts") or 0) * int(values.get("moe_intermediate_size") or 0)


def _latent(values: Mapping[str, Any]) -> Latent | None:
    if not values.get("kv_lora_rank"):
        return None
    names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return Latent(*(int(values.get(name) or 0) for name in names))


def _other_params(
    family: Family, layers: int, hidden: int, heads: tuple[int, int, int], wide: int, positions: int
) -> int:
    """Biases of linear modules, norms of heads, and a table of positions."""
    query, key = heads[0] * heads[2], heads[1] * heads[2]
    qkv = query + 2 * key
    biases = {"none": 0, "qkv": qkv, "all": qkv + 2 * hidden + wide}[family.biases]
    norms = 2 * heads[2] if family.head_norms else 0
    return layers * (biases + norms) + (positions * hidden if family.positions == "learned" else 0)
