"""The state machine over stages, evals, gates and registry."""

from typing import Literal

OnChange = Literal["refuse", "rerun", "keep", "new-run"]
"""What a start does where inputs changed since the last one."""
