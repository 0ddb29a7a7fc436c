"""The keys that say where a model's weights and its tokenizer come from."""

from __future__ import annotations

from posttrain.config.knob import Keys, knob

# fmt: off

OF_THE_GIVEN = ("tokenizer_name_or_path", "init_seed", "adapter_name_or_path")
"""Keys about the model that a pipeline is given: what a stage makes of it holds its tokenizer and its weights."""


class StartKeys(Keys):
    """Weights and tokenizer as they are before a stage."""

    base_model: str = knob(..., "A local folder or a hub id of any transformers causal LM.", also="model_name_or_path (TRL, LLaMA-Factory)", example="Qwen/Qwen3-8B")
    revision: str | None = knob(None, "Revision (branch, tag or commit) of a hub model.", also="model_revision (Axolotl, LLaMA-Factory, TRL)", example="main")
    tokenizer_name_or_path: str | None = knob(None, "A folder or a hub id whose tokenizer is used and exported in place of the model's own; its ids must have rows in the model's embedding.", also="tokenizer_config (Axolotl), tokenizer_name (transformers)", example="EleutherAI/gpt-neox-20b")
    init_seed: int | None = knob(None, "Draw the weights from the config of base_model, by its family's own initialisation and this seed, instead of reading them: pre-training from scratch. All weights are trained.", ge=0, also="reinit_weights (Axolotl), train_from_scratch (LLaMA-Factory)", example=42)
    adapter_name_or_path: str | None = knob(None, "A folder with an adapter of PEFT for base_model, which `adapter: lora` or `qlora` trains on, in the form that it has; its starting values are the reference.", also="lora_model_dir (Axolotl)", example="./before/adapter")
    trust_remote_code: bool = knob(False, "Run code shipped with the model.")

    @property
    def tokenizer_source(self) -> tuple[str, str, str | None]:
        """The key that names the tokenizer, where it is, and at which revision."""
        if self.tokenizer_name_or_path is not None:
            return "tokenizer_name_or_path", self.tokenizer_name_or_path, None
        return "base_model", self.base_model, self.revision
