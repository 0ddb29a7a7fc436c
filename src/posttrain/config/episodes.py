"""The keys of episodes: what a policy speaks with, in training and in evals."""

from __future__ import annotations

from pydantic import model_validator

from posttrain.config.knob import Keys, knob

# fmt: off
# One key a line, as in `stages`.


class EpisodeKeys(Keys):
    """Tools that a completion may call, and an environment that answers it."""

    env: str | None = knob(None, "An environment, `file.py:Class` relative to the YAML, `openenv:URL`, a server of OpenEnv, or `verifiers:PYTHON ID --env.KEY VALUE`, an environment of verifiers installed in that Python: it answers each turn of the policy, until it ends the episode.", also="environment_factory (TRL)", example="my_env.py:Env")
    tools: list[str] = knob([], "Tools that the policy may call: `file.py:function,function` relative to the YAML, or `mcp:COMMAND`, a server of the Model Context Protocol by stdio.", example=["my_tools.py:search,calc"])
    max_turns: int = knob(8, "Turns of the policy in an episode; one that would go on is truncated.", ge=1, also="max_tool_calling_iterations (TRL), max_assistant_turns (verl)")
    env_timeout_s: float = knob(30.0, "Deadline of one call of a tool or the environment; a later one loses its episode.", gt=0)
    env_workers: int = knob(4, "Processes that answer calls of `tools`; an `env` has one for each episode.", ge=1)

    @property
    def played_with(self) -> list[str]:
        """What `env` and `tools` name."""
        return ([self.env] if self.env else []) + self.tools

    @property
    def plays(self) -> bool:
        """Whether completions are episodes."""
        return bool(self.env or self.tools)

    @model_validator(mode="after")
    def _plays_with_something(self) -> EpisodeKeys:
        for name in ("max_turns", "env_timeout_s", "env_workers"):
            if not self.plays and getattr(self, name) != EpisodeKeys.model_fields[name].default:
                raise ValueError(f"{name} does nothing without env or tools; name one of them, or remove it")
        return self
