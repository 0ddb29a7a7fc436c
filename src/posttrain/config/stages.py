"""The keys of a single stage: what every stage has, SFT, preference optimisation; those of RL are in `rl.py`.

Names are those of the flat YAML form where it has one, and TRL's elsewhere. No torch here.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from posttrain.config.datasets import DatasetKeys, RowKind, share_or_number
from posttrain.config.knob import knob
from posttrain.config.optimizing import TAKE_SHARES, OptimizerKeys, check_patterns, only_layers
from posttrain.config.sharding import ShardingKeys, beside_tensor_parallel
from posttrain.config.starting import StartKeys

# fmt: off
# One key a line: the tables below are read down, not across.


INITS_WITH_INPUTS = {
    "eva": "it needs activations on training rows, which are not collected here",
    "corda": "it needs covariances of activations, which are not collected here",
    "lora_ga": "it needs gradients on training rows, which are not collected here",
    "loftq": "it needs a quantiser of its own; use adapter: qlora with init_lora_weights: true",
}
"""Inits of PEFT that take more than the weights. PEFT itself starts some of them as something else, in silence."""


class ModelKeys(StartKeys):
    """Which weights, and what of them is trained."""

    is_reward_model: ClassVar[bool] = False
    """Whether the model has a head that gives a reward in place of the one that gives tokens."""
    rates_steps: ClassVar[bool] = False
    """Whether that head has two labels, and says of each step of an answer whether it is right."""
    validated: ClassVar[tuple[str, ...]] = ("…",)
    """What a validation measures; `…` where that depends on the loss."""

    chat_template: str | None = knob(None, "A Jinja file, or the name of a template of ours, such as `llama3`, `axolotl_chatml` or `llamafactory_qwen`; null keeps the tokenizer's own template.", also="chat_template_path (TRL), chat_template_jinja (Axolotl)", example="./chat.jinja")
    chat_template_kwargs: dict[str, Any] = knob({}, "Values for variables of the chat template, such as `enable_thinking`; they become its defaults, in every rendering and in what is exported.", example={"enable_thinking": False})
    added_tokens: list[str] = knob([], "Tokens to add where the tokenizer lacks them; all of its tokens beyond the embedding get rows, each the mean of those there are. With an adapter, embedding and head are then trained and saved whole.", example=["<tool>"])
    special_tokens: dict[Literal["bos_token", "eos_token", "unk_token"], str] = knob({}, "Which tokens the tokenizer uses as beginning, end and unknown, where they are others than its own; each must be a token of it (or in added_tokens).", example={"eos_token": "<|im_end|>"})
    adapter: Literal["none", "lora", "qlora"] = knob("none", "Train all weights, a LoRA adapter, or a LoRA adapter on a 4-bit base.", also="finetuning_type (LLaMA-Factory), use_peft (TRL)")
    adapter_start: Literal["fresh", "continue"] = knob("fresh", "A new adapter on the model that the stage starts from, or the adapter of the stage before trained on, without a merge in between: its base stays, and its starting values are the reference.")
    load_in_4bit: bool = knob(False, "Quantise the frozen base to 4 bits; implied by `adapter: qlora`.", also="quantization_bit (LLaMA-Factory)")
    load_in_8bit: bool = knob(False, "Quantise the frozen base under `adapter: lora` to 8 bits, a scale per row of a matrix; it is multiplied with as dequantised, so that the exported model is the trained one.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = knob("nf4", "4-bit data type.")
    bnb_4bit_use_double_quant: bool = knob(True, "Quantise the quantisation constants too (double quantisation).", also="use_bnb_nested_quant (TRL), double_quantization (LLaMA-Factory)")
    lora_r: int = knob(16, "Rank of the adapter.", ge=1, also="lora_rank (LLaMA-Factory)")
    lora_alpha: float = knob(32, "Scale: the update is (alpha / r) · B·A.", gt=0)
    lora_dropout: float = knob(0.0, "Dropout on the adapter's input while training.", ge=0, lt=1)
    lora_target: list[str] | str = knob("all-linear", "Module names, `all-linear`, or a regular expression for whole names; in a list names and expressions may stand together, and every entry must match.", min_length=1, also="lora_target_modules (Axolotl, TRL), lora_target_linear (Axolotl)", example=["q_proj", "v_proj"])
    lora_modules_to_save: list[str] = knob([], "Modules trained in full beside the adapter.", also="additional_target (LLaMA-Factory)", example=["lm_head"])
    loraplus_lr_ratio: float = knob(1.0, "Learning rate of the adapter's B matrices over that of A and all else (LoRA+, arXiv 2402.12354).", gt=0, example=16)
    use_rslora: bool = knob(False, "Scale by alpha / sqrt(r).", also="peft_use_rslora (Axolotl)")
    use_dora: bool = knob(False, "Weight-decomposed LoRA.", also="peft_use_dora (Axolotl)")
    init_lora_weights: bool | str = knob(True, "Initialisation of the adapter, as in PEFT: true, false, gaussian, orthogonal, pissa, pissa_niter_N, olora or mica.", also="peft_init_lora_weights (Axolotl)")
    rank_pattern: dict[str, int] = knob({}, "Rank where it differs from lora_r: module name or pattern → rank.", also="lora_rank_pattern (Axolotl)", example={"q_proj": 8})
    alpha_pattern: dict[str, int] = knob({}, "Alpha where it differs from lora_alpha: module name or pattern → alpha.", also="lora_alpha_pattern (Axolotl)", example={"q_proj": 16})
    merge_onto: Literal["dequantized", "original"] = knob("dequantized", "Base that an adapter on 4 or 8 bits is merged onto: the dequantised weights it was trained on, or the original ones.")
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob("auto", "Dtype of the exported model; `auto` is that of the base's file.")
    bf16: bool | Literal["auto"] = knob("auto", "bfloat16 autocast, with float32 masters where trained; `auto` is on for a GPU that has it, and on a CPU only for an adapter on a bf16 file where the CPU has bf16 units. Without it, adapters and their base are float32.")
    gradient_checkpointing: bool | Literal["offload"] = knob(False, "Recompute activations in the backward pass: less memory, more time. `offload` also keeps the layers' inputs, from which they are recomputed, in the machine's memory.", also="disable_gradient_checkpointing (LLaMA-Factory)")
    layer_offloading: bool = knob(False, "Keep the frozen layers under an adapter in the machine's memory and copy each to the GPU a layer ahead of its use, so that two of them are there at a time: for a base larger than the card. Needs gradient_checkpointing; the numbers are the same. Evals load their models so too.")
    torch_compile: bool | Literal["auto"] = knob(False, "Compile the layers for training and scoring: norms, rotation, SwiGLU and casts in few kernels; the first steps take a minute more, and numbers round otherwise. `auto` does it in bf16 on cards that have a row for it (A100, L4, L40S, H100, H200, B200).")
    device: Literal["auto", "cpu", "cuda"] = knob("auto", "Where to run; `auto` takes a GPU when there is one.")

    @property
    def base_bits(self) -> Literal[4, 8] | None:
        """In how many bits the linears of the frozen base lie; None for its own precision."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @field_validator("lora_target", "rank_pattern", "alpha_pattern")
    @classmethod
    def _names_by_patterns_that_compile(cls, given: Any) -> Any:
        check_patterns([given] if isinstance(given, str) else given)
        return given

    @model_validator(mode="after")
    def _compiles_layers_that_stay_as_they_are(self) -> ModelKeys:
        if self.torch_compile is True and self.layer_offloading:
            raise ValueError("torch_compile: true with layer_offloading: true, which copies a layer's weights in and out around it; set one of them to false")
        if self.torch_compile is True and self.base_bits:
            raise ValueError(f"torch_compile: true with load_in_{self.base_bits}bit: true, whose products are kernels of bitsandbytes; set torch_compile: false")
        return self

    @model_validator(mode="after")
    def _has_one_adapter_to_start_from(self) -> ModelKeys:
        if self.adapter_name_or_path is not None and self.adapter == "none":
            raise ValueError(f"adapter_name_or_path: {self.adapter_name_or_path} with adapter: none, which would train the base without it; set adapter: lora or qlora, or merge it first (`posttrain merge`) and name the merged folder as base_model")
        if self.adapter_name_or_path is not None and self.adapter_start == "continue":
            raise ValueError(f"adapter_name_or_path: {self.adapter_name_or_path} with adapter_start: continue, which is about the adapter of the stage before; take one of them out")
        return self

    @model_validator(mode="after")
    def _trains_all_that_is_drawn(self) -> ModelKeys:
        if self.init_seed is not None and (self.adapter != "none" or self.base_bits):
            what = f"adapter: {self.adapter}" if self.adapter != "none" else f"load_in_{self.base_bits}bit: true"
            raise ValueError(f"init_seed: {self.init_seed} with {what}: weights that were drawn and stay frozen say nothing; set adapter: none, or take init_seed out")
        return self

    @model_validator(mode="after")
    def _init_is_one_we_have(self) -> ModelKeys:
        init = self.init_lora_weights
        if isinstance(init, bool) or re.fullmatch(r"gaussian|orthogonal|pissa(_niter_\d+)?|olora|mica", init):
            return self
        reason = INITS_WITH_INPUTS.get(init.partition("_")[0] if init.startswith("corda") else init, "no such init")
        raise ValueError(
            f"init_lora_weights: {init}: {reason}; use true, false, gaussian, orthogonal, pissa, pissa_niter_N, olora or mica"
        )


