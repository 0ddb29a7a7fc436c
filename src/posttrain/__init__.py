"""posttrain: from an open-weight base model to an evaluated, gated, registered, servable one."""

__version__ = "0.1.0"
