"""How several processes hold the model between them, as keys. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator, model_validator

from posttrain.config.knob import Keys, knob

if TYPE_CHECKING:
    from posttrain.config.stages import TrainKeys

# fmt: off
# One key a line: the table below is read down, not across.


class ShardingKeys(Keys):
    """How several processes hold the model between them (FSDP2, under its own words); one process holds all of it, and reads none of these."""

    dp_shard_size: int | Literal["node"] | None = knob(None, "Processes that the model is cut over; each further group of so many holds a copy, and gradients are added up over the copies (HSDP). `node` takes the processes of one machine, null all, 1 cuts nothing.", also="dp_shard_size (Axolotl)", example="node")
    sp_size: int = knob(1, "Neighbouring processes that go through the same micro-batch together (sequence parallelism, Ulysses): each holds a part of its tokens, and in attention all tokens of a part of the heads. They count as one process where rows are dealt.", ge=1, also="sp_size (accelerate)", example=4)
    tensor_parallel_size: int = knob(1, "Neighbouring processes that hold each layer between them (tensor parallelism, by the model's own plan): each computes a part of its heads and of its MLP, or some of its experts, for all tokens of a micro-batch. They count as one process where rows are dealt.", ge=1, also="tensor_parallel_size (Axolotl), parallelism_config_tp_size (accelerate)", example=2)
    reshard_after_forward: bool = knob(True, "Give a layer's gathered weights back after its forward, and gather them again for its backward; false keeps them: less communication, the memory of the whole model.")
    sync_each_batch: bool = knob(True, "Add gradients up over the processes after every micro-batch; false does it once a step: less communication, and each process keeps whole gradients until then.")
    param_dtype: Literal["float32", "bfloat16"] = knob("float32", "Dtype that layers are gathered and run in; with bfloat16 half is sent, and activations between layers are rounded to it. What is trained is held in float32 all the same.")
    reduce_dtype: Literal["float32", "bfloat16"] = knob("float32", "Dtype that gradients are added up over the processes in.")

    @property
    def group_size(self) -> int:
        """Neighbouring processes that go through the same micro-batch, and count as one where rows are dealt."""
        return max(self.sp_size, self.tensor_parallel_size)

    @property
    def group_key(self) -> str:
        """The key that says how many those are."""
        return f"sharding.{'tensor_parallel_size' if self.tensor_parallel_size > 1 else 'sp_size'}"

    @property
    def group_text(self) -> str:
        return f"{self.group_key}: {self.group_size}"

    @model_validator(mode="after")
    def _neighbours_share_one_thing(self) -> ShardingKeys:
        beside = {f"sp_size: {self.sp_size}": self.sp_size > 1, f"dp_shard_size: {self.dp_shard_size}": self.dp_shard_size is not None}
        for name, found in beside.items():
            if found and self.tensor_parallel_size > 1:
                raise ValueError(f"tensor_parallel_size: {self.tensor_parallel_size} with {name}: not proven together; set one of them back")
        return self

    @field_validator("dp_shard_size")
    @classmethod
    def _is_a_number_of_processes(cls, size: int | str | None) -> int | str | None:
        if isinstance(size, int) and size < 1:
            raise ValueError(f"{size} is no number of processes; expected 1 or more, node or null")
        return size


def beside_tensor_parallel(keys: TrainKeys) -> dict[str, tuple[str, Any]]:
    """What of a stage's keys does not go with it: by key why, and whether it is set so."""
    adapted = keys.adapter != "none"
    return {
        f"a base in {keys.base_bits} bits": ("what is packed is not dealt: set adapter: lora, and load_in_8bit: false", adapted and keys.base_bits),
        "use_dora: true": ("it wants whole matrices: set it to false", adapted and keys.use_dora),
        f"init_lora_weights: {keys.init_lora_weights}": ("it wants whole matrices: set it to true", adapted and not isinstance(keys.init_lora_weights, bool)),
        f"lora_dropout: {keys.lora_dropout:g}": ("not proven together: set it to 0", adapted and keys.lora_dropout),
        f"lora_modules_to_save: {', '.join(keys.lora_modules_to_save)}": ("beside A and B nothing is dealt: take them out", adapted and keys.lora_modules_to_save),
        f"added_tokens: {', '.join(keys.added_tokens)}": ("embedding and head would be trained whole: take them out, or set adapter: none", adapted and keys.added_tokens),
        "an adapter on a reward model": ("its head is trained beside A and B: set adapter: none", adapted and keys.is_reward_model),
        "param_dtype: bfloat16": ("not proven together: set it to float32, and bf16: true", keys.sharding.param_dtype != "float32"),
        f"optim: {keys.optim}": ("set adamw", keys.optim != "adamw"),
    }
