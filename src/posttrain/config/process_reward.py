"""The keys of a process reward model: one that says of each step of an answer whether it is right. No torch here."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from posttrain.config.datasets import RowKind
from posttrain.config.knob import knob
from posttrain.config.stages import AskedRewardKeys, TrainKeys

# fmt: off
# One key a line: the table below is read down, not across.


class AskedProcessRewardKeys(AskedRewardKeys):
    """A process reward model that is asked and not trained."""

    rates_steps: ClassVar[bool] = True


class ProcessRewardModelKeys(TrainKeys):
    """A process reward model, by the cross-entropy of two labels at the end of each step."""

    is_reward_model: ClassVar[bool] = True
    rates_steps: ClassVar[bool] = True

    learning_rate: float = knob(1e-5, "Peak learning rate.", gt=0, also="lr", example=1e-5)
    step_separator: str = knob("\n", "What stands behind each step, and is rated at its last token; it is kept with the model, and cuts the answers that the model scores.", min_length=1, example="\n\n")
    max_completion_length: int | None = knob(None, "Tokens after which the steps of a row are cut off; null keeps all up to sequence_len.", ge=1, example=1024)
    train_on_last_step_only: bool = knob(False, "Train on the last step's label alone; a validation is over all steps.")

    @property
    def row_kind(self) -> RowKind:
        return "steps"

    @model_validator(mode="after")
    def _has_what_a_process_reward_model_can_do(self) -> ProcessRewardModelKeys:
        if self.eval_suite is not None:
            raise ValueError("eval_suite in process_reward_model: it answers nothing; name rows in eval_datasets or val_size")
        return self
