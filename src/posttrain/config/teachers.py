"""The keys of teachers: who says how likely the policy's own completions are. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from posttrain.config.knob import Keys, knob
from posttrain.uris import loopback

OF_THE_POLICY = ("policy", "start")
"""Teachers that are the policy itself: with its present weights, and as it was given."""

# fmt: off
# One key a line: the tables below are read down, not across.


class TeacherKeys(Keys):
    """One teacher."""

    model: str = knob(..., "A local model folder or a hub id; `policy` is the policy itself with its present weights, `start` as it was given.", example="runs/teacher/model")
    url: str | None = knob(None, "A server on this machine with OpenAI's completions that echoes token ids with log-probs (`posttrain serve`, vLLM); model is then its name there, best with its digest.", example="http://127.0.0.1:8000")
    token_env: str = knob("POSTTRAIN_TEACHER_KEY", "Environment variable that holds the API key of the server at `url`.")
    timeout_s: float = knob(600.0, "Seconds that the server at `url` may take for one answer.", gt=0)
    revision: str | None = knob(None, "Revision of a hub model.", example="main")
    trust_remote_code: bool = knob(False, "Run code shipped with the model.")
    adapter: str | None = knob(None, "Folder of a LoRA adapter that is put on the model.", example="runs/teacher/adapter")
    prompt: str | None = knob(None, "What the teacher reads in place of the prompt: `{prompt}` (of a conversation its last user turn) and other columns of the row by name.", example="{prompt}\n\nA correct solution: {answer}")
    weight: float = knob(1.0, "Its share where several teach a prompt: log-probs and divergences are averaged with it.", gt=0)
    when: dict[str, str] = knob({}, "Teach only prompts whose columns have these values.", example={"subject": "maths"})

    @property
    def is_the_policy(self) -> bool:
        return self.model in OF_THE_POLICY

    @property
    def is_loaded(self) -> bool:
        """Whether it is weights of its own in this process."""
        return not self.is_the_policy and self.url is None

    @model_validator(mode="after")
    def _policy_has_no_other_weights(self) -> TeacherKeys:
        given = [name for name in ("revision", "adapter") if getattr(self, name) is not None]
        if self.is_the_policy and given:
            raise ValueError(f"{given[0]} with model: {self.model}, which is the policy itself; name a model folder or hub id, or remove {given[0]}")
        return self

    @model_validator(mode="after")
    def _server_has_its_own_weights(self) -> TeacherKeys:
        if self.url is None:
            unread = [name for name in ("token_env", "timeout_s") if getattr(self, name) != type(self).model_fields[name].default]
            if unread:
                raise ValueError(f"{unread[0]} is of a server, and url is not set; remove {unread[0]}, or set url")
            return self
        loopback(self.url)
        if given := [name for name in ("revision", "adapter", "trust_remote_code") if getattr(self, name)]:
            raise ValueError(f"{given[0]} with url: the server loads its own model; remove {given[0]}")
        if self.is_the_policy:
            raise ValueError(f"model: {self.model} with url: that is the policy itself; give the name that the server has for its model")
        return self


TeacherAdvantage = Literal["opd", "rlsd"]
DistillLoss = Literal["opd", "forward_kl", "reverse_kl", "jsd"]
