"""The keys of teachers: who says how likely the policy's own completions are. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from posttrain.config.knob import Keys, knob

OF_THE_POLICY = ("policy", "start")
"""Teachers that are the policy itself: with its present weights, and as it was given."""

# fmt: off
# One key a line: the tables below are read down, not across.


class TeacherKeys(Keys):
    """One teacher."""

    model: str = knob(..., "A local model folder or a hub id; `policy` is the policy itself with its present weights, `start` as it was given.", example="runs/teacher/model")
    revision: str | None = knob(None, "Revision of a hub model.", example="main")
    trust_remote_code: bool = knob(False, "Run code shipped with the model.")
    adapter: str | None = knob(None, "Folder of a LoRA adapter that is merged into the model as it is loaded.", example="runs/teacher/adapter")
    prompt: str | None = knob(None, "What the teacher reads in place of the prompt: `{prompt}` (of a conversation its last user turn) and other columns of the row by name.", example="{prompt}\n\nA correct solution: {answer}")
    weight: float = knob(1.0, "Its share where several teach a prompt: log-probs and divergences are averaged with it.", gt=0)
    when: dict[str, str] = knob({}, "Teach only prompts whose columns have these values.", example={"subject": "maths"})

    @property
    def is_the_policy(self) -> bool:
        return self.model in OF_THE_POLICY

    @model_validator(mode="after")
    def _policy_has_no_other_weights(self) -> TeacherKeys:
        given = [name for name in ("revision", "adapter") if getattr(self, name) is not None]
        if self.is_the_policy and given:
            raise ValueError(f"{given[0]} with model: {self.model}, which is the policy itself; name a model folder or hub id, or remove {given[0]}")
        return self


TeacherAdvantage = Literal["opd", "rlsd"]
DistillLoss = Literal["opd", "forward_kl", "reverse_kl", "jsd"]
