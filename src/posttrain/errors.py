"""The errors a user can cause. Each is also the stdlib error it specialises, so both can be caught.

A message says what was got, what was expected and how to fix it, and names file and line where there is one.
Our own mistakes are `assert`s.
"""

from __future__ import annotations

EXIT_USAGE, EXIT_CRASH, EXIT_AGAIN = 64, 70, 75
"""What a command ends with: for what the user must fix, for a defect of ours, and where it is to be given again (it was stopped and
has saved, or something still waits to be sent)."""


class PosttrainError(Exception):
    """Base of every error that is the user's to fix."""


class ConfigError(PosttrainError, ValueError):
    """A configuration that cannot be run as it stands."""


class DataError(PosttrainError, ValueError):
    """A dataset that is missing, empty, malformed or would train on nothing."""


class ModelError(PosttrainError, ValueError):
    """A model, tokenizer or adapter that does not fit what was asked."""


class RewardError(PosttrainError, RuntimeError):
    """A reward function broke its contract (count, type, too many unscored)."""


class TrainingError(PosttrainError, ArithmeticError):
    """Training produced something that must not be saved (a non-finite loss or gradient)."""


class OutOfMemoryError(PosttrainError, MemoryError):
    """A stage needed more memory than there is; the message says what of its plan was too small, and what would fit."""


class CheckpointError(PosttrainError, OSError):
    """A checkpoint could not be written, or none that is valid could be read."""


class RunLockedError(PosttrainError, RuntimeError):
    """Another process works in this folder, or reads it."""


class ChangedInputsError(PosttrainError, RuntimeError):
    """The inputs of a finished or started run changed, and nobody said what to do about it."""


class DamagedFileError(PosttrainError, ValueError):
    """A file of a run or registry that is not what was written there."""


class EvalError(PosttrainError, ValueError):
    """A suite that cannot be read or scored."""


class GateError(PosttrainError, ValueError):
    """A gate that cannot be decided as specified (for example too few items for its margin)."""


class RegistryError(PosttrainError, RuntimeError):
    """A registry operation that was refused, with the reason."""


class MissingExtraError(PosttrainError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


class EngineError(PosttrainError, RuntimeError):
    """A rollout engine failed or did not take the weights it was sent."""


class EngineGoneError(EngineError):
    """A rollout engine that ended, hangs, or cannot be reached; the work that it was given may be given to another."""