LearningRateShape = Literal["cosine", "cosine_with_restarts", "linear", "polynomial", "constant", "wsd"]


class TrainKeys(OptimizerKeys, ModelKeys):
    """What every stage has."""

    datasets: list[DatasetKeys] = knob(..., "Where the rows come from.", min_length=1, example=[{"path": "./data.jsonl"}])
    dataset_num_proc: int = knob(1, "Processes that tokenise rows which are not in the cache yet, at most one a core; the rows and their cache are those of one.", ge=1, also="dataset_processes (Axolotl), preprocessing_num_workers (LLaMA-Factory)", example=4)
    eval_datasets: list[DatasetKeys] = knob([], "Rows for the validation loss.", also="test_datasets (Axolotl)", example=[{"path": "./dev.jsonl"}])
    val_size: float = knob(0.0, "Rows of datasets to hold out for the validation loss, chosen by the digest of their content: a share below 1, else so many.", ge=0, also="val_set_size (Axolotl)", example=0.05)
    output_dir: str = knob("", "Folder of the run, relative to the YAML; empty means `runs/NAME` with the name of the YAML.", example="runs/first")
    seed: int = knob(42, "Every random choice follows from this seed.", ge=0)
    sequence_len: int = knob(2048, "Longest sequence in tokens.", ge=8, also="cutoff_len (LLaMA-Factory), max_length (TRL), max_seq_length (TRL), max_seq_len (torchtune)")
    overflow: Literal["drop", "truncate", "split", "error"] = knob("drop", "What happens to rows longer than sequence_len; each is counted. `split` cuts plain text into rows of that length, and no token is lost.", also="excess_length_strategy (Axolotl)")
    min_sample_len: int = knob(0, "Rows of fewer tokens are left out; each is counted.", ge=0, example=64)
    deduplicate: bool = knob(False, "Leave out rows whose tokens an earlier row has, in whatever source; each is counted.", also="dataset_exact_deduplication (Axolotl)")
    train_sampling_strategy: Literal["random", "sequential"] = knob("random", "Order of the rows: a new random one each epoch, or that of the files, source after source; `sequential` packs rows as they come, too.", also="disable_shuffling (LLaMA-Factory), curriculum_sampling (Axolotl)")
    per_device_train_batch_size: int = knob(8, "Rows per micro-batch and process; in RL a row is a completion, and a larger group is split.", ge=1, also="micro_batch_size (Axolotl)")
    gradient_accumulation_steps: int = knob(1, "Micro-batches per optimizer step and process.", ge=1)
    num_processes: int | None = knob(None, "Processes that an optimizer step's rows are counted for: per_device_train_batch_size × gradient_accumulation_steps × num_processes; null takes those that the run was begun with. Started on more or fewer, a run keeps its rows per step.", ge=1, example=8)
    ddp_timeout: int = knob(1800, "Seconds that one of several processes waits for another before it gives up; work that rank 0 does alone may take longer.", ge=1)
    sharding: ShardingKeys = knob(ShardingKeys(), "How several processes hold the model between them.", example={"dp_shard_size": "node"})
    num_train_epochs: float = knob(1.0, "Passes over the data, when max_steps is not set.", gt=0, also="num_epochs (Axolotl), epochs (torchtune)")
    max_steps: int = knob(-1, "Optimizer steps; -1 lets num_train_epochs decide.", ge=-1)
    learning_rate: float = knob(2e-5, "Peak learning rate.", gt=0, also="lr", example=1e-5)
    lr_scheduler_type: LearningRateShape = knob("cosine", "Shape of the schedule after the warmup; `wsd` holds, then decays over the last fifth.", also="lr_scheduler (Axolotl)")
    lr_num_cycles: int = knob(1, "How often `cosine_with_restarts` runs down from the peak.", ge=1, example=3)
    lr_power: float = knob(1.0, "Power of `polynomial`.", gt=0, example=2.0)
    lr_decay_ratio: float = knob(1.0, "The schedule has come to its end after this share of the steps, and the rest has its last learning rate.", gt=0, le=1, also="cosine_constant_lr_ratio (Axolotl)", example=0.9)
    min_lr_ratio: float = knob(0.0, "The learning rate ends at this share of its peak; `wsd` warms up from it too.", ge=0, le=1, also="cosine_min_lr_ratio (Axolotl)")
    warmup_ratio: float = knob(0.0, "Share of the steps that warm up.", ge=0, lt=1)
    warmup_steps: int = knob(0, "Steps that warm up; overrides warmup_ratio.", ge=0)
    warmup_type: Literal["linear", "quadratic"] = knob("linear", "Whether the learning rate rises with the step or with its square.", also="lr_quadratic_warmup (Axolotl)")
    logging_steps: int = knob(1, "Log every so many steps.", ge=1)
    eval_suite: str | None = knob(None, "A JSONL eval suite, relative to the YAML; its dev split is answered greedily at every validation and scored as `eval_score`.", example="evals/heldout.jsonl")
    eval_suite_limit: int = knob(100, "Measure only so many items of eval_suite, from its start.", ge=1)
    eval_steps: int | float = knob(0, "Validate every so many steps; 0 is only at the end, below 1 a share of all steps (0.25: four times).", ge=0)
    save_steps: int | float = knob(0, "Checkpoint every so many steps; 0 is only at the end, below 1 a share of all steps.", ge=0)
    save_total_limit: int = knob(2, "Checkpoints to keep, the best one besides.", ge=1)
    save_keep_every: int = knob(0, "Keep for good the checkpoints of steps that this divides, whatever save_total_limit says; 0 keeps none.", ge=0, example=1000)
    load_best_model_at_end: bool = knob(False, "End with the checkpoint of the lowest validation loss (RL: highest dev score).")
    metric_for_best_model: str | None = knob(None, "Which of the validation's metrics says which checkpoint is best; null takes `eval_loss` (RL: `eval_reward`), that of the only validation set where it has a name, or `eval_score` where there is a suite alone.", example="eval_math_loss")
    greater_is_better: bool | None = knob(None, "Whether more of metric_for_best_model is better; null: less of what ends in `loss`, more of anything else.", example=True)
    early_stopping_patience: int = knob(0, "End after so many validations in a row without a better one, with the best checkpoint; 0 never. Needs load_best_model_at_end and eval_steps.", ge=0, also="early_stopping_steps (LLaMA-Factory)", example=3)
    health: dict[str, dict[str, Any]] = knob({}, "Health rules to change: rule → threshold, `severity`, `action` or `enabled`; docs/failure-modes.md lists them.", example={"kl_drift": {"limit": 1.0}})
    health_rollbacks: int = knob(2, "How often a run may return to its last healthy checkpoint before it stops.", ge=0)
    lint: dict[str, dict[str, Any]] = knob({}, "Data lints to change: rule → `limit` (share of the rows) and `action` (warn, refuse or off); docs/data-formats.md lists them.", example={"near_duplicate": {"limit": 0.05}})
    advice_off: list[Literal["lora_rate", "lora_layers", "lora_rank", "lora_batch", "dpo_beta", "dpo_rate"]] = knob([], "Advice that is not to be said before a run and in `posttrain plan`; docs/advice.md lists it.", example=["lora_rate"])
    report_to: list[Literal["mlflow", "wandb", "trackio", "tensorboard"]] = knob([], "Keep a copy of each stage's metrics and findings there; it never delays a step. `mlflow` needs the key mlflow or MLFLOW_TRACKING_URI; the others are told what they need by their own variables (WANDB_PROJECT, WANDB_MODE, TRACKIO_SPACE_ID …).", also="use_wandb, use_tensorboard, use_trackio (Axolotl)", example=["wandb"])
    log_completions: bool = knob(False, "Send samples of an RL stage (prompt, completion, reward) and the run's report, which shows them, to the trackers of report_to too; a run's own folder has them in any case.")
    mlflow: str | None = knob(None, "Mirror metrics to this MLflow server, or to sqlite:///file.db; it never blocks a run. No password here: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.", example="sqlite:///mlflow.db")
    prometheus_port: int | None = knob(None, "Serve the newest metrics to Prometheus on this port of localhost.", ge=1, le=65535)

    @model_validator(mode="before")
    @classmethod
    def _qlora_is_lora_on_4_bits(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("adapter") == "qlora":
            return {"load_in_4bit": True, **values}
        return values

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_none_is_a_list_too(cls, trackers: Any) -> Any:
        """As transformers takes it: a name, `none`, or a list."""
        if isinstance(trackers, str):
            return [] if trackers == "none" else [trackers]
        return trackers

    @model_validator(mode="after")
    def _sequences_are_shared_by_whole_groups(self) -> TrainKeys:
        if (number := self.num_processes or 1) > 1 and number % self.sharding.group_size:  # one shares nothing
            raise ValueError(
                f"num_processes: {self.num_processes} with {self.sharding.group_text}; expected a multiple of it"
            )
        return self

    @model_validator(mode="after")
    def _layers_are_held_between_processes(self) -> TrainKeys:
        for beside, (why, found) in beside_tensor_parallel(self).items():
            if found and self.sharding.tensor_parallel_size > 1:
                raise ValueError(f"{self.sharding.group_text} with {beside}: {why}")
        return self

    @model_validator(mode="after")
    def _held_out_rows_come_from_one_place(self) -> TrainKeys:
        share_or_number(self.val_size)
        if self.holds_out and self.eval_datasets:
            raise ValueError("val_size and eval_datasets both name rows for the validation loss; keep one")
        for place, source in enumerate(self.datasets):
            if source.eval_name and not (self.val_size if source.val_size is None else source.val_size):
                raise ValueError(f"datasets[{place}].eval_name: {source.eval_name}: none of its rows are held out; set its val_size, or name rows in eval_datasets")
        for place, source in enumerate(self.eval_datasets):
            if source.val_size:
                raise ValueError(f"eval_datasets[{place}].val_size: {source.val_size:g}: all of its rows are held out; take it out")
        return self

    @property
    def holds_out(self) -> bool:
        """Whether rows of `datasets` are held out for validation."""
        return any(self.val_size if source.val_size is None else source.val_size for source in self.datasets)

    @property
    def eval_names(self) -> tuple[str, ...]:
        """The validation sets, in order; the one without a name is ""."""
        held = [source for source in self.datasets if (self.val_size if source.val_size is None else source.val_size)]
        return tuple(dict.fromkeys(source.eval_name or "" for source in self.eval_datasets or held))

    @model_validator(mode="after")
    def _best_is_one_of_those_measured(self) -> TrainKeys:
        sets, metric = self.eval_names, self.metric_for_best_model
        known = [*(f"eval_{name}_{what}" if name else f"eval_{what}" for name in sets for what in self.validated), *(["eval_score"] if self.eval_suite else [])]
        unknown = metric is not None and not any(metric == name or (name.endswith("…") and metric.startswith(name[:-1])) for name in known)
        if unknown and (known or not self.load_best_model_at_end):
            raise ValueError(f"metric_for_best_model: {metric} is not measured here; expected one of {', '.join(known) or 'none, for nothing is validated'}")
        if metric is None and self.load_best_model_at_end and len(sets) > 1 and "" not in sets:
            raise ValueError(f"load_best_model_at_end: true with the validation sets {', '.join(sets)}: set metric_for_best_model, such as eval_{sets[0]}_loss, to say which of them decides")
        return self

    @model_validator(mode="after")
    def _splits_what_has_no_prompt(self) -> TrainKeys:
        if self.overflow == "split" and self.row_kind != "examples":
            raise ValueError("overflow: split cuts plain text, and rows here have a prompt that each part would need; set drop, truncate or error")
        return self

    @property
    def rows_looked_at(self) -> int | None:
        """How many rows of each source are read before training, by lint and for showing; None is all."""
        return None

    def shares_of_step(self, world_size: int) -> int:
        """Processes that have rows of their own; of `world_size` of them where no number is set."""
        return max(1, (self.num_processes or world_size) // self.sharding.group_size)

    def micro_batches_per_step(self, world_size: int) -> int:
        """Of all processes; of `world_size` of them where no number is set."""
        return self.gradient_accumulation_steps * self.shares_of_step(world_size)

    def rows_per_step(self, world_size: int) -> int:
        """The global batch: rows of an optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.micro_batches_per_step(world_size)

    @property
    def of_one_process(self) -> tuple[str, str] | None:
        """What of these keys several processes, which share the weights, cannot train with, and what to set instead."""
        if self.layer_offloading:
            return "layer_offloading: true", "layer_offloading: false"
        if self.torch_compile is True:
            return "torch_compile: true", "torch_compile: false"
        return None if self.optim in TAKE_SHARES else (f"optim: {self.optim}", f"optim: {' or '.join(TAKE_SHARES)}")

    @property
    def trackers(self) -> list[str]:
        """Who keeps a copy of a stage's numbers, each once."""
        return list(dict.fromkeys([*self.report_to, *(["mlflow"] if self.mlflow else [])]))

    @property
    def row_kind(self) -> RowKind:
        """What its rows are."""
        return "examples"

    @property
    def may_start_raw(self) -> bool:
        """Whether it may start on a base that was never tuned to answer."""
        return True

    @property
    def pull(self) -> float:
        """Weight of the pull to the reference; 0 without one."""
        return 0.0

    @property
    def selects_tokens(self) -> bool:
        """Whether a pass over each optimizer step's tokens comes before it, to choose among them."""
        return False

    @property
    def holds_reference(self) -> bool:
        """Whether full fine-tuning keeps a frozen copy of the model that it starts from."""
        return False

    @model_validator(mode="after")
    def _pull_can_be_raised(self) -> TrainKeys:
        raising = [rule for rule, change in self.health.items() if change.get("action") == "raise_beta"]
        if raising and not self.pull:
            raise ValueError(
                f"health.{raising[0]}.action: raise_beta needs a pull to a reference, and this stage has none; set beta "
                "above 0 and a loss_type with a reference, or use lower_learning_rate"
            )
        return self

    @field_validator("eval_steps", "save_steps")
    @classmethod
    def _is_a_number_of_steps_or_a_share(cls, steps: int | float) -> int | float:
        if steps >= 1 and not float(steps).is_integer():
            raise ValueError(f"{steps} is neither a number of steps nor a share of them below 1")
        return int(steps) if steps >= 1 else steps

    @model_validator(mode="after")
    def _stops_by_what_it_measures(self) -> TrainKeys:
        if self.early_stopping_patience and not (self.load_best_model_at_end and self.eval_steps):
            raise ValueError(
                f"early_stopping_patience: {self.early_stopping_patience} needs load_best_model_at_end: true and eval_steps, so that there is a best "
                "validation to be no better than; set both, or set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _kept_ones_are_saved(self) -> TrainKeys:
        if self.save_keep_every and (self.save_steps < 1 or self.save_keep_every % self.save_steps):
            raise ValueError(f"save_keep_every={self.save_keep_every} is not a multiple of save_steps={self.save_steps}; set it to one, so that there is a checkpoint to keep")
        return self

    @model_validator(mode="after")
    def _offloaded_layers_are_frozen_and_recomputed(self) -> TrainKeys:
        if self.layer_offloading and self.adapter == "none":
            raise ValueError("layer_offloading: true with adapter: none: weights that are trained stay on the device; set adapter: lora or qlora, or layer_offloading: false")
        if self.layer_offloading and not self.gradient_checkpointing:
            raise ValueError("layer_offloading: true with gradient_checkpointing: false: a layer's weights are there in the backward pass only where it is recomputed; set gradient_checkpointing: true or offload")
        return self

    @model_validator(mode="after")
    def _embeddings_with_their_own_rate_are_trained(self) -> TrainKeys:
        # A continued adapter says only when it is loaded what of the embeddings it trains.
        begun = self.adapter != "none" and self.adapter_start == "fresh" and self.adapter_name_or_path is None
        if self.embedding_lr_scale != 1 and begun and only_layers(self.lora_target) and not (self.lora_modules_to_save or self.added_tokens):
            raise ValueError(f"embedding_lr_scale: {self.embedding_lr_scale:g} with adapter: {self.adapter} on layers alone: neither embedding nor head is trained; set it to 1, or train them (lora_modules_to_save)")
        return self

    @model_validator(mode="after")
    def _adapter_fits_4_bits(self) -> TrainKeys:
        if self.adapter == "qlora" and not self.load_in_4bit:
            raise ValueError("load_in_4bit: false contradicts adapter: qlora; set it to true, or use adapter: lora")
        if self.load_in_4bit and self.adapter == "none":
            raise ValueError("load_in_4bit: true with adapter: none would train nothing; set adapter: qlora")
        if self.load_in_8bit and self.adapter != "lora":
            why = "would train nothing" if self.adapter == "none" else "asks for 4 bits and 8"
            raise ValueError(f"load_in_8bit: true with adapter: {self.adapter} {why}; set adapter: lora, or load_in_8bit: false")
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit: true with load_in_4bit: true; set one of them to false")
        if self.load_in_8bit and self.layer_offloading:
            raise ValueError("load_in_8bit: true with layer_offloading: true, which copies 4-bit and plain layers only; set adapter: qlora, or one of them to false")
        return self


class ExampleKeys(TrainKeys):
    """What stages have that imitate the answers of their rows."""

    train_on: Literal["assistant", "last", "all"] = knob("assistant", "Which tokens of a conversation are trained: every assistant turn, the last one, or all.", also="roles_to_train (Axolotl), train_on_inputs (Axolotl), train_on_prompt (LLaMA-Factory), mask_history (LLaMA-Factory), assistant_only_loss (TRL)")
    packing: bool = knob(False, "Fill micro-batches by tokens (per_device_train_batch_size × sequence_len, best fit) instead of by rows.", also="sample_packing (Axolotl), neat_packing (LLaMA-Factory)")
    packing_window: int | None = knob(None, "Rows of the epoch's order among which packing looks for what fits (best fit); null takes the whole epoch.", ge=1, example=10_000)


class SFTKeys(ExampleKeys):
    """Supervised fine-tuning."""

    validated: ClassVar[tuple[str, ...]] = ("loss", "mean_token_accuracy", "aux_loss")

    loss_type: Literal["nll", "dft", "eaft"] = knob("nll", "Token cross-entropy; or weighted by the token's probability (dynamic fine-tuning, arXiv 2508.05629); or by the model's own doubt (entropy-adaptive fine-tuning, arXiv 2601.02151).", also="use_dft_loss (LLaMA-Factory)")
    eaft_alpha: float = knob(1.0, "eaft: exponent of the weight; 0 is nll.", ge=0)
    eaft_k: int = knob(20, "eaft: number of likeliest tokens whose entropy is the weight.", ge=2)
    packing_strategy: Literal["bfd", "wrapped"] = knob("bfd", "How packing fills: `bfd` keeps rows whole and apart (best fit, and none attends to another); `wrapped` joins the rows of a source end to end and cuts blocks of sequence_len, across which attention goes from row to row, as in pre-training.", example="wrapped")
    streaming: bool = knob(False, "Read rows as they are trained on, from files, URIs or the hub, without loading or counting all of them first; needs max_steps, and begins anew at the end.", also="dataset_streaming (TRL)")
    buffer_size: int = knob(1000, "Of a streamed source, so many rows at a time are read, shuffled and (with packing) fitted together; that many are held.", ge=1, also="streaming_multipack_buffer_size (Axolotl)")
    label_smoothing_factor: float = knob(0.0, "Share of each target that is spread evenly over the vocabulary (with nll).", ge=0, lt=1, example=0.1)
    neftune_noise_alpha: float = knob(0.0, "Noise on the embeddings while training (NEFTune, arXiv 2310.05914): uniform within ± alpha / sqrt(length · width) of a row.", ge=0, also="neftune_alpha (LLaMA-Factory)", example=5)

    @model_validator(mode="after")
    def _streams_what_it_need_not_have_seen(self) -> SFTKeys:
        if not self.streaming:
            return self
        if self.max_steps < 1:
            raise ValueError("streaming: true needs max_steps: how many rows there are is not known; set it")
        if self.holds_out:
            raise ValueError("streaming: true with val_size, for which all rows would be read first; name rows for the validation in eval_datasets")
        if self.deduplicate:
            raise ValueError("streaming: true with deduplicate: true, for which all rows would be remembered; deduplicate the files, or set it to false")
        if len({source.weight is None for source in self.datasets}) > 1:
            raise ValueError("streaming: true with a weight for some of datasets: how long those without are is not known; give all of them a weight, or none")
        return self

    @property
    def is_wrapped(self) -> bool:
        """Whether rows are joined and cut into blocks."""
        return self.packing and self.packing_strategy == "wrapped"

    @property
    def rows_looked_at(self) -> int | None:
        return self.buffer_size if self.streaming else None

    @model_validator(mode="after")
    def _whole_rows_are_softened(self) -> SFTKeys:
        for name in ("label_smoothing_factor", "neftune_noise_alpha"):
            if (value := getattr(self, name)) and self.sharding.group_size > 1:
                raise ValueError(f"{name}: {value:g} with {self.sharding.group_text}, where no process has a whole row; set one of them back")
        if self.loss_type == "eaft" and self.sharding.group_size > 1:
            raise ValueError(f"loss_type: eaft with {self.sharding.group_text}, where no process has a whole row; set one of them back")
        return self

    @model_validator(mode="after")
    def _smooths_cross_entropy(self) -> SFTKeys:
        if self.label_smoothing_factor and self.loss_type != "nll":
            raise ValueError(f"label_smoothing_factor: {self.label_smoothing_factor:g} with loss_type: {self.loss_type}, which has no smoothed form; set one of them back")
        return self


class AskedRewardKeys(ModelKeys):
    """A reward model that is asked and not trained."""

    is_reward_model: ClassVar[bool] = True


class RewardModelKeys(TrainKeys):
    """A reward model, by Bradley and Terry's likelihood of preferences."""

    is_reward_model: ClassVar[bool] = True
    validated: ClassVar[tuple[str, ...]] = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")

    learning_rate: float = knob(1e-5, "Peak learning rate.", gt=0, also="lr", example=1e-5)
    center_rewards_coefficient: float = knob(0.0, "Weight of the mean of (reward of chosen + reward of rejected)², which keeps rewards around 0 (arXiv 2312.09244 eq. 2).", ge=0, example=0.01)

    @property
    def row_kind(self) -> RowKind:
        return "pairs"

    @model_validator(mode="after")
    def _has_what_a_reward_model_can_do(self) -> RewardModelKeys:
        if self.eval_suite is not None:
            raise ValueError("eval_suite in reward_model: a reward model answers nothing; name pairs in eval_datasets or val_size")
        return self
